"""D4RL's physics: D4RL's own rows, transitions that ship, the masses, every change and every refusal.

Runs with mujoco, gymnasium, numpy, h5py and pytest alone, so that it can be tried in any MuJoCo:
`pytest --noconftest tests/test_physics.py`.
"""

import copy
import pickle
from pathlib import Path

import gymnasium
import h5py
import mujoco
import numpy as np
import pytest
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv

from common import physics, simulation
from common.physics import D4RLPhysics, as_d4rl, undo_changes
from tests.physics_rows import FILE, KEYS, ROBOTS, play

FRAGMENTS = Path(__file__).parent.parent.parent / "shared" / "datasets" / "fragments"
VERSION = tuple(int(part) for part in mujoco.__version__.split(".")[:3])
needs_fragments = pytest.mark.skipif(not FRAGMENTS.is_dir(), reason="D4RL's own rows are not here")


def make(robot: str, **kwargs):
    return as_d4rl(gymnasium.make(ROBOTS[robot], disable_env_checker=True, **kwargs)).unwrapped


def plain(robot: str):
    return gymnasium.make(ROBOTS[robot], disable_env_checker=True).unwrapped


# ------------------------------------------------------------------------------------------------ D4RL's own rows


class Rows:
    """The rows of a fragment: states (qpos, qvel), their actions, next observations and rewards, and who follows whom.

    A state is the file's own where that agrees with its observation, else rebuilt from it, with x (and y) 0. v1 files
    hold one and the same state for a whole episode. Hopper's and walker2d's speeds are cut off at 10 in both.
    """

    def __init__(self, robot: str, version: str, env):
        self.robot, nq = robot, env.model.nq
        with h5py.File(FRAGMENTS / f"{robot}_{version}.hdf5") as file:
            raw = {key: file[key][()].astype(np.float64) for key in ("observations", "actions", "rewards", "terminals")}
            timeouts = file["timeouts"][()] if "timeouts" in file else np.zeros(len(raw["rewards"]))
            own = [file[f"infos/{key}"][()].astype(np.float64) for key in ("qpos", "qvel")] if "infos" in file else None
            following = file["next_observations"][()] if "next_observations" in file else raw["observations"][1:]
        self.hidden = 2 if robot == "ant" else 1
        size = nq + env.model.nv - self.hidden
        self.obs, self.next_obs = raw["observations"][:, :size], following[:, :size]
        self.actions, self.rewards = raw["actions"], raw["rewards"].ravel()
        self.ends = (raw["terminals"].ravel() + timeouts.ravel() > 0)[: len(self.next_obs)]
        self.qpos = np.pad(self.obs[:, : nq - self.hidden], ((0, 0), (self.hidden, 0)))
        self.qvel = self.obs[:, nq - self.hidden :]
        self.own = own is not None and np.abs(np.hstack(own)[:, self.hidden :] - self.obs).max() < 1e-6
        if self.own:
            self.qpos, self.qvel = own
        slow = np.abs(self.qvel).max(1) < 9.999 if robot in ("hopper", "walker2d") else np.ones(len(self.obs), bool)
        known = ~self.ends if len(self.next_obs) < len(self.obs) else np.ones_like(self.ends)
        self.judged = np.flatnonzero(slow[: len(known)] & known)

    def errors(self, env) -> tuple[np.ndarray, np.ndarray]:
        """(largest error of the next observation, error of the reward) of one step from each row.

        Ant's reward takes x from `xpos`, which a step leaves at RK4's last stage: it needs the row before.
        """
        obs_errors, reward_errors = [], []
        for row in self.judged:
            qpos, before = self.qpos[row], None
            if self.robot == "ant" and row and not self.ends[row - 1]:
                play(env, self.qpos[row - 1], self.qvel[row - 1], self.actions[row - 1])
                before = env.data.xpos.copy()
                if not self.own:  # x and y, which are not observed
                    qpos = np.concatenate([env.data.qpos[:2], qpos[2:]])
            env.reset(seed=0)
            env.set_state(qpos, self.qvel[row])
            if before is not None:
                env.data.xpos[:] = before
            obs, reward, *_ = env.step(self.actions[row])
            obs_errors.append(np.abs(obs - self.next_obs[row]).max())
            if before is not None or self.robot != "ant":
                reward_errors.append(abs(reward - self.rewards[row]))
        return np.array(obs_errors), np.array(reward_errors)

    def open_loop(self, env) -> list[tuple[np.ndarray, bool, int]]:
        """For each episode, replayed from its first state: (errors, whether the simulator ended it, its length)."""
        starts = np.concatenate([[0], np.flatnonzero(self.ends) + 1])
        ends = np.concatenate([np.flatnonzero(self.ends), [len(self.rewards) - 1]])
        episodes = []
        for start, end in zip(starts, ends, strict=True):
            if start > end:
                continue
            env.reset(seed=0)
            env.set_state(self.qpos[start], self.qvel[start])
            errors, ended = [], False
            for row in range(start, end + 1):
                obs, _, ended, *_ = env.step(self.actions[row])
                if row < len(self.next_obs) and (row < end or len(self.next_obs) == len(self.obs)):
                    errors.append(np.abs(obs - self.next_obs[row]).max())
            episodes.append((np.array(errors), ended, end - start + 1))
        return episodes


# Errors of the next observation that were found, at 50, 90 and 99%; a bound is three times as much. v0 ant and
# halfcheetah come from an older simulator yet: halfcheetah is off in contact, and ant pays for contact forces
FOUND = {
    ("hopper", "medium-v2"): (1.8e-7, 4e-7, 8e-7),
    ("hopper", "medium_replay-v1"): (9e-16, 3e-15, 3e-15),
    ("hopper", "random-v1"): (1.2e-7, 4.9e-7, 6.6e-7),
    ("hopper", "medium"): (1.9e-7, 4.6e-7, 8.0e-7),
    ("halfcheetah", "medium-v2"): (4.9e-7, 1.4e-6, 1e-5),
    ("halfcheetah", "medium_replay-v1"): (6e-15, 8e-14, 3e-13),
    ("halfcheetah", "random-v1"): (4.1e-7, 1.3e-6, 1.3e-5),
    ("halfcheetah", "medium"): (1.1e-6, 5.9e-4, 8.0e-3),
    ("walker2d", "medium-v2"): (3.5e-7, 2.2e-6, 4e-6),
    ("walker2d", "medium_replay-v1"): (1.3e-14, 2.9e-14, 2.9e-14),
    ("walker2d", "random-v1"): (1.7e-7, 7.2e-7, 1.8e-6),
    ("walker2d", "medium"): (3.6e-7, 2.9e-6, 4.7e-6),
    ("ant", "medium-v2"): (3.1e-7, 5e-7, 1.2e-6),
    ("ant", "medium_replay-v1"): (2e-15, 5e-15, 7e-15),
    ("ant", "random-v1"): (4.2e-7, 8.1e-7, 2.1e-6),
    ("ant", "medium"): (3.3e-7, 5.9e-7, 1.4e-6),
}
JUDGED = {  # how many rows that is, so that none is lost unseen
    ("hopper", "medium-v2"): 761, ("hopper", "medium_replay-v1"): 49, ("walker2d", "medium-v2"): 1419,
    ("ant", "medium-v2"): 2000, ("halfcheetah", "medium-v2"): 2000, ("walker2d", "medium_replay-v1"): 5,
}  # fmt: skip


def quantiles(errors: np.ndarray) -> np.ndarray:
    return np.quantile(errors, [0.5, 0.9, 0.99])


@needs_fragments
@pytest.mark.parametrize(("robot", "version"), FOUND)
def test_one_step_gives_d4rls_next_observation_and_reward(robot, version):
    env = make(robot)
    rows = Rows(robot, version, env)
    assert rows.own == (version == "medium-v2")
    assert len(rows.judged) == JUDGED.get((robot, version), len(rows.judged)) > 0
    obs, rewards = rows.errors(env)
    assert (quantiles(obs) <= 3 * np.array(FOUND[robot, version])).all(), quantiles(obs)
    if (robot, version) not in (("ant", "medium"), ("halfcheetah", "medium")):
        assert (quantiles(rewards) <= 3 * np.array([1.3e-7, 3e-7, 5e-7])).all(), quantiles(rewards)


@needs_fragments
@pytest.mark.parametrize(("robot", "version"), FOUND)
def test_todays_robots_do_not(robot, version):
    env = plain(robot)
    rows = Rows(robot, version, env)
    rows.judged = rows.judged[:: max(1, len(rows.judged) // 200)]
    obs, rewards = rows.errors(env)
    assert (quantiles(obs) > 3 * np.array(FOUND[robot, version])).all()
    assert np.median(obs) > 5e-3 and np.median(rewards) > 2e-4


@needs_fragments
def test_ants_reward_needs_the_row_before():
    env = make("ant")
    rows = Rows("ant", "medium-v2", env)
    errors = []
    for row in rows.judged[:200]:
        env.reset(seed=0)
        env.set_state(rows.qpos[row], rows.qvel[row])
        errors.append(abs(env.step(rows.actions[row])[1] - rows.rewards[row]))
    assert 5e-5 < np.median(errors) < 5e-4


# Steps within a bound, for each episode, of what was found; where contacts magnify rounding, half of it
@needs_fragments
@pytest.mark.parametrize(
    ("robot", "version", "bound", "steps"),
    [
        ("hopper", "medium-v2", 1e-3, (470, 441)),
        ("hopper", "medium_replay-v1", 1e-13, (40, 8)),
        ("walker2d", "medium_replay-v1", 1e-12, (10, 20)),
        ("walker2d", "random-v1", 1e-3, (17, 26)),
        ("walker2d", "medium-v2", 1e-3, (110, 125)),
        ("halfcheetah", "medium_replay-v1", 1e-3, (49, 36)),
        ("ant", "medium_replay-v1", 1e-8, (45, 24)),
        ("ant", "medium-v2", 1e-3, (26, 33)),
    ],
)
def test_whole_episodes_replayed_from_their_first_state(robot, version, bound, steps):
    for simulator in (make(robot), plain(robot)):
        episodes = Rows(robot, version, simulator).open_loop(simulator)
        within = [int(np.argmax(np.append(errors > bound, True))) for errors, *_ in episodes]
        if isinstance(simulator, D4RLPhysics):
            assert len(within) == len(steps) and all(np.array(within) >= steps), within
            if (robot, version) == ("hopper", "medium-v2"):  # to the very fall
                assert [(ended, length) for _, ended, length in episodes] == [(True, 470), (True, 441)]
        else:
            assert max(within) <= 1


# ------------------------------------------------------------------------------------------------ rows that ship


def shipped_errors(robot: str, env) -> np.ndarray:
    with np.load(FILE) as file:
        columns = [file[f"{robot}/{key}"] for key in KEYS]
    assert len(columns[0]) == 200
    errors = []
    for qpos, qvel, action, *expected in zip(*columns, strict=True):
        found = play(env, qpos, qvel, action)
        errors.append(max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True)))
    return np.array(errors)


@pytest.mark.parametrize("robot", ROBOTS)
def test_transitions_are_as_they_were(robot):
    assert shipped_errors(robot, make(robot)).max() < 1e-12
    assert shipped_errors(robot, plain(robot)).min() > 1e-5


def without_capsules(monkeypatch):
    monkeypatch.setattr(physics, "undo_capsules", lambda *_: None)


def without_derived_constants(monkeypatch):
    monkeypatch.setattr(mujoco, "mj_setConst", lambda *_: None)


def without_margins(monkeypatch):
    monkeypatch.setattr(physics, "old_margins", lambda model: model.geom_margin.copy())


def without_total_mass(monkeypatch):
    monkeypatch.setattr(physics, "declared_mass", lambda _: None)


def without_runge_kutta(monkeypatch):
    monkeypatch.setattr(simulation, "rk4_turns_to_fourth_order", lambda: False)


@pytest.mark.parametrize(
    ("undone", "needed", "robots"),
    [
        (without_capsules, lambda: True, {"hopper", "halfcheetah", "walker2d", "ant"}),
        (without_derived_constants, lambda: True, {"hopper", "halfcheetah", "walker2d", "ant"}),
        (without_margins, simulation.margins_add_up, {"hopper", "ant"}),
        (without_total_mass, lambda: True, {"halfcheetah"}),
        (without_runge_kutta, simulation.rk4_turns_to_fourth_order, {"ant"}),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_each_change_that_is_left_shows(monkeypatch, undone, needed, robots):
    undone(monkeypatch)
    shows = {robot for robot in ROBOTS if shipped_errors(robot, make(robot)).max() > 1e-9}
    assert shows == (robots if needed() else set())


# ------------------------------------------------------------------------------------------------ models


MASSES = {
    "hopper": [3.53429174, 3.92699082, 2.71433605, 5.08938010],
    "walker2d": [3.53429174, *2 * [3.92699082, 2.71433605, 2.94053072]],
    "halfcheetah": [6.36031332, 1.53524804, 1.58093995, 1.06919060, 1.42558747, 1.17885117, 0.84986945],
    "ant": [0.32724923, *4 * [0.03647693, 0.03647693, 0.06491138]],
}


@pytest.mark.parametrize("robot", ROBOTS)
def test_masses(robot):
    model = make(robot).model
    np.testing.assert_allclose(model.body_mass[1:], MASSES[robot], rtol=0, atol=5e-9)
    assert np.abs(plain(robot).model.body_mass[1:] - MASSES[robot]).max() > 2e-3
    if robot == "halfcheetah":
        np.testing.assert_allclose(model.body_ipos[1], [0.14913793, 0, 0.02485632], rtol=0, atol=5e-9)
        assert model.body_mass.sum() == pytest.approx(14, abs=1e-12)


def test_halfcheetah_weighs_14_whatever_mujoco_makes_of_its_file(tmp_path):
    text = Path(plain("halfcheetah").fullpath).read_text()
    for declared, expected in (("", 14), ('settotalmass="14"', 14), ('settotalmass="20"', 20)):
        path = tmp_path / "half_cheetah.xml"
        path.write_text(text.replace('settotalmass="14"', declared))
        env = as_d4rl(gymnasium.make("HalfCheetah-v5", xml_file=str(path))).unwrapped
        np.testing.assert_allclose(env.model.body_mass[1:], np.array(MASSES["halfcheetah"]) * expected / 14, atol=5e-8)
    env = as_d4rl(gymnasium.make("HalfCheetah-v5", xml_file=str(path)), total_mass=7).unwrapped
    assert env.model.body_mass.sum() == pytest.approx(7)


def compiled(body: str, **options) -> mujoco.MjModel:
    options = " ".join(f'{key}="{value}"' for key, value in options.items())
    return mujoco.MjModel.from_xml_string(f"<mujoco><option {options}/><worldbody>{body}</worldbody></mujoco>")


def test_bodies_with_an_inertia_of_their_own_are_left():
    capsule = '<geom type="capsule" size=".1 .2" pos="{} 0 0" {}/>'
    bodies = {
        "given": f'<inertial pos="0 0 0" mass="3" diaginertia=".1 .1 .1"/>{capsule.format(0, "")}',
        "two densities": capsule.format(0, "") + capsule.format(1, 'density="7"'),
        "one density": capsule.format(0, 'density="7"') + capsule.format(1, 'density="7"'),
    }
    for name, text in bodies.items():
        model = compiled(f"<body><freejoint/>{text}</body>")
        mass, inertia = model.body_mass.copy(), model.body_inertia.copy()
        undo_changes(model)
        same = np.array_equal(mass, model.body_mass) and np.array_equal(inertia, model.body_inertia)
        assert same == (name != "one density"), name
    # a cylinder of half length 0.2 + 0.1 / 2: 7 * 2 pi 0.1^2 0.25 each; about the x axis both turn as they do alone
    mass = 7 * 2 * np.pi * 0.1**2 * 0.25
    across, along = mass * (3 * 0.1**2 + 4 * 0.25**2) / 12, mass * 0.1**2 / 2
    assert model.body_mass[1] == pytest.approx(2 * mass, rel=1e-12)
    apart = 2 * mass * 0.5**2
    expected = sorted([2 * across, 2 * across + apart, 2 * along + apart])
    np.testing.assert_allclose(sorted(model.body_inertia[1]), expected, rtol=1e-12)


def test_a_moved_frame_is_computed_afresh():
    ends = '<geom type="capsule" size=".1 .2"/><geom type="sphere" size=".1" pos="1 0 .3"/>'
    model = compiled(f'<body><freejoint/>{ends}<site pos="0 0 0"/></body>')
    before = model.body_ipos[1].copy()
    undo_changes(model)
    # masses 2 pi r^2 (h + r / 2) and 4/3 pi r^3: the center lies between (0, 0, 0) and (1, 0, 0.3) by their shares
    share = (4 / 3 * 0.1**3) / (4 / 3 * 0.1**3 + 2 * 0.1**2 * 0.25)
    assert np.abs(before - model.body_ipos[1]).max() > 1e-3
    np.testing.assert_allclose(model.body_ipos[1], [share, 0, 0.3 * share], atol=1e-12)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    np.testing.assert_allclose(data.xipos[1], model.body_ipos[1], atol=1e-12)
    # whose bounding volumes may be those of the frame that was there
    midphase = int(mujoco.mjtDisableBit.mjDSBL_MIDPHASE)
    assert model.opt.disableflags & midphase
    still = compiled('<body><freejoint/><geom type="capsule" size=".1 .2"/></body>')
    undo_changes(still)
    assert not still.opt.disableflags & midphase


MARGINS = {  # margin, contype, conaffinity of geoms, each in a body of its own; what they become; None: no such margins
    "equal": ([(0.01, 1, 1), (0.01, 1, 1)], [0.005, 0.005]),
    "one of two has none": ([(0.0, 1, 0), (0.02, 0, 1)], [0.01, 0.01]),
    "a touches b, b touches itself": ([(0.03, 1, 0), (0.01, 2, 3), (0.01, 2, 3)], [0.025, 0.005, 0.005]),
    "all touch": ([(0.03, 1, 1), (0.03, 1, 1), (0.01, 1, 1), (0.01, 1, 1)], None),
}


@pytest.mark.parametrize("case", MARGINS)
def test_margins(case):
    geoms, expected = MARGINS[case]
    body = '<body pos="0 0 {}"><freejoint/><geom size=".1" margin="{}" contype="{}" conaffinity="{}"/></body>'
    model = compiled("".join(body.format(i, *geom) for i, geom in enumerate(geoms)))
    before = model.geom_margin.copy()
    if not simulation.margins_add_up():
        undo_changes(model)
        np.testing.assert_array_equal(model.geom_margin, before)
    elif expected is None:
        with pytest.raises(ValueError, match="mixes the margins"):
            undo_changes(model)
        np.testing.assert_array_equal(model.geom_margin, before)
    else:
        undo_changes(model)
        np.testing.assert_allclose(model.geom_margin, expected, rtol=0, atol=1e-12)


def test_gaps_are_refused():
    model = compiled('<body><freejoint/><geom size=".1" margin=".1" gap=".05"/></body>')
    with pytest.raises(ValueError, match="contact gaps"):
        undo_changes(model)


def test_actuators_with_a_state_are_refused_where_rk4_is_made_by_hand():
    model = mujoco.MjModel.from_xml_string(
        '<mujoco><option integrator="RK4"/><worldbody><body><freejoint/><geom size=".1"/><body><joint name="j"/>'
        '<geom size=".1" pos="1 0 0"/></body></body></worldbody>'
        '<actuator><general joint="j" dyntype="integrator"/></actuator></mujoco>'
    )
    with pytest.raises(ValueError, match="actuators with a state"):
        simulation.RungeKutta(model, mujoco.MjData(model))


# ------------------------------------------------------------------------------------------------ probes


def test_probes():
    """Each against the physics that a hand can work out, or the version in which it changed."""
    assert simulation.margins_add_up() == (VERSION >= (3, 5, 0))
    assert simulation.deep_contacts_are_true() == (VERSION >= (3, 2, 7))
    assert simulation.rk4_turns_to_fourth_order() == (VERSION >= (4, 0, 0))


def test_convex_collider_is_off():
    model = compiled('<body><freejoint/><geom type="box" size="1 1 1"/></body>')
    model.opt.disableflags = 0
    for name in ("NATIVECCD", "MULTICCD"):
        model.opt.enableflags |= int(getattr(mujoco.mjtEnableBit, f"mjENBL_{name}", 0))
    undo_changes(model)
    assert model.opt.enableflags == 0
    for name in ("NATIVECCD", "MULTICCD"):
        bit = int(getattr(mujoco.mjtDisableBit, f"mjDSBL_{name}", 0))
        assert model.opt.disableflags & bit == bit


def test_runge_kutta_by_hand_is_the_native_one_without_free_joints():
    text = '<body pos="0 0 2"><joint axis="0 1 0"/><geom type="capsule" size=".1 .3"/><body pos="0 0 1">'
    text += '<joint axis="1 0 0"/><geom type="capsule" size=".1 .3"/></body></body>'
    model = compiled(text, integrator="RK4", timestep=0.02)
    native, by_hand = mujoco.MjData(model), mujoco.MjData(model)
    native.qvel[:] = by_hand.qvel[:] = [1, -2]
    for _ in range(20):
        mujoco.mj_step(model, native)
        simulation.RungeKutta(model, by_hand).step()
    np.testing.assert_allclose(by_hand.qpos, native.qpos, rtol=0, atol=1e-13)
    np.testing.assert_allclose(by_hand.qvel, native.qvel, rtol=0, atol=1e-13)
    assert by_hand.time == pytest.approx(native.time)


def test_the_four_stages_have_their_times_and_the_solver_starts_where_it_ended():
    model = compiled('<body pos="0 0 1"><freejoint/><geom type="box" size=".1 .2 .3"/></body>', integrator="RK4",
                     timestep=0.02)  # fmt: skip
    data, times = mujoco.MjData(model), []
    data.qvel[3:], data.time = [3, 1, 2], 1.0
    mujoco.set_mjcb_control(lambda m, d: times.append(d.time))
    try:
        simulation.RungeKutta(model, data).step()
    finally:
        mujoco.set_mjcb_control(None)
    assert times == pytest.approx([1.0, 1.01, 1.01, 1.02]) and data.time == pytest.approx(1.02)
    np.testing.assert_array_equal(data.qacc_warmstart, data.qacc)
    assert data.qacc.any()


BOX = '<geom type="box" size=".5 .5 .5"/>'
FALLING = (
    '<body pos="0 0 {z}"><joint type="slide" axis="0 0 1"/><geom type="{kind}" size=".1 .1" euler="0 90 0"/></body>'
)


def deep(kind: str, z: float, integrator: str):
    model = compiled(BOX + FALLING.format(kind=kind, z=z), gravity="0 0 0", integrator=integrator, timestep=0.0005)
    return model, mujoco.MjData(model)


@pytest.mark.parametrize("kind", ["sphere", "capsule"])
def test_deep_contacts_push_as_hard_as_those_as_deep_as_the_radius(kind):
    """One Euler step: 0.1 inside the box, a sphere or capsule is pushed out as if its center were on the surface."""
    speeds = []
    for z in (0.4, 0.5):
        model, data = deep(kind, z, "Euler")
        simulation.Simulation(model, data).step(1)
        speeds.append(data.qvel[0])
    assert speeds[0] == pytest.approx(speeds[1], rel=1e-9) and speeds[0] > 0
    model, data = deep(kind, 0.4, "Euler")
    mujoco.mj_step(model, data)
    assert (data.qvel[0] > 1.01 * speeds[0]) == simulation.deep_contacts_are_true()


@pytest.mark.skipif(not simulation.deep_contacts_are_true(), reason="contacts are as they were")
@pytest.mark.parametrize(("missing", "again"), [(0.001, True), (0.029, True), (0.031, False)])
def test_a_step_that_ends_nearly_too_deep_is_taken_again(missing, again, monkeypatch):
    """Within 0.03: one of its other stages may have been deeper."""
    model, data = deep("sphere", 0.5 + missing, "RK4")
    chosen, taken = simulation.Simulation(model, data), []
    monkeypatch.setattr(mujoco, "mj_step", lambda m, d: mujoco.mj_forward(m, d))
    monkeypatch.setattr(chosen.runge_kutta, "step", lambda: taken.append(True))
    chosen.step(1)
    assert bool(taken) == again


@pytest.mark.parametrize("z", [0.4, 0.5, 0.52])
def test_a_native_step_is_taken_again_by_hand_where_a_contact_was_deep(z):
    (model, data), (_, by_hand), (_, native) = (deep("capsule", z, "RK4") for _ in range(3))
    chosen = simulation.Simulation(model, data)
    for _ in range(10):
        chosen.step(1)
        simulation.RungeKutta(model, by_hand, simulation.DeepContacts(model, by_hand)).step()
        mujoco.mj_step(model, native)
    np.testing.assert_allclose(data.qvel, by_hand.qvel, rtol=1e-12)
    np.testing.assert_allclose(data.qpos, by_hand.qpos, rtol=1e-12)
    assert (abs(native.qvel[0] - data.qvel[0]) > 1e-3) == (z == 0.4 and simulation.deep_contacts_are_true())


# ------------------------------------------------------------------------------------------------ environments


def test_a_second_time_changes_nothing():
    env = gymnasium.make("Hopper-v4")
    assert as_d4rl(env) is env
    model = copy.copy(env.unwrapped.model)
    assert as_d4rl(env) is env and as_d4rl(env.unwrapped) is env.unwrapped
    np.testing.assert_array_equal(env.unwrapped.model.geom_margin, model.geom_margin)
    np.testing.assert_array_equal(env.unwrapped.model.body_mass, model.body_mass)
    with pytest.raises(ValueError, match="has D4RL's physics already"):
        undo_changes(env.unwrapped.model)


class Static(D4RLPhysics, HopperEnv):
    """D4RL's physics by inheritance."""


class Unpicklable(HopperEnv):
    """Stores its whole state instead of how it was made, as environments without EzPickle do."""

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key != "mujoco_renderer"}

    def __setstate__(self, state):
        vars(self).update(state)


def trajectory(env) -> np.ndarray:
    env.reset(seed=3)
    actions = np.random.default_rng(0).uniform(-1, 1, (20, *env.action_space.shape))
    return np.array([env.step(action)[0] for action in actions])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))], ids=["copy", "pickle"])
@pytest.mark.parametrize(
    "build",
    [
        *(lambda robot=robot: as_d4rl(gymnasium.make(ROBOTS[robot])) for robot in ROBOTS),
        lambda: as_d4rl(gymnasium.make("Hopper-v4", reset_noise_scale=0.1), total_mass=20.0, round_actions=False),
        Static,
        lambda: as_d4rl(Unpicklable()),
    ],
    ids=[*ROBOTS, "arguments", "static", "whole state"],
)
def test_environments_are_pickled_with_their_physics(build, clone):
    env = build()
    if isinstance(env, Unpicklable) and VERSION < (3, 2, 7):
        pytest.skip("this MuJoCo crashes where its own MjData is pickled")
    other = clone(env)
    assert other is not env and type(other.unwrapped) is type(env.unwrapped)
    assert isinstance(other.unwrapped, D4RLPhysics)
    expected = trajectory(env)
    np.testing.assert_array_equal(trajectory(other), expected)
    np.testing.assert_array_equal(trajectory(clone(other)), expected)


def test_static_subclasses_have_the_physics():
    np.testing.assert_array_equal(trajectory(Static()), trajectory(make("hopper")))
    assert np.abs(trajectory(Static()) - trajectory(plain("hopper"))).max() > 1e-3


def test_others_are_refused_and_left_as_they_were(tmp_path):
    with pytest.raises(ValueError, match="only MuJoCo environments"):
        as_d4rl(gymnasium.make("CartPole-v1"))
    path = tmp_path / "hopper.xml"
    path.write_text(Path(plain("hopper").fullpath).read_text().replace('margin="0.001"', 'margin="0.001" gap="0.0005"'))
    env = gymnasium.make("Hopper-v5", xml_file=str(path))
    with pytest.raises(ValueError, match="contact gaps"):
        as_d4rl(env)
    assert not isinstance(env.unwrapped, D4RLPhysics)


def test_first_observations_have_unit_quaternions():
    for seed in range(5):
        obs, _ = make("ant").reset(seed=seed)
        assert np.linalg.norm(obs[1:5]) == pytest.approx(1, abs=1e-15)
        obs, _ = plain("ant").reset(seed=seed)
        assert abs(np.linalg.norm(obs[1:5]) - 1) > 1e-3


def test_actions_are_rounded_as_d4rls_normaliser_does():
    """low + (a + 1) * 0.5 * (high - low), clipped, in single precision."""
    env, unrounded = make("hopper"), as_d4rl(gymnasium.make("Hopper-v4"), round_actions=False).unwrapped
    actions = [np.array([0.123456789, -0.7, 1e-9]), np.array([1.5, -2.0, 1.0], np.float32)]
    for action in actions:
        low, high = np.full(3, -1, np.float32), np.full(3, 1, np.float32)
        expected = np.clip(low + (action.astype(np.float32) + 1) * np.float32(0.5) * (high - low), low, high)
        for simulator, ctrl in ((env, expected), (unrounded, action)):
            simulator.reset(seed=0)
            simulator.step(action)
            np.testing.assert_array_equal(simulator.data.ctrl, ctrl.astype(np.float64))
    # another range than -1 to 1 is none of D4RL's: its actions are played as they are
    pusher = as_d4rl(gymnasium.make("Pusher-v5")).unwrapped
    pusher.reset(seed=0)
    pusher.step(np.full(7, 1.7000001))
    np.testing.assert_array_equal(pusher.data.ctrl, np.full(7, 1.7000001))


def test_contact_forces_stay_zero():
    """D4RL's ant observed 84 of them, all zero."""
    env = as_d4rl(gymnasium.make("Ant-v4", use_contact_forces=True)).unwrapped
    obs, _ = env.reset(seed=0)
    for _ in range(50):
        obs, *_ = env.step(np.ones(8))
    assert obs.shape == (111,) and not obs[27:].any() and env.data.ncon
