"""Observations of any environment as one vector, the same in data and play; what cannot be one is named."""

import sys

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

import o2td3
from common import agreement, datasets, envs, policies, tasks
from common.cli import UserError


def box(*shape, low=-10.0, high=10.0, dtype=np.float32):
    return spaces.Box(low, high, shape, dtype)


class Reach(gym.Env):
    """A point that is moved to a goal; an observation may show where it is, beside `achieved_goal`, or not."""

    def __init__(self, shows=False, observation_space=None, action_space=None):
        self.shows = shows
        goals = {"desired_goal": box(2), "achieved_goal": box(2), "observation": box(5 if shows else 3)}
        self.observation_space = observation_space or spaces.Dict(goals)
        self.action_space = action_space or spaces.Box(np.float32([-1, -0.5]), np.float32([1, 2.0]))

    def observed(self):
        noise = self.np_random.normal(size=3)
        observation = np.concatenate([noise, self.at[::-1]]) if self.shows else noise
        parts = {"desired_goal": self.goal, "achieved_goal": self.at, "observation": observation}
        return {key: np.float32(part) for key, part in parts.items()}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.goal = self.np_random.normal(size=(2, 2))
        return self.observed(), {}

    def step(self, action):
        self.at = self.at + 0.1 * action
        away = float(np.linalg.norm(self.at - self.goal))
        return self.observed(), -away, False, False, {"is_success": away < 0.5}


class Odd(gym.Env):
    """Observes any space at random."""

    def __init__(self, observation_space, action_space=None):
        self.observation_space, self.action_space = observation_space, action_space or box(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


gym.register("Reach-v0", f"{__name__}:Reach", max_episode_steps=12)
gym.register("ReachShown-v0", Reach, max_episode_steps=12, kwargs={"shows": True})
gym.register("Reach-v1", Reach)


def task_of(space, action_space=None):
    spec = gym.envs.registration.EnvSpec("Odd-v0", Odd, max_episode_steps=9, kwargs=dict(
        observation_space=space, action_space=action_space))  # fmt: skip
    return tasks.Task("gymnasium", "Odd-v0", "mine", "Odd-v0", spec)


def played(env_id="Reach-v0", n=60):
    """Arrays of random play, with observations as dictionaries; and what followed each row."""
    env, rows = gym.make(env_id, max_episode_steps=12), []
    env.action_space.seed(0)
    obs = env.reset(seed=0)[0]
    for _ in range(n):
        action = env.action_space.sample()
        following, reward, terminated, truncated, _ = env.step(action)
        rows.append((obs, action, reward, terminated, truncated))
        obs = env.reset()[0] if truncated else following
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    raw = {name: np.array(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}
    raw["observations"] = {key: np.array([obs[key] for obs in raw["observations"]]) for key in raw["observations"][0]}
    return raw


def written(path, raw, join=None):
    """A file of those arrays: observations as a group, or joined as (N, S)."""
    with h5py.File(path, "w") as file:
        for name, value in raw.items():
            if name == "observations":
                value = {"": join(value)} if join else value
                for key, part in value.items():
                    file[f"observations/{key}".rstrip("/")] = part
            else:
                file[name] = value
    return str(path)


# ------------------------------------------------------------------------------------------------ order


@pytest.mark.parametrize(
    ("env_id", "order", "said"),
    [
        ("Reach-v0", ("achieved_goal", "observation", "desired_goal"),
         "achieved_goal (2), observation (3), desired_goal (2), in this order"),
        ("ReachShown-v0", ("observation", "desired_goal"),
         "observation (5), desired_goal (2), in this order; achieved_goal is in there"),
    ],
)  # fmt: skip
def test_a_goal_comes_last_and_what_is_shown_already_does_not_come_twice(env_id, order, said, tmp_path):
    raw = played(env_id)
    data = datasets.load(env_id, written(tmp_path / "x.hdf5", raw))
    assert data.task.keys == order and f"data: observations are {said}" in data.describe()
    want = np.concatenate([raw["observations"][key] for key in order], axis=1)
    np.testing.assert_array_equal(data.obs[:11], want[:11])
    flat = datasets.load(env_id, written(tmp_path / "y.hdf5", raw, lambda parts: want))
    assert (flat.table == data.table).all() and len(data) == 55
    # in play, with actions from -1 to 1
    env, plain = envs.make_env(data.task), gym.make(env_id)
    seen = plain.reset(seed=0)[0]
    assert np.array_equal(env.reset(seed=0)[0], np.concatenate([seen[key] for key in order]))
    for action in np.random.default_rng(0).uniform(-1, 1, (5, 2)).astype(np.float32):
        seen = plain.step(np.float32([action[0], -0.5 + (action[1] + 1) / 2 * 2.5]))[0]
        np.testing.assert_allclose(env.step(action)[0], np.concatenate([seen[key] for key in order]), atol=1e-6)
    assert env.observation_space.shape == (7,)


def test_other_dictionaries_in_their_own_order_and_boxes_of_any_shape():
    parts = {"b": box(2, 3), "a": box(), "c": spaces.Box(0, 9, (4,), np.int64)}
    for space, keys, order in [
        (spaces.Dict(parts), ("a", "b", "c"), "a (1), b (6), c (4)"), (box(3, 4), (), None),
    ]:  # fmt: skip
        task = envs.observed(task_of(space))
        assert task.keys == keys and task.notes == ((f"observations are {order}, in this order",) if order else ())
        obs = envs.make_env(task).reset(seed=5)[0]
        space.seed(5)
        sample = space.sample()
        want = np.concatenate([np.ravel(sample[key]) for key in keys]) if keys else sample.ravel()
        np.testing.assert_array_equal(obs, want)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_dataset_of_minari_with_goals(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    raw, env = played(n=12), gym.make("Reach-v0")
    obs = {key: np.concatenate([part, part[-1:]]) for key, part in raw["observations"].items()}
    buffer = EpisodeBuffer(id=0, observations=obs, actions=raw["actions"], rewards=list(raw["rewards"]),
                           terminations=[False] * 12, truncations=[False] * 11 + [True])  # fmt: skip
    minari.create_dataset_from_buffers("toy/reach-v0", [buffer], env=env, algorithm_name="random", author="o2rl",
                                       author_email="a@b.c", code_permalink="-", description="-")  # fmt: skip
    data = datasets.load("toy/reach-v0")
    want = np.concatenate([obs[key] for key in ("achieved_goal", "observation", "desired_goal")], axis=1)
    np.testing.assert_array_equal(data.obs, want[:-1])
    np.testing.assert_array_equal(data.next_obs, want[1:])


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (box(64, 64, 3, low=0, high=255, dtype=np.uint8), r"images \(\(64, 64, 3\) bytes\) as observations"),
        (spaces.Text(5), r"Text\(1, 5, .*\) as observations"),
        (spaces.Tuple([box(2), box(3)]), r"Tuple\(Box.*\) as observations"),
        (spaces.Discrete(4), r"Discrete\(4\) as observations"),
        (spaces.MultiBinary(4), r"MultiBinary\(4\) as observations"),
        (spaces.Dict(a=box(2), b=spaces.Discrete(3)), r"Discrete\(3\) under 'b'"),
        (spaces.Dict(a=spaces.Dict(b=box(2))), r"Dict\('b': Box.*\) under 'a'"),
        (spaces.Dict(), "an empty Dict as observations"),
    ],
)
def test_observations_that_are_no_vectors_are_named(space, words):
    with pytest.raises(UserError, match=f"Odd-v0 has {words}, which cannot be used here; wrap it"):
        envs.observed(task_of(space))


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (spaces.Discrete(4), r"Discrete\(4\) as actions"),
        (spaces.Tuple([box(1)]), r"Tuple\(Box.*\) as actions"),
        (box(2, low=-np.inf), r"actions without bounds \(Box"),
        (box(2, 2), r"actions of the shape \(2, 2\)"),
        (box(2, low=10.0), r"actions with no room between their bounds"),
    ],
)
def test_actions_that_are_no_finite_box_are_named(space, words):
    with pytest.raises(UserError, match=f"Odd-v0 has {words}.*, which cannot be used here; wrap it"):
        envs.observed(task_of(box(3), space))


def refused(tmp_path, env_id="Reach-v0", limit=None, join=None, **changes) -> str:
    raw = played() | changes
    raw["observations"] = {key: part for key, part in raw["observations"].items() if part is not None}
    with pytest.raises(UserError) as error:
        datasets.load(env_id, written(tmp_path / "x.hdf5", raw, join), max_episode_steps=limit)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_whose_observations_are_not_the_environments(tmp_path):
    parts = played()["observations"]
    assert "the group observations lacks desired_goal, which the environment observes" in refused(
        tmp_path, observations=parts | {"desired_goal": None}
    )
    assert "observations is no array of numbers but a group, and no dictionary is observed" in refused(
        tmp_path, "Hopper-v5"
    )
    assert "observations/observation has the shape (50, 3), but needs one vector for each of 60 rows" in refused(
        tmp_path, observations=parts | {"observation": parts["observation"][:50]}
    )
    wide = refused(tmp_path, observations=parts | {"observation": np.zeros((60, 4))})
    assert "has observations (60, 8) and actions (60, 2), but Reach-v0 has 7 and 2 dimensions" in wide
    assert "next_observations (60, 7) need as many numbers" in refused(tmp_path, next_observations=np.zeros((60, 7)))


# ------------------------------------------------------------------------------------------------ what is said


class Forgetful(Reach):
    """Whose episodes do not come out the same a second time."""

    def reset(self, seed=None, options=None):
        return super().reset(seed=None)


gym.register("Forgetful-v0", Forgetful, max_episode_steps=12)


def test_what_a_resumed_run_cannot_repeat_is_said(tmp_path, capsys):
    path = written(tmp_path / "x.hdf5", played())
    for env_id in ("Reach-v0", "Forgetful-v0"):
        agreement.report_simulator_check(datasets.load(env_id, path))
        said = "Forgetful-v0 does not play the same episode twice from one seed" in capsys.readouterr().out
        assert said == (env_id == "Forgetful-v0")


def test_returns_that_are_too_large_for_the_constants_are_said(tmp_path):
    raw = played()
    raw["rewards"] = np.random.default_rng(0).normal(-300, 100, 60)
    data = datasets.load("Reach-v0", written(tmp_path / "x.hdf5", raw))
    largest = max(
        abs(sum(0.99 ** (i - first) * raw["rewards"][i] for i in range(first, 12 * e + 11)))
        for e in range(5) for first in range(12 * e, 12 * e + 11)
    )  # fmt: skip
    assert data.largest_return_to_go() == pytest.approx(largest, rel=1e-5) and 1_000 < largest < 10_000
    assert f"(γ 0.99) reach {largest:,.0f}; " in data.describe() and "--reward-scale 0.1" in data.describe()
    data.rewards /= 10
    assert "--reward-scale" not in data.describe()


# ------------------------------------------------------------------------------------------------ limits, and a run


def test_without_a_time_limit_one_is_asked_for(tmp_path):
    assert "Reach-v1 has no time limit; give one with --max-episode-steps" in refused(tmp_path, "Reach-v1")
    assert "--max-episode-steps is for environments without a limit, but Reach-v0 has one of 12 steps" in refused(
        tmp_path, limit=13
    )
    path = written(tmp_path / "y.hdf5", played())
    data = datasets.load("Reach-v1", path, max_episode_steps=12)
    assert data.task.max_episode_steps == 12 and len(data) == 55
    env = envs.make_env(data.task)
    env.reset(seed=0)
    assert [env.step(np.zeros(2))[3] for _ in range(12)] == [False] * 11 + [True]
    assert (datasets.load("Reach-v0", path, max_episode_steps=12).table == data.table).all()


def test_a_run_with_goals(tmp_path, run_script, monkeypatch):
    """From nothing to a fine-tuned policy, its return and its rate of success."""
    monkeypatch.setitem(sys.modules, "mytask", sys.modules[__name__])
    path = written(tmp_path / "mine.hdf5", played(n=300))
    code, out, err = run_script(
        o2td3, "--env-id", "mytask:Reach-v1", "--dataset-path", path, "--max-episode-steps", 12, "--offline", "bc",
        "--offline-steps", 3, "--device", "cpu", "--no-compile", "--eval-episodes", 2, "--online-steps", 30,
        "--reevaluate-steps", 3, "--align-steps", 3, "--learning-starts", 20, "--run-dir", tmp_path, "--eval-every", 30,
        "--batch-size", 32,
    )  # fmt: skip
    assert code == 0, err
    assert "observations are achieved_goal (2), observation (3), desired_goal (2), in this order" in out
    assert "mean returns, on no scale" in out and "of the last evaluation's episodes" in out and " return " in out
    files = [*tmp_path.glob("*/policy.pt"), *tmp_path.glob("*/best.pt")]
    assert len(files) == 3  # the offline policy, and what the run made of it
    for file in files:
        assert policies.load(file).action_range.tolist() == [[-1, -0.5], [1, 2]]
    code, out, err = run_script(o2td3, "--env-id", "mytask:Reach-v1", "--dataset-path", path, "--run-dir", tmp_path)
    assert code == 2 and err == "error: Reach-v1 has no time limit; give one with --max-episode-steps\n"
