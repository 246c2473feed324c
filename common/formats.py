"""Reading files: HDF5 in D4RL's layout and Minari's datasets, both as arrays in D4RL's layout (Fu et al., 2020)."""

from pathlib import Path

import h5py
import numpy as np

from common.cli import UserError
from common.tasks import D4RL_IDS, minari_dataset

# What is read from a file in D4RL's layout, and its name there. qpos and qvel are MuJoCo's state at each row.
NAMES = {name: name for name in ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")}
NAMES |= {"qpos": "infos/qpos", "qvel": "infos/qvel"}


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
            found = {key: file[name] for key, name in NAMES.items() if name in file}
            for key, array in found.items():
                if not isinstance(array, h5py.Dataset) or array.dtype.kind not in "fiub":
                    raise UserError(f"{path}: {key} is no array of numbers; give a file in D4RL's layout")
            raw = {key: array[()] for key, array in found.items()}
            source = file.attrs.get("source", "D4RL" if path.stem.replace("_", "-") in D4RL_IDS else "unknown")
            return raw | {"source": source.decode() if isinstance(source, bytes) else str(source)}
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(f"{path} is not a whole HDF5 file ({error}); delete it and download it again") from error


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
