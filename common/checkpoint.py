"""Files that are never half written, and what has to be saved for a run to continue as if it had not been stopped."""

import io
import json
import os
import random
from pathlib import Path

import numpy as np
import torch

from common.cli import UserError


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` aside, then rename. Raises UserError where the disk does not take it."""
    aside = path.with_name(path.name + ".part")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path} ({error.strerror}); free some space or choose another --run-dir, then start the same "
            "command again: it continues from the last checkpoint"
        ) from error


def save_tensors(path: Path, state: dict) -> None:
    """`torch.save`, atomically. `state` holds tensors, numbers, strings, lists and dictionaries alone."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getbuffer())


class Inert:
    """Stands for any class or function that a checkpoint names and that is not on PyTorch's list of safe ones."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def load_tensors(path: Path, device) -> object:
    """`torch.load` that executes nothing: what is no tensor, number, string or container becomes an `Inert`."""
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(Inert, name) for name in unknown]):
        return torch.load(path, map_location=device, weights_only=True)


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


class Best:
    """The best policy so far: its score and a copy of its weights."""

    def __init__(self, score: float, policy: torch.nn.Module):
        self.score, self.weights = score, {}
        self.update(score, policy, force=True)

    def update(self, score: float, policy: torch.nn.Module, force: bool = False) -> bool:
        """Take `policy` over where it scores better; whether it did."""
        better = force or score > self.score
        if better:
            self.score = score
            self.weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        return better

    def state_dict(self) -> dict:
        return {"score": self.score, "weights": self.weights}

    def load_state_dict(self, state: dict) -> None:
        self.score, self.weights = state["score"], state["weights"]
