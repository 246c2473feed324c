"""Conservative Q-learning (Kumar et al., NeurIPS 2020), CQL(H): SAC whose critics are pushed down on actions that the
data do not hold. Writes the policy and its critics to runs/<env_id>__cql__<seed>/policy.pt.

    python offline/cql.py --env-id hopper-medium-v2
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli, datasets, envs, steps  # noqa: E402
from common.checkpoint import seed_everything  # noqa: E402
from common.nn import Adam, EnsembleLinear, gaussian_log_prob, polyak, tanh_log_det  # noqa: E402
from common.policies import save_policy  # noqa: E402
from common.replay import sample  # noqa: E402
from common.run import Run  # noqa: E402

PRESETS = {
    "demo": dict(env_id="hopper-medium-demo", steps=1_500, n_actions=4, actor_lr=3e-4, log_every=250,
                 eval_every=1_500, compile=False),
    "quick": dict(steps=10_000, actor_lr=3e-4, eval_every=2_000),
}  # fmt: skip


@dataclass
class Args:
    preset: Literal["none", "demo", "quick"] = "none"
    """demo: minutes on 2 cores, with hopper-medium-demo; quick: about a quarter of an hour; none: the paper's"""
    exp_name: str = "cql"
    """the name of this experiment, a part of the run folder's name"""
    env_id: str = "hopper-medium-v2"
    """the dataset: a D4RL name, hopper-medium-demo, or a Minari id"""
    dataset_path: str = ""
    """an HDF5 file in D4RL's layout, used in place of the one that --env-id names"""
    seed: int = 0
    """seed of the networks and of all sampling"""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes the GPU where there is one"""
    compile: bool = True
    """compile the training step (and capture it in a CUDA graph on a GPU)"""
    deterministic: bool = False
    """bitwise repeatable kernels, and no TF32 on a GPU"""
    run_dir: str = "runs"
    """where run folders are made"""
    checkpoint_seconds: float = 60.0
    """time between checkpoints; an interrupted run continues from the last one"""
    track: bool = False
    """log to Weights & Biases too (needs `pip install wandb`)"""
    wandb_project_name: str = "o2rl"
    """the project there"""
    wandb_entity: str | None = None
    """the team there"""

    steps: int = 1_000_000
    """gradient steps"""
    batch_size: int = 256
    """transitions in a batch"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """Polyak factor of the target critics"""
    actor_lr: float = 3e-5
    """learning rate of the actor and of the temperature"""
    critic_lr: float = 3e-4
    """learning rate of the critics"""
    hidden_layers: int = 3
    """hidden layers of 256 units in the actor and in each critic"""
    alpha: float = 10.0
    """weight of the conservative term"""
    n_actions: int = 10
    """actions sampled from each of: uniform, policy at s, policy at s'"""
    log_every: int = 1_000
    """steps between logged means"""
    eval_every: int = 5_000
    """steps between evaluations"""
    eval_episodes: int = 10
    """episodes of an evaluation, played side by side"""


# What o2sac.py hands on when it calls this script
SHARED = ("preset", "env_id", "dataset_path", "seed", "device", "compile", "deterministic", "run_dir",
          "checkpoint_seconds", "eval_episodes")  # fmt: skip


# ---------------------------------------------------------------------------------------------- networks


class Actor(nn.Module):
    """Squashed Gaussian policy: (B, S) -> mean and log std of u, (B, A) each; the action is tanh(u)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: int = 3):
        super().__init__()
        sizes = [obs_dim] + [256] * hidden_layers
        layers = [layer for i, o in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(256, 2 * action_dim))
        nn.init.xavier_uniform_(self.net[-1].weight, gain=0.01)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        return mean, (log_std - 1.0).clamp(-20.0, 2.0)


class Critic(nn.Module):
    """Twin Q networks: (B, S), (B, A) -> (2, B), without layer normalisation, as in the paper."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: int = 3):
        super().__init__()
        sizes = [obs_dim + action_dim] + [256] * hidden_layers
        layers = [
            layer for i, o in zip(sizes, sizes[1:], strict=False) for layer in (EnsembleLinear(2, i, o), nn.ReLU(True))
        ]
        self.net = nn.Sequential(*layers, EnsembleLinear(2, 256, 1))

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        x = torch.cat([obs, actions], dim=-1)
        return self.net(x.expand(2, *x.shape)).squeeze(-1)


def sample_actions(mean: torch.Tensor, log_std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a = tanh(u), u ~ N(mean, std), reparameterised, and log pi(a|s): (..., A) and (...)."""
    u = mean + log_std.exp() * torch.randn_like(mean)
    return torch.tanh(u), gaussian_log_prob(u, mean, log_std) - tanh_log_det(u)


# ---------------------------------------------------------------------------------------------- training


class Agent(nn.Module):
    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: int):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, hidden_layers)
        self.critic = Critic(obs_dim, action_dim, hidden_layers)
        self.critic_target = copy.deepcopy(self.critic)
        self.log_temperature = nn.Parameter(torch.zeros(()))


class Optimizers(dict):
    """One Adam for each thing that is learned."""

    def __init__(self, args: Args, agent: Agent):
        super().__init__(
            actor_optimizer=Adam(agent.actor.parameters(), args.actor_lr),
            critic_optimizer=Adam(agent.critic.parameters(), args.critic_lr),
            temperature_optimizer=Adam([agent.log_temperature], args.actor_lr),
        )


def training_step(args: Args, data: datasets.Dataset, agent: Agent, optimizers: Optimizers):
    """One update of critics, actor and temperature on a batch of the dataset."""
    actor, critic, critic_target = agent.actor, agent.critic, agent.critic_target
    actor_params, critic_params = list(actor.parameters()), list(critic.parameters())
    action_dim, n, batch_size = data.actions.shape[1], args.n_actions, args.batch_size
    chunk = batch_size if data.obs.is_cuda else 64

    def gradients():
        obs, actions, rewards, next_obs, terminations, _ = sample(data, batch_size)
        temperature = agent.log_temperature.exp().detach()

        # SAC's target, without the entropy term: y = r + gamma (1 - d) min_i Q_target_i(s', a')
        with torch.no_grad():
            next_mean, next_log_std = actor(next_obs)
            next_actions, _ = sample_actions(next_mean, next_log_std)
            y = rewards + args.gamma * (1 - terminations) * critic_target(next_obs, next_actions).amin(0)

        # 3 n other actions at s (3 n, B, A), with the log density that each was drawn with
        mean, log_std = actor(obs)
        with torch.no_grad():
            uniform = torch.empty(n, batch_size, action_dim, device=obs.device).uniform_(-1, 1)
            current, current_log_prob = sample_actions(mean.expand(n, -1, -1), log_std.expand(n, -1, -1))
            following, following_log_prob = sample_actions(next_mean.expand(n, -1, -1), next_log_std.expand(n, -1, -1))
            candidates = torch.cat([actions[None], uniform, current, following])
            uniform_log_prob = torch.full_like(current_log_prob, action_dim * math.log(0.5))
            log_density = torch.cat([uniform_log_prob, current_log_prob, following_log_prob])

        # critic, some states at a time, so that a CPU's cache holds the activations of all their actions
        parts = []
        for start in range(0, batch_size, chunk):
            part = slice(start, start + chunk)
            a = candidates[:, part]  # (1 + 3 n, states, A)
            s = obs[part].expand(*a.shape[:2], -1)
            q_all = critic(s.flatten(0, 1), a.flatten(0, 1)).view(2, *a.shape[:2])
            q, q_others = q_all[:, 0], q_all[:, 1:]
            td_loss = ((q - y[part]) ** 2).sum() / batch_size
            # R(s) = log E_a [exp Q(s, a) / density(a)] - Q(s, a_data): CQL(H) with importance sampling
            gap = (torch.logsumexp(q_others - log_density[:, part], dim=1) - q).sum() / batch_size
            grads = torch.autograd.grad(td_loss + args.alpha * gap, critic_params)
            parts.append((td_loss.detach(), gap.detach() / 2, q.detach().sum() / (2 * batch_size), *grads))
        td_loss, gap, q, *critic_grads = [sum(part) for part in zip(*parts, strict=True)]

        # actor: temperature log pi - min_i Q_i, and the temperature towards the entropy -A
        new_actions, log_prob = sample_actions(mean, log_std)
        actor_loss = (temperature * log_prob - critic(obs, new_actions).amin(0)).mean()
        temperature_loss = -agent.log_temperature * (log_prob.detach() - action_dim).mean()

        metrics = {"critic_loss": td_loss, "conservative_gap": gap, "actor_loss": actor_loss, "q": q,
                   "temperature": temperature, "entropy": -log_prob.mean()}  # fmt: skip
        return (
            critic_grads,
            torch.autograd.grad(actor_loss, actor_params),
            torch.autograd.grad(temperature_loss, [agent.log_temperature]),
            {name: value.detach() for name, value in metrics.items()},
        )

    gradients = steps.compiled(gradients, args.compile)

    def step():
        critic_grads, actor_grads, temperature_grads, metrics = gradients()
        optimizers["temperature_optimizer"].step(temperature_grads)
        optimizers["actor_optimizer"].step(actor_grads)
        optimizers["critic_optimizer"].step(critic_grads)
        polyak(critic_target, critic, args.tau)
        return metrics

    return step


def run_name(args: Args) -> str:
    label = Path(args.dataset_path).stem or args.env_id.replace("/", "-")
    preset = "" if args.preset == "none" else f"__{args.preset}"
    return f"{label}__{args.exp_name}__{args.seed}{preset}"


def train(args: Args, data: datasets.Dataset) -> Path:
    """Train on `data`, which is standardised here, and return the policy's path. A finished run trains nothing."""
    cli.check_positive(
        args, "steps", "batch_size", "n_actions", "hidden_layers", "log_every", "eval_every", "eval_episodes"
    )
    run = Run(args, run_name(args))
    path = run.dir / "policy.pt"
    mean, std = data.statistics()
    data.standardise(mean, std)
    if path.exists():
        return path
    device = data.obs.device
    seed_everything(args.seed)
    obs_dim, action_dim = data.obs.shape[1], data.actions.shape[1]
    agent = Agent(obs_dim, action_dim, args.hidden_layers).to(device)
    optimizers = Optimizers(args, agent)
    evaluator = envs.Evaluator(data.simulator, mean, std, args.eval_episodes)
    run.train(
        "cql", lambda: training_step(args, data, agent, optimizers), args.steps, {"agent": agent, **optimizers},
        device=device, compile=args.compile, log_every=args.log_every, evaluate_every=args.eval_every,
        evaluate=lambda: evaluator(lambda obs: torch.tanh(agent.actor(obs)[0]), device),
    )  # fmt: skip
    save_policy(
        path, kind="squashed_gaussian", obs_dim=obs_dim, action_dim=action_dim, hidden_layers=args.hidden_layers,
        state_mean=mean, state_std=std, algorithm="cql", env_id=args.env_id, simulator=data.simulator, seed=args.seed,
        steps=args.steps, score=run.scores("cql")[-1], actor=agent.actor.state_dict(),
        critic={"layer_norm": False, "hidden_layers": args.hidden_layers, "critic": agent.critic.state_dict(),
                "critic_target": agent.critic_target.state_dict()},
    )  # fmt: skip
    return path


def main() -> None:
    args = cli.parse(Args, PRESETS)
    device = cli.resolve_device(args.device)
    steps.setup(device, args.seed, args.deterministic)
    args.compile = args.compile and steps.can_compile(device)
    data = datasets.load(args.env_id, args.dataset_path, device)
    print(f"data: {len(data):,} transitions, {data.source}")
    envs.report_simulator_check(data)
    print(f"policy: {train(args, data)}")


if __name__ == "__main__":
    cli.run(main)
