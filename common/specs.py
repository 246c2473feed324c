"""Environments as Gymnasium and Minari specify them: an id, its arguments, its time limit, its wrappers."""

import contextlib
import dataclasses
import importlib
import re
from pathlib import Path

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec, load_env_creator

from common.errors import UserError


def in_words(spec: EnvSpec) -> str:
    """An environment's id and whatever is not its default."""
    words = [f"{name}={value}" for name, value in spec.kwargs.items()]
    words += [wrapper.name for wrapper in spec.additional_wrappers]
    words = ", ".join(words)
    return spec.id + (f" ({re.sub(' at 0x[0-9a-fA-F]+', '', words)})" if words else "")  # else other in every process


def stored_spec(spec: EnvSpec, env_id: str) -> tuple[EnvSpec, list[str]]:
    """The specification that a dataset stores, as far as this machine can make it, and what is left out.

    A stored specification says what to import and to call. Only environments and wrappers are called, be they what
    Gymnasium knows under that id or classes of an installed package. Raises UserError.
    """
    package = str(spec.entry_point).split(":")[0].split(".")[0]
    if spec.id not in gym.registry:
        with contextlib.suppress(Exception):  # that is what makes a package's environments known
            importlib.import_module(package)
    if spec.id in gym.registry:
        spec = dataclasses.replace(spec, entry_point=gym.registry[spec.id].entry_point)
    elif not is_class(spec.entry_point, gym.Env):
        raise UserError(
            f"the environment of the Minari dataset {env_id}, {spec.id}, is not installed here; install the package "
            f"{package}, from which {spec.entry_point} comes"
        )
    wrappers = [w for w in spec.additional_wrappers if w.kwargs is not None and is_class(w.entry_point, gym.Wrapper)]
    lost = [w.name for w in spec.additional_wrappers if w not in wrappers]
    spec = dataclasses.replace(spec, additional_wrappers=tuple(wrappers))
    if lost:
        return spec, [
            f"the wrapper {', '.join(lost)} of {spec.id} is left out: the dataset does not say how to make it"
        ]
    return spec, []


def is_class(entry_point, kind: type) -> bool:
    """Whether "module:Name" names a class of that kind in an installed package."""
    try:
        found = load_env_creator(entry_point)
    except Exception:  # importing may fail in any way
        return False
    return isinstance(found, type) and issubclass(found, kind)


# ----------------------------------------------------------------------------------------------- Minari


def in_minari(env_id: str) -> bool:
    """Whether a Minari dataset of that name is on this machine."""
    from minari.storage.datasets_root_dir import get_dataset_path

    return bool(env_id) and (Path(get_dataset_path(env_id)) / "data").is_dir()


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
