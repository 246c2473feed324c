"""The simulator check: silent on D4RL's own rows and on ours, and never on another simulator's."""

import re
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from benchmarks import physics as physics_table
from common import agreement, datasets, envs, physics, simulation, tasks

FRAGMENTS = Path(__file__).parent.parent.parent / "shared" / "datasets" / "fragments"
VERSIONS = ("medium-v2", "medium_replay-v1", "random-v1", "medium")  # the last is v0
needs_fragments = pytest.mark.skipif(not FRAGMENTS.is_dir(), reason="D4RL's own rows are not here")


def fragment(robot: str, version: str) -> datasets.Dataset:
    return datasets.load(f"{robot}-medium-v2", str(FRAGMENTS / f"{robot}_{version}.hdf5"))


def said(data, capsys) -> str:
    agreement.report_simulator_check(data)
    return capsys.readouterr().out


@needs_fragments
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("robot", tasks.ROBOTS)
def test_d4rls_files_agree_with_its_robots_and_with_no_others(robot, version, capsys):
    data = fragment(robot, version)
    out = said(data, capsys)
    assert out.startswith(f"simulator check: data and D4RL's {robot} agree") and "WARNING" not in out
    assert ("contact forces" in out) == ((robot, version) == ("ant", "medium"))
    data.task = replace(data.task, d4rl=False, simulator="today's robot")
    out = said(data, capsys)
    assert out.startswith("WARNING: the next observations")
    assert "are not those of today's robot" in out and f"They agree with D4RL's {robot}" in out


@needs_fragments
def test_margins_are_seen(monkeypatch):
    """They move a few hundredths of Hopper's rows and leave the rest alone, the median too."""
    if not simulation.margins_add_up():
        pytest.skip("this MuJoCo's margins are D4RL's")
    data = fragment("hopper", "medium-v2")
    monkeypatch.setattr(physics, "old_margins", lambda model: model.geom_margin.copy())
    errors = agreement.simulator_errors(data, data.task)
    assert np.median(errors["next observations"]) < 1e-6
    assert agreement.wrong(errors) == ["next observations"]


@needs_fragments
def test_own_states_are_taken_only_where_they_are_the_rows(monkeypatch):
    """v1's files log one state for a whole episode; v2's show x, which observations do not."""
    seen = []
    for version in ("medium-v2", "medium_replay-v1"):
        data = fragment("ant", version)
        env = envs.make_env(data.task)
        env.reset(seed=0)
        assert agreement.set_state(env, data.task, data.obs[20].numpy(), data.states[20])
        seen.append(env.unwrapped.data.qpos[:2].copy())
        np.testing.assert_allclose(env.unwrapped.data.qpos[2:], data.obs[20, :13], atol=1e-6)
    np.testing.assert_array_equal(seen[0], fragment("ant", "medium-v2").states[20, :2])
    np.testing.assert_array_equal(seen[1], 0)


@pytest.mark.parametrize(("place", "off", "x"), [(1, 5e-7, 5), (1, 5e-6, 0), (7, 5e-6, 5), (7, 5e-5, 0)])
def test_a_state_is_the_rows_where_it_shows_the_rows_observation(place, off, x):
    """To a millionth, of what is large to a millionth of it; x is not observed, and else that of the root."""
    task = tasks.resolve(tasks.DEMO)
    env = envs.make_env(task)
    env.reset(seed=0)
    state = np.concatenate([env.unwrapped.data.qpos, env.unwrapped.data.qvel])
    state[[0, 7]] = 5, 9
    env.unwrapped.set_state(state[:6], state[6:])
    obs = np.float32(env.unwrapped._get_obs())
    state[place] += off
    assert agreement.set_state(env, task, obs, state) and env.unwrapped.data.qpos[0] == x


def demo() -> datasets.Dataset:
    return datasets.load(tasks.DEMO)


def test_the_demo_agrees(capsys):
    assert said(demo(), capsys).startswith("simulator check: data and D4RL's hopper agree")


def test_what_differs_is_named(capsys):
    data = demo()
    data.rewards = data.rewards * 1.05
    out = said(data, capsys)
    assert (
        out.startswith("WARNING: the rewards of the data are not") and "undo what was done to the file's rewards" in out
    )
    data = demo()
    data.next_obs = data.next_obs + 0.02
    out = said(data, capsys)
    assert out.startswith("WARNING: the next observations of the data are not") and "collected in with --env-id" in out


def test_a_few_wrong_rows_in_a_hundred_are_seen_and_one_in_a_thousand_is_not(capsys):
    for every, words in ((30, "WARNING"), (1_000, "agree")):
        data = demo()
        data.next_obs[::every] += 0.05
        assert words in said(data, capsys)


def collected(task, n: int) -> datasets.Dataset:
    """`n` transitions of random actions in a task's simulator."""
    env = envs.make_env(task)
    env.action_space.seed(0)
    raw = {key: [] for key in ("observations", "actions", "rewards", "terminals", "timeouts")}
    obs, _ = env.reset(seed=0)
    for _ in range(n):
        action = env.action_space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        for key, value in zip(raw, (obs, action, reward, terminated, truncated), strict=True):
            raw[key].append(value)
        obs = env.reset()[0] if terminated or truncated else next_obs
    raw = {key: np.array(value) for key, value in raw.items()}
    view, _ = datasets.qlearning_view(raw, 1_000)
    return datasets.Dataset(**{key: torch.as_tensor(x) for key, x in view.items()}, task=task, source="random")


@pytest.mark.parametrize("name", ["Ant-v4", "Hopper-v5", "HalfCheetah-v5", "Swimmer-v5"])
def test_gymnasiums_robots_agree_with_themselves(name, capsys):
    """An ant without D4RL's contact forces has 27 observations and no zeros beside them."""
    task = tasks.Task("other", name, name, name, gymnasium.spec(name))
    data = collected(task, 300)
    assert said(data, capsys).startswith(f"simulator check: data and {name} agree")
    data.task = replace(task, d4rl=True)
    assert said(data, capsys).startswith("WARNING")


def test_gymnasiums_ant_is_sent_there(capsys):
    data = collected(tasks.Task("other", "x", "x", "x", gymnasium.spec("Ant-v4")), 300)
    data.task = replace(data.task, d4rl=True, simulator="D4RL's ant")
    assert "They agree with Gymnasium's Ant-v4 in the MuJoCo that is installed" in said(data, capsys)


@pytest.mark.parametrize("name", ["Reacher-v5", "Pendulum-v1", "InvertedDoublePendulum-v5"])
def test_states_that_observations_do_not_show_are_not_guessed(name, capsys):
    data = collected(tasks.Task("other", name, name, name, gymnasium.spec(name)), 50)
    assert "cannot be rebuilt from observations; not checked" in said(data, capsys)


def test_the_table_of_errors(run_script):
    code, out, err = run_script(physics_table, "--env-ids", "hopper-medium-demo", "--rows", "60")
    assert code == 0, err
    [line] = [line for line in out.splitlines() if "hopper-medium-demo" in line]
    plain, here = ([float(x) for x in found.split(" / ")] for found in re.findall(r"\S+e-\d+ / \S+e-\d+", line))
    assert max(here) < 1e-2 < max(plain) and here[0] < 1e-3 < plain[0]
    code, _, err = run_script(physics_table, "--env-ids", "Hopper-v5")
    assert code == 2 and err.startswith("error: ")
