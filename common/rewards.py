"""What rewards are turned into before a value is learned of them."""

import math
from dataclasses import replace

from common.datasets import Dataset

import numpy as np
import torch


class RewardScale:
    """Rewards over a running standard deviation of the discounted return R ← γR + r.

    It is taken over the dataset first and goes on through the online episodes; R starts at zero in each of them.
    """

    def __init__(self, gamma: float):
        self.gamma, self.now = gamma, np.zeros(1)
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # of every R so far; squares: the sum of (R - mean)²

    def __call__(self, rewards: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """The scaled rewards of steps that follow those of the last call, (T, num_envs), as `ended` says where episodes
        ended with the step."""
        returns = np.zeros(rewards.shape)
        for t in range(len(rewards)):
            returns[t] = self.gamma * self.now + rewards[t]
            self.now = np.where(ended[t], 0.0, returns[t])
        n, total, shift = returns.size, self.count + returns.size, float(returns.mean()) - self.mean
        self.squares += n * float(returns.var()) + shift**2 * self.count * n / total
        self.mean, self.count = self.mean + shift * n / total, total
        return (rewards / (math.sqrt(self.squares / total) + 1e-8)).astype(np.float32)

    def state_dict(self) -> dict:
        return vars(self) | {"now": self.now.tolist()}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state, now=np.array(state["now"]))


def scaled(data: Dataset, scale: RewardScale) -> Dataset:
    """The dataset with its rewards scaled, the first that `scale` sees."""
    ended = np.append(np.diff(data.episode.cpu()) != 0, True)
    rewards = scale(data.rewards.cpu().numpy()[:, None], ended[:, None])
    return replace(data, rewards=torch.as_tensor(rewards[:, 0], device=data.rewards.device))


def discounted_tails(data: Dataset, gamma: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The return of every step as R + c V(s_T): (R, c, T), (N,) each.

    R is discounted to the end of the step's own episode and T is the row in which that ends. After a real end nothing
    is left (c = 0), even where the episode's rows go on; where the time limit or the file cut it off, V at its last
    state stands for the rest.
    """
    rewards, terminations = data.rewards.tolist(), data.terminations.tolist()
    episode, n = data.episode.tolist(), len(data)
    tails, coefficients, ends = [0.0] * n, [0.0] * n, [0] * n
    for i in reversed(range(n)):
        if i + 1 < n and episode[i] == episode[i + 1] and not terminations[i]:
            tails[i] = rewards[i] + gamma * tails[i + 1]
            coefficients[i], ends[i] = gamma * coefficients[i + 1], ends[i + 1]
        else:
            tails[i], coefficients[i], ends[i] = rewards[i], gamma * (1 - terminations[i]), i
    return tuple(torch.tensor(column, device=data.obs.device) for column in (tails, coefficients, ends))
