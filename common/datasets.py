"""Offline data: find the file that `--env-id` names, check it, and turn it into transitions on the device.

The layout is D4RL's (Fu et al., 2020). A dataset is found by name in four places, see `load`.
"""

import difflib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass, field, replace
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import torch
from tqdm import tqdm

from common.cli import UserError
from common.d4rl import D4RL_IDS, ROBOTS, d4rl_registry
from common.envs import make_env

DEMO = "hopper-medium-demo"
DEMO_FILE = Path(__file__).parent.parent / "datasets" / "hopper-medium-demo.hdf5"


@dataclass
class Dataset:
    """Transitions of D4RL's Q-learning view, N rows each, on one device.

    obs, next_obs (N, S) standardised once `standardise` was called; actions (N, A) in [-1, 1], next_actions those that
    the data take at next_obs (meaningless after an end); rewards and terminations (N,), the latter 1.0 only where the
    episode really ended; episode (N,) numbers the episodes; returns (number of episodes,) undiscounted; simulator is
    the Gymnasium id, source says where the data come from.
    """

    obs: torch.Tensor
    actions: torch.Tensor
    next_actions: torch.Tensor
    rewards: torch.Tensor
    next_obs: torch.Tensor
    terminations: torch.Tensor
    episode: torch.Tensor
    returns: torch.Tensor
    simulator: str
    source: str
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

    def standardise(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        """Map every observation to (obs - mean) / std, once."""
        self.obs, self.next_obs = (self.obs - mean) / std, (self.next_obs - mean) / std
        self.__post_init__()

    def head(self, n: int) -> "Dataset":
        """The first `n` transitions."""
        return self.rows(slice(n))

    def best_episodes(self, fraction: float) -> "Dataset":
        """The `fraction` of the episodes that has the highest returns."""
        n = max(1, round(fraction * len(self.returns)))
        best = self.returns.argsort(descending=True)[:n]
        return self.rows(torch.isin(self.episode, best)) if n < len(self.returns) else self

    def hold_out(self, fraction: float, n: int) -> tuple["Dataset", "Dataset"]:
        """Split off whole episodes, drawn at random but always the same: (the rest, `n` of their transitions).

        They make up `fraction` of all transitions, or one episode if that is more. With `fraction` 0, and where there
        is one episode only, nothing is split off and the second part is drawn from the first.
        """
        order = torch.randperm(len(self.returns), generator=torch.Generator().manual_seed(0)).to(self.episode.device)
        lengths = torch.bincount(self.episode, minlength=len(order))[order]
        order, lengths = order[lengths > 0], lengths[lengths > 0]
        taken = order[: max(1, int((lengths.cumsum(0) <= fraction * len(self)).sum()))]
        mask = torch.isin(self.episode, taken)
        if fraction == 0 or mask.all():
            rest = held_out = self
        else:
            rest, held_out = self.rows(~mask), self.rows(mask)
            rest.returns = self.returns.clone()
            rest.returns[taken] = -torch.inf  # none of the best episodes of what is left
        return rest, held_out.rows(torch.linspace(0, len(held_out) - 1, n, device=mask.device).long())

    def rows(self, chosen) -> "Dataset":
        columns = ("obs", "actions", "next_actions", "rewards", "next_obs", "terminations", "episode")
        return replace(self, **{name: getattr(self, name)[chosen] for name in columns})


def load(env_id: str, dataset_path: str = "", device: torch.device | str = "cpu") -> Dataset:
    """Load the data that `env_id` (or `dataset_path`) names. Raises UserError where that cannot be done."""
    simulator = simulator_of(env_id)
    if dataset_path:
        path, raw = Path(dataset_path), read_hdf5(Path(dataset_path))
    elif "/" in env_id:
        path, raw = env_id, read_minari(env_id)
    else:
        path = find_file(env_id)
        raw = read_hdf5(path)
    check(raw, simulator, path)
    view = qlearning_view(raw, max_episode_steps(simulator))
    tensors = {key: torch.as_tensor(value, device=device) for key, value in view.items()}
    return Dataset(**tensors, simulator=simulator, source=raw["source"])


# ----------------------------------------------------------------------------------------------- names


def simulator_of(env_id: str) -> str:
    """The Gymnasium id behind a dataset's name: v4 keeps the model and reward of D4RL's v2. Raises UserError."""
    if "/" in env_id:
        return minari_dataset(env_id).env_spec.id
    if env_id == DEMO or env_id in D4RL_IDS:
        return ROBOTS[env_id.split("-")[0]]
    near = difflib.get_close_matches(env_id, [*D4RL_IDS, DEMO], n=3, cutoff=0.3)
    hint = f"; the nearest names are: {', '.join(near)}" if near else f"; try {DEMO}"
    raise UserError(f"--env-id {env_id!r} is not known{hint}")


# ----------------------------------------------------------------------------------------------- files


def find_file(env_id: str) -> Path:
    """The HDF5 file of `env_id`: shipped, in $D4RL_DATASET_DIR, in ~/.d4rl/datasets, or downloaded to the latter."""
    if env_id == DEMO:
        return DEMO_FILE
    url = d4rl_registry()["DATASET_URLS"][env_id]
    name = url.rsplit("/", 1)[1]
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or Path.home() / ".d4rl" / "datasets")
    if not (folder / name).exists():
        download(url, folder / name)
    return folder / name


def download(url: str, path: Path) -> None:
    """Fetch `url` to `path`: written aside, size checked, then renamed. Raises UserError."""
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as reply, open(aside, "wb") as file:
            size = int(reply.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=f"download {path.name}") as bar:
                while block := reply.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
            if size and file.tell() != size:
                raise OSError(f"{file.tell()} of {size} bytes arrived")
        aside.replace(path)
    except (OSError, urllib.error.URLError) as error:
        aside.unlink(missing_ok=True)
        raise UserError(
            f"could not download the dataset ({error}): fetch {url} on a machine with a network and put it at {path}, "
            f"or use --env-id {DEMO}, which needs no network"
        ) from error


def read_hdf5(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file in D4RL's layout, plus its `source`. Raises UserError for a file that is not one."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; give --dataset-path an HDF5 file in D4RL's layout")
    try:
        with h5py.File(path, "r") as file:
            needed = ("observations", "actions", "rewards", "terminals")
            missing = [key for key in needed if key not in file]
            if missing:
                raise UserError(
                    f"{path} lacks {', '.join(missing)}; a file in D4RL's layout has {', '.join(needed)} "
                    "and, if episodes were cut by a time limit, timeouts"
                )
            optional = [key for key in ("timeouts", "next_observations") if key in file]
            for key in (*needed, *optional):
                if not isinstance(file[key], h5py.Dataset) or file[key].dtype.kind not in "fiub":
                    raise UserError(f"{path}: {key} is no array of numbers; give a file in D4RL's layout")
            raw = {key: file[key][()] for key in (*needed, *optional)}
            source = file.attrs.get("source", "D4RL" if path.stem.replace("_", "-") in D4RL_IDS else "unknown")
            return raw | {"source": source.decode() if isinstance(source, bytes) else str(source)}
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(f"{path} is not a whole HDF5 file ({error}); delete it and download it again") from error


def minari_dataset(env_id: str):
    """The Minari dataset `env_id`, downloaded if need be. Raises UserError."""
    import minari

    try:
        return minari.load_dataset(env_id, download=True)
    except Exception as error:  # Minari raises many kinds, from its storage to its network client
        raise UserError(
            f"Minari cannot load {env_id!r} ({error}): check the name with `minari list remote`, or download it on a "
            f"machine with a network with `minari download {env_id}`"
        ) from error


def read_minari(env_id: str) -> dict[str, np.ndarray]:
    """A Minari dataset in D4RL's layout: episodes end to end, with the true next observations."""
    episodes = list(minari_dataset(env_id).iterate_episodes())
    if not isinstance(episodes[0].observations, np.ndarray):
        raise UserError(f"{env_id} has observations of a composite kind; only flat vectors can be used")
    timeouts = [episode.truncations.copy() for episode in episodes]
    for timeout, episode in zip(timeouts, episodes, strict=True):
        timeout[-1] |= not episode.terminations[-1]  # an episode that was cut off anywhere else has no next state
    return {
        "observations": np.concatenate([episode.observations[:-1] for episode in episodes]),
        "next_observations": np.concatenate([episode.observations[1:] for episode in episodes]),
        "actions": np.concatenate([episode.actions for episode in episodes]),
        "rewards": np.concatenate([episode.rewards for episode in episodes]),
        "terminals": np.concatenate([episode.terminations for episode in episodes]),
        "timeouts": np.concatenate(timeouts),
        "source": f"Minari {env_id}",
    }


def check(raw: dict, simulator: str, path) -> None:
    """Refuse data that would train silently into nonsense. Raises UserError."""
    env = make_env(simulator)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    env.close()
    obs, actions = raw["observations"], raw["actions"]
    if obs.ndim != 2 or actions.ndim != 2 or (obs.shape[1], actions.shape[1]) != (obs_dim, action_dim):
        raise UserError(
            f"{path} has observations {obs.shape} and actions {actions.shape}, but {simulator} has {obs_dim} and "
            f"{action_dim} dimensions; name the environment that the data come from with --env-id"
        )
    lengths = {len(value) for key, value in raw.items() if key != "source"}
    if len(lengths) > 1 or min(lengths) < 2:
        raise UserError(f"the arrays of {path} have {sorted(lengths)} rows; they need the same number, 2 or more")
    for key in ("observations", "actions", "rewards", "next_observations"):
        if key in raw and not np.isfinite(raw[key]).all():
            row = int(np.argwhere(~np.isfinite(raw[key]))[0][0])
            raise UserError(f"{path} holds NaN or infinite {key} (first in row {row}); repair or remove these rows")
    largest = float(np.abs(actions).max())
    if largest > 1 + 1e-5:
        raise UserError(f"{path} holds actions up to {largest:.4g}; rescale them to [-1, 1]")


def qlearning_view(raw: dict, max_steps: int) -> dict[str, np.ndarray]:
    """D4RL's Q-learning view without its Python loop.

    next_obs[i] is the file's, else obs[i + 1]; a step that was cut off by the time limit is dropped, for its next
    state is unknown; `terminations` marks real ends alone. Without `timeouts` every `max_steps`-th step of an episode
    counts as one.
    """
    n = len(raw["rewards"]) - 1  # the last row has no successor
    terminals = raw["terminals"][:-1].astype(bool).reshape(n)
    index = np.arange(n)
    if "timeouts" in raw:
        timeouts = raw["timeouts"][:-1].astype(bool).reshape(n)
    else:
        after_terminal = np.where(np.concatenate([[True], terminals[:-1]]), index, 0)
        step = index - np.maximum.accumulate(after_terminal)
        timeouts = step % max_steps == max_steps - 1
    keep = ~timeouts
    ends = terminals | timeouts
    episode = np.concatenate([[0], np.cumsum(ends)[:-1]])
    rewards = raw["rewards"][:-1].reshape(n).astype(np.float32)
    obs = raw["observations"].astype(np.float32, copy=False)
    actions = raw["actions"].astype(np.float32, copy=False).clip(-1, 1)
    next_obs = raw["next_observations"][:-1].astype(np.float32, copy=False) if "next_observations" in raw else obs[1:]
    return {
        "obs": obs[:-1][keep],
        "actions": actions[:-1][keep],
        "next_actions": actions[1:][keep],
        "rewards": rewards[keep],
        "next_obs": next_obs[keep],
        "terminations": terminals[keep].astype(np.float32),
        "episode": episode[keep],
        "returns": np.bincount(episode, weights=rewards),
    }


def max_episode_steps(simulator: str) -> int:
    return gymnasium.spec(simulator).max_episode_steps or 1000
