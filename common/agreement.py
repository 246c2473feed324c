"""The check that data and simulator agree: the simulator, put into states of the data, has to do what they say."""

import gymnasium as gym
import numpy as np

from common.envs import make_env
from common.tasks import Task


def set_state(env: gym.Env, task: Task, obs: np.ndarray) -> bool:
    """Put a MuJoCo environment that was reset into the state that `obs` (S,) shows; whether that can be done.

    The root's position is not observed and taken as zero. Hopper and Walker2d show no joint speed above 10, so a state
    with such a speed cannot be rebuilt.
    """
    model = getattr(env.unwrapped, "model", None)
    if model is None or not hasattr(env.unwrapped, "set_state"):
        return False
    obs = obs[: len(obs) - task.forces].astype(np.float64)
    hidden = model.nq + model.nv - len(obs)  # root coordinates that are not observed
    qvel = obs[model.nq - hidden :]
    if not 0 <= hidden <= 2 or (task.robot in ("hopper", "walker2d") and np.abs(qvel).max() >= 10):
        return False
    env.unwrapped.set_state(np.concatenate([np.zeros(hidden), obs[: model.nq - hidden]]), qvel)
    return True


def simulator_error(dataset, samples: int = 300, seed: int = 0) -> float | None:
    """Median difference between what the data say and what the simulator does from the same state and action.

    Puts the environment into dataset states, plays the dataset's actions, and compares next observation and reward
    (the larger of the two errors, in their own units). None where a state cannot be rebuilt from its observation.
    Call it before the dataset is standardised.
    """
    env = make_env(dataset.task)
    obs, next_obs, actions = (x.cpu().numpy() for x in (dataset.obs, dataset.next_obs, dataset.actions))
    errors = []
    rows = np.flatnonzero(dataset.terminations.cpu().numpy() == 0)  # after an end comes a new episode
    for row in np.random.default_rng(seed).permutation(rows)[:samples]:
        env.reset(seed=0)
        if set_state(env, dataset.task, obs[row]):
            found, reward, *_ = env.step(actions[row])
            errors.append(max(np.abs(found - next_obs[row]).max(), abs(reward - float(dataset.rewards[row]))))
    env.close()
    return float(np.median(errors)) if errors else None


def report_simulator_check(dataset) -> None:
    """Print the simulator check's result; warn plainly where the data come from another simulator."""
    error, simulator = simulator_error(dataset), dataset.task.simulator
    if error is None:
        print(f"simulator check: the states of {simulator} cannot be rebuilt from observations; not checked")
    elif error < 1e-3:
        print(f"simulator check: data and {simulator} agree (median error {error:.1e})")
    else:
        print(
            f"WARNING: the data do not come from {simulator} as it is installed here (median error of one step "
            f"{error:.2g}). Fine-tuning would go on in another environment than the data's."
        )
