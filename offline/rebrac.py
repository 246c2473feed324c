"""ReBRAC (Tarasov et al., NeurIPS 2023): TD3+BC with the penalty in the critic's target too, each with a weight of its
own, deeper networks and layer normalisation, on observations as they are. Writes to
runs/<env_id>__rebrac__<seed>/policy.pt.

    python offline/rebrac.py --env-id hopper-medium-v2
"""

import copy
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli, datasets, pretrain, steps
from common.bounds import at_least, between
from common.nn import Adam, ensemble_mlp, mlp, polyak
from common.replay import sample
from common.tasks import Task

import torch
from torch import nn

PRESETS = {
    "demo": dict(env_id="hopper-medium-demo", steps=5_000, batch_size=256, log_every=1_000, eval_every=2_500,
                 compile=False),
    "quick": dict(steps=30_000, batch_size=256, eval_every=10_000),
}  # fmt: skip

# Other defaults for a family of data, or for a part of one
FAMILIES = {
    "antmaze": dict(
        reward_scale=100.0,
        gamma=0.999,
        batch_size=256,
        actor_lr=3e-4,
        critic_lr=5e-5,
        eval_every=50_000,
        eval_episodes=20,
        final_episodes=100,
    ),
    "antmaze-umaze": dict(actor_bc_coef=0.003, critic_bc_coef=0.002),
    "antmaze-umaze-diverse": dict(actor_bc_coef=0.003, critic_bc_coef=0.001),
    "antmaze-medium-play": dict(actor_bc_coef=0.001, critic_bc_coef=0.0005),
    "antmaze-medium-diverse": dict(actor_bc_coef=0.001, critic_bc_coef=0.0),
    "antmaze-large-play": dict(actor_bc_coef=0.002, critic_bc_coef=0.001),
    "antmaze-large-diverse": dict(actor_bc_coef=0.002, critic_bc_coef=0.002),
    "adroit": dict(batch_size=256, actor_lr=3e-4, critic_lr=3e-4, eval_every=50_000, eval_episodes=100),
    "adroit-pen-human": dict(actor_bc_coef=0.1, critic_bc_coef=0.5),
    "adroit-pen-cloned": dict(actor_bc_coef=0.05, critic_bc_coef=0.5),
    "adroit-pen-expert": dict(actor_bc_coef=0.01, critic_bc_coef=0.01),
    "adroit-door-human": dict(actor_bc_coef=0.1, critic_bc_coef=0.1),
    "adroit-door-cloned": dict(actor_bc_coef=0.01, critic_bc_coef=0.1),
    "adroit-door-expert": dict(actor_bc_coef=0.05, critic_bc_coef=0.01),
    "adroit-hammer-human": dict(actor_bc_coef=0.01, critic_bc_coef=0.5),
    "adroit-hammer-cloned": dict(actor_bc_coef=0.1, critic_bc_coef=0.5),
    "adroit-hammer-expert": dict(actor_bc_coef=0.01, critic_bc_coef=0.01),
    "adroit-relocate-human": dict(actor_bc_coef=0.1, critic_bc_coef=0.01),
    "adroit-relocate-cloned": dict(actor_bc_coef=0.1, critic_bc_coef=0.01),
    "adroit-relocate-expert": dict(actor_bc_coef=0.05, critic_bc_coef=0.01),
}

# The paper's weights of imitation in actor and critic, tuned for each of these datasets; for no other is there any
PUBLISHED = {
    "random": {"halfcheetah": (0.001, 0.1), "hopper": (0.001, 0.01), "walker2d": (0.01, 0.0)},
    "medium": {"halfcheetah": (0.001, 0.01), "hopper": (0.01, 0.01), "walker2d": (0.05, 0.1)},
    "medium-replay": {"halfcheetah": (0.01, 0.001), "hopper": (0.05, 0.5), "walker2d": (0.05, 0.01)},
    "full-replay": {"halfcheetah": (0.001, 0.1), "hopper": (0.01, 0.01), "walker2d": (0.01, 0.01)},
    "medium-expert": {"halfcheetah": (0.01, 0.1), "hopper": (0.1, 0.01), "walker2d": (0.01, 0.01)},
    "expert": {"halfcheetah": (0.01, 0.01), "hopper": (0.1, 0.1), "walker2d": (0.01, 0.5)},
}


def published(task: Task) -> tuple[float, float] | None:
    return PUBLISHED.get(task.quality, {}).get(task.robot)


@dataclass
class Args(pretrain.PretrainArgs):
    standardise: bool = False
    """standardise observations with the dataset's mean and std, here and in all that starts from this policy"""

    steps: Annotated[int, at_least(1)] = 1_000_000
    """gradient steps"""
    batch_size: Annotated[int, at_least(1)] = 1024
    """transitions in a batch"""
    gamma: Annotated[float, between(0, 1)] = 0.99
    """discount factor"""
    tau: Annotated[float, between(0, 1)] = 0.005
    """Polyak factor of the targets"""
    actor_lr: Annotated[float, at_least(0)] = 1e-3
    """learning rate of the actor"""
    critic_lr: Annotated[float, at_least(0)] = 1e-3
    """learning rate of the critics"""
    hidden: Annotated[tuple[int, ...], at_least(1)] = (256, 256, 256)
    """widths of the hidden layers in every network"""
    actor_bc_coef: Annotated[float | None, at_least(0)] = None
    """weight of imitation in the actor's loss (the paper's β1); None: the paper's for this dataset, else 0.01"""
    critic_bc_coef: Annotated[float | None, at_least(0)] = None
    """weight of imitation in the critic's target (β2); None: the paper's for this dataset, else 0.01"""
    policy_noise: Annotated[float, at_least(0)] = 0.2
    """standard deviation of the noise on target actions"""
    noise_clip: Annotated[float, at_least(0)] = 0.5
    """that noise is clipped at this"""
    policy_freq: Annotated[int, at_least(1)] = 2
    """critic updates per update of the actor and of the targets"""

    def constants(self, task: Task) -> dict:
        """The paper's for the dataset."""
        actor, critic = published(task) or (0.01, 0.01)
        return super().constants(task) | dict(actor_bc_coef=actor, critic_bc_coef=critic)


# ---------------------------------------------------------------------------------------------- networks


class Actor(nn.Module):
    """Deterministic policy: (B, S) -> (B, A) in (-1, 1)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = mlp(obs_dim, hidden_layers, action_dim)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.net(obs))


class Critic(nn.Module):
    """Twin Q networks side by side: (B, S), (B, A) -> (2, B), layer-normalised."""

    layer_norm = "after"

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = ensemble_mlp(2, obs_dim + action_dim, hidden_layers, 1, self.layer_norm)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([obs, actions], dim=-1)
        return self.net(x.expand(2, *x.shape)).squeeze(-1)


# ---------------------------------------------------------------------------------------------- training


class Agent(nn.Module):
    kind = "deterministic"

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, args.hidden)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic = Critic(obs_dim, action_dim, args.hidden)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        return self.actor(obs)


class Optimizers(dict):
    """One Adam for each thing that is learned."""

    def __init__(self, args: Args, agent: Agent):
        super().__init__(
            actor_optimizer=Adam(agent.actor.parameters(), args.actor_lr),
            critic_optimizer=Adam(agent.critic.parameters(), args.critic_lr),
        )


def training_step(args: Args, data: datasets.Dataset, agent: Agent, optimizers: Optimizers):
    """One update of the critics, and at every `policy_freq`-th call of the actor and of the targets."""
    actor, actor_target, critic, critic_target = agent.actor, agent.actor_target, agent.critic, agent.critic_target
    actor_params, critic_params = list(actor.parameters()), list(critic.parameters())

    def critic_gradients():
        obs, actions, rewards, next_obs, terminations, rows = sample(data, args.batch_size)
        # y = r + γ (1 - d) [ min_i Q̄_i(s', a') - β2 ‖a' - â'‖² ],  â' the data's next action (unknown: no penalty)
        with torch.no_grad():
            noise = (torch.randn_like(actions) * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
            next_actions = (actor_target(next_obs) + noise).clamp(-1, 1)
            penalty = ((next_actions - data.next_actions[rows]) ** 2).sum(1).nan_to_num()
            next_q = critic_target(next_obs, next_actions).amin(0) - args.critic_bc_coef * penalty
            y = rewards + args.gamma * (1 - terminations) * next_q
        q = critic(obs, actions)
        critic_loss = ((q - y) ** 2).mean(1).sum()
        metrics = {"critic_loss": critic_loss.detach(), "q": q.detach().mean()}
        return torch.autograd.grad(critic_loss, critic_params), metrics, obs, actions

    def actor_gradients(obs, actions):
        # -min_i Q_i(s, π(s)) / mean|Q| + β1 ‖π(s) - a‖²
        new_actions = actor(obs)
        q = critic(obs, new_actions).amin(0)
        imitation = ((new_actions - actions) ** 2).sum(1).mean()
        actor_loss = -q.mean() / q.abs().mean().detach() + args.actor_bc_coef * imitation
        return torch.autograd.grad(actor_loss, actor_params), actor_loss.detach()

    critic_gradients = steps.compiled(critic_gradients, args.compile)
    actor_gradients = steps.compiled(actor_gradients, args.compile)
    updates = itertools.count(int(optimizers["critic_optimizer"].steps[0]) + 1)  # a resumed run goes on in turn

    def step():
        critic_grads, metrics, obs, actions = critic_gradients()
        optimizers["critic_optimizer"].step(critic_grads)
        if next(updates) % args.policy_freq == 0:
            actor_grads, actor_loss = actor_gradients(obs, actions)
            optimizers["actor_optimizer"].step(actor_grads)
            polyak(critic_target, critic, args.tau)
            polyak(actor_target, actor, args.tau)
            metrics["actor_loss"] = actor_loss
        return metrics

    return step


def train(args: Args, data: datasets.Dataset) -> Path:
    """Train on `data` and return the policy's path; see `pretrain.train`."""
    data.need_order("ReBRAC")
    if not (published(data.task) or any(map(data.task.matches, FAMILIES))):
        print(
            f"ReBRAC's paper has no weights of imitation for {data.task.data}: this run takes {args.actor_bc_coef} and "
            f"{args.critic_bc_coef} (--actor-bc-coef, --critic-bc-coef; 0.01 by default)"
        )
    return pretrain.train(args, data, Agent, Optimizers, training_step)


if __name__ == "__main__":
    cli.run(lambda: pretrain.main(Args, PRESETS, FAMILIES, train))
