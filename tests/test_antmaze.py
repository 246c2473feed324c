"""D4RL's mazes: its own rows, walls, goals, starts and ends.

The environment needs mujoco, gymnasium and numpy, and the model file of the package d4rl.
"""

import pickle
from pathlib import Path

import h5py
import mujoco
import numpy as np
import pytest

from common.antmaze import MAZES, AntMazeEnv, cells
from common.physics import as_d4rl

FRAGMENTS = Path(__file__).parent.parent.parent / "shared" / "datasets" / "fragments"
NAMES = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
needs_fragments = pytest.mark.skipif(not FRAGMENTS.is_dir(), reason="D4RL's own rows are not here")


@pytest.fixture(scope="module")
def mazes():
    """One environment in D4RL's physics for each maze."""
    return {maze: as_d4rl(AntMazeEnv(maze)) for maze in MAZES}


# ------------------------------------------------------------------------------------------------ D4RL's own rows


def fragment(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(states, actions, next states) of a file. Its flags are not needed: `infos` hold the state after each row."""
    with h5py.File(FRAGMENTS / f"antmaze-{name}-v0.hdf5") as file:
        following = np.hstack([file["infos/qpos"][()], file["infos/qvel"][()]])
        return file["observations"][()].astype(np.float64), file["actions"][()], following.astype(np.float64)


def at_a_wall(env) -> bool:
    """Whether a part of the ant touches a wall."""
    walls = env.model.geom_type == mujoco.mjtGeom.mjGEOM_BOX
    return bool(walls[env.data.contact.geom].any())


def step_errors(env, name: str, every: int) -> tuple[np.ndarray, np.ndarray]:
    """(error of one step's next state, whether the ant touched a wall before it or after).

    Of one in `every` rows, and of every second one in which the ant is within reach of a wall.
    """
    obs, actions, following = fragment(name)
    centers = np.array(cells(env.maze, "#"))
    near = (np.abs(following[:, None, :2] - centers).max(2) < 2.6).any(1)
    errors, touched = [], []
    for row in range(len(obs)):
        if row % every and not (near[row] and row % 2):
            continue
        env.set_state(obs[row, :15], obs[row, 15:])
        before = at_a_wall(env)
        found, *_ = env.step(actions[row])
        errors.append(np.abs(found - following[row]).max())
        touched.append(before or at_a_wall(env))
    return np.array(errors), np.array(touched)


@needs_fragments
def test_one_step_from_a_real_state_gives_the_next_one(mazes):
    rows = [step_errors(mazes[name.split("-")[0]], name, every=4) for name in NAMES]
    for name, (errors, _) in zip(NAMES, rows, strict=True):
        assert np.mean(errors < 1e-3) >= 0.99 and np.quantile(errors, [0.5, 0.9]).max() < 1.5e-5, name
    at_walls = np.concatenate([errors[touched] for errors, touched in rows])
    assert len(at_walls) > 150
    assert np.mean(at_walls < 1e-3) >= 0.99 and np.median(at_walls) < 5e-6


@needs_fragments
def test_no_real_row_would_come_out_in_todays_physics():
    errors, _ = step_errors(AntMazeEnv("large"), "large-play", every=20)
    assert np.mean(errors < 1e-3) < 0.05


@needs_fragments
@pytest.mark.parametrize("name", NAMES)
def test_real_ants_stay_in_free_cells(name):
    maze = name.split("-")[0]
    positions = fragment(name)[0][:, :2]
    free = np.array([xy for kind in ".rg" for xy in cells(maze, kind)])
    assert (np.abs(positions[:, None] - free).max(2).min(1) <= 2).all()


# ------------------------------------------------------------------------------------------------ mazes


@pytest.mark.parametrize(
    ("maze", "walls", "goal", "corner"),
    [("umaze", 18, (0, 8), (12, 12)), ("medium", 38, (20, 20), (24, 24)), ("large", 62, (32, 24), (40, 28))],
)
def test_maps(mazes, maze, walls, goal, corner):
    env = mazes[maze]
    assert cells(maze, "r") == [(0, 0)] and cells(maze, "g") == [goal]
    boxes = env.model.geom_type == mujoco.mjtGeom.mjGEOM_BOX
    assert boxes.sum() == walls
    sizes, positions = env.model.geom_size[boxes], env.model.geom_pos[boxes]
    assert (sizes == [2, 2, 1]).all() and (positions[:, 2] == 1).all()
    assert positions[:, :2].min(0).tolist() == [-4, -4]
    assert positions[:, :2].max(0).tolist() == list(corner)
    assert env.model.body_mass.sum() == pytest.approx(0.87871017)


def test_goals_and_starts(mazes):
    env = mazes["medium"]
    resets = [env.reset(seed=0 if i == 0 else None) for i in range(2_000)]
    goals = np.array([info["goal"] for _, info in resets]) - 20
    # U(0, 1) + U(0, 0.5): mean 0.75, standard deviation 0.3227, from 0 to 1.5, the axes by themselves
    np.testing.assert_allclose(goals.mean(0), 0.75, atol=0.03)
    np.testing.assert_allclose(goals.std(0), 0.3227, atol=0.02)
    assert goals.min() > 0 and goals.max() < 1.5 and goals.min() < 0.08 and goals.max() > 1.42
    assert abs(np.corrcoef(goals.T)[0, 1]) < 0.1
    obs = np.array([obs for obs, _ in resets])
    uniform = np.delete(obs, [3, 4, 5, 6], axis=1)[:, :11] - np.delete(env.init_qpos, [3, 4, 5, 6])
    assert np.abs(uniform).max() < 0.1 and (np.abs(uniform).max(0) > 0.099).all()
    np.testing.assert_allclose(uniform.std(0), 0.1 / np.sqrt(3), rtol=0.05)
    np.testing.assert_allclose(np.linalg.norm(obs[:, 3:7], axis=1), 1, atol=1e-12)
    assert env.init_qpos[2] == 0.75 and (np.abs(obs[:, 4:7]).max(0) > 0.09).all()
    np.testing.assert_allclose(obs[:, 15:].std(0), 0.1, rtol=0.08)
    assert (np.abs(obs[:, 15:].mean(0)) < 0.01).all()


def test_a_seed_repeats_start_goal_and_episode(mazes):
    env = mazes["umaze"]

    def episode(seed, env=env):
        obs, info = env.reset(seed=seed)
        rng = np.random.default_rng(0)
        rows = [env.step(rng.uniform(-1, 1, 8).astype(np.float32))[0] for _ in range(30)]
        return np.concatenate([obs, info["goal"], *rows])

    first, other, again = episode(3), episode(4), episode(3)
    assert np.array_equal(first, again)
    assert np.abs(first[:31] - other[:31]).min() > 1e-9  # every coordinate and the goal are others
    copy = pickle.loads(pickle.dumps(env))
    assert type(copy) is type(env) and copy.maze == "umaze"
    assert np.array_equal(first, episode(3, copy))


# ------------------------------------------------------------------------------------------------ rewards and ends


@pytest.mark.parametrize(("distance", "reward"), [(0.499999, 1.0), (0.5, 1.0), (0.500001, 0.0)])
def test_reward_and_end_where_the_ant_is_after_the_step(mazes, distance, reward):
    env, action = mazes["umaze"], np.full(8, 0.3, np.float32)
    env.reset(seed=1)
    start = env.data.qpos.copy(), env.data.qvel.copy() + 3
    env.set_state(*start)
    there = env.step(action)[0][:2]
    assert np.linalg.norm(there - start[0][:2]) > 0.1
    for direction in ((1.0, 0.0), (-0.6, 0.8)):
        env.reset(seed=1)
        env.set_state(*start)
        env.goal = there + np.multiply(direction, distance) * (1 - 1e-12)
        _, found, terminated, truncated, info = env.step(action)
        assert (found, terminated, truncated, info["success"]) == (reward, reward == 1, False, reward == 1)


def test_a_fall_ends_nothing(mazes):
    env = mazes["umaze"]
    env.reset(seed=0)
    qpos = env.init_qpos.copy()
    qpos[2:7] = 0.3, 0, 1, 0, 0  # on its back
    env.set_state(qpos, np.zeros(14))
    for _ in range(20):
        obs, reward, terminated, truncated, _ = env.step(np.zeros(8, np.float32))
        assert (reward, terminated, truncated) == (0.0, False, False)
    assert obs[2] < 0.4


def test_actions_are_torques_of_thirty(mazes):
    env = mazes["umaze"]
    env.reset(seed=0)
    assert env.action_space.shape == (8,) and (env.action_space.high == 1).all()
    env.step(np.array([-2, -1, -0.5, 0, 0.25, 0.5, 1, 5]))
    np.testing.assert_array_equal(env.data.ctrl, [-30, -30, -15, 0, 7.5, 15, 30, 30])
    env.step(np.full(8, 0.1, np.float32))  # D4RL's normaliser in single precision: -30 + (a + 1) / 2 * 60
    low, high = np.float32([-30, 30])
    assert (env.data.ctrl == low + (np.float32(0.1) + 1.0) * 0.5 * (high - low)).all()
