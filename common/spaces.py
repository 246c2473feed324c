"""Observations of any environment as one vector: what can be one, and in which order a dictionary's parts come.

The same function joins the parts in the data and in play.
"""

import copy

import gymnasium as gym
import numpy as np

GOAL = ("achieved_goal", "observation", "desired_goal")  # what environments with goals observe
STEPS = 100  # random ones, over which an achieved goal is looked for in the observation


class Flat(gym.ObservationWrapper):
    """Observations as one vector (S,): a box's numbers, or the parts `keys` of a dictionary, one after the other."""

    def __init__(self, env: gym.Env, keys: tuple[str, ...] = ()):
        super().__init__(env)
        self.keys = keys
        size = sum(sizes(env.observation_space, keys).values())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float64)

    def observation(self, observation) -> np.ndarray:
        one = {key: np.asarray(part)[None] for key, part in parts(observation, self.keys).items()}
        return joined(one if self.keys else one[""], self.keys)[0]


def joined(observations: dict[str, np.ndarray] | np.ndarray, keys: tuple[str, ...] = ()) -> np.ndarray:
    """Observations of N steps as vectors (N, S): (N, …) as it is, or a dictionary of such, its `keys` in that order."""
    found = parts(observations, keys).values()
    return np.concatenate([part.reshape(len(part), -1) for part in found], axis=1)


def parts(observation, keys: tuple[str, ...]) -> dict:
    return {key: observation[key] for key in keys} if keys else {"": observation}


def sizes(space: gym.Space, keys: tuple[str, ...]) -> dict[str, int]:
    """How many numbers each of the parts has; "" stands for the whole of a box."""
    return {key: int(np.prod(part.shape)) for key, part in parts(space, keys).items()}


def fault_of_observations(space: gym.Space) -> str | None:
    """Why observations cannot be used as a vector, in words that name their space."""
    if isinstance(space, gym.spaces.Dict):
        faults = (f"{fault} under {key!r}" for key, part in space.items() if (fault := fault_of_part(part)))
        return next(faults, None if len(space) else "an empty Dict as observations")
    fault = fault_of_part(space)
    return f"{fault} as observations" if fault else None


def fault_of_part(space: gym.Space) -> str | None:
    if not isinstance(space, gym.spaces.Box):
        return str(space)
    if space.dtype == np.uint8 and len(space.shape) == 3:
        return f"images ({space.shape} bytes)"
    return None


def fault_of_actions(space: gym.Space) -> str | None:
    """Why actions cannot be mapped to [-1, 1], in words that name their space."""
    if not isinstance(space, gym.spaces.Box):
        return f"{space} as actions"
    if len(space.shape) != 1:
        return f"actions of the shape {space.shape}"
    if not np.issubdtype(space.dtype, np.floating):
        return f"whole numbers as actions ({space})"
    if not np.isfinite([space.low, space.high]).all():
        return f"actions without bounds ({space})"
    if not (space.low < space.high).all():
        return f"actions with no room between their bounds ({space})"
    return None


def running_statistics(env: gym.Env) -> str | None:
    """The wrapper in an environment that divides by what it has seen so far."""
    while isinstance(env, gym.Wrapper):
        normalises = isinstance(env, gym.wrappers.NormalizeObservation | gym.wrappers.NormalizeReward)
        if normalises and getattr(env, "update_running_mean", True):  # else they stand still
            return type(env).__name__
        env = env.env
    return None


def order_of(env: gym.Env) -> tuple[str, ...]:
    """The keys of a dictionary of observations, in the order in which its parts are joined; () for a box.

    Where there is a goal, that comes last and what was achieved first, if it is not shown already by components of the
    observation. Others come in the space's own order, which is the alphabet's for a plain dictionary.
    """
    space = env.observation_space
    if not isinstance(space, gym.spaces.Dict):
        return ()
    if not set(GOAL) <= set(space):
        return tuple(space)
    first, *others = GOAL
    return (*([] if is_shown(env) else [first]), *others, *(key for key in space if key not in GOAL))


def is_shown(env: gym.Env) -> bool:
    """Whether each number of an achieved goal equals one of the observation's in every one of some random steps."""
    env.action_space.seed(0)
    seen = [copy.deepcopy(env.reset(seed=0)[0])]  # an environment may fill the same arrays in every step
    for _ in range(STEPS):
        obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
        seen.append(copy.deepcopy(env.reset()[0] if terminated or truncated else obs))
    observation, achieved = (joined({key: np.array([obs[key] for obs in seen])}, (key,)) for key in GOAL[1::-1])
    return bool((observation[:, :, None] == achieved[:, None]).all(0).any(0).all())
