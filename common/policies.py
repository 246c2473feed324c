"""Offline policies on disk: plain tensors, and all that anyone needs to use them."""

import pickle
from pathlib import Path

import torch

from common.checkpoint import save_tensors
from common.cli import UserError

FORMAT = "o2rl-policy-1"
KINDS = ("squashed_gaussian", "gaussian", "deterministic")
FIELDS = {"kind": str, "obs_dim": int, "action_dim": int, "hidden_layers": int, "state_mean": torch.Tensor,
          "state_std": torch.Tensor, "algorithm": str, "env_id": str, "simulator": str, "seed": int, "steps": int,
          "score": float, "actor": dict}  # fmt: skip


def save_policy(path: Path, **fields) -> None:
    """Write a policy checkpoint with the fields of `FIELDS`, and `critic` (a dictionary) where there is one."""
    missing = FIELDS.keys() - fields.keys()
    if missing:
        raise ValueError(f"a policy checkpoint needs {sorted(missing)}")
    save_tensors(Path(path), {"format": FORMAT, **fields})


def load_policy(path: str | Path, simulator: str, obs_dim: int, action_dim: int, device="cpu") -> dict:
    """Read a policy checkpoint and check that it fits the environment. Raises UserError; executes nothing it holds."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; make one with offline/cql.py, or use --offline cql")
    try:
        policy = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path} is not a checkpoint that can be read safely ({first}); give --offline cql or a "
                        "policy.pt that a script in offline/ wrote") from error  # fmt: skip
    if not isinstance(policy, dict) or policy.get("format") != FORMAT:
        raise UserError(f"{path} holds no policy of this project; give --offline a policy.pt of a script in offline/")
    wrong = [name for name, kind in FIELDS.items() if not isinstance(policy.get(name), kind)]
    if wrong or policy["kind"] not in KINDS:
        raise UserError(f"{path} has missing or foreign entries ({', '.join(wrong) or policy['kind']}); make it again")
    if (policy["simulator"], policy["obs_dim"], policy["action_dim"]) != (simulator, obs_dim, action_dim):
        raise UserError(
            f"{path} is a policy for {policy['simulator']} ({policy['env_id']}, {policy['obs_dim']} observations, "
            f"{policy['action_dim']} actions), but this run is in {simulator} ({obs_dim}, {action_dim}); choose the "
            "--env-id that it was trained on"
        )
    return policy
