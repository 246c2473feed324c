"""What a policy really gets from states of the data, in the simulator: the truth that a critic is measured by."""

import math

from common import agreement, datasets
from common.cli import UserError
from common.datasets import Dataset
from common.envs import make_env, standardised
from common.nn import gaussian_log_prob, tanh_log_det
from common.policies import Policy
from common.probe import STATES

import gymnasium as gym
import numpy as np
import torch


def dataset(args) -> Dataset:
    """The data of a run with these arguments."""
    return datasets.load(args.env_id, args.dataset_path, max_episode_steps=args.max_episode_steps)


def held_out(args, data: Dataset) -> Dataset:
    """The rows of its `data` that a run with these arguments holds out, as far as the simulator can be put into them.

    They are not standardised. Raises UserError where there is none, as experiments ask before their first run.
    """
    data = data.hold_out(args.holdout, STATES)[1]
    return data.rows(torch.as_tensor(rebuilt(data)))


def check(args) -> None:
    """Refuse before any run what no simulator can answer after it. Raises UserError."""
    if getattr(args, "scale_rewards", False):
        raise UserError(
            "O2PPO's V is no return where rewards are divided by a running deviation; leave it out of --algorithms, "
            "or run it alone, --algorithms o2ppo --run-flags=--no-scale-rewards"
        )
    held_out(args, dataset(args))


def rebuilt(data: Dataset) -> np.ndarray:
    """The rows of `data`, not standardised, whose state the simulator can be put into, (n,).

    Raises UserError where there is none.
    """
    env = make_env(data.task)
    env.reset(seed=0)
    rows = np.flatnonzero([place(env, data, row) for row in range(len(data))])
    env.close()
    if not len(rows):
        raise UserError(
            f"{data.task.simulator} cannot be put into states of these data, which this needs; choose an --env-id "
            "whose observations show the whole state, as hopper's do"
        )
    return rows


def place(env: gym.Env, data: Dataset, row: int) -> bool:
    """Put an environment that was reset into the state of a row; whether that can be done."""
    if hasattr(env.unwrapped, "place"):  # the Adroit hand's scene is in its episode's first row, which may not be here
        return False
    own = None if data.states is None else data.states[row]
    return agreement.set_state(env, data.task, data.obs[row].numpy(), own)


@torch.no_grad()
def returns_ahead(
    pool: list[gym.Env], data: Dataset, rows: np.ndarray, net: Policy, args, first=None, luck=None, noisy=True
) -> np.ndarray:
    """What Q ought to be: the discounted return of one episode from the state of each of `rows` (n,), side by side.

    The first action is `first` (n, A), None: π_off's own, whose network is `net`. From then on π_off plays as in the
    Bellman equation of the script whose arguments `args` are (see `acts`) or, not `noisy`, by its most likely actions.
    Episodes with the same number in `luck` (n,) meet the same noise, and so differ by their first action alone; None:
    each has its own. Each may last as long as the task's whole episodes. `data` are not standardised; `pool` grows to
    as many environments as are needed.
    """
    pool += [make_env(data.task) for _ in rows[len(pool) :]]
    for env, row in zip(pool, rows, strict=False):
        env.reset(seed=0)
        place(env, data, row)
    luck = np.arange(len(rows)) if luck is None else luck
    seen = net.state_mean.numpy(), net.state_std.numpy(), net.clip
    obs, returns, running = data.obs.numpy()[rows].astype(np.float64), np.zeros(len(rows)), np.arange(len(rows))
    for t in range(data.task.max_episode_steps):
        noise = torch.randn(luck.max() + 1, data.actions.shape[1])[luck[running]]
        actions, bonus = acts(net, torch.as_tensor(standardised(obs[running], *seen)), noise if noisy else None, args)
        if t == 0 and first is not None:  # whose own entropy is no part of Q
            actions, bonus = first, torch.zeros(len(rows))
        actions, bonus = actions.numpy(), bonus.numpy()
        ends = np.zeros(len(running), bool)
        for j, i in enumerate(running):
            obs[i], reward, ends[j], *_ = pool[i].step(actions[j])
            returns[i] += args.gamma**t * (args.reward_scale * reward + args.reward_shift + bonus[j])
        running = running[~ends]
        if not len(running):
            break
    return returns


def acts(net: Policy, obs: torch.Tensor, noise: torch.Tensor | None, args) -> tuple[torch.Tensor, torch.Tensor]:
    """What π_off does in a Bellman equation (B, A), given standard normal noise, and what that adds to the reward (B,).

    SAC's are drawn, and their entropy counts, -α log π; a Gaussian's are drawn, as wide as O2PPO lets them be; TD3's
    are its most likely ones with the clipped noise of target actions. Without noise: its most likely actions, and
    nothing.
    """
    nothing = torch.zeros(len(obs))
    if noise is None:
        return net.mode(obs), nothing
    if net.kind == "deterministic":
        smoothing = getattr(args, "policy_noise", 0.0) * noise
        most = getattr(args, "noise_clip", 0.0)
        return (net.mode(obs) + smoothing.clamp(-most, most)).clamp(-1, 1), nothing
    mean, log_std = net.spread(obs)
    most = getattr(args, "max_std_start", None) or math.inf  # O2PPO narrows the policy that it reads
    u = mean + log_std.exp().clamp(max=most) * noise
    if net.kind == "gaussian":
        return u.clamp(-1, 1), nothing
    return torch.tanh(u), -getattr(args, "alpha", 0.0) * (gaussian_log_prob(u, mean, log_std) - tanh_log_det(u))
