"""Replay: online transitions on the device, mixed with offline ones as `--buffer` says."""

import torch

from common.datasets import Dataset


def sample(dataset: Dataset, batch_size: int) -> tuple[torch.Tensor, ...]:
    """A uniform batch (obs, actions, rewards, next_obs, terminations) and its rows (B,), drawn on the device."""
    rows = torch.randint(len(dataset), (batch_size,), device=dataset.rewards.device)
    return *split(dataset.table[rows], dataset.obs.shape[1], dataset.actions.shape[1]), rows


def split(table: torch.Tensor, obs_dim: int, action_dim: int) -> tuple[torch.Tensor, ...]:
    """Rows (B, 2 S + A + 2) of a table as (obs, actions, rewards, next_obs, terminations)."""
    obs, actions, next_obs, rewards, terminations = table.split([obs_dim, action_dim, obs_dim, 1, 1], dim=1)
    return obs, actions, rewards.squeeze(1), next_obs, terminations.squeeze(1)


class ReplayBuffer:
    """Online transitions, and the offline ones that `mode` keeps:

    half - every batch is half offline and half online; all - the whole dataset is put into the online buffer;
    part - only its `part_episodes` episodes of highest return are; none - no offline data.
    Nothing is ever overwritten: there is room for all `steps` online transitions.
    """

    def __init__(self, dataset: Dataset, steps: int, mode: str = "half", part_episodes: int = 50):
        table = dataset.table
        self.obs_dim, self.action_dim = dataset.obs.shape[1], dataset.actions.shape[1]
        self.offline = table if mode == "half" else table[:0]
        start = table[:0]
        if mode == "all":
            start = table
        elif mode == "part":
            dataset.need_order("--buffer part")
            best = torch.as_tensor(dataset.returns, device=table.device).argsort(descending=True)[:part_episodes]
            start = table[torch.isin(dataset.episode, best)]
        self.table = torch.cat([start, table.new_zeros(steps, table.shape[1])])
        self.length = len(start)
        self.size = torch.tensor(self.length, dtype=torch.float64, device=table.device)  # read inside captured steps

    def add(self, obs, action, reward: float, next_obs, terminated: bool) -> None:
        """Store one transition. `terminated` is a real end; a time limit's truncation is not one."""
        row = torch.cat([
            torch.as_tensor(obs), torch.as_tensor(action), torch.as_tensor(next_obs),
            torch.tensor([reward, float(terminated)]),
        ]).float()  # fmt: skip
        if self.table.is_cuda:
            row = row.pin_memory()  # so that the copy queues up behind the updates and nothing waits for them
        self.table[self.length].copy_(row, non_blocking=True)
        self.length += 1
        self.size.fill_(self.length)

    def sample(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        """A batch (obs, actions, rewards, next_obs, terminations) of `batch_size` rows."""
        device = self.table.device
        n_offline = batch_size // 2 if len(self.offline) else 0
        # float64 leaves no index of a buffer of millions out, and the size may grow without recompiling anything
        rows = (torch.rand(batch_size - n_offline, dtype=torch.float64, device=device) * self.size).long()
        batch = self.table[rows]
        if n_offline:
            rows = torch.randint(len(self.offline), (n_offline,), device=device)
            batch = torch.cat([batch, self.offline[rows]])
        return split(batch, self.obs_dim, self.action_dim)

    def state_dict(self) -> dict:
        return {"table": self.table[: self.length].clone(), "length": self.length}

    def load_state_dict(self, state: dict) -> None:
        self.length = state["length"]
        self.table[: self.length] = state["table"].to(self.table.device)
        self.size.fill_(self.length)
