"""SAC-ML, the offline part of ACA (Yu & Zhang, ICML 2023): SAC whose actor also maximises the likelihood of the data's
actions, and beside it the baseline Z(s) that ACA's critics start from. Writes all of it to
runs/<env_id>__sac_ml__<seed>/policy.pt.

    python offline/sac_ml.py --env-id hopper-medium-v2

As in the authors' code states are not standardised. They move the temperature first in a step, here it moves last; on
AntMaze they have an unsquashed Gaussian and leave the rewards of this part at 0 and 1, though those of play are shifted
by -1: here the policy is a squashed one everywhere, and both are shifted.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli, datasets, pretrain, steps
from common.bounds import at_least, between, finite
from common.nn import Adam, before_tanh, ensemble_mlp, gaussian_log_prob, mlp, polyak, tanh_log_det
from common.replay import sample

import torch
from torch import nn

PRESETS = {
    "demo": dict(env_id="hopper-medium-demo", steps=10_000, log_every=1_000, eval_every=5_000),
    "quick": dict(steps=100_000, eval_every=20_000),
}

# Other defaults for a family of data, or for a part of one
FAMILIES = {
    "antmaze": dict(reward_shift=-1.0, target_entropy=-0.5, eval_every=50_000, eval_episodes=20, final_episodes=100),
    "adroit": dict(eval_every=50_000, eval_episodes=100),
}


@dataclass
class Args(pretrain.PretrainArgs):
    standardise: bool = False
    """standardise observations with the dataset's mean and std, here and in all that starts from this policy"""
    steps: Annotated[int, at_least(1)] = 500_000
    """gradient steps"""
    batch_size: Annotated[int, at_least(1)] = 256
    """transitions in a batch"""
    gamma: Annotated[float, between(0, 1)] = 0.99
    """discount factor"""
    tau: Annotated[float, between(0, 1)] = 0.005
    """Polyak factor of the target critics"""
    lr: Annotated[float, at_least(0)] = 3e-4
    """learning rate of everything"""
    hidden: Annotated[tuple[int, ...], at_least(1)] = (256, 256)
    """widths of the hidden layers in every network"""
    q_weight: Annotated[float, at_least(0)] = 30.0
    """weight of Q, divided by its mean size, against the likelihood of the data's actions in the actor's loss"""
    target_entropy: Annotated[float, finite()] = -1.0
    """entropy that the temperature is tuned to, for each action dimension"""


# ---------------------------------------------------------------------------------------------- networks


class Actor(nn.Module):
    """Squashed Gaussian policy: (B, S) -> mean and log std of u, (B, A) each; the action is tanh(u)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = mlp(obs_dim, hidden_layers, 2 * action_dim)
        with torch.no_grad():
            self.net[-1].bias[action_dim:] += 1.0  # so that log std starts near 0

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, (log_std - 1.0).clamp(-20.0, 2.0)


class Critic(nn.Module):
    """Twin Q networks side by side: (B, S), (B, A) -> (2, B)."""

    layer_norm = False

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = ensemble_mlp(2, obs_dim + action_dim, hidden_layers, 1)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([obs, actions], dim=-1)
        return self.net(x.expand(2, *x.shape)).squeeze(-1)


class Baseline(nn.Module):
    """Z, two networks of the state alone side by side: (B, S) -> (2, B)."""

    def __init__(self, obs_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = ensemble_mlp(2, obs_dim, hidden_layers, 1)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.net(obs.expand(2, *obs.shape)).squeeze(-1)


def sample_actions(mean: torch.Tensor, log_std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a = tanh(u), u ~ N(mean, std), reparameterised, and log π(a|s): (B, A) and (B,)."""
    u = mean + log_std.exp() * torch.randn_like(mean)
    return torch.tanh(u), log_prob_of(u, mean, log_std)


def log_prob_of(u: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """log π(tanh(u)|s) (B,)."""
    return gaussian_log_prob(u, mean, log_std) - tanh_log_det(u)


# ---------------------------------------------------------------------------------------------- training


class Agent(nn.Module):
    kind = "squashed_gaussian"

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, args.hidden)
        self.critic = Critic(obs_dim, action_dim, args.hidden)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.baseline = Baseline(obs_dim, args.hidden)
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.actor(obs)[0])


class Optimizers(dict):
    """One Adam for each thing that is learned."""

    def __init__(self, args: Args, agent: Agent):
        super().__init__(
            actor_optimizer=Adam(agent.actor.parameters(), args.lr),
            critic_optimizer=Adam(agent.critic.parameters(), args.lr),
            baseline_optimizer=Adam(agent.baseline.parameters(), args.lr),
            alpha_optimizer=Adam([agent.log_alpha], args.lr),
        )


def training_step(args: Args, data: datasets.Dataset, agent: Agent, optimizers: Optimizers):
    """One update of critics, baseline, actor and temperature on a batch of the dataset."""
    actor, critic, critic_target, baseline = agent.actor, agent.critic, agent.critic_target, agent.baseline
    actor_params, critic_params = list(actor.parameters()), list(critic.parameters())
    baseline_params, target_entropy = list(baseline.parameters()), args.target_entropy * data.actions.shape[1]
    u_data = before_tanh(data.actions)

    def critic_gradients():
        obs, actions, rewards, next_obs, terminations, rows = sample(data, args.batch_size)
        alpha, q, z = agent.log_alpha.exp(), critic(obs, actions), baseline(obs)
        with torch.no_grad():
            next_actions, next_log_prob = sample_actions(*actor(next_obs))
            # critics: y = r + γ (1 - d) [ min_i Q̄_i(s', a') - α log π(a'|s') ],  a' ~ π
            next_v = critic_target(next_obs, next_actions).amin(0) - alpha * next_log_prob
            y = rewards + args.gamma * (1 - terminations) * next_v
            # baseline: Q_i(s, a) = log π(a|s) + Z_i(s) in the same equation, at the same a', without a target network
            next_z = next_log_prob + baseline(next_obs).amin(0) - alpha * next_log_prob
            y_z = rewards + args.gamma * (1 - terminations) * next_z
            log_prob = log_prob_of(u_data[rows], *actor(obs))
        critic_loss = ((q - y) ** 2).mean(1).sum()
        baseline_loss = ((log_prob + z - y_z) ** 2).mean(1).sum()
        metrics = {"critic_loss": critic_loss, "baseline_loss": baseline_loss, "q": q.mean(), "z": z.mean()}
        return (
            torch.autograd.grad(critic_loss, critic_params),
            torch.autograd.grad(baseline_loss, baseline_params),
            {name: value.detach() for name, value in metrics.items()},
            obs,
            u_data[rows],
        )

    def actor_gradients(obs, u):
        # actor: c mean(α log π(a_π|s) - min_i Q_i(s, a_π)) / mean|min_i Q_i(s, a_π)| - mean log π(a|s),  a_π ~ π
        mean, log_std = actor(obs)
        new_actions, new_log_prob = sample_actions(mean, log_std)
        alpha, q = agent.log_alpha.exp().detach(), critic(obs, new_actions).amin(0)
        log_prob = log_prob_of(u, mean, log_std)
        scale = args.q_weight / q.detach().abs().mean()
        actor_loss = scale * (alpha * new_log_prob - q).mean() - log_prob.mean()
        # temperature towards the target entropy
        alpha_loss = -agent.log_alpha * (new_log_prob.detach() + target_entropy).mean()
        metrics = {"actor_loss": actor_loss, "log_prob": log_prob.mean(), "alpha": alpha,
                   "entropy": -new_log_prob.mean()}  # fmt: skip
        return (
            torch.autograd.grad(actor_loss, actor_params),
            torch.autograd.grad(alpha_loss, [agent.log_alpha]),
            {name: value.detach() for name, value in metrics.items()},
        )

    critic_gradients = steps.compiled(critic_gradients, args.compile)
    actor_gradients = steps.compiled(actor_gradients, args.compile)

    def step():
        critic_grads, baseline_grads, metrics, obs, u = critic_gradients()
        optimizers["critic_optimizer"].step(critic_grads)
        optimizers["baseline_optimizer"].step(baseline_grads)
        actor_grads, alpha_grads, actor_metrics = actor_gradients(obs, u)  # with the new critics
        optimizers["actor_optimizer"].step(actor_grads)
        optimizers["alpha_optimizer"].step(alpha_grads)
        polyak(critic_target, critic, args.tau)
        return metrics | actor_metrics

    return step


def train(args: Args, data: datasets.Dataset) -> Path:
    """Train on `data` and return the policy's path; see `pretrain.train`."""
    return pretrain.train(args, data, Agent, Optimizers, training_step)


if __name__ == "__main__":
    cli.run(lambda: pretrain.main(Args, PRESETS, FAMILIES, train))
