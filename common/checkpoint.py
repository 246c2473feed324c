"""Files that are never half written, and what has to be saved for a run to continue as if it had not been stopped."""

import contextlib
import hashlib
import io
import json
import math
import os
import random
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from common.cli import UserError


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A name beside `path`, of this process alone: what is written there takes the place of `path` at the end.

    Where the end is not reached it is removed; a process that is killed leaves it, with the ending `.part`.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


RESUME = (
    "move the run's folder to another disk and name that with --run-dir; the same command continues from the last "
    "checkpoint"
)


@contextlib.contextmanager
def writing(what: str | Path, remedy: str = RESUME):
    """Raises UserError where the disk does not take what is written meanwhile."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {what} ({error.strerror}); free some space or {remedy}") from error


def write_atomic(path: Path, data: bytes, remedy: str = RESUME) -> None:
    """Write `data` aside, then rename. Raises UserError where the disk does not take it."""
    with writing(path, remedy), aside(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sha256(path: Path, length: int | None = None) -> str:
    """The hash of a file, or of its first `length` bytes."""
    digest = hashlib.sha256()
    left = path.stat().st_size if length is None else length
    with open(path, "rb") as file:
        while block := file.read(min(left, 1 << 20)):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


SEAL = b"sha256:"  # and 64 digits, at the end of every file of ours: as the comment that a zip archive may have


def save_tensors(path: Path, state: dict) -> None:
    """`torch.save`, atomically, with a checksum. `state` holds tensors, numbers, strings, lists and dictionaries."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(-2, os.SEEK_END)  # a zip archive ends with the length of its comment
    buffer.write((len(SEAL) + 64).to_bytes(2, "little"))
    with buffer.getbuffer() as data:
        digest = hashlib.sha256(data).hexdigest()
    buffer.write(SEAL + digest.encode())
    write_atomic(path, buffer.getbuffer())


def verify(path: Path) -> None:
    """Refuse a file that is no longer what `save_tensors` wrote. Raises UserError. One from elsewhere passes."""
    length = path.stat().st_size - len(SEAL) - 64
    if length <= 0:
        return
    with open(path, "rb") as file:
        file.seek(length)
        seal = file.read()
    if seal.startswith(SEAL) and seal != SEAL + sha256(path, length).encode():
        raise UserError(f"{path} is damaged: it no longer has the checksum that it was written with; delete it")


def rng_state() -> dict:
    """The states of every random generator that training draws from."""
    state = {"torch": torch.get_rng_state(), "python": json.dumps(random.getstate())}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = json.loads(state["python"])
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class BestPolicy:
    """The best policy so far: its score, where it comes from in words, and a copy of its weights.

    With a `margin` a policy is better where its returns are higher by so many standard errors, compared start by start:
    all were played from the same ones, some from more of them. Without, any higher score is.
    """

    def __init__(self, score: float, policy: torch.nn.Module, origin: str, returns=(), margin: float = 0.0):
        self.score, self.margin = -math.inf, margin
        self.update(score, policy, origin, returns)

    def update(self, score: float, policy: torch.nn.Module, origin: str, returns=()) -> bool:
        """Take `policy` over where it is better; whether it was."""
        better = score > self.score
        if self.margin and self.score > -math.inf:
            n = min(len(returns), len(self.returns))
            gain = np.subtract(returns[:n], self.returns[:n])
            better = bool(gain.mean() > self.margin * gain.std(ddof=1) / n**0.5)
        if better:
            self.score, self.origin, self.returns = score, origin, [float(value) for value in returns]
            self.weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        return better

    def state_dict(self) -> dict:
        return {"score": self.score, "origin": self.origin, "weights": self.weights, "returns": self.returns}

    def load_state_dict(self, state: dict) -> None:
        self.score, self.origin, self.weights = state["score"], state["origin"], state["weights"]
        self.returns = state["returns"]
