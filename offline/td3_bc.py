"""TD3+BC (Fujimoto & Gu, NeurIPS 2021): TD3 whose policy also imitates the data.
Writes the policy and its critics to runs/<env_id>__td3_bc__<seed>/policy.pt.

    python offline/td3_bc.py --env-id hopper-medium-v2
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

import torch
from torch import nn

PRESETS = {
    "demo": dict(env_id="hopper-medium-demo", steps=10_000, log_every=1_000, eval_every=5_000, compile=False),
    "quick": dict(steps=50_000, eval_every=10_000),
}

# Other defaults for a family of data, or for a part of one
FAMILIES = {
    "antmaze": dict(reward_shift=-1.0, eval_every=50_000, eval_episodes=20, final_episodes=100),
    "adroit": dict(eval_every=50_000, eval_episodes=100),
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
    """Polyak factor of the targets"""
    lr: Annotated[float, at_least(0)] = 3e-4
    """learning rate of the actor and of the critics"""
    hidden: Annotated[tuple[int, ...], at_least(1)] = (256, 256)
    """widths of the hidden layers in every network"""
    alpha: Annotated[float, at_least(0)] = 2.5
    """weight of Q, which is normalised, against imitation"""
    policy_noise: Annotated[float, at_least(0)] = 0.2
    """standard deviation of the noise on target actions"""
    noise_clip: Annotated[float, at_least(0)] = 0.5
    """that noise is clipped at this"""
    policy_freq: Annotated[int, at_least(1)] = 2
    """critic updates per update of the actor and of the targets"""


# ---------------------------------------------------------------------------------------------- networks


class Actor(nn.Module):
    """Deterministic policy: (B, S) -> (B, A) in (-1, 1)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = mlp(obs_dim, hidden_layers, action_dim)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.net(obs))


class Critic(nn.Module):
    """Twin Q networks side by side: (B, S), (B, A) -> (2, B); the first `n` alone give (n, B)."""

    layer_norm = False

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = ensemble_mlp(2, obs_dim + action_dim, hidden_layers, 1, self.layer_norm)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor, n: int = 2) -> torch.Tensor:
        x = torch.cat([obs, actions], dim=-1)
        return self.net(x.expand(n, *x.shape)).squeeze(-1)


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
            actor_optimizer=Adam(agent.actor.parameters(), args.lr),
            critic_optimizer=Adam(agent.critic.parameters(), args.lr),
        )


def training_step(args: Args, data: datasets.Dataset, agent: Agent, optimizers: Optimizers):
    """One update of the critics, and at every `policy_freq`-th call of the actor and of the targets."""
    actor, actor_target, critic, critic_target = agent.actor, agent.actor_target, agent.critic, agent.critic_target
    actor_params, critic_params = list(actor.parameters()), list(critic.parameters())

    def critic_gradients():
        obs, actions, rewards, next_obs, terminations, _ = sample(data, args.batch_size)
        # y = r + γ (1 - d) min_i Q̄_i(s', a'),  a' = clip(π̄(s') + clipped noise)
        with torch.no_grad():
            noise = (torch.randn_like(actions) * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
            next_actions = (actor_target(next_obs) + noise).clamp(-1, 1)
            y = rewards + args.gamma * (1 - terminations) * critic_target(next_obs, next_actions).amin(0)
        q = critic(obs, actions)
        critic_loss = ((q - y) ** 2).mean(1).sum()
        metrics = {"critic_loss": critic_loss.detach(), "q": q.detach().mean()}
        return torch.autograd.grad(critic_loss, critic_params), metrics, obs, actions

    def actor_gradients(obs, actions):
        # -α Q_1(s, π(s)) / mean|Q_1| + (π(s) - a)²
        new_actions = actor(obs)
        q = critic(obs, new_actions, n=1)[0]
        actor_loss = -args.alpha * q.mean() / q.abs().mean().detach() + ((new_actions - actions) ** 2).mean()
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
    return pretrain.train(args, data, Agent, Optimizers, training_step)


if __name__ == "__main__":
    cli.run(lambda: pretrain.main(Args, PRESETS, FAMILIES, train))
