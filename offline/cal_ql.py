"""Cal-QL (Nakamoto et al., NeurIPS 2023, arXiv 2303.05479), its offline part: CQL(H) whose critics are pushed down on
the policy's actions to the return of the data, and no further. Writes policy and critics to
runs/<env_id>__cal_ql__<seed>/policy.pt.

    python offline/cal_ql.py --env-id hopper-medium-v2

Nothing is published for locomotion: weight and networks are those of offline/cql.py there, and the last 100 rows of
episodes that the time limit cut off are not calibrated, as their returns are unknown (--calibrate-to-end). The authors
multiply log σ by a learned number and add one, 1 and -1 at the start; here these stay. On AntMaze the critics have five
layers, as CORL's and O2SAC's (the authors': four), for Adroit all networks are CORL's (theirs: two and three layers of
512). With --critics 10 --layer-norm it is what WSRL starts from, and with --no-calibrate CQL.
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli, datasets, pretrain, steps
from common.bounds import at_least, between, finite, only_with
from common.nn import Adam, ensemble_mlp, gaussian_log_prob, mlp, orthogonal, polyak, tanh_log_det
from common.replay import returns_to_go, sample

import torch
from torch import nn

PRESETS = {
    "demo": dict(env_id="hopper-medium-demo", steps=1_500, n_actions=4, actor_lr=3e-4, log_every=250,
                 eval_every=1_500, compile=False),
    "quick": dict(steps=10_000, actor_lr=3e-4, eval_every=2_000),
}  # fmt: skip

# Other defaults for a family of data, or for a part of one
FAMILIES = {
    "antmaze": dict(reward_scale=10.0, reward_shift=-5.0, failure_reward=0.0, standardise=False,
                    critic_hidden=(256,) * 5, hidden=(256, 256), alpha=5.0, lagrange=True,
                    eval_every=50_000, eval_episodes=20, final_episodes=100),
    "adroit": dict(calibrate_to_end=True, alpha=1.0, standardise=False, eval_every=50_000, eval_episodes=100),
}  # fmt: skip


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
    actor_lr: Annotated[float, at_least(0)] = 1e-4
    """learning rate of the actor and of the temperature"""
    critic_lr: Annotated[float, at_least(0)] = 3e-4
    """learning rate of the critics and of the multiplier"""
    hidden: Annotated[tuple[int, ...], at_least(1)] = (256, 256, 256)
    """widths of the hidden layers in the actor"""
    critic_hidden: Annotated[tuple[int, ...], at_least(1)] = (256, 256, 256)
    """widths of the hidden layers in each critic"""
    critics: Annotated[int, at_least(2)] = 2
    """critics; of more than two, the target takes two at random, with replacement"""
    layer_norm: bool = False
    """layer normalisation in the critics"""
    calibrate: bool = True
    """count the policy's actions at the data's return where their Q is lower; without it this is CQL"""
    failure_reward: Annotated[float | None, finite(), only_with(calibrate=True)] = None
    """the environment's reward in every step until a task succeeds (AntMaze: 0); None: rewards are dense"""
    calibrate_to_end: Annotated[bool, only_with(calibrate=True)] = False
    """calibrate the last 1 / (1 - γ) rows of an episode that the time limit cut off too, as if nothing came behind it
    (Adroit: yes, its episodes are hardly longer than that); no: their return is unknown. With --failure-reward it is
    known of all, and this changes nothing"""
    alpha: Annotated[float, at_least(0)] = 10.0
    """weight of the conservative term"""
    lagrange: bool = False
    """multiply that weight by a factor that is tuned until the conservative gap is --target-gap"""
    target_gap: Annotated[float, finite(), only_with(lagrange=True)] = 0.8
    """what the conservative gap of a critic is brought to then"""
    min_gap: Annotated[float | None, finite()] = None
    """the conservative gap of a state is clipped from below at this; None: it is not (CORL's: -200)"""
    best_of: Annotated[int, at_least(1)] = 10
    """actions that the policy draws at s' for the target, which takes the one of highest value"""
    n_actions: Annotated[int, at_least(1)] = 10
    """actions sampled from each of: uniform, policy at s, policy at s'"""


# ---------------------------------------------------------------------------------------------- networks


class Actor(nn.Module):
    """Squashed Gaussian policy: (B, S) -> mean and log std of u, (B, A) each; the action is tanh(u)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple):
        super().__init__()
        self.net = mlp(obs_dim, hidden_layers, 2 * action_dim)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, (log_std - 1.0).clamp(-20.0, 2.0)


class Critic(nn.Module):
    """`n` Q networks side by side: (B, S), (B, A) -> (n, B)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: tuple, n: int = 2, layer_norm: bool = False):
        super().__init__()
        self.n, self.layer_norm = n, layer_norm
        self.net = ensemble_mlp(n, obs_dim + action_dim, hidden_layers, 1, layer_norm)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([obs, actions], dim=-1)
        return self.net(x.expand(self.n, *x.shape)).squeeze(-1)


def lowest(q: torch.Tensor) -> torch.Tensor:
    """The lower of two critics' values, (n, B) -> (B,); of more than two, two are drawn, with replacement."""
    return (q if len(q) == 2 else q[torch.randint(len(q), (2,), device=q.device)]).amin(0)


def sample_actions(mean: torch.Tensor, log_std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a = tanh(u), u ~ N(mean, std), reparameterised, and log π(a|s): (..., A) and (...)."""
    u = mean + log_std.exp() * torch.randn_like(mean)
    return torch.tanh(u), gaussian_log_prob(u, mean, log_std) - tanh_log_det(u)


# ---------------------------------------------------------------------------------------------- training


class Agent(nn.Module):
    kind = "squashed_gaussian"

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, args.hidden)
        self.critic = Critic(obs_dim, action_dim, args.critic_hidden, args.critics, args.layer_norm)
        for net in (self.actor.net, self.critic.net):  # as the authors do; CORL's last layers are like the others
            orthogonal(net, hidden=math.sqrt(2), last=1e-2)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.zeros(()))
        self.log_multiplier = nn.Parameter(torch.ones(()))

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.actor(obs)[0])


class Optimizers(dict):
    """One Adam for each thing that is learned."""

    def __init__(self, args: Args, agent: Agent):
        super().__init__(
            actor_optimizer=Adam(agent.actor.parameters(), args.actor_lr),
            critic_optimizer=Adam(agent.critic.parameters(), args.critic_lr),
            temperature_optimizer=Adam([agent.log_temperature], args.actor_lr),
            multiplier_optimizer=Adam([agent.log_multiplier], args.critic_lr),
        )


def training_step(args: Args, data: datasets.Dataset, agent: Agent, optimizers: Optimizers):
    """One update of critics, actor, temperature and multiplier on a batch of the dataset."""
    actor, critic, critic_target = agent.actor, agent.critic, agent.critic_target
    actor_params, critic_params = list(actor.parameters()), list(critic.parameters())
    action_dim, n, m, batch_size = data.actions.shape[1], args.n_actions, args.best_of, args.batch_size
    min_gap = -math.inf if args.min_gap is None else args.min_gap
    chunk = batch_size if data.obs.is_cuda else 64
    returns = torch.full_like(data.rewards, -math.inf)  # no bound
    if args.calibrate:
        data.need_order("calibration by returns")
        failure = None if args.failure_reward is None else args.failure_reward * args.reward_scale + args.reward_shift
        returns = returns_to_go(
            data.rewards, data.terminations, args.gamma, data.episode, failure, args.calibrate_to_end
        )

    def gradients():
        obs, actions, rewards, next_obs, terminations, rows = sample(data, batch_size)
        temperature = agent.log_temperature.exp().detach()

        # SAC's target, without the entropy term: y = r + γ (1 - d) max_a' min_i Q̄_i(s', a'), of m actions
        with torch.no_grad():
            next_mean, next_log_std = actor(next_obs)
            next_actions, _ = sample_actions(next_mean.expand(m, -1, -1), next_log_std.expand(m, -1, -1))
            next_states = next_obs.expand(m, -1, -1)
            next_q = lowest(critic_target(next_states.flatten(0, 1), next_actions.flatten(0, 1))).view(m, -1).amax(0)
            y = rewards + args.gamma * (1 - terminations) * next_q

        # 3 n other actions at s (3 n, B, A), with the log density that each was drawn with
        mean, log_std = actor(obs)
        with torch.no_grad():
            uniform = torch.empty(n, batch_size, action_dim, device=obs.device).uniform_(-1, 1)
            current, current_log_prob = sample_actions(mean.expand(n, -1, -1), log_std.expand(n, -1, -1))
            following, following_log_prob = sample_actions(next_mean.expand(n, -1, -1), next_log_std.expand(n, -1, -1))
            candidates = torch.cat([actions[None], uniform, current, following])
            uniform_log_prob = torch.full_like(current_log_prob, action_dim * math.log(0.5))
            log_density = torch.cat([uniform_log_prob, current_log_prob, following_log_prob])

        # of the policy's actions the value is max(Q, G), G being the return that followed the data's action
        bound = torch.cat([torch.full_like(uniform_log_prob, -math.inf), returns[rows].expand(2 * n, -1)])

        # critic, some states at a time, so that a CPU's cache holds the activations of all their actions
        multiplier = agent.log_multiplier.exp().clamp(max=1e6)
        weight = args.alpha * multiplier.detach() if args.lagrange else args.alpha
        parts = []
        for start in range(0, batch_size, chunk):
            part = slice(start, start + chunk)
            a = candidates[:, part]  # (1 + 3 n, states, A)
            s = obs[part].expand(*a.shape[:2], -1)
            q_all = critic(s.flatten(0, 1), a.flatten(0, 1)).view(critic.n, *a.shape[:2])
            q, q_others = q_all[:, 0], q_all[:, 1:]
            td_loss = ((q - y[part]) ** 2).sum() / batch_size
            # R(s) = log Σ_a [exp Q(s, a) / density(a)] - Q(s, a_data): CQL(H) with importance sampling
            gaps = torch.logsumexp(torch.maximum(q_others, bound[:, part]) - log_density[:, part], dim=1) - q
            gap = gaps.clamp(min=min_gap).sum() / batch_size
            grads = torch.autograd.grad(td_loss + weight * gap, critic_params)
            parts.append(
                (td_loss.detach(), gap.detach() / critic.n, q.detach().sum() / (critic.n * batch_size), *grads)
            )
        td_loss, gap, q, *critic_grads = [sum(part) for part in zip(*parts, strict=True)]

        # multiplier towards a gap of the target's size: it rises while the gap is wider
        multiplier_loss = -args.alpha * multiplier * (gap - args.target_gap)

        # actor: temperature log π - min_i Q_i, and the temperature towards the entropy -A
        new_actions, log_prob = sample_actions(mean, log_std)
        actor_loss = (temperature * log_prob - critic(obs, new_actions).amin(0)).mean()
        temperature_loss = -agent.log_temperature * (log_prob.detach() - action_dim).mean()

        metrics = {"critic_loss": td_loss, "conservative_gap": gap, "q_target": y.mean(), "actor_loss": actor_loss,
                   "q": q, "temperature": temperature, "entropy": -log_prob.mean()}  # fmt: skip
        if args.lagrange:
            metrics["multiplier"] = multiplier
        return (
            critic_grads,
            torch.autograd.grad(actor_loss, actor_params),
            torch.autograd.grad(temperature_loss, [agent.log_temperature]),
            torch.autograd.grad(multiplier_loss, [agent.log_multiplier]),
            {name: value.detach() for name, value in metrics.items()},
        )

    gradients = steps.compiled(gradients, args.compile, long_sums=True)  # over every sampled action of every state

    def step():
        critic_grads, actor_grads, temperature_grads, multiplier_grads, metrics = gradients()
        optimizers["temperature_optimizer"].step(temperature_grads)
        optimizers["actor_optimizer"].step(actor_grads)
        optimizers["critic_optimizer"].step(critic_grads)
        if args.lagrange:
            optimizers["multiplier_optimizer"].step(multiplier_grads)
        polyak(critic_target, critic, args.tau)
        return metrics

    return step


def train(args: Args, data: datasets.Dataset) -> Path:
    """Train on `data` and return the policy's path; see `pretrain.train`."""
    return pretrain.train(args, data, Agent, Optimizers, training_step)


if __name__ == "__main__":
    cli.run(lambda: pretrain.main(Args, PRESETS, FAMILIES, train))
