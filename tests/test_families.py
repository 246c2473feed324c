"""What a name means: AntMaze's data, and what scripts set otherwise for a family of data."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import h5py
import numpy as np
import pytest
import torch

import o2ppo
import o2sac
import o2td3
from common import agreement, cli, datasets, envs, tasks, usage, views
from common.bounds import at_least
from offline import awac, bc, cql, iql, rebrac, td3_bc
from tests.conftest import kill_at

SHARED = Path(__file__).parent.parent.parent / "shared" / "datasets"
FRAGMENTS = SHARED / "fragments"
needs_fragments = pytest.mark.skipif(not FRAGMENTS.is_dir(), reason="D4RL's own rows are not here")


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("name", tasks.MAZE_IDS)
def test_names_of_the_mazes(name, monkeypatch, tmp_path):
    task = tasks.resolve(name)
    maze = name.split("-")[1]
    assert (task.family, task.kind, task.data) == ("antmaze", name[:-3], name)
    assert task.max_episode_steps == (700 if maze == "umaze" else 1_000) and task.references == (0, 1) and task.d4rl
    env = envs.make_env(task)
    assert env.unwrapped.maze == maze and env.observation_space.shape == (29,) and env.action_space.shape == (8,)
    # In D4RL the file is called otherwise: it is found by the name, and known as D4RL's again
    size = {"umaze": "u", "medium": "big", "large": "hardest"}[maze]
    starts, goals = name != "antmaze-umaze-v2", "diverse" in name
    path = tmp_path / f"Ant_maze_{size}-maze_noisy_multistart_{starts}_multigoal_{goals}_sparse_fixed.hdf5"
    path.touch()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    assert datasets.find_file(name) == path and tasks.is_d4rls(path)
    assert tasks.resolve(name, str(path)) == task


def test_a_maze_and_data_of_another_one_are_refused():
    with pytest.raises(cli.UserError, match="another maze than that of antmaze-medium-play-v2"):
        tasks.resolve("antmaze-large-play-v2", "antmaze-medium-play-v2.hdf5")
    task = tasks.resolve("antmaze-umaze-v2", "mine.hdf5")
    assert (task.data, task.kind) == ("mine", "antmaze-umaze")


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_names_of_v0_and_v1_are_refused(version):
    with pytest.raises(cli.UserError, match="take antmaze-large-diverse-v2, with --dataset-path for an old file"):
        tasks.resolve(f"antmaze-large-diverse-{version}")
    with pytest.raises(cli.UserError, match="is not known; the nearest names are: antmaze-"):
        tasks.resolve("antmaze-huge-play-v2")


# ------------------------------------------------------------------------------------------------ data


def maze_rows(rng, lengths, cluster=3):
    """Ants that go a little in each step; every episode has a cluster of rewarded rows in its middle."""
    rows = {"observations": [], "rewards": [], "timeouts": []}
    for length in lengths:
        obs = np.cumsum(rng.uniform(-0.2, 0.2, (length, 29)), axis=0) + rng.uniform(-9, 9, 29)
        reward = np.zeros(length)
        reward[length // 2 : length // 2 + cluster] = 1
        rows["observations"].append(obs.astype(np.float32))
        rows["rewards"].append(reward)
        rows["timeouts"].append(np.arange(length) == length - 1)
    raw = {key: np.concatenate(parts) for key, parts in rows.items()}
    n = len(raw["rewards"])
    return raw | {"actions": rng.uniform(-1, 1, (n, 8)).astype(np.float32), "terminals": raw["rewards"] > 0}


def literal_view(raw):
    """D4RL's: a row is a transition to the next one unless it is a time-out; rewarded rows end, but no episode."""
    rows, returns, episode = [], [0.0], 0
    for i in range(len(raw["rewards"]) - 1):
        returns[-1] += raw["rewards"][i]
        if raw["timeouts"][i]:
            episode += 1
            returns.append(0.0)
        else:
            following = raw["observations"][i + 1]
            rows.append((raw["observations"][i], raw["rewards"][i], following, float(raw["terminals"][i]), episode))
    returns[-1] += raw["rewards"][-1]
    return [np.array(column) for column in zip(*rows, strict=True)], returns


def test_the_view_of_a_maze_equals_a_literal_loop():
    raw = maze_rows(np.random.default_rng(0), [41, 60, 41, 12, 80])
    view, notes = views.qlearning_view(raw, 40, goes_on=True)  # one more row than the limit, and many more
    columns, returns = literal_view(raw)
    for name, column in zip(("obs", "rewards", "next_obs", "terminations", "episode"), columns, strict=True):
        np.testing.assert_array_equal(view[name], column, err_msg=name)
    assert view["returns"].tolist() == returns == [3] * 5 and not notes and view["ordered"]
    assert view["rewards"].sum() == raw["rewards"].sum() == view["terminations"].sum()


def test_time_outs_are_put_right_by_the_state_after_each_row(tmp_path):
    right = maze_rows(np.random.default_rng(0), [701, 701, 701])
    following = np.concatenate([right["observations"][1:], right["observations"][-1:]]).astype(np.float64)
    following[right["timeouts"]] += 0.1
    wrong = right | {"timeouts": np.roll(right["timeouts"], -3)}

    def load(raw, infos):
        path = tmp_path / "data.hdf5"
        with h5py.File(path, "w") as file:
            for key, value in raw.items():
                file[key] = value
            if infos:
                file["infos/qpos"], file["infos/qvel"] = following[:, :15], following[:, 15:]
        return datasets.load("antmaze-umaze-v2", str(path))

    expected = load(right, True)
    assert expected.notes == () and expected.states is None and len(expected) == 2_100
    repaired = load(wrong, True)
    assert repaired.notes == ("time-outs in the wrong rows, moved to where the next row begins another episode: 2",)
    assert (repaired.table == expected.table).all() and (repaired.episode == expected.episode).all()
    with pytest.raises(cli.UserError, match="2 transitions in which the position jumps: its time-outs stand in the"):
        load(wrong, False)


def test_the_best_episodes_of_a_maze_are_whole():
    raw = maze_rows(np.random.default_rng(1), [50, 50, 50], cluster=4)
    raw["rewards"][60:90] = 1
    raw["terminals"] = raw["rewards"] > 0
    view, _ = views.qlearning_view(raw, 49, goes_on=True)
    counts = np.bincount(view["episode"])
    assert counts.tolist() == [49, 49, 49] and view["returns"].argmax() == 1


@needs_fragments
@pytest.mark.parametrize("data", tasks.MAZE_DATA)
def test_d4rls_own_rows_of_the_mazes(data, capsys):
    path = FRAGMENTS / f"antmaze-{data}-v0.hdf5"
    found = datasets.load(f"antmaze-{data}-v2", str(path))
    assert (found.next_obs - found.obs)[:, :2].abs().max() < 1
    agreement.report_simulator_check(found)
    out = capsys.readouterr().out
    assert out.startswith(f"simulator check: data and D4RL's antmaze-{data.split('-')[0]} agree")
    errors = agreement.simulator_errors(found, dataclasses.replace(found.task, d4rl=False))
    assert agreement.wrong(errors) == ["next observations"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the stand-ins are not here")
def test_a_rounded_file_agrees_and_todays_robot_does_not(monkeypatch, capsys):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(SHARED))
    data = datasets.load("antmaze-umaze-v2")
    assert len(data) == 105_000 and len(data.returns) == 150 and data.rewards.sum() == data.returns.sum() == 15_711
    agreement.report_simulator_check(data)
    assert "agree" in (out := capsys.readouterr().out) and "rounded to 16 bits" in out
    data.task = dataclasses.replace(data.task, d4rl=False)
    agreement.report_simulator_check(data)
    assert "WARNING: the next observations of the data are not those" in capsys.readouterr().out


def test_bits_of_rounded_numbers():
    x = np.random.default_rng(0).normal(size=1_000).astype(np.float32)
    assert agreement.bits_of(x) == 24 and agreement.bits_of(x.astype(np.float16)) == 11


# ------------------------------------------------------------------------------------------------ rewards


def test_training_sees_transformed_rewards_and_scores_do_not(data):
    rewards, returns = data.rewards.clone(), data.returns.clone()
    data.transform_rewards(10.0, -5.0)
    assert (data.rewards == 10 * rewards - 5).all() and (data.table[:, -2] == data.rewards).all()
    assert (data.returns == returns).all()
    plain, other = (envs.Episodes(envs.make_env(data.task), 0, *transform) for transform in ((), (10.0, -5.0)))
    ended = False
    while not ended:
        _, reward, _, total = plain.step(np.ones(3, np.float32))
        _, transformed, _, same = other.step(np.ones(3, np.float32))
        ended = total is not None
        assert transformed == 10 * reward - 5 and same == total


# ------------------------------------------------------------------------------------------------ families


@dataclass
class Args(cli.RunArgs):
    env_id: str = "hopper-medium-v2"
    n: Annotated[int, at_least(0)] = 1
    """a number"""


PRESETS = {"demo": dict(env_id="hopper-medium-demo", n=20), "quick": dict(seed=3), "quick antmaze-large": dict(seed=4)}
FAMILIES = {"antmaze": dict(n=10, reward_shift=-1.0), "antmaze-large": dict(n=11)}


@pytest.mark.parametrize(
    ("line", "n", "shift", "seed"),
    [
        ("", 1, 0, 0),
        ("--env-id antmaze-umaze-v2", 10, -1, 0),
        ("--env-id antmaze-large-play-v2", 11, -1, 0),
        ("--env-id antmaze-large-play-v2 --n 2", 2, -1, 0),
        ("--env-id antmaze-large-play-v2 --n 1", 1, -1, 0),  # the default, but typed
        ("--env-id antmaze-large-play-v2 --reward-shift 0", 11, 0, 0),
        ("--preset demo", 20, 0, 0),
        ("--preset demo --env-id antmaze-umaze-v2", 20, -1, 0),
        ("--preset quick --env-id antmaze-umaze-v2", 10, -1, 3),
        ("--preset quick --env-id antmaze-large-diverse-v2", 11, -1, 4),
        ("--preset quick --env-id antmaze-large-diverse-v2 --seed 0", 11, -1, 0),
    ],
)
def test_typed_before_preset_before_family_before_default(line, n, shift, seed):
    args = cli.parse(Args, PRESETS, FAMILIES, line.split())
    assert (args.n, args.reward_shift, args.seed) == (n, shift, seed)


def test_help_names_what_a_family_sets(capsys):
    for script in (o2sac, o2td3, cql):
        with pytest.raises(SystemExit):
            cli.parse(script.Args, script.PRESETS, script.FAMILIES, ["--help"])
        text = " ".join(capsys.readouterr().out.split())
        for key, value in script.FAMILIES["antmaze"].items():
            assert " ".join(usage.flag(key, value)) in text


def test_what_help_names_can_be_typed_as_it_stands_there():
    for script in (o2sac, o2td3, cql):
        values = script.FAMILIES["antmaze"] | {"go_on": True, "compile": False}
        words = [word for item in values.items() for word in usage.flag(*item)]
        found = vars(cli.parse(script.Args, {}, {}, ["--env-id", "hopper-medium-v2", *words]))
        assert {key: found[key] for key in values} == values
    assert "--no-critic-layer-norm" in usage.of_families(o2td3.FAMILIES)


MAZES = {  # of METHOD's tables; medium and large differ from umaze where there are two values
    o2sac: dict(reward_scale=10, reward_shift=-5, critics=1, critic_hidden=(256,) * 5, align_steps=1_000_000,
                online_steps=200_000, learning_starts=5_000, eval_every=5_000, kl_threshold_start=0.125,
                kl_threshold_end=2.0, utd=10, reevaluate_steps=500_000, alpha=[0.2, 0.5],
                lagrange_init=[1, 2], gamma=0.99, actor_lr=1e-4),
    o2td3: dict(reward_scale=1, reward_shift=-1, critic_hidden=(256, 256), critic_layer_norm=False,
                align_steps=1_000_000, online_steps=200_000, learning_starts=1_000,
                eval_every=5_000, mse_threshold_start=0.0025, utd=1,
                mse_threshold_end=0.04, reevaluate_steps=500_000, lagrange_init=1, gamma=0.99),
    o2ppo: dict(reward_scale=1, reward_shift=0, value_hidden=(256,) * 3, reevaluate_steps=1_000_000,
                online_steps=250_000, eval_every=2_500,
                reference_alpha=2, beta_start=1, beta_steps=250_000, update_epochs=10, gamma=0.99,
                scale_rewards=False),
    cql: dict(reward_scale=10, reward_shift=-5, standardise=False, alpha=5, actor_lr=1e-4, critic_lr=3e-4, gamma=0.99,
              lagrange=True, target_gap=0.8, min_gap=-200, best_of=10, critic_hidden=(256,) * 5, hidden=(256,) * 3),
    iql: dict(reward_scale=1, reward_shift=-1, standardise=True, expectile=0.9, beta=10, lr=3e-4, gamma=0.99),
    td3_bc: dict(reward_scale=1, reward_shift=-1, standardise=True, alpha=2.5, gamma=0.99),
    rebrac: dict(reward_scale=100, reward_shift=0, standardise=False, gamma=0.999, hidden=(256,) * 3,
                 batch_size=256, actor_lr=3e-4, critic_lr=5e-5),
    awac: dict(reward_scale=1, reward_shift=-1, temperature=0.1, gamma=0.99),
    bc: dict(reward_scale=1, reward_shift=0),
}  # fmt: skip
REBRAC = dict(zip(tasks.MAZE_DATA, [(0.003, 0.002), (0.003, 0.001), (0.001, 0.0005), (0.001, 0), (0.002, 0.001),
                                    (0.002, 0.002)], strict=True))  # fmt: skip


@pytest.mark.parametrize("data", tasks.MAZE_DATA)
@pytest.mark.parametrize("script", MAZES)
def test_constants_of_the_mazes(script, data):
    args = dataclasses.asdict(
        cli.parse(script.Args, script.PRESETS, script.FAMILIES, ["--env-id", f"antmaze-{data}-v2"])
    )
    want = {name: value[not data.startswith("umaze")] if isinstance(value, list) else value
            for name, value in MAZES[script].items()}  # fmt: skip
    if script is rebrac:
        want |= dict(zip(("actor_bc_coef", "critic_bc_coef"), REBRAC[data], strict=True))
    assert {name: args[name] for name in want} == want


def test_an_offline_algorithm_that_is_called_takes_its_own():
    import offline

    args = cli.parse(
        o2sac.Args, o2sac.PRESETS, o2sac.FAMILIES, ["--env-id", "antmaze-large-play-v2", "--offline", "iql"]
    )
    _, chosen = offline.algorithm_args(args)
    assert (chosen.expectile, chosen.reward_scale, chosen.reward_shift, args.reward_scale) == (0.9, 1, -1, 10)


# ------------------------------------------------------------------------------------------------ runs

TINY_RUN = {
    "env_id": "antmaze-umaze-demo", "offline": "bc", "offline_steps": 3, "device": "cpu", "batch_size": 32,
    "eval_episodes": 2, "final_episodes": 3, "regime_episodes": 2, "reevaluate_steps": 3, "align_steps": 3,
    "online_steps": 60, "learning_starts": 40, "eval_every": 30, "checkpoint_seconds": 0,
}  # fmt: skip
SHORT = "from common import tasks\ntasks.MAZE_STEPS['umaze'] = 35"  # steps of an episode


def executed(script, folder, stage="none", step=0):
    """A run of the script, in a process of its own, that is killed at a step of a stage."""
    flags = [part for key, value in TINY_RUN.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    program = f"{SHORT}\n{kill_at(script, stage, step, 10)}"
    command = [sys.executable, "-c", program, *flags, "--no-compile", "--run-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=120)
    name = f"antmaze-umaze-demo__{script}__bc__0"
    return done, folder / name


def test_a_resumed_run_in_a_maze_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path):
    """It goes on within an episode, whose state and goal are hidden in nothing but its seed and its actions."""
    whole, folder = executed("o2td3", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    killed, cut = executed("o2td3", tmp_path / "cut", "finetune", 55)
    assert killed.returncode == -9
    resumed, _ = executed("o2td3", tmp_path / "cut")
    assert resumed.returncode == 0 and "finetune: continuing at step 50" in resumed.stdout
    for name in ("policy.pt", "best.pt", "finetune.pt"):
        a, b = (torch.load(path / name, weights_only=True) for path in (folder, cut))
        for key in ("actor",) if name != "finetune.pt" else ("state",):
            assert_same(a[key], b[key])
    assert torch.load(folder / "finetune.pt", weights_only=True)["state"]["env"]["actions"].shape == (25, 8)


def assert_same(a, b):
    """Nested dictionaries of tensors and numbers, equal to the last bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_loaded_episode_goes_on_with_its_goal():
    task = tasks.resolve("antmaze-umaze-v2")
    first, second = (envs.Episodes(envs.make_env(task), seed=0) for _ in range(2))
    rng = np.random.default_rng(0)
    for _ in range(705):  # into the second episode
        first.step(rng.uniform(-1, 1, 8).astype(np.float32))
    second.load_state_dict(first.state_dict())
    assert first.episode == second.episode == 1
    assert (first.env.unwrapped.goal == second.env.unwrapped.goal).all() and (first.obs == second.obs).all()
    for _ in range(20):
        action = rng.uniform(-1, 1, 8).astype(np.float32)
        assert all(np.array_equal(a, b) for a, b in zip(first.step(action), second.step(action), strict=True))
