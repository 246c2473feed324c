"""Replay: online transitions on the device, mixed with offline ones as `--buffer` says."""

import numpy as np
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


def room(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros for rows that are still to come. On a CPU they take memory as they are written to, not all at once."""
    if device.type == "cpu":  # NumPy's do, PyTorch's do not
        return torch.from_numpy(np.zeros(shape, torch.empty(0, dtype=dtype).numpy().dtype))
    return torch.zeros(shape, dtype=dtype, device=device)


class ReplayBuffer:
    """Online transitions, and the offline ones that `mode` keeps:

    half - every batch is half offline and half online; all - the whole dataset is put into the online buffer;
    part - only its `part_episodes` episodes of highest return are; none - no offline data.
    Nothing is ever overwritten: there is room for all `steps` online transitions. `extra` (N, k) are more columns.
    """

    def __init__(self, dataset: Dataset, steps: int, mode: str = "half", part_episodes: int = 50, extra=None):
        table = dataset.table if extra is None else torch.cat([dataset.table, extra], dim=1)
        self.obs_dim, self.action_dim = dataset.obs.shape[1], dataset.actions.shape[1]
        self.offline = table if mode == "half" else table[:0]
        start = table[:0]
        if mode == "all":
            start = table
        elif mode == "part":
            dataset.need_order("--buffer part")
            start = table[torch.isin(dataset.episode, dataset.best(part_episodes))]
        self.table = room(len(start) + steps, table.shape[1], device=table.device)
        self.table[: len(start)] = start
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
        self.table[self.length, : len(row)].copy_(row, non_blocking=True)
        self.length += 1
        self.size.fill_(self.length)

    def sample(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        """A batch (obs, actions, rewards, next_obs, terminations) of `batch_size` rows."""
        return split(self.rows(batch_size), self.obs_dim, self.action_dim)

    def rows(self, batch_size: int) -> torch.Tensor:
        """That batch as it stands in the table."""
        device = self.table.device
        n_offline = batch_size // 2 if len(self.offline) else 0
        # float64 leaves no index of a buffer of millions out, and the size may grow without recompiling anything
        rows = (torch.rand(batch_size - n_offline, dtype=torch.float64, device=device) * self.size).long()
        batch = self.table[rows]
        if n_offline:
            rows = torch.randint(len(self.offline), (n_offline,), device=device)
            batch = torch.cat([batch, self.offline[rows]])
        return batch

    def state_dict(self) -> dict:
        return {"table": self.table[: self.length].clone(), "length": self.length}

    def load_state_dict(self, state: dict) -> None:
        self.length = state["length"]
        self.table[: self.length] = state["table"].to(self.table.device)
        self.size.fill_(self.length)


class EpisodeBuffer(ReplayBuffer):
    """A buffer whose online rows are drawn when their episode has ended, with the return that followed each of them.

    `returns` (N,) are those of the dataset's rows. `ended` counts the rows that can be drawn.
    """

    def __init__(self, dataset: Dataset, steps: int, mode: str, returns: torch.Tensor):
        super().__init__(dataset, steps, mode, extra=returns[:, None])
        self.ended = self.length

    def add(self, *transition) -> None:
        super().add(*transition)
        self.size.fill_(self.ended)

    def end_episode(self, returns_of) -> None:
        """Give the rows since the last end `returns_of(rewards, terminations)`, (n,) of either and of what it gives."""
        episode = self.table[self.ended : self.length]
        episode[:, -1] = returns_of(episode[:, -3], episode[:, -2])
        self.ended = self.length
        self.size.fill_(self.ended)

    def sample(self, batch_size: int) -> tuple[torch.Tensor, ...]:
        """A batch (obs, actions, rewards, next_obs, terminations, returns) of `batch_size` rows."""
        rows = self.rows(batch_size)
        return *split(rows[:, :-1], self.obs_dim, self.action_dim), rows[:, -1]

    def state_dict(self) -> dict:
        return super().state_dict() | {"ended": self.ended}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.ended = state["ended"]
        self.size.fill_(self.ended)


BLOCK = 256  # rows whose priorities are summed up


class PrioritisedBuffer(ReplayBuffer):
    """Data and play in one buffer, drawn in proportion to their priorities: 1 for the data; for new rows the highest
    that there has been so far, which begins at `priority`.

    A row is found by its block's share of the sum of all, and within the block; the sums of what is written are made
    anew, so that they cannot drift. All shapes are fixed: this can stand in a captured step.
    """

    def __init__(self, dataset: Dataset, steps: int, priority: float):
        super().__init__(dataset, steps, "all")
        self.start = self.length  # of the online rows
        n = -(-len(self.table) // BLOCK)
        self.priorities = room(n, BLOCK, dtype=torch.float64, device=self.table.device)
        self.priorities.view(-1)[: self.start] = 1.0
        self.sums = self.priorities.sum(1)
        self.highest = self.sums.new_tensor(float(priority))

    def add(self, *transition) -> None:
        block = self.length // BLOCK
        self.priorities[block, self.length % BLOCK] = self.highest
        self.sums[block] = self.priorities[block].sum()
        super().add(*transition)

    def sample(self, batch_size: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """A batch (obs, actions, rewards, next_obs, terminations) and its rows (B,), one of each B-th of the sum."""
        u = torch.rand(batch_size, dtype=torch.float64, device=self.sums.device)
        rows = self.find((torch.arange(batch_size, device=u.device) + u) * self.sums.sum() / batch_size)
        return split(self.table[rows], self.obs_dim, self.action_dim), rows

    def find(self, mass: torch.Tensor) -> torch.Tensor:
        """The rows (B,) in which the running sum of all priorities passes `mass` (B,)."""
        ends = self.sums.cumsum(0)
        block = torch.searchsorted(ends, mass, right=True).clamp(max=len(ends) - 1)
        within = mass - (ends - self.sums)[block]
        place = torch.searchsorted(self.priorities[block].cumsum(1), within[:, None], right=True)[:, 0]
        rows = block * BLOCK + place.clamp(max=BLOCK - 1)  # a sum that was rounded may end a little early
        return torch.minimum(rows, self.size.long() - 1)

    def update(self, rows: torch.Tensor, priorities: torch.Tensor) -> None:
        """Give `rows` (B,) new priorities (B,), equal ones where a row stands there twice."""
        priorities = priorities.double()
        self.priorities.view(-1)[rows] = priorities
        blocks = rows // BLOCK
        self.sums[blocks] = self.priorities[blocks].sum(1)
        self.highest.copy_(torch.maximum(self.highest, priorities.max()))

    def either(self, batch_size: int) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """A uniform batch of the data, and one of what was played."""
        u = torch.rand(2, batch_size, dtype=torch.float64, device=self.table.device)
        rows = (u[0] * self.start).long(), self.start + (u[1] * (self.size - self.start)).long()
        return tuple(split(self.table[r], self.obs_dim, self.action_dim) for r in rows)

    def state_dict(self) -> dict:
        return super().state_dict() | {"priorities": self.priorities, "highest": self.highest}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.priorities.copy_(state["priorities"])
        self.sums.copy_(self.priorities.sum(1))
        self.highest.copy_(state["highest"])


def experience(args, data) -> ReplayBuffer:
    """What online batches are drawn from, as --buffer says: the dataset, or part of it, and all that is played."""
    return ReplayBuffer(data, args.online_steps, args.buffer, args.part_episodes)


def returns_to_go(
    rewards, terminations, gamma: float, episode=None, failure: float | None = None, to_end: bool = False
) -> torch.Tensor:
    """G_t = r_t + γ (1 - d_t) G_{t+1} of each row (N,), never across the end of an `episode` (N,), 0 behind it.

    Where a task's rewards say only whether it has failed so far, they are all `failure` in an episode that never
    succeeds: that one goes on failing, r / (1 - γ), without a bound where γ = 1. Elsewhere (`failure` None) what
    follows a time limit is unknown, and a return near it is too low: the last 1 / (1 - γ) rows of an episode that was
    cut off have -∞, so no bound, but where `to_end` asks for all of them.
    """
    r, d = rewards.double().cpu().numpy(), terminations.double().cpu().numpy()
    numbers = np.zeros(len(r), int) if episode is None else episode.cpu().numpy()
    ends = np.flatnonzero(np.append(numbers[1:] != numbers[:-1], True)) + 1
    returns, start, horizon = np.zeros(len(r)), 0, round(1 / (1 - gamma)) if gamma < 1 else len(r)
    for stop in ends:
        value = 0.0
        for i in range(stop - 1, start - 1, -1):
            returns[i] = value = r[i] + gamma * (1 - d[i]) * value
        if failure is not None and np.allclose(r[start:stop], failure):
            returns[start:stop] = failure / (1 - gamma) if gamma < 1 else -np.inf
        elif failure is None and not to_end and not d[stop - 1]:
            returns[max(start, stop - horizon) : stop] = -np.inf
        start = stop
    return torch.as_tensor(returns, dtype=rewards.dtype, device=rewards.device)
