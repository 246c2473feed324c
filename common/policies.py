"""Policies on disk and in memory: plain tensors, and all that anyone needs to use them.

Three kinds, each with one layout of weights that every script's actor of that kind shares:

squashed_gaussian - `net` gives mean and log std of u (2 A outputs, the log std before -1 and a clamp); a = tanh(u)
gaussian          - `net` gives the mean before its tanh (A outputs), `log_std` (A,) is free of the state
deterministic     - `net` gives the action before its tanh (A outputs)
"""

from pathlib import Path

import torch
from torch import nn

from common.checkpoint import save_tensors
from common.cli import UserError
from common.nn import mlp
from common.run import script_name

FORMAT = "o2rl-policy-1"
KINDS = ("squashed_gaussian", "gaussian", "deterministic")
FIELDS = {"kind": str, "obs_dim": int, "action_dim": int, "hidden_layers": int, "state_mean": torch.Tensor,
          "state_std": torch.Tensor, "algorithm": str, "env_id": str, "simulator": str, "seed": int, "steps": int,
          "score": float, "actor": dict}  # fmt: skip


class Policy(nn.Module):
    """The network of any kind. `mode(obs)`: most likely actions (B, A); `spread(obs)`: see there."""

    def __init__(self, kind: str, obs_dim: int, action_dim: int, hidden_layers: int):
        super().__init__()
        self.kind = kind
        self.net = mlp(obs_dim, hidden_layers, action_dim * (2 if kind == "squashed_gaussian" else 1))
        if kind == "gaussian":
            self.log_std = nn.Parameter(torch.zeros(action_dim))

    def mode(self, obs: torch.Tensor) -> torch.Tensor:
        out = self.net(obs)
        return torch.tanh(out.chunk(2, dim=-1)[0] if self.kind == "squashed_gaussian" else out)

    def spread(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Mean and log std, of u = atanh(a) for a squashed Gaussian, of a for a Gaussian; None if deterministic."""
        if self.kind == "squashed_gaussian":
            mean, log_std = self.net(obs).chunk(2, dim=-1)
            return mean, (log_std - 1.0).clamp(-20.0, 2.0)
        if self.kind == "gaussian":
            return torch.tanh(self.net(obs)), self.log_std.clamp(-20.0, 2.0)
        return None

    def sample(self, obs: torch.Tensor) -> torch.Tensor | None:
        """Actions as they are executed, (B, A) in [-1, 1]; None if deterministic."""
        if self.kind == "deterministic":
            return None
        mean, log_std = self.spread(obs)
        x = mean + log_std.exp() * torch.randn_like(mean)
        return torch.tanh(x) if self.kind == "squashed_gaussian" else x.clamp(-1, 1)


def module(policy: dict) -> Policy:
    """The network of a policy checkpoint, on the device of its weights."""
    net = Policy(policy["kind"], policy["obs_dim"], policy["action_dim"], policy["hidden_layers"])
    net.load_state_dict(policy["actor"])
    return net.to(policy["state_mean"].device).requires_grad_(False)


def save_policy(path: Path, **fields) -> None:
    """Write a policy checkpoint with the fields of `FIELDS`, and `critic` (a dictionary) where there is one."""
    missing = FIELDS.keys() - fields.keys()
    if missing:
        raise ValueError(f"a policy checkpoint needs {sorted(missing)}")
    save_tensors(Path(path), {"format": FORMAT, **fields})


def save_online(run, data, policy: dict, actor: nn.Module, best) -> None:
    """policy.pt and best.pt of a fine-tuning run that started from `policy`, and where they come from in it."""
    same = {k: policy[k] for k in ("kind", "obs_dim", "action_dim", "hidden_layers", "state_mean", "state_std",
                                   "simulator")}  # fmt: skip
    last, last_score = run.logged.evaluations("finetune")[-1]
    kept = {"policy": (last_score, f"online, step {last:,}", actor.state_dict()),
            "best": (best.score, best.origin, best.weights)}  # fmt: skip
    for name, (score, origin, weights) in kept.items():
        save_policy(
            run.dir / f"{name}.pt", **same, algorithm=script_name(run.args), env_id=data.task.data, seed=run.args.seed,
            steps=last, origin=origin, score=score, actor=weights,
        )  # fmt: skip


def check_policy(policy: dict, path: Path, simulator: str, obs_dim: int, action_dim: int) -> None:
    """Refuse a checkpoint of this project that is incomplete or of another environment. Raises UserError."""
    wrong = [name for name, kind in FIELDS.items() if not isinstance(policy.get(name), kind)]
    if wrong or policy["kind"] not in KINDS:
        raise UserError(f"{path} has missing or foreign entries ({', '.join(wrong) or policy['kind']}); make it again")
    if (policy["simulator"], policy["obs_dim"], policy["action_dim"]) != (simulator, obs_dim, action_dim):
        raise UserError(
            f"{path} is a policy for {policy['simulator']} ({policy['env_id']}, {policy['obs_dim']} observations, "
            f"{policy['action_dim']} actions), but this run is in {simulator} ({obs_dim}, {action_dim}); choose the "
            "--env-id that it was trained on"
        )
