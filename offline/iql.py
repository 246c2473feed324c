"""Implicit Q-learning (Kostrikov et al., ICLR 2022): the value of the best actions in the data by expectile regression,
then a policy by advantage-weighted regression. Writes both to runs/<env_id>__iql__<seed>/policy.pt.

    python offline/iql.py --env-id hopper-medium-v2
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli, datasets, pretrain, steps
from common.bounds import above, at_least, between
from common.nn import Adam, ensemble_mlp, gaussian_log_prob, mlp, polyak
from common.replay import sample

import torch
import torch.nn.functional as F
from torch import nn

PRESETS = {
    "demo": dict(env_id="hopper-medium-demo", steps=10_000, log_every=1_000, eval_every=5_000, compile=False),
    "quick": dict(steps=50_000, eval_every=10_000),
}

# Other defaults for a family of data, or for a part of one
FAMILIES = {
    "antmaze": dict(
        reward_shift=-1.0, expectile=0.9, beta=10.0, eval_every=50_000, eval_episodes=20, final_episodes=100
    ),
    "adroit": dict(expectile=0.8, actor_dropout=0.1, eval_every=50_000, eval_episodes=100),
}


@dataclass
class Args(pretrain.PretrainArgs):
    steps: Annotated[int, at_least(1)] = 1_000_000
    """gradient steps"""
    batch_size: Annotated[int, at_least(1)] = 256
    """transitions in a batch"""
    gamma: Annotated[float, between(0, 1)] = 0.99
    """discount factor"""
    tau: Annotated[float, between(0, 1)] = 0.005
    """Polyak factor of the target critics"""
    lr: Annotated[float, at_least(0)] = 3e-4
    """learning rate of the actor (annealed to zero by a cosine), of the critics and of the value"""
    hidden: Annotated[tuple[int, ...], at_least(1)] = (256, 256)
    """widths of the hidden layers in every network"""
    expectile: Annotated[float, between(0, 1)] = 0.7
    """the expectile that V regresses on (AntMaze: 0.9, Adroit: 0.8)"""
    beta: Annotated[float, at_least(0)] = 3.0
    """inverse temperature of the advantage weights (AntMaze: 10)"""
    max_weight: Annotated[float, above(0)] = 100.0
    """advantage weights are clipped at this"""
    actor_dropout: Annotated[float, between(0, 0.99)] = 0.0
    """share of the actor's hidden units that its training leaves out (Adroit: 0.1, as CORL has it)"""


# ---------------------------------------------------------------------------------------------- networks


class Actor(nn.Module):
    """Gaussian policy: (B, S) -> mean in (-1, 1) and log std, the latter free of the state; (B, A) and (A,)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = mlp(obs_dim, hidden_layers, action_dim)
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, obs: torch.Tensor, dropout: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.net[:-1]:
            obs = layer(obs)
            if dropout and isinstance(layer, nn.ReLU):  # in training alone
                obs = F.dropout(obs, dropout)
        return torch.tanh(self.net[-1](obs)), self.log_std.clamp(-20.0, 2.0)


class Critic(nn.Module):
    """Twin Q networks side by side: (B, S), (B, A) -> (2, B)."""

    layer_norm = False

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = ensemble_mlp(2, obs_dim + action_dim, hidden_layers, 1, self.layer_norm)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([obs, actions], dim=-1)
        return self.net(x.expand(2, *x.shape)).squeeze(-1)


class Value(nn.Module):
    """V network: (B, S) -> (B,)."""

    def __init__(self, obs_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = mlp(obs_dim, hidden_layers, 1)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.net(obs).squeeze(-1)


# ---------------------------------------------------------------------------------------------- training


class Agent(nn.Module):
    kind = "gaussian"

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, args.hidden)
        self.critic = Critic(obs_dim, action_dim, args.hidden)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.value = Value(obs_dim, args.hidden)

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        return self.actor(obs)[0]


class Optimizers(dict):
    """One Adam for each thing that is learned."""

    def __init__(self, args: Args, agent: Agent):
        super().__init__(
            actor_optimizer=Adam(agent.actor.parameters(), args.lr),
            critic_optimizer=Adam(agent.critic.parameters(), args.lr),
            value_optimizer=Adam(agent.value.parameters(), args.lr),
        )


def training_step(args: Args, data: datasets.Dataset, agent: Agent, optimizers: Optimizers):
    """One update of value, critics and actor on a batch of the dataset."""
    actor, critic, critic_target, value = agent.actor, agent.critic, agent.critic_target, agent.value
    actor_params, critic_params = list(actor.parameters()), list(critic.parameters())
    value_params = list(value.parameters())
    actor_optimizer = optimizers["actor_optimizer"]

    def gradients():
        obs, actions, rewards, next_obs, terminations, _ = sample(data, args.batch_size)

        # value: expectile regression, |0.7 - 1[u < 0]| u² with u = min_i Q̄_i(s, a) - V(s)
        v = value(obs)
        with torch.no_grad():
            q_target = critic_target(obs, actions).amin(0)
            next_v = value(next_obs)
        advantage = q_target - v
        value_loss = ((args.expectile - (advantage < 0).float()).abs() * advantage**2).mean()

        # critic: y = r + γ (1 - d) V(s')
        y = rewards + args.gamma * (1 - terminations) * next_v
        q = critic(obs, actions)
        critic_loss = ((q - y) ** 2).mean(1).sum()

        # actor: -exp(β (Q - V)) log π(a|s), over the data's actions
        weight = (args.beta * advantage.detach()).exp().clamp(max=args.max_weight)
        log_prob = gaussian_log_prob(actions, *actor(obs, args.actor_dropout))
        actor_loss = -(weight * log_prob).mean()

        # the actor's learning rate falls to zero along a cosine
        actor_lr = 0.5 * args.lr * (1 + torch.cos(math.pi * actor_optimizer.steps[0] / args.steps))

        metrics = {"critic_loss": critic_loss, "value_loss": value_loss, "actor_loss": actor_loss, "q": q.mean(),
                   "v": v.mean(), "advantage_weight": weight.mean(), "log_prob": log_prob.mean()}  # fmt: skip
        return (
            torch.autograd.grad(value_loss, value_params),
            torch.autograd.grad(critic_loss, critic_params),
            torch.autograd.grad(actor_loss, actor_params),
            actor_lr,
            {name: metric.detach() for name, metric in metrics.items()},
        )

    gradients = steps.compiled(gradients, args.compile)

    def step():
        value_grads, critic_grads, actor_grads, actor_lr, metrics = gradients()
        optimizers["value_optimizer"].step(value_grads)
        optimizers["critic_optimizer"].step(critic_grads)
        actor_optimizer.lr.copy_(actor_lr)
        actor_optimizer.step(actor_grads)
        polyak(critic_target, critic, args.tau)
        return metrics

    return step


def train(args: Args, data: datasets.Dataset) -> Path:
    """Train on `data` and return the policy's path; see `pretrain.train`."""
    return pretrain.train(args, data, Agent, Optimizers, training_step)


if __name__ == "__main__":
    cli.run(lambda: pretrain.main(Args, PRESETS, FAMILIES, train))
