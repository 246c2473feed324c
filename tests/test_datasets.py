"""Data: D4RL's Q-learning view, names, files, and every way in which they can be wrong."""

import time
import urllib.request

import h5py
import numpy as np
import pytest
import torch

from common import agreement, datasets, envs, tasks
from common.cli import UserError


def literal_view(raw, max_steps):
    """D4RL's view as a loop, one transition at a time."""
    rows, episode_step = [], 0
    for i in range(len(raw["rewards"]) - 1):
        final = raw["timeouts"][i] if "timeouts" in raw else episode_step == max_steps - 1
        if final:
            episode_step = 0
            continue
        if raw["terminals"][i]:
            episode_step = 0
        else:
            episode_step += 1
        following = raw["next_observations"][i] if "next_observations" in raw else raw["observations"][i + 1]
        rows.append((raw["observations"][i], raw["actions"][i], raw["rewards"][i], following, raw["terminals"][i]))
    return [np.array(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("timeouts", [True, False])
@pytest.mark.parametrize("next_observations", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_view_equals_a_literal_loop(random_raw, timeouts, next_observations, seed):
    raw = random_raw(3_000, seed, next_observations, timeouts)
    view = datasets.qlearning_view(raw, 40)
    expected = literal_view(raw, 40)
    for name, column in zip(("obs", "actions", "rewards", "next_obs", "terminations"), expected, strict=True):
        np.testing.assert_array_equal(view[name], column, err_msg=name)
    # the action after that: of the row whose observation is next_obs, where there is no file of next observations
    if not next_observations:
        following = {row.tobytes(): action for row, action in zip(raw["observations"], raw["actions"], strict=True)}
        expected = [following[row.tobytes()] for row in view["next_obs"]]
        np.testing.assert_array_equal(view["next_actions"], expected)


def test_a_million_transitions_in_a_second(random_raw):
    raw = random_raw(1_000_000)
    start = time.perf_counter()
    datasets.qlearning_view(raw, 1_000)
    assert time.perf_counter() - start < 1


def test_returns_are_those_of_whole_episodes(random_raw):
    raw = random_raw(500, seed=3)
    view = datasets.qlearning_view(raw, 1_000)
    expected, total = [], 0.0
    for i in range(499):
        total += raw["rewards"][i]
        if raw["terminals"][i] or raw["timeouts"][i]:
            expected.append(total)
            total = 0.0
    np.testing.assert_allclose(view["returns"][: len(expected)], expected, rtol=1e-4, atol=1e-5)
    # every transition carries the number of its episode: rewards of kept ones add up to the return, if none was dropped
    for episode in np.unique(view["episode"]):
        rows = view["episode"] == episode
        if view["terminations"][rows][-1]:
            np.testing.assert_allclose(view["rewards"][rows].sum(), expected[episode], rtol=1e-3, atol=1e-4)


def test_demo_says_that_it_is_not_d4rls():
    data = datasets.load(datasets.DEMO)
    assert len(data) == 299_999 and data.task.robot == "hopper" and "not D4RL" in data.source


def test_standardised_once():
    data = datasets.load(datasets.DEMO)
    mean, std = data.statistics()
    raw = data.obs.clone()
    data.standardise(mean, std)
    torch.testing.assert_close(data.obs, (raw - raw.mean(0)) / (raw.std(0, correction=0) + 1e-3))
    assert torch.equal(data.table[:, :11], data.obs)


def test_every_mujoco_name_has_an_address_and_reference_returns():
    urls = tasks.d4rl_registry()["DATASET_URLS"]
    assert len(tasks.D4RL_IDS) == 24 and all(name in urls for name in tasks.D4RL_IDS)
    assert tasks.reference_returns("hopper") == (-20.272305, 3234.3)
    assert tasks.reference_returns("pusher") is None


def test_ant_has_d4rl_observations():
    assert envs.make_env(tasks.resolve("ant-medium-v2")).observation_space.shape == (111,)


def test_d4rl_dataset_dir(tmp_path, monkeypatch, hdf5):
    hdf5("hopper_medium_replay-v2.hdf5")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    assert len(datasets.load("hopper-medium-replay-v2")) > 1_900


def test_states_of_a_file_stay_beside_their_rows(hdf5):
    numbers = np.arange(2_000.0)
    path = hdf5(**{"observations": numbers[:, None] + np.zeros(11), "infos/qpos": numbers[:, None] + np.zeros(6),
                   "infos/qvel": -numbers[:, None] + np.zeros(6)})  # fmt: skip
    data = datasets.load("hopper-medium-v2", str(path))
    for part in (data, data.head(70), data.best_episodes(0.2), data.hold_out(0.2, 30)[1]):
        np.testing.assert_array_equal(part.states[:, 0], part.obs[:, 0].numpy())
        np.testing.assert_array_equal(part.states[:, 6], -part.obs[:, 0].numpy())
    assert data.states.dtype == np.float64 and data.states.shape == (len(data), 12)
    assert datasets.load(datasets.DEMO).states is None


def test_minari(tmp_path, monkeypatch):
    import gymnasium
    import minari
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env, buffers = gymnasium.make("Hopper-v4"), []
    env.action_space.seed(0)
    for episode in range(3):
        obs = [env.reset(seed=episode)[0]]
        actions = [env.action_space.sample() for _ in range(10)]  # cut off long before the episode ends
        steps = [env.step(action) for action in actions]
        buffers.append(EpisodeBuffer(
            id=episode, observations=np.array([*obs, *(step[0] for step in steps)]), actions=np.array(actions),
            rewards=[step[1] for step in steps], terminations=[False] * 10, truncations=[False] * 10,
        ))  # fmt: skip
    minari.create_dataset_from_buffers(
        "mujoco/hopper/tiny-v0", buffers, env=env, algorithm_name="random", author="o2rl", author_email="a@b.c",
        code_permalink="none", description="-",
    )  # fmt: skip
    data = datasets.load("mujoco/hopper/tiny-v0")
    assert len(data) == 27 and not data.terminations.any()  # the cut step of each episode is dropped
    assert data.episode.tolist() == [0] * 9 + [1] * 9 + [2] * 9
    assert agreement.simulator_errors(data, data.task)["next observations"].max() < 1e-5


# ----------------------------------------------------------------------------------------------- bad input


def refused(**kwargs) -> str:
    with pytest.raises(UserError) as error:
        datasets.load(**kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_unknown_name():
    message = refused(env_id="hoper-medium-v2")
    assert "hopper-medium-v2" in message


def test_no_network(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    message = refused(env_id="walker2d-medium-v2")
    assert "walker2d_medium-v2.hdf5" in message and str(tmp_path) in message and datasets.DEMO in message
    assert list(tmp_path.iterdir()) == []


class Reply:
    """A server's answer of `content`, which claims to be `length` bytes long."""

    def __init__(self, content: bytes, length: int):
        self.content, self.headers = content, {"Content-Length": str(length)}

    def read(self, n):
        block, self.content = self.content[:n], self.content[n:]
        return block

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def test_download(tmp_path, monkeypatch, hdf5):
    content = hdf5().read_bytes()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Reply(content, len(content)))
    datasets.download("http://server/file", tmp_path / "new" / "file.hdf5")
    assert (tmp_path / "new" / "file.hdf5").read_bytes() == content


def test_short_download_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Reply(b"half", 8))
    with pytest.raises(UserError, match="4 of 8 bytes"):
        datasets.download("http://server/file", tmp_path / "file.hdf5")
    assert list(tmp_path.iterdir()) == []


def test_truncated_file(hdf5):
    path = hdf5()
    path.write_bytes(path.read_bytes()[:5_000])
    assert "not a whole HDF5 file" in refused(env_id="hopper-medium-v2", dataset_path=str(path))


def test_foreign_file(tmp_path):
    path = tmp_path / "x.hdf5"
    path.write_text("hello")
    assert "not a whole HDF5 file" in refused(env_id="hopper-medium-v2", dataset_path=str(path))


def test_missing_file(tmp_path):
    assert "there is no file" in refused(env_id="hopper-medium-v2", dataset_path=str(tmp_path / "none"))


def test_group_in_place_of_an_array(tmp_path):
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        for key in ("observations", "actions", "rewards", "terminals"):
            file.create_group(key)
    assert "is no array of numbers" in refused(env_id="hopper-medium-v2", dataset_path=str(tmp_path / "x.hdf5"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rewards": None}, "lacks rewards"),
        ({"observations": np.full((2_000, 11), np.nan)}, "NaN or infinite observations"),
        ({"rewards": np.full(2_000, np.inf)}, "NaN or infinite rewards"),
        ({"observations": np.zeros((2_000, 17))}, "has 11 and 3 dimensions"),
        ({"actions": np.zeros((2_000, 6))}, "has 11 and 3 dimensions"),
        ({"actions": np.full((2_000, 3), 1.5)}, "rescale them"),
        ({"terminals": np.zeros(1_999, bool)}, "the same number"),
        ({"rewards": np.array([b"x"] * 2_000)}, "rewards is no array of numbers"),
    ],
)
def test_bad_arrays(hdf5, change, words):
    assert words in refused(env_id="hopper-medium-v2", dataset_path=str(hdf5(**change)))
