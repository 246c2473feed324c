"""Advantage-weighted actor-critic (Nair et al., 2020), its offline part: policy evaluation by TD, and a policy by
advantage-weighted regression. Writes the policy and its critics to runs/<env_id>__awac__<seed>/policy.pt.

    python offline/awac.py --env-id hopper-medium-v2

Networks and weights are CORL's, exp(A / λ) clipped at 100; `--weights softmax --temperature 2` are the authors' for
locomotion (rlkit's, where the advantages are those before the critics' step). The mean of the policy goes through a
tanh, as in rlkit.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli, datasets, pretrain, steps
from common.bounds import above, at_least, between, only_with
from common.nn import Adam, ensemble_mlp, gaussian_log_prob, mlp, polyak
from common.replay import sample

import torch
from torch import nn

PRESETS = {
    "demo": dict(env_id="hopper-medium-demo", steps=5_000, log_every=1_000, eval_every=2_500, compile=False),
    "quick": dict(steps=30_000, eval_every=10_000),
}

# Other defaults for a family of data, or for a part of one
FAMILIES = {
    "antmaze": dict(reward_shift=-1.0, temperature=0.1, eval_every=50_000, eval_episodes=20, final_episodes=100),
    "adroit": dict(temperature=0.1, eval_every=50_000, eval_episodes=100),
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
    """learning rate of the actor and of the critics"""
    hidden: Annotated[tuple[int, ...], at_least(1)] = (256, 256, 256)
    """widths of the hidden layers in every network"""
    temperature: Annotated[float, above(0)] = 1 / 3
    """the paper's λ: advantages are divided by it (on all locomotion data; on AntMaze and Adroit 0.1)"""
    weights: Literal["exp", "softmax"] = "exp"
    """of the actions in a batch: exp(A / λ), or the share of it in the batch's sum times the batch's size"""
    max_weight: Annotated[float, above(0), only_with(weights="exp")] = 100.0
    """the former are clipped at this"""


# ---------------------------------------------------------------------------------------------- networks


class Actor(nn.Module):
    """Gaussian policy: (B, S) -> mean in (-1, 1) and log std, the latter free of the state; (B, A) and (A,)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = mlp(obs_dim, hidden_layers, action_dim)
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tanh(self.net(obs)), self.log_std.clamp(-20.0, 2.0)


class Critic(nn.Module):
    """Twin Q networks side by side: (B, S), (B, A) -> (2, B)."""

    layer_norm = False

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = ensemble_mlp(2, obs_dim + action_dim, hidden_layers, 1, self.layer_norm)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([obs, actions], dim=-1)
        return self.net(x.expand(2, *x.shape)).squeeze(-1)


# ---------------------------------------------------------------------------------------------- training


def sample_actions(mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Actions as the environment would execute them, (B, A) in [-1, 1]."""
    return (mean + log_std.exp() * torch.randn_like(mean)).clamp(-1, 1)


class Agent(nn.Module):
    kind = "gaussian"

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, args.hidden)
        self.critic = Critic(obs_dim, action_dim, args.hidden)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        return self.actor(obs)[0]


class Optimizers(dict):
    """One Adam for each thing that is learned."""

    def __init__(self, args: Args, agent: Agent):
        super().__init__(
            actor_optimizer=Adam(agent.actor.parameters(), args.lr),
            critic_optimizer=Adam(agent.critic.parameters(), args.lr),
        )


def training_step(args: Args, data: datasets.Dataset, agent: Agent, optimizers: Optimizers):
    """One update of critics and actor on a batch of the dataset."""
    actor, critic, critic_target = agent.actor, agent.critic, agent.critic_target
    actor_params, critic_params = list(actor.parameters()), list(critic.parameters())

    def critic_gradients():
        obs, actions, rewards, next_obs, terminations, _ = sample(data, args.batch_size)
        # y = r + γ (1 - d) min_i Q̄_i(s', a'),  a' ~ π
        with torch.no_grad():
            next_q = critic_target(next_obs, sample_actions(*actor(next_obs))).amin(0)
            y = rewards + args.gamma * (1 - terminations) * next_q
        q = critic(obs, actions)
        critic_loss = ((q - y) ** 2).mean(1).sum()
        metrics = {"critic_loss": critic_loss.detach(), "q": q.detach().mean()}
        return torch.autograd.grad(critic_loss, critic_params), metrics, obs, actions

    def actor_gradients(obs, actions):
        # -w log π(a|s),  A = min_i Q_i(s, a) - min_i Q_i(s, ã),  ã ~ π
        mean, log_std = actor(obs)
        with torch.no_grad():
            advantage = critic(obs, actions).amin(0) - critic(obs, sample_actions(mean, log_std)).amin(0)
            if args.weights == "softmax":
                weight = len(advantage) * (advantage / args.temperature).softmax(0)
            else:
                weight = (advantage / args.temperature).exp().clamp(max=args.max_weight)
        log_prob = gaussian_log_prob(actions, mean, log_std)
        actor_loss = -(weight * log_prob).mean()
        metrics = {"actor_loss": actor_loss, "advantage_weight": weight.mean(), "log_prob": log_prob.mean()}
        metrics = {name: metric.detach() for name, metric in metrics.items()}
        return torch.autograd.grad(actor_loss, actor_params), metrics

    critic_gradients = steps.compiled(critic_gradients, args.compile)
    actor_gradients = steps.compiled(actor_gradients, args.compile)

    def step():
        critic_grads, metrics, obs, actions = critic_gradients()
        optimizers["critic_optimizer"].step(critic_grads)
        actor_grads, actor_metrics = actor_gradients(obs, actions)  # with the new critics
        optimizers["actor_optimizer"].step(actor_grads)
        polyak(critic_target, critic, args.tau)
        return metrics | actor_metrics

    return step


def train(args: Args, data: datasets.Dataset) -> Path:
    """Train on `data` and return the policy's path; see `pretrain.train`."""
    return pretrain.train(args, data, Agent, Optimizers, training_step)


if __name__ == "__main__":
    cli.run(lambda: pretrain.main(Args, PRESETS, FAMILIES, train))
