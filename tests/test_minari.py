"""Minari's datasets: the environment that they store, and every step of their episodes."""

import errno
import json
from types import SimpleNamespace

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer

import o2sac
from common import agreement, cli, datasets, envs, evaluation, formats, tasks
from common.cli import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Makes a dataset of `episodes` episodes of at most `steps` random actions; returns the rewards of each."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    def make(name, played, episodes=3, steps=10, ends=False, **more):
        played.action_space.seed(0)
        buffers = []
        for episode in range(episodes):
            obs, actions, rewards = [played.reset(seed=episode)[0]], [], []
            for _ in range(steps):
                actions.append(played.action_space.sample())
                following, reward, *_ = played.step(actions[-1])
                obs.append(following)
                rewards.append(float(reward))
            if isinstance(obs[0], dict):
                obs = {key: np.array([step[key] for step in obs]) for key in obs[0]}
            else:
                obs = np.array(obs)
            last = [False] * (steps - 1) + [True]
            buffers.append(EpisodeBuffer(
                id=episode, observations=obs, actions=np.array(actions), rewards=rewards,
                terminations=last if ends else [False] * steps, truncations=[False] * steps,
            ))  # fmt: skip
        about = dict(algorithm_name="random", author="o2rl", author_email="a@b.c", code_permalink="-", description="-")
        minari.create_dataset_from_buffers(name, buffers, **dict(env=played) | about | more)
        return [buffer.rewards for buffer in buffers]

    return make


def test_episodes_with_all_their_steps(store):
    rewards = store("mujoco/hopper/tiny-v0", gym.make("Hopper-v4"))
    data = datasets.load("mujoco/hopper/tiny-v0")
    assert len(data) == 30 and not data.terminations.any()  # cut off, but what followed the last step is stored
    assert data.episode.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    np.testing.assert_allclose(data.returns, np.sum(rewards, axis=1), rtol=1e-6)
    np.testing.assert_allclose(data.rewards, np.concatenate(rewards), rtol=1e-6)
    assert agreement.simulator_errors(data, data.task)["next observations"].max() < 1e-5
    assert data.task.measure == "return"


def test_episodes_of_one_step(store):
    store("toy/onestep-v0", gym.make("Hopper-v5"), episodes=20, steps=1)
    data = datasets.load("toy/onestep-v0")
    assert len(data) == len(data.returns) == 20 and not data.terminations.any()


def test_a_name_without_a_slash(store):
    store("hopper-mine-v0", gym.make("Hopper-v5"))
    assert tasks.resolve("hopper-mine-v0").family == "minari"
    with pytest.raises(UserError, match="is not known"):
        tasks.resolve("hopper-yours-v0")


def test_the_environments_arguments_and_time_limit(store):
    options = dict(forward_reward_weight=0.0, ctrl_cost_weight=0.0, healthy_reward=0.0)
    store("toy/noreward-v0", gym.make("Hopper-v5", max_episode_steps=20, **options))
    task = tasks.resolve("toy/noreward-v0")
    assert task.max_episode_steps == 20 and "healthy_reward=0.0" in task.simulator
    evaluator = evaluation.Evaluator(task, torch.zeros(11), torch.ones(11), episodes=3)
    assert evaluator.returns(lambda obs: obs[:, :3] * 0, "cpu").tolist() == [0, 0, 0]
    assert evaluator.envs[0].spec.max_episode_steps == 20


def test_the_evaluation_environment(store):
    paying = gym.make("Hopper-v5", forward_reward_weight=0.0, ctrl_cost_weight=0.0, healthy_reward=7.0)
    store("toy/paying-v0", gym.make("Hopper-v5"), eval_env=paying)
    data = datasets.load("toy/paying-v0")
    evaluator = evaluation.Evaluator(data.task, torch.zeros(11), torch.ones(11), episodes=2)
    returns = evaluator.returns(lambda obs: obs[:, :3] * 0, "cpu")
    assert (returns > 6).all() and (returns % 7 == 0).all()
    assert "evaluation environment, Hopper-v5 (forward_reward_weight=0.0" in data.describe()
    trained_in = envs.make_env(data.task)
    trained_in.reset(seed=0)
    assert trained_in.step(np.zeros(3))[1] < 2


class Reach(gym.Env):
    """Shows these parts of observations, and takes actions of this precision."""

    def __init__(self, keys=("goal", "obs"), dtype="float32"):
        self.observation_space = gym.spaces.Dict({key: gym.spaces.Box(-1, 1, (2,), np.float64) for key in keys})
        self.action_space = gym.spaces.Box(-0.1, 0.1, (2,), dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {key: np.zeros(2) for key in self.observation_space}, {}

    def step(self, action):
        return self.reset()[0], 1.0, False, False, {}


@pytest.mark.parametrize("options", [{"dtype": "float64"}, {"keys": ("goal", "obs", "other")}])
def test_an_evaluation_environment_may_show_more_and_take_actions_in_another_precision(store, monkeypatch, options):
    monkeypatch.setitem(gym.registry, "Reach-v0", EnvSpec("Reach-v0", "tests.test_minari:Reach", max_episode_steps=3))
    store("toy/reach-v0", gym.make("Reach-v0"), eval_env=gym.make("Reach-v0", **options))
    evaluator = evaluation.Evaluator(datasets.load("toy/reach-v0").task, torch.zeros(4), torch.ones(4), episodes=2)
    assert evaluator.returns(lambda obs: obs[:, :2] * 0, "cpu").tolist() == [3, 3]


def test_an_evaluation_environment_of_another_kind_is_refused(store):
    wide = gym.wrappers.RescaleAction(gym.make("Hopper-v5"), -2.0, 2.0)
    for name, other in (("walker", gym.make("Walker2d-v5")), ("longer", gym.make("HalfCheetah-v5")), ("wide", wide)):
        store(f"toy/{name}-v0", gym.make("Hopper-v5"), eval_env=other)
        with pytest.raises(UserError, match="evaluation environment, whose .* not those of Hopper-v5; create"):
            datasets.load(f"toy/{name}-v0")


def test_a_dataset_that_is_not_whole(store, tmp_path):
    store("toy/cut-v0", gym.make("Hopper-v5"))
    [file] = tmp_path.rglob("*.hdf5")
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(UserError, match="cannot be read .*truncated file.*; remove it with `minari delete toy/cut-v0`"):
        datasets.load("toy/cut-v0")


def test_a_dataset_that_is_whole_is_not_to_be_removed(monkeypatch):
    def fails(error):
        def episodes():
            raise error

        monkeypatch.setattr(formats, "minari_dataset", lambda _: SimpleNamespace(iterate_episodes=episodes))
        formats.read_minari("toy/mine-v0")

    with pytest.raises(UserError, match="^the Minari dataset toy/mine-v0 may not be read .*; change its permissions$"):
        fails(PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(MemoryError):  # see `cli.run`
        fails(MemoryError())


def test_a_hand_of_minaris_is_not_d4rls(store):
    store("D4RL/pen/human-v9", gym.make("Hopper-v5"), episodes=1)
    data = datasets.load("D4RL/pen/human-v9")
    assert data.task.family == "minari" and "replayed in that environment" in data.describe()


def test_its_own_reference_returns(store):
    store("toy/scored-v0", gym.make("Hopper-v5"), ref_min_score=10.0, ref_max_score=210.0)
    data = datasets.load("toy/scored-v0")
    evaluator = evaluation.Evaluator(data.task, torch.zeros(11), torch.ones(11), episodes=1)
    assert evaluator.score(np.array([60.0])) == 25 and data.task.measure == "score"
    assert "10 (0) and 210 (100)" in data.scale()


@pytest.mark.parametrize("low", [10.0, 210.0])
def test_reference_returns_that_make_no_scale(store, low):
    store("toy/turned-v0", gym.make("Hopper-v5"), ref_min_score=low, ref_max_score=10.0)
    data = datasets.load("toy/turned-v0")
    assert data.task.measure == "return" and f"from {low:g} (0) up to 10 (100): scores are returns" in data.describe()


def test_gymnasiums_own_ant(store):
    store("toy/ant-v0", gym.make("Ant-v4"))
    data = datasets.load("toy/ant-v0")
    assert data.obs.shape == (30, 27) and data.task.forces == 0 and not data.task.d4rl


class Monitor(gym.Wrapper):
    """One that does not record how it was made, as Stable-Baselines3's does not."""


def test_a_wrapper_that_cannot_be_made_again_is_left_out_and_named(store):
    store("toy/monitored-v0", Monitor(gym.wrappers.ClipAction(gym.make("Hopper-v5"))))
    with pytest.raises(UserError, match="finite box"):  # ClipAction, which can, takes any action
        datasets.load("toy/monitored-v0")
    store("toy/again-v0", Monitor(gym.make("Hopper-v5")))
    data = datasets.load("toy/again-v0")
    assert "the wrapper Monitor of Hopper-v5 is left out" in data.describe() and len(data) == 30


def test_without_an_environment(store):
    env = gym.make("Hopper-v5")
    store("toy/recorded-v0", env, env=None, observation_space=env.observation_space, action_space=env.action_space)
    with pytest.raises(UserError, match="names no environment"):
        tasks.resolve("toy/recorded-v0")


def called(*args, **kwargs):
    raise AssertionError("a dataset called what is no environment")


@pytest.mark.parametrize("entry_point", ["not_installed.somewhere:Env", f"{__name__}:called", "subprocess:run"])
def test_an_environment_that_is_not_installed(store, entry_point):
    """Nor is anything called that is none, whatever a dataset names as its environment."""
    spec = EnvSpec("Unknown-v0", entry_point=entry_point, kwargs={"args": ["false"]})
    store("toy/unknown-v0", gym.make("Hopper-v5"))
    path = minari.load_dataset("toy/unknown-v0").storage.data_path / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"env_spec": spec.to_json()}))
    with pytest.raises(UserError, match="Unknown-v0, is not installed here; install the package"):
        tasks.resolve("toy/unknown-v0")


def test_an_unregistered_environment_of_an_installed_package(store):
    spec = EnvSpec("Mine-v0", entry_point="gymnasium.envs.mujoco.hopper_v5:HopperEnv", max_episode_steps=30)
    store("toy/mine-v0", gym.make(spec))
    assert datasets.load("toy/mine-v0").task.max_episode_steps == 30


def test_pictures_and_dictionaries_are_refused(store):
    store("toy/cart-v0", gym.make("CartPole-v1"))
    with pytest.raises(UserError, match="finite box of actions"):
        datasets.load("toy/cart-v0")


def test_no_such_dataset(store, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(minari, "load_dataset", unreachable)
    with pytest.raises(UserError, match="minari download toy/none-v0"):
        datasets.load("toy/none-v0")


def test_an_ant_in_a_maze_has_a_goal_to_come_to_once(store, capsys):
    pytest.importorskip("gymnasium_robotics")
    gym.register_envs(__import__("gymnasium_robotics"))
    played = gym.make("AntMaze_UMaze-v4")
    mirrored = gym.make(
        "AntMaze_UMaze-v4", maze_map=[[1] * 5, [1, "g", 0, 0, 1], [1, 1, 1, 0, 1], [1, "r", 0, 0, 1], [1] * 5]
    )
    store("D4RL/antmaze/umaze-diverse-v1", played, episodes=4, steps=8, eval_env=mirrored)
    path = minari.storage.get_dataset_path("D4RL/antmaze/umaze-diverse-v1") / "data" / "main_data.hdf5"
    with h5py.File(path, "r+") as file:
        file["episode_1/rewards"][3:] = 1.0  # it arrives, and is paid for every step from then on
        for i in range(4):
            file[f"episode_{i}/observations/desired_goal"][1:] = [i, 7.0]
    data = datasets.load("D4RL/antmaze/umaze-diverse-v1")
    task = data.task
    assert task.matches("antmaze-umaze") and task.references == (0, 1) and task.eval_spec is None
    assert task.keys == ("achieved_goal", "observation", "desired_goal") and data.obs.shape[1] == 31
    assert torch.bincount(data.episode).tolist() == [8, 4, 8, 8]
    assert data.returns.tolist() == [0, 1, 0, 0]
    assert data.terminations.nonzero().flatten().tolist() == [11] and data.rewards.sum() == 1
    assert (data.obs[:, -2:] == torch.stack([data.episode.float(), torch.full((28,), 7.0)], dim=1)).all()
    args = cli.complete(o2sac.Args(env_id="D4RL/antmaze/umaze-diverse-v1"))
    env = envs.make_env(task)
    assert env.unwrapped.maze.maze_map == played.unwrapped.maze.maze_map
    env.reset(seed=0)
    env.unwrapped.goal = env.unwrapped.data.qpos[:2].copy()  # there already
    _, reward, terminated, _, _ = env.step(env.action_space.sample())
    assert reward == 1 and terminated
    assert args.alpha == 0.2 and "come to their goal" in data.scale()
