"""Evaluation: whole episodes side by side, in environments of their own, and D4RL's score of their returns."""

import copy
import os
import pickle
import signal
import threading
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from multiprocessing import get_context, parent_process

import gymnasium as gym
import numpy as np
import torch

from common.cli import UserError
from common.envs import make_env, standardised
from common.tasks import Task

FRESH = 1 << 60  # seeds from here on are no training episode's, whatever --seed is, and no evaluation's


class Evaluator:
    """Plays whole episodes side by side, in environments of its own, from the same start states every time.

    With `workers`, that many processes share the episodes, each with a copy of the policy: only weights and returns
    pass between them, no single step. Policies act on a CPU and on one thread wherever they are played, so that the
    number of workers changes no bit of a return.

    `final` evaluations may have more episodes: those of every other one and further ones. `last` are the returns of the
    last evaluation, (its episodes,).
    """

    def __init__(self, task: Task, mean: torch.Tensor, std: torch.Tensor, episodes: int = 10, seed: int = 10_000,
                 workers: int = 0, final: int | None = None):  # fmt: skip
        # The seeds start far from the training environment's: its first 10,000 episodes start elsewhere
        self.seeds = list(range(seed, seed + episodes))
        self.final_seeds = list(range(seed, seed + max(episodes, final or 0)))
        self.last = np.zeros(0)
        self.task, self.mean, self.std = task, mean.cpu().numpy(), std.cpu().numpy()
        self.seen = self.mean, self.std, task.clip
        self.envs: list[gym.Env] = []
        self.workers = min(workers, episodes)
        if workers:
            check_pickles(task)
        self.pool = start_workers(self.workers) if workers else None
        self.reference = task.references
        self.count, self.seconds = 0, 0.0  # evaluations so far, and the time that they took

    def returns(self, policy, device: torch.device | str, seeds=None, observe=None) -> np.ndarray:
        """Undiscounted return of one episode per seed, (episodes,). `policy` maps (B, S) on `device` to (B, A).

        A policy that remembers may `observe` the rewards of each step, (B,) numbers of NumPy's.
        """
        return self.outcomes(policy, device, seeds, observe)[0]

    def outcomes(self, policy, device: torch.device | str, seeds=None, observe=None) -> np.ndarray:
        """Returns, and whether episodes were a success in any step, NaN where no step says so: (2, episodes).

        Workers need a `policy` that is a method of a module, which they get whole; any other is played here, on
        `device`. `seeds`: others than those of every evaluation.
        """
        seeds = seeds or self.seeds
        whole = isinstance(getattr(policy, "__self__", None), torch.nn.Module)
        # A copy, as workers have: what a policy keeps of an evaluation does not reach the next one
        if whole and (observe is None or torch.device(device).type != "cpu"):
            policy, device = getattr(copy.deepcopy(policy.__self__).cpu(), policy.__name__), "cpu"
        if self.pool is None or not whole:
            self.envs += [make_env(self.task, evaluation=True) for _ in seeds[len(self.envs) :]]
            return play(self.envs, seeds, range(len(seeds)), self.seen, policy, device, observe)
        packed = pickle.dumps((self.task, seeds, self.seen, policy))  # once, not once for every worker
        shares = np.array_split(range(len(seeds)), self.workers)
        try:
            return np.concatenate(list(self.pool.map(play_share, [packed] * len(shares), shares)), axis=1)
        except BrokenExecutor as error:
            raise UserError("an evaluation process died, killed or out of memory; try --eval-workers 0") from error

    def fresh_returns(self, policy, device: torch.device | str, episodes: int | None = None) -> np.ndarray:
        """Returns from start states that no evaluation has seen, (episodes,); None: ten
        for each of its episodes, up to 100, or as many as those.

        The best of many scores on the same start states is partly luck with these; here it has none.
        """
        n = len(self.seeds)
        end = FRESH + (episodes or min(10 * n, max(n, 100)))
        parts = [range(start, min(start + n, end)) for start in range(FRESH, end, n)]
        return np.concatenate([self.returns(policy, device, part) for part in parts])

    def paths(self, policy, device: torch.device | str) -> list[tuple[np.ndarray, bool]]:
        """Where an ant went in each episode, its first two observations (steps + 1, 2), and whether it arrived."""
        envs = [Traced(make_env(self.task, evaluation=True)) for _ in self.seeds]
        outcomes = play(envs, self.seeds, range(len(envs)), self.seen, policy, device)
        return [(np.array(env.path), success == 1) for env, success in zip(envs, outcomes[1], strict=True)]

    def score(self, returns: np.ndarray) -> float:
        """The mean return, D4RL's way: 0 is a random policy's, 100 an expert's. Itself where the task knows no such."""
        if self.reference is None:
            return float(np.mean(returns))
        low, high = self.reference
        return float(100 * (np.mean(returns) - low) / (high - low))

    def scalars(self, policy, device: torch.device | str, final: bool = False) -> dict[str, float]:
        """The "score" of an evaluation, and its rate of "success" where the environment knows what that is."""
        start = time.perf_counter()
        self.last, successes = self.outcomes(policy, device, self.final_seeds if final else None)
        self.count, self.seconds = self.count + 1, self.seconds + time.perf_counter() - start
        rate = {} if np.isnan(successes).any() else {"success": float(successes.mean())}
        return {"score": self.score(self.last)} | rate

    def __call__(self, policy, device: torch.device | str, final: bool = False) -> float:
        return self.scalars(policy, device, final)["score"]


class Traced(gym.Wrapper):
    """Keeps the first two observations of every step in `path`."""

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.path = [obs[:2]]
        return obs, info

    def step(self, action):
        obs, *rest = self.env.step(action)
        self.path.append(obs[:2])
        return obs, *rest


@torch.no_grad()
def play(envs: list[gym.Env], seeds, share, seen: tuple, policy, device, observe=None) -> np.ndarray:
    """One episode for each of `seeds` that `share` (n,) counts out, all acted on at once: their outcomes (2, n).

    `observe` is called with the rewards (seeds,) of each step.

    A policy always acts on a row for each of `seeds`, those of others being zero: the order in which a product is
    summed may depend on the number of rows, on their place in memory and on the number of threads. `seen`: how policies
    see observations, mean and std (S,) and where these are cut off.
    """
    envs = dict(zip(share, envs, strict=False))
    starts = {i: env.reset(seed=int(seeds[i]))[0] for i, env in envs.items()}
    obs = np.zeros((len(seeds), len(seen[0])))
    total, running, success = np.zeros(len(seeds)), np.zeros(len(seeds), bool), np.full(len(seeds), np.nan)
    for i, start in starts.items():
        obs[i], running[i] = start, True
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        while running.any():
            x = standardised(obs, *seen)  # at once for all, as `Standardised` does for one
            actions = policy(torch.tensor(x, device=device)).cpu().numpy()
            rewards = np.zeros(len(seeds))
            for i in np.flatnonzero(running):  # a vector environment would step those that are done, too
                obs[i], rewards[i], terminated, truncated, info = envs[i].step(actions[i])
                total[i] += rewards[i]
                success[i] = np.fmax(success[i], info.get("success", info.get("is_success", np.nan)))
                running[i] = not (terminated or truncated)
            if observe:
                observe(rewards)
    finally:
        torch.set_num_threads(threads)
    return np.stack([total, success])[:, list(envs)]


def make_evaluator(args, data, mean: torch.Tensor, std: torch.Tensor) -> Evaluator:
    """The evaluator of `data`'s environment that `--eval-episodes` and `--eval-workers` ask for.

    Left open, there is a worker for each episode on a GPU, as far as there are cores: a run there is so short that
    evaluations would take a tenth of it. On a CPU there is none, so that no run depends on how many cores it has.
    """
    workers = args.eval_workers
    if workers is None:
        workers = min(args.eval_episodes, torch.get_num_threads()) if data.obs.is_cuda else 0
    return Evaluator(data.task, mean, std, args.eval_episodes, workers=workers, final=args.final_episodes)


# ---------------------------------------------------------------------------------------------- workers


def check_pickles(task: Task) -> None:
    """Refuse what no other process can be given, before anything is trained. Raises UserError."""
    try:
        pickle.dumps(task)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"{task.spec.id} cannot be played in other processes, to which its arguments do not go ({error}); add "
            "--eval-workers 0"
        ) from error


def start_workers(n: int) -> ProcessPoolExecutor:
    """`n` processes that live as long as this one. Fresh ones: a fork of a process that uses a GPU cannot go on."""
    pool = ProcessPoolExecutor(n, get_context("spawn"), initializer=start_worker)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for the process that trains
    for _ in range(n):
        pool.submit(int)  # one process for each, now, so that they are ready when the first evaluation comes
    signal.signal(signal.SIGINT, handler)
    return pool


def start_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()  # even if it is killed


worker_envs: list[gym.Env] = []  # of a worker, kept from one evaluation to the next


def play_share(packed: bytes, share: np.ndarray) -> np.ndarray:
    """In a worker: the outcomes of the episodes that `share` counts out."""
    task, seeds, *how = pickle.loads(packed)
    while len(worker_envs) < len(share):
        worker_envs.append(make_env(task, evaluation=True))
    return play(worker_envs, seeds, share, *how, "cpu")
