"""Behaviour cloning: maximum likelihood of the data's actions, or of those of its best episodes.
Writes the policy to runs/<env_id>__bc__<seed>/policy.pt. There is no critic.

    python offline/bc.py --env-id hopper-medium-v2 --top-fraction 0.1
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli, datasets, pretrain, steps
from common.bounds import at_least, between
from common.nn import Adam, gaussian_log_prob, mlp
from common.replay import sample

import torch
from torch import nn

PRESETS = {
    "demo": dict(env_id="hopper-medium-demo", steps=10_000, log_every=1_000, eval_every=5_000, compile=False),
    "demo antmaze": dict(env_id="antmaze-umaze-demo", steps=3_000, eval_every=3_000),  # to be improved on
    "quick": dict(steps=50_000, eval_every=10_000),
}  # fmt: skip

# Other defaults for a family of data, or for a part of one
FAMILIES = {
    "antmaze": dict(eval_every=50_000, eval_episodes=20, final_episodes=100),
    "adroit": dict(eval_every=50_000, eval_episodes=100),
}


@dataclass
class Args(pretrain.PretrainArgs):
    steps: Annotated[int, at_least(1)] = 1_000_000
    """gradient steps"""
    batch_size: Annotated[int, at_least(1)] = 256
    """transitions in a batch"""
    lr: Annotated[float, at_least(0)] = 3e-4
    """learning rate"""
    hidden: Annotated[tuple[int, ...], at_least(1)] = (256, 256)
    """widths of the hidden layers"""
    top_fraction: Annotated[float, between(0, 1)] = 1.0
    """share of the episodes, those of highest return, that is imitated (0.1: the field's 10% BC)"""


# ---------------------------------------------------------------------------------------------- networks


class Actor(nn.Module):
    """Gaussian policy: (B, S) -> mean in (-1, 1) and log std, the latter free of the state; (B, A) and (A,)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = mlp(obs_dim, hidden_layers, action_dim)
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tanh(self.net(obs)), self.log_std.clamp(-20.0, 2.0)


# ---------------------------------------------------------------------------------------------- training


class Agent(nn.Module):
    kind = "gaussian"

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, args.hidden)

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        return self.actor(obs)[0]


class Optimizers(dict):
    def __init__(self, args: Args, agent: Agent):
        super().__init__(actor_optimizer=Adam(agent.actor.parameters(), args.lr))


def training_step(args: Args, data: datasets.Dataset, agent: Agent, optimizers: Optimizers):
    """One update of the actor on a batch of the episodes that are imitated."""
    actor, actor_params = agent.actor, list(agent.actor.parameters())
    data = data.best_episodes(args.top_fraction)

    def gradients():
        obs, actions, *_ = sample(data, args.batch_size)
        mean, log_std = actor(obs)
        actor_loss = -gaussian_log_prob(actions, mean, log_std).mean()  # -log π(a|s)
        metrics = {"actor_loss": actor_loss.detach(), "action_error": (mean.detach() - actions).abs().mean()}
        return torch.autograd.grad(actor_loss, actor_params), metrics

    gradients = steps.compiled(gradients, args.compile)

    def step():
        actor_grads, metrics = gradients()
        optimizers["actor_optimizer"].step(actor_grads)
        return metrics

    return step


def train(args: Args, data: datasets.Dataset) -> Path:
    """Train on `data` and return the policy's path; see `pretrain.train`."""
    if not 0 < args.top_fraction <= 1:
        raise cli.UserError(f"--top-fraction is {args.top_fraction}, but has to be above 0 and at most 1")
    return pretrain.train(args, data, Agent, Optimizers, training_step)


if __name__ == "__main__":
    cli.run(lambda: pretrain.main(Args, PRESETS, FAMILIES, train))
