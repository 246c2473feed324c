"""Reading files: HDF5 in D4RL's layout and Minari's datasets, both as arrays in D4RL's layout (Fu et al., 2020)."""

import dataclasses
import errno
import importlib
import math
import os
from pathlib import Path

import h5py
import numpy as np

from common.errors import UserError, is_out_of_memory
from common.spaces import joined
from common.tasks import is_d4rls, minari_dataset

# What is read, and its names in a file: ends have other names in Gymnasium than they had in D4RL. qpos and qvel are
# MuJoCo's state at each row, scene what of an Adroit model is drawn at each reset.
NAMES = {
    "observations": ("observations",),
    "actions": ("actions",),
    "rewards": ("rewards",),
    "terminals": ("terminals", "terminations"),
    "timeouts": ("timeouts", "truncations"),
    "next_observations": ("next_observations",),
    "qpos": ("infos/qpos",),
    "qvel": ("infos/qvel",),
    "scene": ("infos/desired_orien", "infos/door_body_pos", "infos/board_pos"),
}
NEEDED = ("observations", "actions", "rewards", "terminals")
OBSERVATIONS = ("observations", "next_observations")
VECTORS = (*OBSERVATIONS, "actions", "qpos", "qvel", "scene")


def read_hdf5(path: Path, keys: tuple[str, ...] = ()) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of a file in D4RL's layout, and where they come from. Raises UserError for a file that is not one.

    Everything that a file declares is checked before anything of it is read. Where the environment observes a
    dictionary, whose parts `keys` are joined in that order, the file may hold them so, or as a group of such parts.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; give --dataset-path an HDF5 file in D4RL's layout")
    try:
        with h5py.File(path, "r") as file:
            found = {key: present(file, names) for key, names in names_in(file, keys).items()}
            check_declared(path, found)
            raw = {key: arrays[0][()] for key, arrays in found.items() if arrays}
            for key in OBSERVATIONS:
                if parts := {part: raw.pop(f"{key}/{part}") for part in keys if f"{key}/{part}" in raw}:
                    raw[key] = joined(parts, keys)
            for key in ("terminals", "timeouts"):
                if found[key]:  # under both names: an end is an end
                    raw[key] = np.any([flag(path, array) for array in found[key]], axis=0)
            source = file.attrs.get("source", "D4RL" if is_d4rls(path) else "unknown")
            return raw, source.decode() if isinstance(source, bytes) else str(source)
    except (OSError, RuntimeError, KeyError) as error:
        raise UserError(unreadable(path, error)) from error
    except MemoryError as error:
        raise UserError(f"{path} does not fit into the memory of this machine; use fewer rows of it") from error


def present(file: h5py.File, names: tuple[str, ...]) -> list:
    """What the file has of these names. Raises UserError where one is a link that leads nowhere."""
    for name in names:
        link = file.get(name, getlink=True) if name in file else None
        if isinstance(link, h5py.ExternalLink | h5py.SoftLink) and file.get(name) is None:
            there = f"{link.path} in {link.filename}" if isinstance(link, h5py.ExternalLink) else link.path
            raise UserError(
                f"{file.filename}: {name} leads to {there}, where nothing can be opened; put that there, or the array "
                "itself in the place of the link"
            )
    return [file[name] for name in names if name in file]


def flag(path: Path, array: h5py.Dataset) -> np.ndarray:
    """An array of 0 and 1 as booleans, (N,). Raises UserError for other numbers, whose meaning nobody knows."""
    values = array[()].reshape(-1)
    if (other := values[(values != 0) & (values != 1)]).size:
        raise UserError(
            f"{path}: {array.name.lstrip('/')} holds {other[0]:g}, but is a flag: write 1 in the last row of each "
            "episode that ended so, and 0 in all others"
        )
    return values != 0


def names_in(file: h5py.File, keys: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """`NAMES`, with the parts of observations that a file has in groups. Raises UserError where one is missing."""
    names = {}
    for key, its in NAMES.items():
        if not (key in OBSERVATIONS and isinstance(file.get(key), h5py.Group)):
            names[key] = its
            continue
        if missing := [part for part in keys if part not in file[key]]:
            raise UserError(
                f"{file.filename}: the group {key} lacks {', '.join(missing)}, which the environment observes"
            )
        if not keys:
            raise UserError(f"{file.filename}: {key} is no array of numbers but a group, and no dictionary is observed")
        names |= {f"{key}/{part}": (f"{key}/{part}",) for part in keys}
    return names


def unreadable(path: Path | str, error: Exception, damaged: str = "") -> str:
    """What to do about a file that HDF5 cannot read: a good one is never called `damaged`."""
    words, number = str(error), getattr(error, "errno", None)
    if number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
        return f"{path} lies on a disk without file locks ({words}); set HDF5_USE_FILE_LOCKING=FALSE and start again"
    if number in (errno.EAGAIN, errno.EWOULDBLOCK) or "open for write" in words:
        return f"{path} is open in another program ({words}); close it there and start again"
    if number in (errno.EACCES, errno.EPERM):
        return f"{path} may not be read ({words}); change its permissions"
    return f"{path} {damaged or f'is not a whole HDF5 file ({words}); copy it again from where it came from'}"


def check_declared(path: Path, found: dict[str, list]) -> None:
    """Refuse a file by what it declares of its arrays. Raises UserError."""
    there = {key.split("/")[0] for key, arrays in found.items() if arrays}
    missing = [key for key in NEEDED if key not in there]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}; a file in D4RL's layout has {', '.join(NEEDED)} and, if episodes were "
            "cut by a time limit, timeouts"
        )
    rows = None
    for key, arrays in found.items():
        for array in arrays:
            name = array.name.lstrip("/")
            if not isinstance(array, h5py.Dataset) or array.dtype.kind not in "fiub":
                raise UserError(f"{path}: {name} is no array of numbers; give a file in D4RL's layout")
            shape = array.shape or ()
            rows = (*shape, 0)[0] if rows is None else rows  # of the observations, which come first
            if "/" in key:  # a part of observations, whatever its shape
                what, fits = "vector", shape[:1] == (rows,)
            elif key in VECTORS:
                what, fits = "vector", len(shape) == 2 and shape[0] == rows
            else:
                what, fits = "number", shape in ((rows,), (rows, 1))
            if not fits:
                raise UserError(f"{path}: {name} has the shape {shape}, but needs one {what} for each of {rows} rows")
            check_stored(path, name, array)
    for key, arrays in found.items():
        shapes, like = ([array.shape for array in x] for x in (arrays, found.get(key.removeprefix("next_"), [])))
        if key.startswith("next_observations") and shapes and shapes != like:
            raise UserError(f"{path}: {key} {shapes[0]} need as many numbers as observations have")
    if rows < 2:
        raise UserError(f"{path} holds {rows} rows; it takes 2 or more to make a transition")


def parts_of(path: Path, name: str, array: h5py.Dataset) -> set[Path]:
    """The files that a virtual array is put together from. Raises UserError where one, or its part of the array, is not
    where HDF5 looks for it, of which it would read zeros."""
    prefixes = os.environ.get("HDF5_VDS_PREFIX", "").split(":")
    folders, found = (path.parent, *prefixes, ".", path.resolve().parent), set()
    for part, inside in {(x.file_name, x.dset_name) for x in array.virtual_sources()} if array.is_virtual else ():
        names = [part, Path(part).name] if os.path.isabs(part) else [part]  # the latter of a file that was moved
        files = [path] if part == "." else [Path(folder, its) for its in names for folder in folders]
        if not (there := [file for file in files if file.is_file()]):
            raise UserError(
                f"{path}: {name} is put together from {part}, which is not there; put that file beside this one, or "
                "the array itself into it"
            )
        if not (inside in array.file if part == "." else holds(there[0], inside)):
            raise UserError(
                f"{path}: {name} is put together from {inside} in {there[0]}, which lacks it; put the array itself "
                "into this file"
            )
        found.add(there[0])
    return found


def holds(path: Path, name: str) -> bool:
    """Whether an HDF5 file has something under this name. Raises UserError where it cannot be read."""
    try:
        with h5py.File(path, "r") as file:
            return name in file
    except OSError as error:
        raise UserError(unreadable(path, error)) from error


def check_stored(path: Path, name: str, array: h5py.Dataset) -> None:
    """Refuse what cannot be unpacked here, and a small file that unpacks to gigabytes. Raises UserError."""
    declared, stored = array.size * array.dtype.itemsize, array.id.get_storage_size()
    stored += sum(part.stat().st_size for part in parts_of(path, name, array))
    if declared > max(100 * stored, 1 << 26):
        much = f"{path}: {name} declares {declared / 1e9:.1f} GB, but the file holds {stored / 1e3:,.0f} kB of that"
        chunks = math.prod(-(-size // chunk) for size, chunk in zip(array.shape, array.chunks or (), strict=False))
        if not array.chunks or array.id.get_num_chunks() < chunks:
            raise UserError(f"{much}; it is not whole: copy it again from where it came from")
        if declared > 1 << 30:
            raise UserError(f"{much}; if that is meant, write it again without compression")
    pipeline = array.id.get_create_plist()
    for i in range(pipeline.get_nfilters()):
        code, _, _, filter_name = pipeline.get_filter(i)
        if not h5py.h5z.filter_avail(code):
            try:
                importlib.import_module("hdf5plugin")  # makes HDF5 know more filters, if it is installed
            except ImportError as error:
                words = filter_name.decode(errors="replace") or f"filter {code}"
                raise UserError(
                    f"{path} is compressed by {words}, which HDF5 cannot unpack by itself; pip install hdf5plugin"
                ) from error


def read_minari(env_id: str, keys: tuple[str, ...] = (), arrives: bool = False) -> tuple[dict[str, np.ndarray], str]:
    """A Minari dataset in D4RL's layout: episodes end to end, with the true next observations.

    `keys`: the parts of observations that are dictionaries, in the order in which they are joined. `arrives`: episodes
    are over at their first reward.
    """
    dataset = minari_dataset(env_id)
    try:
        episodes = [episode for episode in dataset.iterate_episodes() if len(episode)]
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        if is_out_of_memory(error):
            raise
        damaged = f"cannot be read ({error}); remove it with `minari delete {env_id}`, and download or create it again"
        raise UserError(unreadable(f"the Minari dataset {env_id}", error, damaged)) from error
    if arrives:
        episodes = [until_arrival(episode) for episode in episodes]
    if not episodes:
        raise UserError(f"the Minari dataset {env_id} has no transition; choose another")
    observations = [joined(episode.observations, keys) for episode in episodes]
    timeouts = [episode.truncations.copy() for episode in episodes]
    for timeout, episode in zip(timeouts, episodes, strict=True):
        timeout[-1] |= not episode.terminations[-1]  # an episode that was cut off anywhere else ends there, too
    raw = {
        "observations": np.concatenate([obs[:-1] for obs in observations]),
        "next_observations": np.concatenate([obs[1:] for obs in observations]),
        "actions": np.concatenate([episode.actions for episode in episodes]),
        "rewards": np.concatenate([episode.rewards for episode in episodes]),
        "terminals": np.concatenate([episode.terminations for episode in episodes]),
        "timeouts": np.concatenate(timeouts),
    }
    return raw, f"Minari {env_id}"


def until_arrival(episode):
    """A Minari episode to its first reward, which ends it. The goal of its first observation may be that of the episode
    before (https://github.com/Farama-Foundation/Minari/issues/265), so it is taken from the second one."""
    paid = np.flatnonzero(episode.rewards > 0)
    n = paid[0] + 1 if len(paid) else len(episode)
    observations = {key: part[: n + 1].copy() for key, part in episode.observations.items()}
    observations["desired_goal"][0] = observations["desired_goal"][1]
    terminations = episode.terminations[:n].copy()
    terminations[-1] |= len(paid) > 0
    flows = {name: getattr(episode, name)[:n] for name in ("actions", "rewards", "truncations")}
    return dataclasses.replace(episode, observations=observations, terminations=terminations, **flows)
