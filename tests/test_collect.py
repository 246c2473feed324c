"""Collecting data: all five files at tiny budgets, read back as D4RL's are, and D4RL's own policies."""

import importlib.util
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from common import datasets, tasks

FRAGMENT = Path(__file__).parent.parent.parent / "shared" / "datasets" / "fragments" / "hopper_medium-v2.hdf5"
spec = importlib.util.spec_from_file_location("collect", tasks.SHIPPED / "collect.py")
collect = importlib.util.module_from_spec(spec)
sys.modules["collect"] = collect
spec.loader.exec_module(collect)


@pytest.fixture
def tiny(tmp_path, monkeypatch, run_script):
    """Runs the script with goals that an untrained hopper reaches: (exit code, stdout, stderr)."""
    goals = {"medium": (5.0, 0.0), "expert": (60.0, 0.0)}
    monkeypatch.setitem(collect.D4RL_RETURNS, "hopper", goals)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "data"))
    flags = ["--no-compile", "--device", "cpu", "--total-steps", "400", "--learning-starts", "300", "--window", "2",
             "--rows", "200", "--run-dir", str(tmp_path / "runs")]  # fmt: skip
    return lambda *more: run_script(collect, *flags, *more)


def test_all_files_of_a_robot(tiny, tmp_path, monkeypatch):
    code, out, err = tiny()
    assert code == 0, err
    for quality in collect.QUALITIES:
        assert quality in out
        with h5py.File(tmp_path / "data" / f"hopper_{quality.replace('-', '_')}-v2.hdf5") as file:
            assert "not D4RL's rows" in file.attrs["source"]
            raw = {name: file[name][()] for name in file}
        n = len(raw["rewards"])
        assert n == 200 or quality == "medium-replay" and 0 < n <= 200
        assert not (raw["terminals"] & raw["timeouts"]).any() and (np.abs(raw["actions"]) <= 1).all()
        data = datasets.load(f"hopper-{quality}-v2")
        assert len(data) <= n - 1 and data.source != "D4RL"
        same_height = (data.next_obs[:, 0] - data.obs[:, 0]).abs().max()  # 8 ms: no row leads into the next episode
        assert same_height < 0.1
    before = (tmp_path / "data" / "hopper_expert-v2.hdf5").stat().st_mtime_ns
    (tmp_path / "data" / "hopper_medium_expert-v2.hdf5").unlink()
    code, out, err = tiny("--files", "medium-expert", "medium")  # which of them is there already
    assert code == 0 and out.count("│ medium") == 1 and "│ medium-expert" in out, err
    code, _, err = tiny()
    assert code == 2 and "holds all files of hopper already" in err
    assert (tmp_path / "data" / "hopper_expert-v2.hdf5").stat().st_mtime_ns == before


@pytest.mark.skipif(not FRAGMENT.exists(), reason="needs a file of D4RL's")
def test_what_is_asked_for_is_made_without_learning_what_it_does_not_need(tiny, tmp_path):
    own = ("--medium-policy", str(FRAGMENT), "--files", "medium")
    code, out, err = tiny(*own, "--rows", "2000")
    assert code == 0, err
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["hopper_medium-v2.hdf5"]
    assert not (tmp_path / "runs").exists() and "expert" not in out
    with h5py.File(tmp_path / "data" / "hopper_medium-v2.hdf5") as file:
        assert "D4RL's own medium-v2 file" in file.attrs["source"]
        returns = collect.episode_returns({name: file[name][()] for name in ("rewards", "terminals", "timeouts")})
    assert len(returns) >= 3 and 800 < returns.mean() < 2_000  # D4RL's: 1422 ± 379
    code, _, err = tiny(*own)
    assert code == 2 and "holds these files of hopper already" in err


def test_returns_are_those_of_whole_episodes():
    data = {"rewards": np.arange(6.0), "terminals": np.array([0, 1, 0, 0, 0, 0], bool),
            "timeouts": np.array([0, 0, 0, 1, 0, 0], bool)}  # fmt: skip
    assert collect.episode_returns(data).tolist() == [1.0, 5.0]


def test_a_replay_that_is_too_long_keeps_whole_episodes_of_all_its_length():
    memory = collect.Memory(100, 1, 1, torch.device("cpu"))
    for row in range(100):  # ten episodes of ten
        memory.add([row], [0.0], [row + 1], 1.0, False, row % 10 == 9)
    data = collect.replayed(memory, 100, 50)
    episodes = data["observations"][:, 0] // 10
    assert len(episodes) == 50 and np.unique(episodes, return_counts=True)[1].tolist() == [10] * 5
    assert episodes.min() < 2 and episodes.max() > 7 and data["timeouts"].sum() == 5


@pytest.mark.skipif(not FRAGMENT.exists(), reason="needs a file of D4RL's")
def test_d4rls_own_policy_is_the_one_that_made_its_file():
    actor = collect.d4rl_policy(str(FRAGMENT))
    with h5py.File(FRAGMENT) as file:
        obs, actions, log_probs = (torch.as_tensor(file[name][()]) for name in (
            "observations", "actions", "infos/action_log_probs"))  # fmt: skip
    mean, log_std = actor(obs).chunk(2, dim=-1)
    inside = (actions.abs() < 0.999).all(1)  # near the edge, atanh of a rounded action says little
    u = torch.atanh(actions[inside])
    expected = collect.gaussian_log_prob(u, mean[inside], log_std[inside].clamp(-20, 2)) - collect.tanh_log_det(u)
    assert inside.sum() > 300
    torch.testing.assert_close(expected, log_probs[inside], atol=2e-2, rtol=1e-3)


def test_what_it_has_no_use_for_is_not_taken(tiny, tmp_path):
    code, _, err = tiny("--env-id", "walker2d-medium-v2")  # the robot is --robot
    assert code == 2 and "--env-id" in err and not (tmp_path / "data").exists()


def test_a_file_without_a_policy_is_named(tiny, tmp_path, hdf5):
    code, _, err = tiny("--medium-policy", str(hdf5()))
    assert code == 2 and "holds no policy of D4RL's" in err and not (tmp_path / "runs").exists()
