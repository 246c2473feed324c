"""The check that data and simulator agree: the simulator, put into states of the data, has to do what they say."""

from dataclasses import replace

import gymnasium as gym
import numpy as np

from common.envs import blamed, make_env
from common.tasks import ROBOTS, Task

# What one step may be off by in nine of ten rows and in all but a hundredth, in the units of observation and reward. In
# D4RL's physics D4RL's files reach 3e-6 and 1e-5, the oldest ones 6e-4 and 8e-3 (HalfCheetah) and 3e-3 and 9e-3 in the
# reward (Ant); today's robots are off by 3e-2 and 7e-2. The median would not do: MuJoCo's change of contact margins is
# felt by a few hundredths of Hopper's rows.
BOUNDS = {"next observations": {0.9: 1e-3, 0.99: 1e-2}, "rewards": {0.9: 5e-3, 0.99: 1e-2}}
BITS = 20  # of a mantissa; what a contact makes of coarser observations says nothing of the simulator
CLIPPED = ("hopper", "walker2d")  # show no joint speed above 10
STALE = ("ant",)  # its reward starts from the position that the step before computed, which is not quite the state's


def set_state(
    env: gym.Env, task: Task, obs: np.ndarray, own: np.ndarray | None = None, root=(0.0, 0.0), first=None
) -> bool:
    """Put a MuJoCo environment that was reset into the state of a row that shows `obs` (S,); whether that can be done.

    The state is `own` (nq + nv,), the file's, if that shows `obs`: some files log another row's, or the one after the
    step. Else it is rebuilt from `obs`, which leaves out the root's position: that is taken from `root`. An environment
    with a scene of its own, the Adroit hand, also needs `first`, both `obs` and `own` of the episode's first row.
    """
    simulator, shown = env.unwrapped, obs[: len(obs) - task.forces].astype(np.float64)
    if hasattr(simulator, "place"):
        return own is not None and simulator.place(shown, own, *first)
    if task.keys or not all(hasattr(simulator, name) for name in ("model", "set_state", "_get_obs")):
        return False
    nq, size = simulator.model.nq, simulator.model.nq + simulator.model.nv
    hidden = size - len(shown)  # root coordinates that are not observed
    states = [own] if own is not None and len(own) == size else []
    if 0 <= hidden <= 2:
        states.append(np.concatenate([root[:hidden], shown]))
    for state in states:
        simulator.set_state(state[:nq], state[nq:])
        found = simulator._get_obs()
        if found.shape == shown.shape and (np.abs(found - shown) <= 1e-6 * np.maximum(1, np.abs(shown))).all():
            return task.robot not in CLIPPED or bool(np.abs(state[nq:]).max() < 9.999)
    return False


def simulator_errors(dataset, task: Task, samples: int = 500, seed: int = 0) -> dict[str, np.ndarray]:
    """How far the simulator of `task` is off one step from states of the data, in the data's own units.

    The largest error in each row's "next observations", and that of its "rewards", for the rows whose state can be had;
    empty where none can. Call it before the dataset is standardised.
    """
    env = make_env(task)
    rows = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:samples])
    tensors = (dataset.obs, dataset.next_obs, dataset.actions, dataset.rewards, dataset.terminations)
    obs, next_obs, actions, rewards, ends = (x.cpu().numpy() for x in tensors)
    states = dataset.states if dataset.states is not None else [None] * len(dataset)
    firsts = np.searchsorted(dataset.episode.cpu().numpy(), dataset.episode.cpu().numpy()[rows])
    obs_errors, reward_errors = [], []
    for row, first in zip(rows, firsts, strict=True):
        env.reset(seed=0)
        before, root, positions = row - 1, (0.0, 0.0), None
        if task.robot in STALE:
            follows = row > 0 and not ends[before] and np.abs(next_obs[before] - obs[row]).max() < 1e-6
            if follows and set_state(env, task, obs[before], states[before]):
                env.step(actions[before])
                root, positions = env.unwrapped.data.qpos[:2].copy(), env.unwrapped.data.xpos.copy()
                env.reset(seed=0)
        if not set_state(env, task, obs[row], states[row], root, (obs[first], states[first])):
            continue
        if positions is not None:
            env.unwrapped.data.xpos[:] = positions
        found, reward, *_ = env.step(actions[row])
        if not ends[row]:  # after an end comes a new episode
            obs_errors.append(np.abs(found - next_obs[row])[: len(found) - task.forces].max())
        if not task.hidden and (task.robot not in STALE or positions is not None):
            reward_errors.append(abs(reward - float(rewards[row])))
    env.close()
    errors = {"next observations": np.array(obs_errors), "rewards": np.array(reward_errors)}
    return {name: found for name, found in errors.items() if len(found)}


def bits_of(x: np.ndarray) -> int:
    """How many bits of their mantissas, of 24, single-precision numbers use; fewer in a file that was rounded."""
    mantissas = (x.astype(np.float32).view(np.int32) & 0x7FFFFF) | 0x800000
    return 24 - int(np.log2(mantissas & -mantissas).min())


def wrong(errors: dict[str, np.ndarray], most: float = 1.0) -> list[str]:
    """What is further off than in two simulators that agree: next observations, rewards. Rows above the quantile `most`
    are not judged."""
    return [
        name for name, found in errors.items()
        if any(np.quantile(found, q) > x for q, x in BOUNDS[name].items() if q <= most)
    ]  # fmt: skip


def report_simulator_check(dataset) -> None:
    """Print the check's result; where the data come from another simulator, warn plainly and say what to do."""
    task = dataset.task
    if not task.d4rl and not repeats(task):
        print(
            f"{task.simulator} does not play the same episode twice from one seed: a run that is interrupted goes on, "
            "but not exactly as it would have"
        )
    errors = simulator_errors(dataset, task)
    if not errors:
        print(f"simulator check: the states of {task.simulator} cannot be rebuilt from observations; not checked")
        return
    bits = bits_of(dataset.obs.cpu().numpy())
    differing = wrong(errors, 0.9 if bits < BITS else 1.0)
    found = " and ".join(
        f"{np.quantile(x, 0.9):.1e} (99%: {np.quantile(x, 0.99):.1e}) in {k}" for k, x in errors.items()
    )
    steps = f"90% of single steps from their states are off by less than {found}"
    if differing:
        print(
            f"WARNING: the {' and '.join(differing)} of the data are not those of {task.simulator}: {steps}. "
            f"Fine-tuning would go on in another environment than the data's. {remedy(dataset, differing)}"
        )
    else:
        rounded = f"; the file is rounded to {bits} bits, which is felt in contacts" if bits < BITS else ""
        print(f"simulator check: data and {task.simulator} agree: {steps}{rounded}")
    if task.forces and (share := float((dataset.obs[:, -task.forces :] != 0).any(1).float().mean())):
        print(
            f"simulator check: {share:.0%} of the rows show contact forces, which {task.simulator} shows as zeros; "
            "v1 and v2 of the data have none"
        )


def repeats(task: Task, steps: int = 200) -> bool:
    """Whether an episode of random actions comes out the same when it is played again, which resumed runs count on."""
    env, plays = make_env(task), []
    with blamed(task.spec.id, "cannot be played"):  # before anything is trained
        for _ in range(2):
            env.action_space.seed(0)
            rows, done = [env.reset(seed=0)[0]], False
            while not done and len(rows) <= steps:
                obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
                rows.append(np.append(obs, reward))
                done = terminated or truncated
            plays.append(np.concatenate(rows))
    env.close()
    return np.array_equal(*plays, equal_nan=True)


def remedy(dataset, differing: list[str]) -> str:
    task = dataset.task
    if differing == ["rewards"]:
        return "The robot is the same: undo what was done to the file's rewards, or find which version of it pays them."
    if ROBOTS.get(task.robot) == task.spec.id:
        other = replace(task, d4rl=not task.d4rl)
        if not wrong(simulator_errors(dataset, other)):
            then, today = f"D4RL's {task.robot}", f"Gymnasium's {task.spec.id} in the MuJoCo that is installed"
            return f"They agree with {then if other.d4rl else today}: name that with --env-id."
    return "Name the simulator that they were collected in with --env-id."
