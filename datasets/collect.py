"""Collect random, medium-replay, medium, expert and medium-expert data in D4RL's physics, the way D4RL's authors did.

SAC (Haarnoja et al., 2018) learns online. Where its training episodes first reach D4RL's medium return, its policy is
kept, and what it has seen by then is medium-replay; it stops at D4RL's expert return. Random is the policy before it
has learned. Where a file of D4RL's own is at hand, `--medium-policy FILE` plays the policy in its `metadata/policy`,
and with `--files medium` nothing has to be learned.

    python datasets/collect.py --robot hopper
    python datasets/collect.py --robot hopper --files medium --medium-policy D4RL/hopper_medium-v2.hdf5 --rows 1000000

The files bear D4RL's names, so that `--env-id hopper-expert-v2` finds them; their `source` says whose they are.
"""

import copy
import io
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli, envs, steps, tasks
from common.bounds import at_least, between
from common.checkpoint import seed_everything, write_atomic
from common.loop import Loop
from common.nn import Adam, ensemble_mlp, gaussian_log_prob, mlp, polyak, tanh_log_det
from common.replay import room
from common.run import Run, make_folder

import h5py
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm import tqdm
from tyro.conf import Suppress

# Mean return ± standard deviation of an episode in D4RL's own v2 files
D4RL_RETURNS = {
    "hopper": {"medium-replay": (467.3, 511.0), "medium": (1422.1, 379.0), "expert": (3511.4, 328.6)},
    "halfcheetah": {"medium-replay": (3093.3, 1680.7), "medium": (4770.3, 355.8), "expert": (10656.4, 441.7)},
    "walker2d": {"medium-replay": (682.7, 896.0), "medium": (2852.1, 1095.4), "expert": (4920.5, 136.4)},
}
QUALITIES = ("random", "medium-replay", "medium", "medium-expert", "expert")


@dataclass
class Args(cli.RunArgs):
    robot: Literal["hopper", "halfcheetah", "walker2d"] = "hopper"
    """whose data"""
    files: tuple[Literal[QUALITIES], ...] = QUALITIES
    """which files are made"""
    rows: Annotated[int, at_least(2)] = 200_000
    """transitions in each file (medium-replay: at most)"""
    medium_policy: str = ""
    """a file of D4RL's, whose metadata/policy is played for medium; none: SAC's own at D4RL's medium return"""
    out: str = ""
    """where the files are written; none: $D4RL_DATASET_DIR, else ~/.d4rl/datasets, where --env-id looks for them"""
    checkpoint_seconds: Annotated[float, at_least(0)] = 600.0
    """time between checkpoints; an interrupted run continues from the last one"""

    total_steps: Annotated[int, at_least(1)] = 1_000_000
    """environment steps at most"""
    learning_starts: Annotated[int, at_least(1)] = 10_000
    """environment steps with random actions before the first update"""
    batch_size: Annotated[int, at_least(1)] = 256
    """transitions in a batch"""
    gamma: Annotated[float, between(0, 1)] = 0.99
    """discount factor"""
    tau: Annotated[float, between(0, 1)] = 0.005
    """Polyak factor of the target critics"""
    lr: Annotated[float, at_least(0)] = 3e-4
    """learning rate of actor, critics and temperature"""
    window: Annotated[int, at_least(1)] = 10
    """training episodes whose mean return is compared with D4RL's"""

    # what other scripts take and this one has no use for
    preset: Suppress[str] = "none"
    env_id: Suppress[str] = "hopper-medium-v2"
    dataset_path: Suppress[str] = ""
    max_episode_steps: Suppress[int | None] = None
    reward_scale: Suppress[float] = 1.0
    reward_shift: Suppress[float] = 0.0
    eval_episodes: Suppress[int] = 10
    final_episodes: Suppress[int | None] = None
    eval_workers: Suppress[int | None] = None


# ---------------------------------------------------------------------------------------------- SAC


class Agent(nn.Module):
    """π, Q, Q̄, log α, and what has to be remembered: π at D4RL's medium return, and the last episodes' returns."""

    def __init__(self, obs_dim: int, action_dim: int, window: int):
        super().__init__()
        self.actor = mlp(obs_dim, 2, 2 * action_dim)
        self.critic = ensemble_mlp(2, obs_dim + action_dim, 2, 1)
        self.critic_target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.medium = copy.deepcopy(self.actor).requires_grad_(False)
        self.register_buffer("medium_step", torch.tensor(0))
        self.register_buffer("returns", torch.full((window,), -math.inf, dtype=torch.float64))


def sample(actor: nn.Module, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a = tanh(u), u ~ N(mean, std): actions (B, A) and log π(a|s) (B,)."""
    mean, log_std = actor(obs).chunk(2, dim=-1)
    log_std = log_std.clamp(-20.0, 2.0)
    u = mean + log_std.exp() * torch.randn_like(mean)
    return torch.tanh(u), gaussian_log_prob(u, mean, log_std) - tanh_log_det(u)


class Memory:
    """All transitions in the order in which they came: rows of (obs, action, next_obs, reward, terminated, ended)."""

    def __init__(self, size: int, obs_dim: int, action_dim: int, device: torch.device):
        self.widths = [obs_dim, action_dim, obs_dim, 1, 1, 1]
        self.table, self.length = room(size, sum(self.widths), device=device), 0
        self.size = torch.zeros((), dtype=torch.float64, device=device)  # read inside compiled steps

    def add(self, *row) -> None:
        self.table[self.length] = torch.as_tensor(np.concatenate([np.atleast_1d(x) for x in row]))
        self.length += 1
        self.size.fill_(self.length)

    def sample(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        rows = (torch.rand(batch_size, dtype=torch.float64, device=self.table.device) * self.size).long()
        return self.table[rows].split(self.widths, dim=1)

    def state_dict(self) -> dict:
        return {"table": self.table[: self.length].clone()}

    def load_state_dict(self, state: dict) -> None:
        self.length = len(state["table"])
        self.table[: self.length] = state["table"]
        self.size.fill_(self.length)


def training_step(args: Args, memory: Memory, agent: Agent, optimizers: dict):
    """One update of SAC: critics, actor, temperature, targets."""
    actor_params, critic_params = list(agent.actor.parameters()), list(agent.critic.parameters())
    target_entropy = -float(memory.widths[1])

    def q_values(critic, obs, actions):
        x = torch.cat([obs, actions], dim=-1)
        return critic(x.expand(2, *x.shape)).squeeze(-1)

    def gradients():
        obs, actions, next_obs, rewards, terminated, _ = memory.sample(args.batch_size)
        alpha = agent.log_alpha.exp().detach()
        # y = r + γ (1 - d) [ min_i Q̄_i(s', a') - α log π(a'|s') ]
        with torch.no_grad():
            next_actions, next_log_prob = sample(agent.actor, next_obs)
            next_v = q_values(agent.critic_target, next_obs, next_actions).amin(0) - alpha * next_log_prob
            y = rewards[:, 0] + args.gamma * (1 - terminated[:, 0]) * next_v
        critic_loss = ((q_values(agent.critic, obs, actions) - y) ** 2).mean(1).sum()
        new_actions, log_prob = sample(agent.actor, obs)
        actor_loss = (alpha * log_prob - q_values(agent.critic, obs, new_actions).amin(0)).mean()
        alpha_loss = -agent.log_alpha * (log_prob.detach() + target_entropy).mean()
        return (
            torch.autograd.grad(critic_loss, critic_params),
            torch.autograd.grad(actor_loss, actor_params),
            torch.autograd.grad(alpha_loss, [agent.log_alpha]),
            {"critic_loss": critic_loss.detach(), "alpha": alpha, "entropy": -log_prob.detach().mean()},
        )

    gradients = steps.compiled(gradients, args.compile)

    def step():
        critic_grads, actor_grads, alpha_grads, metrics = gradients()
        optimizers["critic_optimizer"].step(critic_grads)
        optimizers["actor_optimizer"].step(actor_grads)
        optimizers["alpha_optimizer"].step(alpha_grads)
        polyak(agent.critic_target, agent.critic, args.tau)
        return metrics

    return step


def learn(args: Args, run: Run, task: tasks.Task, agent: Agent, memory: Memory, device: torch.device) -> None:
    """Train until the mean return of the last `window` episodes is D4RL's expert's, or the steps are used up."""
    goals = D4RL_RETURNS[args.robot]
    optimizers = dict(
        actor_optimizer=Adam(agent.actor.parameters(), args.lr),
        critic_optimizer=Adam(agent.critic.parameters(), args.lr),
        alpha_optimizer=Adam([agent.log_alpha], args.lr),
    )
    stepper = steps.Stepper(training_step(args, memory, agent, optimizers), device, args.compile, steps_per_graph=1)
    env = envs.Episodes(envs.make_env(task), args.seed)
    state = {"agent": agent, **optimizers, "memory": memory, "env": env, "stepper": stepper}
    loop = Loop(run, "sac", args.total_steps, state, device)
    if loop.done:
        return
    for step in loop:
        obs = torch.as_tensor(env.obs, dtype=torch.float32, device=device)
        if step > args.learning_starts:
            with torch.no_grad():
                action = sample(agent.actor, obs[None])[0][0].cpu()
            stepper.run(1)
        else:
            action = torch.empty(memory.widths[1]).uniform_(-1, 1)
        next_obs, reward, terminated, episodic_return = env.step(action.numpy())
        memory.add(obs.cpu(), action, next_obs, reward, terminated, episodic_return is not None)
        if episodic_return is None:
            continue
        agent.returns.copy_(torch.cat([agent.returns[1:], agent.returns.new_tensor([episodic_return])]))
        mean = agent.returns.mean().item()
        if not agent.medium_step and mean >= goals["medium"][0]:
            agent.medium.load_state_dict(agent.actor.state_dict())
            agent.medium_step.fill_(step)
        if mean >= goals["expert"][0]:
            loop.total = step  # the last one
        run.last_score = mean
        run.log("sac", step, {"sac/episodic_return": episodic_return,
                              **{f"sac/{name}": value for name, value in stepper.means().items()}})  # fmt: skip


# ---------------------------------------------------------------------------------------------- data


def d4rl_policy(path: str) -> nn.Module:
    """The policy that made a file of D4RL's, from the file. Raises UserError where there is none."""
    try:
        with h5py.File(path, "r") as file:
            layers = [
                {k: torch.as_tensor(file[f"metadata/policy/{name}/{k}"][()]) for k in ("weight", "bias")}
                for name in ("fc0", "fc1", "last_fc", "last_fc_log_std")
            ]
    except (OSError, KeyError) as error:
        raise cli.UserError(f"{path} holds no policy of D4RL's ({error}); give a medium-v2 file of D4RL's") from error
    head = {k: torch.cat([layers[2][k], layers[3][k]]) for k in ("weight", "bias")}
    net = mlp(layers[0]["weight"].shape[1], 2, len(head["bias"]))
    for linear, values in zip((net[0], net[2], net[4]), (*layers[:2], head), strict=True):
        linear.load_state_dict(values)
    return net.requires_grad_(False)


@torch.no_grad()
def play(task: tasks.Task, actor: nn.Module, rows: int, seed: int, title: str) -> dict[str, np.ndarray]:
    """`rows` transitions of a sampled policy, in D4RL's layout."""
    env, columns = envs.Episodes(envs.make_env(task), seed), []
    for _ in tqdm(range(rows), desc=title, unit="step", miniters=1):
        obs = env.obs
        action = sample(actor, torch.as_tensor(obs, dtype=torch.float32)[None])[0][0].numpy()
        _, reward, terminated, episodic_return = env.step(action)
        columns.append((obs, action, reward, terminated, episodic_return is not None and not terminated))
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    return {name: np.array(column) for name, column in zip(names, zip(*columns, strict=True), strict=True)}


def replayed(memory: Memory, length: int, rows: int) -> dict[str, np.ndarray]:
    """The first `length` transitions of SAC's buffer; where they are more than `rows`, episodes at even intervals."""
    obs, actions, _, rewards, terminated, ended = (
        x.cpu().numpy() for x in memory.table[:length].split(memory.widths, dim=1)
    )
    terminals, timeouts = terminated[:, 0] > 0, (ended[:, 0] > 0) & (terminated[:, 0] == 0)
    episode = np.concatenate([[0], np.cumsum(ended[:-1, 0])]).astype(int)
    share = min(1.0, rows / length)
    keep = np.floor((episode + 1) * share) > np.floor(episode * share)
    columns = dict(observations=obs, actions=actions, rewards=rewards[:, 0], terminals=terminals, timeouts=timeouts)
    return {name: column[keep][:rows] for name, column in columns.items()}


def episode_returns(data: dict[str, np.ndarray]) -> np.ndarray:
    """Returns of the episodes that came to their end."""
    ends = np.flatnonzero(data["terminals"] | data["timeouts"])
    return np.diff(np.cumsum(data["rewards"].astype(np.float64))[ends], prepend=0.0)


def write(path: Path, data: dict[str, np.ndarray], source: str) -> None:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs["source"] = source
        for name, column in data.items():
            column = column if column.dtype == bool else column.astype(np.float32)
            file.create_dataset(name, data=column, compression="gzip", compression_opts=9, shuffle=True)
    write_atomic(path, buffer.getbuffer())


def main() -> None:
    args = cli.parse(Args, {}, {})
    device = cli.resolve_device(args.device)
    steps.setup(device, args.seed, args.deterministic, args.matmul)
    args = replace(args, compile=args.compile and steps.can_compile(device))
    folder = Path(args.out or os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
    paths = {quality: folder / f"{args.robot}_{quality.replace('-', '_')}-v2.hdf5" for quality in QUALITIES}
    missing = [quality for quality in args.files if not paths[quality].exists()]
    if not missing:
        which = "all" if set(args.files) == set(QUALITIES) else "these"
        raise cli.UserError(f"{folder} holds {which} files of {args.robot} already; choose another --out")
    medium = d4rl_policy(args.medium_policy) if args.medium_policy else None
    make_folder(folder, "--out")

    task = tasks.resolve(f"{args.robot}-medium-v2")
    seed_everything(args.seed)
    env = envs.make_env(task)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    agent = Agent(obs_dim, action_dim, args.window).to(device)
    actors, data = {"random": (copy.deepcopy(agent.actor).cpu(), "an untrained policy")}, {}
    if medium is not None:
        actors["medium"] = medium, "the policy in D4RL's own medium-v2 file"
    if not actors.keys() >= set(missing):  # the others are SAC's
        memory = Memory(args.total_steps, obs_dim, action_dim, device)
        learned = replace(args, files=QUALITIES)  # SAC's run is the same, whichever of them are made of it
        learn(args, Run(learned, f"{args.robot}__{args.exp_name}__{args.seed}", None), task, agent, memory, device)
        reached = int(agent.medium_step)
        if not reached:
            raise cli.UserError(f"SAC did not reach D4RL's medium return; give it more than {args.total_steps} steps")
        data["medium-replay"] = replayed(memory, reached, args.rows), f"what SAC saw in its first {reached:,} steps"
        actors["expert"] = agent.actor.cpu(), f"SAC after {memory.length:,} steps"
        actors.setdefault("medium", (agent.medium.cpu(), f"SAC after {reached:,} steps"))
    halves = ("medium", "expert")
    for i, quality in enumerate(("random", "expert", "medium"), start=1):
        if quality in missing or quality in halves and "medium-expert" in missing:
            actor, what = actors[quality]
            seed_everything(args.seed + i)
            data[quality] = play(task, actor, args.rows, args.seed + i, quality), what
    if "medium-expert" in missing:
        cut = [{name: x[: args.rows // 2].copy() for name, x in data[quality][0].items()} for quality in halves]
        for half in cut:  # an episode that is cut off has no next state
            half["timeouts"][-1] |= not half["terminals"][-1]
        both = {name: np.concatenate([half[name] for half in cut]) for name in cut[0]}
        data["medium-expert"] = both, "half medium, half expert"

    table = Table(title=f"{args.robot} in D4RL's physics, in {folder}", title_justify="left")
    for column in ("", "transitions", "episodes", "mean return", "D4RL's own"):
        table.add_column(column, justify="right" if column else "left")
    for quality in missing:
        rows, what = data[quality]
        returns, known = episode_returns(rows), D4RL_RETURNS[args.robot].get(quality)
        theirs = f"{known[0]:,.0f} ± {known[1]:,.0f}" if known else ""
        n = len(rows["rewards"])
        table.add_row(quality, f"{n:,}", f"{len(returns):,}", f"{returns.mean():,.0f} ± {returns.std():,.0f}", theirs)
        write(paths[quality], rows, f"{n:,} transitions of {what}, in D4RL's physics; not D4RL's rows")
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
