"""Policies from elsewhere, read without running anything that their files contain:

CORL             - a dictionary with an `actor` entry, as algorithms/offline/*.py save it
Stable-Baselines3 - the .zip of a model with an MLP policy
ONNX             - a policy as d3rlpy exports it (needs onnx and onnxruntime)
TorchScript      - likewise; it is a program, so it is only loaded with --trust-checkpoint
"""

import zipfile
from pathlib import Path

from common import policies
from common.cli import UserError
from common.foreign.build import View, raw_view
from common.foreign.corl import best_view, corl
from common.foreign.programs import onnx, torchscript
from common.foreign.sb3 import stable_baselines, vecnormalize
from common.inert import absent, read_tensors

HELP = (
    "give --offline the name of a file in offline/, a policy.pt of this project, a checkpoint of CORL, a policy in "
    "ONNX or TorchScript, or a .zip of Stable-Baselines3"
)
D3RLPY = "is a whole model of d3rlpy, whose policy alone is read: export it with save_policy('policy.onnx')"
TRANSFORMER = "is a Decision Transformer, which acts on a history and cannot be played here"
OTHERS = {"model_state": TRANSFORMER, "q_funcs": D3RLPY}  # what else a checkpoint may hold, by its keys


def names_in(path: Path) -> list[str]:
    """The names in a zip archive; none in what is no such archive, or a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception:  # whatever a damaged directory makes of it, `read_tensors` refuses the file in a sentence
        return []


def load_policy(path: str | Path, data, trust: bool = False, normalize_from: str = "") -> dict:
    """Read a policy of any of these formats and check that it fits `data`, which is not standardised yet.

    Returns the fields of `common.policies.FIELDS`; one that is no network of ours has the kind "function" and a
    `Function` as its actor. All take observations standardised by `state_mean` and `state_std`. `normalize_from`: how
    its own network saw them, where its format does not say so. Raises UserError.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(absent(path) if path.is_dir() else f"there is no checkpoint {path}; {HELP}")
    if path.suffix == ".d3":
        raise UserError(f"{path} {D3RLPY}")
    view = view_named(normalize_from, data)
    if path.suffix == ".onnx":
        return onnx(path, data, view or raw_view(data), trust)
    names = names_in(path)
    if "policy.pth" in names:
        return stable_baselines(path, data, view)
    if any("/code/" in name for name in names):
        if not trust:
            raise UserError(
                f"{path} is a TorchScript program; pass --trust-checkpoint to run it if you know its origin"
            )
        return torchscript(path, data, view or raw_view(data))
    checkpoint = read_tensors(path, "cpu")
    if policies.is_ours(checkpoint):
        if view:
            raise UserError(f"{path} knows how it sees observations; leave --normalize-from out")
        return our_policy(path, data)
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("actor"), dict):
        return corl(path, data, checkpoint, view)
    other = [what for key, what in OTHERS.items() if isinstance(checkpoint, dict) and key in checkpoint]
    raise UserError(f"{path} {other[0] if other else f'holds no policy that is known here; {HELP}'}")


def our_policy(path: Path, data) -> dict:
    """The policy of a policy.pt, for the environment of `data`. Raises UserError."""
    policy = policies.read(path, data.obs.device)
    policies.check_environment(policy, path, data)
    return policy | policies.range_of(data)  # which an older file does not say


def view_named(name: str, data) -> View | None:
    """What `--normalize-from` says: a file, `none`, or a share of the data; None where it is left out. UserError."""
    if not name:
        return None
    if name == "none":
        return raw_view(data)
    try:
        share = float(name)
    except ValueError:
        if not Path(name).is_file():
            raise UserError(
                f"--normalize-from {name} is no file: give the vecnormalize.pkl of Stable-Baselines3, none (raw "
                "observations), 1 (mean and std of this dataset) or a share such as 0.1 (of its best trajectories)"
            ) from None
        return vecnormalize(Path(name), data)
    if not 0 < share <= 1:
        raise UserError(f"--normalize-from {name} is no share of the dataset between 0 and 1")
    return best_view(data, share)
