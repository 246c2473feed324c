"""Data: names, files, and every way in which they can be wrong."""

import subprocess
import sys
import tracemalloc
import urllib.request

import h5py
import numpy as np
import pytest
import torch

from common import datasets, envs, formats, tasks
from common.cli import UserError


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


def test_every_name_has_an_address_and_reference_returns():
    urls = tasks.d4rl_registry()["DATASET_URLS"]
    assert len(tasks.D4RL_IDS) == 42 and all(name in urls for name in tasks.D4RL_IDS)
    assert tasks.reference_returns("hopper-medium-v2") == (-20.272305, 3234.3)
    assert tasks.reference_returns("pusher-medium-v2") is None


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


def test_ends_under_gymnasiums_names(hdf5, random_raw):
    raw = random_raw()
    renamed = dict(terminations=raw["terminals"], truncations=raw["timeouts"], terminals=None, timeouts=None)
    files = [hdf5(), hdf5("renamed.hdf5", **renamed), hdf5("both.hdf5", truncations=raw["timeouts"], timeouts=None)]
    files.append(hdf5("empty.hdf5", truncations=raw["timeouts"], timeouts=np.zeros(2_000, bool)))
    first, *others = (datasets.load("hopper-medium-v2", str(path)) for path in files)
    for data in others:
        assert torch.equal(data.table, first.table) and torch.equal(data.terminations, first.terminations)


def test_columns_of_one_number(hdf5, random_raw):
    """As the oldest of D4RL's files have rewards and ends."""
    raw = random_raw()
    columns = {key: raw[key].astype(float)[:, None] for key in ("rewards", "terminals", "timeouts")}
    first = datasets.load("hopper-medium-v2", str(hdf5()))
    assert torch.equal(datasets.load("hopper-medium-v2", str(hdf5("columns.hdf5", **columns))).table, first.table)


def test_actions_of_plus_minus_one_keep_their_bits(hdf5, random_raw):
    actions = random_raw()["actions"]
    actions[0] = 1e-12  # of which nothing would be left beside 1
    data = datasets.load("hopper-medium-v2", str(hdf5(actions=actions, timeouts=np.zeros(2_000, bool))))
    assert torch.equal(data.actions, torch.as_tensor(actions[:-1]))
    actions[::7, 1], actions[3::7, 0] = 1.00006, -1.00004  # rounded in another precision: these are ±1
    clipped = datasets.load("hopper-medium-v2", str(hdf5("x.hdf5", actions=actions, timeouts=np.zeros(2_000, bool))))
    assert torch.equal(clipped.actions, torch.as_tensor(actions[:-1]).clamp(-1, 1)) and clipped.actions.max() == 1


@pytest.fixture
def humanoid(hdf5, random_raw):
    """Data of an environment whose actions are between -0.4 and 0.4."""
    raw, rng = random_raw(), np.random.default_rng(0)
    obs = rng.normal(size=(2_000, 348))
    raw["actions"] = rng.uniform(-0.4, 0.4, (2_000, 17)).astype(np.float32)
    raw["actions"][0], raw["actions"][1] = -0.4, 0.4
    return hdf5("humanoid.hdf5", **raw | {"observations": obs}), raw["actions"]


def test_actions_of_another_range_are_scaled_and_scaled_back(humanoid, hdf5):
    path, actions = humanoid
    data = datasets.load("Humanoid-v5", str(path))
    assert data.actions[0].tolist() == [-1] * 17 and data.actions[1].tolist() == [1] * 17
    assert data.task.measure == "return" and data.scale() == "mean returns, on no scale"
    env = envs.make_env(data.task)
    played = [env.action(action) for action in data.actions[:50].numpy()]
    rows = [row for row in range(60) if np.isclose(actions[row], played, atol=1e-6).all(1).any()]
    assert len(rows) == 50 and (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    assert "takes -0.4 to 0.4" in refused(env_id="Humanoid-v5", dataset_path=str(hdf5(
        "x.hdf5", observations=np.zeros((2_000, 348)), actions=np.full((2_000, 17), 0.41),
    )))  # fmt: skip


def test_a_module_makes_its_environments_known(tmp_path, monkeypatch, hdf5):
    (tmp_path / "somebodys.py").write_text(
        "import gymnasium\nfrom gymnasium.envs.mujoco.hopper_v5 import HopperEnv\n"
        "gymnasium.register('Somebodys-v0', 'somebodys:HopperEnv', kwargs=dict(healthy_reward=2.0))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = datasets.load("somebodys:Somebodys-v0", str(hdf5()), max_episode_steps=1_000)
    assert data.task.simulator == "Somebodys-v0 (healthy_reward=2.0)" and data.task.max_episode_steps == 1_000
    env = envs.make_env(data.task)
    env.reset(seed=0)
    assert env.step(np.zeros(3))[1] > 1.5 and env.spec.max_episode_steps == 1_000


# ----------------------------------------------------------------------------------------------- bad input


def refused(**kwargs) -> str:
    with pytest.raises(UserError) as error:
        datasets.load(**kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_unknown_name():
    message = refused(env_id="hoper-medium-v2")
    assert "hopper-medium-v2" in message


def test_an_environment_needs_data():
    assert "--dataset-path" in refused(env_id="Humanoid-v5")
    assert "there is no module no_such_module; see to its name" in refused(
        env_id="no_such_module:Some-v0", dataset_path="x.hdf5"
    )


@pytest.mark.parametrize("env_id", ["CartPole-v1", "FrozenLake-v1"])
def test_environments_of_another_kind_are_refused(hdf5, env_id):
    message = refused(env_id=env_id, dataset_path=str(hdf5()))
    assert "Discrete" in message and "finite box of actions" in message


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


def test_a_server_that_names_no_length_is_believed(tmp_path, monkeypatch):
    reply = Reply(b"whole", 0)
    reply.headers.clear()
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: reply)
    datasets.download("http://server/file", tmp_path / "file.hdf5")
    assert (tmp_path / "file.hdf5").read_bytes() == b"whole"


@pytest.mark.parametrize(("named", "folder"), [(None, ".d4rl/datasets"), ("", ".d4rl/datasets"), ("~/mine", "mine")])
def test_files_are_looked_for_where_d4rl_has_them_and_downloaded_once(named, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    if named is not None:
        monkeypatch.setenv("D4RL_DATASET_DIR", named)
    asked = []

    def download(url, path):
        asked.append(url)
        path.parent.mkdir(parents=True)
        path.touch()

    monkeypatch.setattr(datasets, "download", download)
    for _ in range(2):
        assert datasets.find_file("hopper-medium-v2") == tmp_path / folder / "hopper_medium-v2.hdf5"
    assert asked == [tasks.d4rl_url("hopper-medium-v2")]


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


def offset(by) -> np.ndarray:
    """Observations in float64 whose column 4 counts up from there, a second each row."""
    return np.random.default_rng(0).normal(size=(2_000, 11)) + (np.arange(2_000)[:, None] + by) * (np.arange(11) == 4)


def test_an_offset_that_float32_takes_is_none(hdf5):
    constant = np.full((2_000, 11), 1e9) + 1e-7 * np.random.default_rng(0).normal(size=(2_000, 11))
    for obs in (offset(1e4), constant, offset(1.7e9).astype(np.float32)):
        assert len(datasets.load("hopper-medium-v2", str(hdf5(observations=obs))))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rewards": None}, "lacks rewards"),
        ({"observations": np.full((2_000, 11), np.nan)}, "NaN or infinite observations"),
        ({"rewards": np.full(2_000, np.inf)}, "NaN or infinite rewards"),
        ({"rewards": np.full(2_000, 1e39)}, "beyond float32's range (first in row 0)"),
        ({"observations": np.full((2_000, 11), -1e39)}, "beyond float32's range"),
        (
            {"observations": offset(1.7e9)},
            "column 4 of observations varies by 577.3 about 1.7e+09, which float32 rounds to multiples of 128;",
        ),
        ({"observations": offset(-1.7e9)}, "column 4 of observations varies by 577.3 about -1.7e+09, which float32"),
        ({"observations": offset(1.7e9).astype(np.int64)}, "subtract the offset, in the data and in the environment"),
        ({"observations": np.zeros((2_000, 17))}, "has 11 and 3 dimensions"),
        ({"actions": np.zeros((2_000, 6))}, "has 11 and 3 dimensions"),
        ({"actions": np.full((2_000, 3), 1.5)}, "actions from 1.5 to 1.5, but D4RL's hopper takes -1 to 1"),
        (
            {"actions": np.where(np.eye(2_000, 3, -1), [1, -1.005, 1], 0.5)},
            "actions from -1.005 to 0.5, but D4RL's hopper takes",
        ),
        (
            {"terminals": np.zeros(1_999, bool)},
            "terminals has the shape (1999,), but needs one number for each",
        ),
        ({"terminals": np.zeros((2_000, 2))}, "terminals has the shape (2000, 2)"),
        ({"rewards": np.zeros((2_000, 2))}, "rewards has the shape (2000, 2)"),
        ({"rewards": np.float32(1)}, "rewards has the shape ()"),
        ({"observations": np.zeros(2_000)}, "observations has the shape (2000,), but needs one vector"),
        ({"observations": h5py.Empty("f4")}, "observations has the shape ()"),
        ({"next_observations": np.zeros((2_000, 11, 1))}, "next_observations has the shape (2000, 11, 1)"),
        ({"next_observations": np.zeros((2_000, 12))}, "as many"),
        ({"terminals": np.zeros(2_000, bool), "timeouts": np.ones(2_000, bool)}, "no transition is left"),
        ({"terminals": np.tile([-1, 1], 1_000)}, "terminals holds -1, but is a flag: write 1 in the last row"),
        ({"timeouts": np.full(2_000, 0.5)}, "timeouts holds 0.5, but is a flag"),
        ({"truncations": np.full(2_000, np.nan)}, "truncations holds nan, but is a flag"),
        ({"rewards": np.array([b"x"] * 2_000)}, "rewards is no array of numbers"),
    ],
)
def test_bad_arrays(hdf5, change, words):
    assert words in refused(env_id="hopper-medium-v2", dataset_path=str(hdf5(**change)))


def test_rows_that_are_no_numbers_are_removed_as_is_said(hdf5, random_raw):
    for next_observations in (True, False):
        raw = random_raw(2_000, 0, next_observations)
        whole = len(datasets.load("hopper-medium-v2", str(hdf5(**raw))))
        gap = next(row for row in range(2, 2_000) if not (raw["terminals"] | raw["timeouts"])[row - 2 : row + 2].any())
        raw["rewards"][gap] = np.nan
        assert "remove them and set `timeouts` in the row before each gap" in refused(
            env_id="hopper-medium-v2", dataset_path=str(hdf5(**raw))
        )
        raw["timeouts"][gap - 1] = True
        data = datasets.load("hopper-medium-v2", str(hdf5(**{key: np.delete(raw[key], gap, 0) for key in raw})))
        assert len(data) == whole - 2 and data.table.isfinite().all() and not data.notes
        before = torch.as_tensor(raw["observations"][gap - 2])
        assert [row for row in data.obs if torch.equal(row, torch.as_tensor(raw["observations"][gap - 1]))] == []
        assert (data.obs == before).all(1).sum() == 1


def test_rows_that_are_no_numbers_go_with_their_episodes_where_those_are_stored_whole(random_raw):
    raw = random_raw()
    raw["rewards"][[7, 9]] = np.nan
    with pytest.raises(UserError, match=r"first in row 7\); repair these rows, or leave out their episodes$"):
        datasets.check(raw, tasks.resolve(tasks.DEMO), "mine", whole=True)


def test_states_that_nobody_learns_from_may_be_nan(hdf5):
    states = {"infos/qpos": np.full((2_000, 6), np.nan), "infos/qvel": np.zeros((2_000, 6))}
    first, data = (datasets.load("hopper-medium-v2", str(hdf5(**more))) for more in ({}, states))
    assert torch.equal(data.table, first.table) and np.isnan(data.states[:, :6]).all()


def test_next_observations_that_nobody_needs_may_be_nan(hdf5, random_raw):
    raw = random_raw(2_000, next_observations=True)
    first = datasets.load("hopper-medium-v2", str(hdf5(**raw)))
    raw["next_observations"][raw["terminals"] | raw["timeouts"], 4:] = np.nan  # in a part of them is enough
    data = datasets.load("hopper-medium-v2", str(hdf5(**raw)))
    alive = first.terminations == 0
    assert data.table.isfinite().all() and torch.equal(data.table[alive], first.table[alive])
    assert torch.equal(data.terminations, first.terminations)
    row = int(np.flatnonzero(~(raw["terminals"] | raw["timeouts"]))[0])
    raw["next_observations"][row] = np.nan
    assert "let them be NaN and set `timeouts` there" in refused(
        env_id="hopper-medium-v2", dataset_path=str(hdf5(**raw))
    )
    raw["timeouts"][row] = True
    assert len(datasets.load("hopper-medium-v2", str(hdf5(**raw)))) == len(data) - 1


def test_a_file_without_rows(hdf5, random_raw):
    assert "holds 1 rows" in refused(env_id="hopper-medium-v2", dataset_path=str(hdf5(**random_raw(1))))


def test_a_file_that_is_open_elsewhere_is_no_damaged_file(hdf5):
    path = hdf5()
    writer = "import h5py, sys; file = h5py.File(sys.argv[1], 'a'); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", writer, path], stdin=-1, stdout=-1) as process:
        process.stdout.readline()
        message = refused(env_id="hopper-medium-v2", dataset_path=str(path))
        process.kill()
    assert "open in another program" in message and "copy" not in message


def test_a_small_file_that_declares_gigabytes(hdf5):
    path = hdf5(observations=None)
    with h5py.File(path, "a") as file:
        file.create_dataset("observations", (100_000_000, 11), "f4", chunks=(1_000, 11))
    tracemalloc.start()
    message = refused(env_id="hopper-medium-v2", dataset_path=str(path))
    assert "observations declares 4.4 GB" in message and tracemalloc.get_traced_memory()[1] < 1e8
    tracemalloc.stop()


def test_what_packs_well_is_no_damaged_file(hdf5, monkeypatch):
    path = hdf5(actions=None)
    with h5py.File(path, "a") as file:
        file.create_dataset("actions", data=np.zeros((2_000, 3)), chunks=(900, 2), compression="gzip")
        actions = file["actions"]
        monkeypatch.setattr(h5py.Dataset, "size", property(lambda self: 10**7))  # as if it were 80 MB
        formats.check_stored(path, "actions", actions)
        monkeypatch.setattr(h5py.Dataset, "size", property(lambda self: 10**9))
        with pytest.raises(UserError, match=r"8.0 GB.*write it again without compression"):
            formats.check_stored(path, "actions", actions)
        part = file.create_dataset("part", (2_000, 3), "f8", chunks=(900, 2), compression="gzip")
        part[:900] = 0
        with pytest.raises(UserError, match="not whole"):
            formats.check_stored(path, "part", part)


def test_a_link_to_what_is_not_there(hdf5):
    path = hdf5(rewards=None)
    with h5py.File(path, "a") as file:
        file["rewards"] = h5py.ExternalLink("gone.hdf5", "r")
    message = refused(env_id="hopper-medium-v2", dataset_path=str(path))
    assert "rewards leads to r in gone.hdf5, where nothing can be opened" in message and "copy it" not in message
    with h5py.File(path.with_name("gone.hdf5"), "w") as file:
        file["r"] = np.zeros(2_000)
    assert len(datasets.load("hopper-medium-v2", str(path)))
    with h5py.File(path, "a") as file:
        del file["rewards"]
        file["rewards"] = h5py.SoftLink("/r")
    message = refused(env_id="hopper-medium-v2", dataset_path=str(path))
    assert "rewards leads to /r, where nothing can be opened" in message and "copy it" not in message


def test_an_array_that_is_put_together_from_other_files(hdf5):
    """HDF5 reads zeros of those that are not there. The array itself takes no room, however large it is."""
    path = hdf5(rewards=None)
    whole = h5py.VirtualLayout((2_000,), "f4")
    for i, name in enumerate(("first.hdf5", "second.hdf5")):
        whole[1_000 * i : 1_000 * (i + 1)] = h5py.VirtualSource(name, "r", (1_000,))
        with h5py.File(path.with_name(name), "w") as file:
            file["r"] = np.full(1_000, 3.0 + i)
    with h5py.File(path, "a") as file:
        file.create_virtual_dataset("rewards", whole)
    assert datasets.load("hopper-medium-v2", str(path)).rewards.unique().tolist() == [3, 4]
    second = path.with_name("second.hdf5")
    with h5py.File(second, "a") as file:
        file.move("r", "other")
    assert f"put together from r in {second}, which lacks it" in refused(
        env_id="hopper-medium-v2", dataset_path=str(path)
    )
    second.write_bytes(b"")
    assert f"{second} is not a whole HDF5 file" in refused(env_id="hopper-medium-v2", dataset_path=str(path))
    second.unlink()
    assert "rewards is put together from second.hdf5, which is not there" in refused(
        env_id="hopper-medium-v2", dataset_path=str(path)
    )
    path, many = path.with_name("large.hdf5"), 2 << 20
    whole = h5py.VirtualLayout((9, many), "f4")
    with h5py.File(path, "w") as file:
        file["row"] = np.zeros(many, "f4")
        for i in range(9):
            whole[i] = h5py.VirtualSource(file["row"])
        formats.check_stored(path, "rows", file.create_virtual_dataset("rows", whole))


@pytest.mark.parametrize("part", ["new/part.hdf5", "beside/part.hdf5", "beside/new/part.hdf5", "prefix/part.hdf5"])
@pytest.mark.parametrize("whole_path", [True, False])
def test_parts_of_an_array_are_looked_for_where_hdf5_does(whole_path, part, hdf5, tmp_path, monkeypatch):
    """Beside the file or what it links to, and in folders that are named for it; what was moved by its own name."""
    monkeypatch.setenv("HDF5_VDS_PREFIX", f"{tmp_path}:{tmp_path / 'prefix'}")
    path, layout = hdf5(rewards=None), h5py.VirtualLayout((2_000,), "f4")
    layout[:] = h5py.VirtualSource(tmp_path / "old" / "part.hdf5" if whole_path else "part.hdf5", "r", (2_000,))
    with h5py.File(path, "a") as file:
        file.create_virtual_dataset("rewards", layout)
    for folder in ("new", "beside/new", "prefix"):
        (tmp_path / folder).mkdir(parents=True)
    link = tmp_path / "beside" / "link.hdf5"
    link.symlink_to(path.rename(tmp_path / "new" / path.name))
    with h5py.File(tmp_path / part, "w") as file:
        file["r"] = np.full(2_000, 3.0)
    if part.startswith("beside/new"):
        assert "which is not there" in refused(env_id="hopper-medium-v2", dataset_path=str(link))
    else:
        assert (datasets.load("hopper-medium-v2", str(link)).rewards == 3).all()


def test_a_filter_that_hdf5_lacks(hdf5, monkeypatch):
    path = hdf5(observations=None)
    with h5py.File(path, "a") as file:
        file.create_dataset("observations", data=np.zeros((2_000, 11)), compression="gzip")
    assert len(datasets.load("hopper-medium-v2", str(path)))
    monkeypatch.setattr(h5py.h5z, "filter_avail", lambda code: False)
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    assert "pip install hdf5plugin" in refused(env_id="hopper-medium-v2", dataset_path=str(path))


def test_the_best_episodes_are_those_that_have_rows():
    """Of the first rows alone, too, as they are timed on."""
    data = datasets.load(tasks.DEMO, "", "cpu")
    few = data.head(3_000)
    numbers = few.episode.unique()
    assert len(numbers) < len(data.returns) / 20  # so that the best 5% of all are mostly elsewhere
    best = few.best_episodes(0.05)
    assert len(best) and torch.isin(few.best(len(numbers)), numbers).all()
