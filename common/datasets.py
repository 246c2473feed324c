"""Offline data: find the file that `--env-id` names, check it, and turn it into transitions on the device.

The layout is D4RL's (Fu et al., 2020). A dataset is found by name in four places, see `load`.
"""

import contextlib
import math
import os
import urllib.error
import urllib.request
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.checkpoint import aside
from common.cli import UserError
from common.envs import is_unit, observed, unscaled_env
from common.formats import read_hdf5, read_minari
from common.owner import own
from common.tasks import DEMO, DEMOS, SHIPPED, Task, d4rl_url, limited, resolve
from common.views import flags, qlearning_view, timeouts_put_right


@dataclass
class Dataset:
    """Transitions of D4RL's Q-learning view, N rows each, on one device.

    obs, next_obs (N, S) standardised once `standardise` was called; actions (N, A) in [-1, 1], next_actions those that
    the data take at next_obs (NaN where they hold none); rewards and terminations (N,), the latter 1.0 only where the
    episode really ended; episode (N,) numbers the episodes; returns (number of episodes,) undiscounted; task is what
    they belong to, source says where the data come from, notes what was put right in them; ordered is false where rows
    do not follow one another, so that returns and next actions are unknown; states (N, nq + nv) are MuJoCo's qpos and
    qvel in each row, as the file has them, where it has them; of the Adroit hand's the scene comes behind them.
    """

    obs: torch.Tensor
    actions: torch.Tensor
    next_actions: torch.Tensor
    rewards: torch.Tensor
    next_obs: torch.Tensor
    terminations: torch.Tensor
    episode: torch.Tensor
    returns: torch.Tensor
    task: Task
    source: str
    notes: tuple[str, ...] = ()
    ordered: bool = True
    states: np.ndarray | None = None
    table: torch.Tensor = field(init=False, repr=False)

    def __len__(self) -> int:
        return len(self.rewards)

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation (+ 1e-3) of the observations, (S,) each."""
        return self.obs.mean(0), self.obs.std(0, correction=0) + 1e-3

    def __post_init__(self) -> None:
        # All transitions as one (N, 2 S + A + 2) tensor, so that a batch is gathered in one go
        columns = [self.obs, self.actions, self.next_obs, self.rewards[:, None], self.terminations[:, None]]
        self.table = torch.cat(columns, dim=1)

    def standardise(self, mean: torch.Tensor, std: torch.Tensor, clip: float = math.inf) -> None:
        """Map every observation to (obs - mean) / std, held within ± clip, once. The task's environments do so, too."""
        self.obs, self.next_obs = (((obs - mean) / std).clamp(-clip, clip) for obs in (self.obs, self.next_obs))
        self.task = replace(self.task, clip=clip)
        self.__post_init__()

    def transform_rewards(self, scale: float, shift: float) -> None:
        """Make every reward scale · r + shift, once. `returns` stay those of the rewards as they are."""
        if (scale, shift) != (1.0, 0.0):
            self.rewards = scale * self.rewards + shift
            self.__post_init__()

    def head(self, n: int) -> "Dataset":
        """The first `n` transitions."""
        return self.rows(slice(n))

    def best_episodes(self, fraction: float) -> "Dataset":
        """The `fraction` of the episodes that has the highest returns. Raises UserError where these are unknown."""
        if fraction < 1:
            self.need_order("choosing the best episodes")
        n = max(1, round(fraction * len(self.returns)))
        return self.rows(torch.isin(self.episode, self.best(n))) if n < len(self.returns) else self

    def best(self, n: int) -> torch.Tensor:
        """The numbers of the `n` episodes of highest return, (n,); copies of one, and those that have no row here, come
        after all others."""
        first_copies = self.first_copies()
        is_copy = first_copies != torch.arange(len(first_copies), device=first_copies.device)
        here = torch.isin(torch.arange(len(first_copies), device=first_copies.device), self.episode)
        returns = torch.as_tensor(self.returns, device=first_copies.device)
        return returns.where(here & ~is_copy, -torch.inf).argsort(descending=True)[:n]

    def need_order(self, what: str) -> None:
        """Raises UserError where the rows' order is lost, and with it the episodes that `what` needs."""
        if not self.ordered:
            raise UserError(f"{what} needs whole episodes, but the rows of these data do not follow one another")

    def scale(self) -> str:
        """What kind of number a score on these data is, in words."""
        if self.task.references is None:
            return "mean returns, on no scale"
        low, high = self.task.references
        if self.task.arrives:
            return "episodes that come to their goal, in percent; not D4RL's task"
        if self.task.family == "minari":
            return f"score by the dataset's own reference returns, {low:,.0f} (0) and {high:,.0f} (100)"
        if self.source.startswith("D4RL"):
            return "D4RL score"
        return "score on D4RL's scale, but these are not D4RL's data"

    def describe(self) -> str:
        """What the user should know of the data before anything is trained on them, in lines."""
        episodes = len(self.returns)
        lines = [f"{len(self):,} transitions in {episodes:,} episode{'s' * (episodes != 1)}, {self.source}"]
        lines += [*self.task.notes, *self.notes]
        if self.task.family not in ("locomotion", "antmaze") and (largest := self.largest_return_to_go()) > 1_000:
            lines.append(
                f"discounted returns to go (γ 0.99) reach {largest:,.0f}; temperature, λ and advantage weights are "
                f"meant for some hundreds: consider --reward-scale {10 ** -math.ceil(math.log10(largest / 1_000)):g}"
            )
        return "\n".join(f"data: {line}" for line in lines)

    def largest_return_to_go(self, gamma: float = 0.99) -> float:
        """The largest |r_t + γ r_{t+1} + …| of any row, up to the end of its episode."""
        episode = self.episode.cpu().numpy()
        goes_on = np.append(episode[1:] == episode[:-1], False) & (self.terminations.cpu().numpy() == 0)
        largest = value = 0.0
        for reward, more in zip(self.rewards.tolist()[::-1], goes_on.tolist()[::-1], strict=True):
            value = reward + (gamma * value if more else 0.0)
            largest = max(largest, abs(value))
        return largest

    def hold_out(self, fraction: float, n: int) -> tuple["Dataset", "Dataset"]:
        """Split off whole episodes, drawn at random but always the same: (the rest, `n` of their transitions).

        They make up `fraction` of all transitions, or one episode if that is more; copies of an episode (half of D4RL's
        cloned data of the hand is made of them) are never on both sides. With `fraction` 0, and where there is one
        episode only, nothing is split off and the second part is drawn from the first.
        """
        order = torch.randperm(len(self.returns), generator=torch.Generator().manual_seed(0)).to(self.episode.device)
        first_copy = self.first_copies()
        order = order.argsort()[first_copy].argsort(stable=True)  # each copy behind the first one
        lengths = torch.bincount(self.episode, minlength=len(order))[order]
        order, lengths = order[lengths > 0], lengths[lengths > 0]
        _, group = first_copy[order].unique_consecutive(return_inverse=True)
        together = torch.zeros_like(lengths).index_add(0, group, lengths)  # rows of each episode and its copies
        taken = order[group < max(1, int((together.cumsum(0) <= fraction * len(self)).sum()))]
        mask = torch.isin(self.episode, taken)
        if fraction == 0 or mask.all():
            rest = held_out = self
        else:
            rest, held_out = self.rows(~mask), self.rows(mask)
            rest.returns = self.returns.clone()
            rest.returns[taken] = -torch.inf  # none of the best episodes of what is left
        return rest, held_out.rows(torch.linspace(0, len(held_out) - 1, n, device=mask.device).long())

    def first_copies(self) -> torch.Tensor:
        """For each episode the first one that begins with the same transition, itself where there is none before it."""
        numbers = torch.arange(len(self.returns), device=self.episode.device)
        if not self.ordered:
            return numbers
        there = self.episode.unique()
        bits = self.table[torch.searchsorted(self.episode, there)].view(torch.int32).long()
        factors = torch.randint(1 << 62, bits.shape[1:], generator=torch.Generator().manual_seed(0)).to(bits.device)
        _, same = (bits * factors).sum(1).unique(return_inverse=True)  # a hash
        numbers[there] = torch.full_like(there, len(numbers)).scatter_reduce(0, same, there, "amin")[same]
        return numbers

    def rows(self, chosen) -> "Dataset":
        columns = ("obs", "actions", "next_actions", "rewards", "next_obs", "terminations", "episode")
        parts = {name: getattr(self, name)[chosen] for name in columns}
        if self.states is not None:
            parts["states"] = self.states[chosen.cpu().numpy() if isinstance(chosen, torch.Tensor) else chosen]
        return replace(self, **parts)


def load(
    env_id: str, dataset_path: str = "", device: torch.device | str = "cpu", max_episode_steps: int | None = None
) -> Dataset:
    """Load the data that `env_id` (or `dataset_path`) names. Raises UserError where that cannot be done.

    `max_episode_steps`: the time limit of an environment that has none.
    """
    task = observed(limited(resolve(env_id, dataset_path), max_episode_steps))
    whole = task.family == "minari" and not dataset_path
    if whole:
        path, (raw, source) = env_id, read_minari(env_id, task.keys, task.arrives)
    else:
        path = Path(dataset_path) if dataset_path else find_file(env_id)
        raw, source = read_hdf5(path, task.keys)
    if not whole:
        fill_ends(raw)
    check(raw, task, path, whole)
    moved = timeouts_put_right(raw) if task.next_infos else []
    view, notes = qlearning_view(raw, task.max_episode_steps, whole, task.goes_on, task.marked)
    if not len(view["rewards"]):
        raise UserError(f"no transition is left of {path}: every row is the last of its episode")
    if task.reach and (jumps := np.abs(view["next_obs"] - view["obs"])[:, :2].max(1) > task.reach).any():
        raise UserError(
            f"{path} has {jumps.sum():,} transitions in which the position jumps: its time-outs stand in the wrong "
            "rows, as in D4RL's v0 and v1; take the file of v2, or one that has infos/qpos and infos/qvel"
        )
    states, ordered = view.pop("states", None), view.pop("ordered")
    tensors = {key: torch.as_tensor(value, device=device) for key, value in view.items()}
    return Dataset(**tensors, states=states, ordered=ordered, task=task, source=source, notes=(*moved, *notes))


# ----------------------------------------------------------------------------------------------- files


def find_file(env_id: str) -> Path:
    """The HDF5 file of `env_id`: shipped, in $D4RL_DATASET_DIR, in ~/.d4rl/datasets, or downloaded to the latter."""
    if env_id in DEMOS:
        return SHIPPED / f"{env_id}.hdf5"
    url = d4rl_url(env_id)
    name = url.rsplit("/", 1)[1]
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
    if not (folder / name).exists():
        download(url, folder / name)
    return folder / name


def download(url: str, path: Path) -> None:
    """Fetch `url` to `path`: written aside, size checked, then renamed. Raises UserError.

    Of several processes that need the same file one fetches it, and the others wait.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = own(path.with_name(path.name + ".lock"), f"another process is downloading {path.name}", wait=True)
        try:
            if path.exists():
                return
            with urllib.request.urlopen(url, timeout=30) as reply, aside(path) as temporary:
                size = int(reply.headers.get("Content-Length") or 0)
                with (
                    open(temporary, "wb") as file,
                    tqdm(total=size or None, unit="B", unit_scale=True, desc=f"download {path.name}") as bar,
                ):
                    while block := reply.read(1 << 20):
                        file.write(block)
                        bar.update(len(block))
                    if size and file.tell() != size:
                        raise OSError(f"{file.tell()} of {size} bytes arrived")
        finally:
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink()
            lock.release()
    except (OSError, urllib.error.URLError) as error:
        raise UserError(
            f"could not download the dataset ({error}): fetch {url} on a machine with a network and put it at {path}, "
            f"or use --env-id {DEMO}, which needs no network"
        ) from error


def fill_ends(raw: dict) -> None:
    """Let next observations that are NaN at an end be the row's own: nothing is learned of them there."""
    if "next_observations" in raw:
        unknown = np.isnan(raw["next_observations"]).any(1) & np.logical_or(*flags(raw))
        if unknown.any():
            raw["next_observations"][unknown] = raw["observations"][unknown]


def check(raw: dict, task: Task, path, whole: bool) -> None:
    """Refuse data that would train silently into nonsense, and bring the actions to [-1, 1]. Raises UserError."""
    env = unscaled_env(task)
    (obs_dim,), space = env.observation_space.shape, env.action_space
    env.close()
    obs, actions = raw["observations"], raw["actions"]
    if obs.ndim != 2 or actions.ndim != 2 or (obs.shape[1], actions.shape[1]) != (obs_dim, space.shape[0]):
        raise UserError(
            f"{path} has observations {obs.shape} and actions {actions.shape}, but {task.simulator} has {obs_dim} and "
            f"{space.shape[0]} dimensions; name the environment that the data come from with --env-id"
        )
    for key, values in raw.items():
        with np.errstate(over="ignore"):
            finite = np.isfinite(values.astype(np.float32, copy=False))  # in which everything is learned
        if key not in ("qpos", "qvel", "scene") and not finite.all():
            row = int(np.argwhere(~finite)[0][0])
            remedy = "remove them and set `timeouts` in the row before each gap, after which nothing is known to follow"
            if whole:
                remedy = "leave out their episodes"
            elif key == "next_observations":
                remedy = "let them be NaN and set `timeouts` there"
            raise UserError(
                f"{path} holds NaN or infinite {key}, or such as are beyond float32's range (first in row {row}); "
                f"repair these rows, or {remedy}"
            )
    for i in range(obs_dim if obs.dtype.itemsize > 2 and obs.dtype != np.float32 else 0):
        std, offset = obs[:, i].std(dtype=np.float64), obs[:, i].mean(dtype=np.float64)
        lost = np.spacing(np.float32(abs(offset))) / 2
        if std > 1e-3 and lost > 0.05 * std:
            raise UserError(
                f"{path}: column {i} of observations varies by {std:.4g} about {offset:.4g}, which float32 rounds to "
                f"multiples of {2 * lost:.3g}; subtract the offset, in the data and in the environment"
            )
    raw["actions"] = to_unit_range(actions, space.low, space.high)
    beyond = np.abs(raw["actions"]).max(0)
    if beyond.max() > 1 + 1e-4:  # as far as rounding goes: such actions are clipped
        i = int(beyond.argmax())
        found = f"{actions[:, i].min():.4g} to {actions[:, i].max():.4g}"
        raise UserError(
            f"{path} holds actions from {found}, but {task.simulator} takes {space.low[i]:.4g} to {space.high[i]:.4g}: "
            "clip them in the file if the environment did so when they were played, else name the one that they were "
            "played in with --env-id"
        )


def to_unit_range(actions: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Actions (N, A) between `low` and `high` (A,) as policies know them, in [-1, 1]. Those of ±1 are not touched."""
    if is_unit(low, high):
        return actions
    low, high = low.astype(np.float64), high.astype(np.float64)
    return 2 * (actions - low) / (high - low) - 1
