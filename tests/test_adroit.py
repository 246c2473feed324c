"""D4RL's Adroit hand: its rewards, ends, successes, own rows, own policies and names, and short runs on it."""

import math
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import offline
import o2ppo
import o2sac
import o2td3
from common import agreement, cli, datasets, envs, policies, tasks, views
from common.evaluation import Evaluator
from common.physics import as_d4rl
from export import to_onnx
from offline import awac, bc, cql, iql, rebrac, td3_bc

SHARED = Path(__file__).parent.parent.parent / "shared" / "datasets"
FRAGMENTS = SHARED / "fragments"
needs_fragments = pytest.mark.skipif(not FRAGMENTS.is_dir(), reason="D4RL's own rows are not here")
HANDS = {  # observations, actions, steps, D4RL's returns of a random policy and of an expert
    "pen": (45, 24, 100, 96.262799, 3076.8331017826877),
    "door": (39, 28, 200, -56.512833, 2880.5693087298737),
    "hammer": (46, 26, 200, -274.856578, 12794.134825156867),
    "relocate": (39, 30, 200, -6.425911, 4233.877797728884),
}


def test_the_missing_package_is_asked_for_by_name(monkeypatch):
    find = tasks.importlib.util.find_spec
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None if "robotics" in name else find(name))
    with pytest.raises(cli.UserError, match="install it with: pip install gymnasium-robotics"):
        tasks.resolve("pen-human-v1")


def test_what_is_not_played_is_named():
    with pytest.raises(cli.UserError, match="door-cloned-v0 is not played.* take door-cloned-v1"):
        tasks.resolve("door-cloned-v0")
    with pytest.raises(cli.UserError, match="'pen-medium-v1' is not known; the nearest names are: .*pen-human-v1"):
        tasks.resolve("pen-medium-v1")


pytest.importorskip("gymnasium_robotics", reason="gymnasium-robotics, which has the hand's models, is not installed")


@pytest.fixture(scope="module")
def hands():
    """One environment in D4RL's physics for each of the four, as it was reset."""
    from common.adroit import HANDS

    return {hand: as_d4rl(env()) for hand, env in HANDS.items()}


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("name", tasks.HAND_IDS)
def test_names(name):
    task = tasks.resolve(name)
    observations, actions, steps, *references = HANDS[task.robot]
    assert (task.family, task.data, task.kind) == ("adroit", name, f"adroit-{name[:-3]}") and task.d4rl
    assert task.max_episode_steps == steps and task.references == tuple(references)
    assert task.simulator == f"D4RL's {task.robot}" and task.usual_clip == 10
    assert datasets.d4rl_url(name).endswith(f"/{name}.hdf5") and tasks.is_d4rls(Path(f"{name}.hdf5"))
    assert task == tasks.resolve(name, f"{name}.hdf5")


def test_names_and_data_of_another_hand():
    with pytest.raises(cli.UserError, match="pen-human-v1 is another task than that of door-human-v1"):
        tasks.resolve("pen-human-v1", "door-human-v1.hdf5")
    assert tasks.resolve("pen-human-v1", "pen-cloned-v1.hdf5").kind == "adroit-pen-cloned"
    assert tasks.resolve("pen-human-v1", "mine.hdf5").data == "mine"


CONSTANTS = {  # of all twelve
    iql: dict(expectile=0.8, beta=3, standardise=True, clip_observations=10),
    cql: dict(alpha=1, lagrange=False, standardise=True),
    awac: dict(temperature=0.1),
    td3_bc: dict(alpha=2.5),
    bc: dict(clip_observations=10),
    rebrac: dict(standardise=False, batch_size=256, actor_lr=3e-4, critic_lr=3e-4),
    o2sac: dict(online_steps=200_000, best_margin=2),
    o2td3: dict(online_steps=200_000, best_margin=2),
    o2ppo: dict(best_margin=2),
}
REBRAC = {  # actor, critic: human, cloned, expert
    "pen": ((0.1, 0.5), (0.05, 0.5), (0.01, 0.01)), "door": ((0.1, 0.1), (0.01, 0.1), (0.05, 0.01)),
    "hammer": ((0.01, 0.5), (0.1, 0.5), (0.01, 0.01)), "relocate": ((0.1, 0.01), (0.1, 0.01), (0.05, 0.01)),
}  # fmt: skip


@pytest.mark.parametrize("script", CONSTANTS)
def test_constants(script):
    for hand, weights in REBRAC.items():
        for data, (actor, critic) in zip(("human", "cloned", "expert"), weights, strict=True):
            args = vars(cli.parse(script.Args, script.PRESETS, script.FAMILIES, ["--env-id", f"{hand}-{data}-v1"]))
            want = CONSTANTS[script] | dict(reward_scale=1, reward_shift=0, eval_episodes=100)
            want |= dict(actor_bc_coef=actor, critic_bc_coef=critic) if script is rebrac else {}
            assert {name: args[name] for name in want} == want


@pytest.mark.parametrize("name", offline.ALGORITHMS)
def test_every_offline_algorithm_holds_standardised_observations(name):
    script = offline.algorithm(name)
    for env_id, clip in (("pen-human-v1", 10), ("hopper-medium-v2", None)):
        args = cli.parse(script.Args, script.PRESETS, script.FAMILIES, ["--env-id", env_id])
        assert args.clip_observations == clip


# ------------------------------------------------------------------------------------------------ rewards and ends


def pen_by_names(body, site, joint, qvel):
    away = math.dist(body("Object"), site("eps_ball"))
    pen, target = (site(f"{x}_top") - site(f"{x}_bottom") for x in ("object", "target"))
    cos = float(pen @ target) / math.hypot(*PEN) ** 2
    reward, at_goal = cos - away, False
    if away < 0.075 and cos > 0.9:
        reward += 10
    if away < 0.075 and cos > 0.95:
        reward, at_goal = reward + 50, True
    dropped = body("Object")[2] < 0.075
    return reward - (5 if dropped else 0), dropped, at_goal


def door_by_names(body, site, joint, qvel):
    reward = -0.1 * math.dist(site("S_grasp"), site("S_handle")) - 0.1 * (joint - 1.57) ** 2
    reward -= 1e-5 * sum(v**2 for v in qvel)
    for more, than in ((2, 0.2), (8, 1.0), (10, 1.35)):
        if joint > than:
            reward += more
    return reward, False, joint >= 1.35


def hammer_by_names(body, site, joint, qvel):
    depth = math.dist(site("S_target"), site("nail_goal"))
    reward = -0.1 * math.dist(site("S_grasp"), body("Object")) - math.dist(site("tool"), site("S_target")) - 10 * depth
    reward -= 0.01 * math.hypot(*qvel)
    if body("Object")[2] > 0.04 and site("tool")[2] > 0.04:
        reward += 2
    reward += 100 if depth < 0.01 else 25 if depth < 0.02 else 0
    return reward, False, depth < 0.01


def relocate_by_names(body, site, joint, qvel):
    palm, ball, target = site("S_grasp"), body("Object"), site("target")
    away, reward = math.dist(ball, target), -0.1 * math.dist(palm, ball)
    if ball[2] > 0.04:
        reward += 1 - 0.5 * math.dist(palm, target) - 0.5 * away
    reward += 30 if away < 0.05 else 10 if away < 0.1 else 0
    return reward, False, away < 0.1


BY_NAMES = {"pen": pen_by_names, "door": door_by_names, "hammer": hammer_by_names, "relocate": relocate_by_names}
PEN = (0.0, 0.0, 0.2)  # the length that it is given here
NEAR = {"pen": 0.05, "door": 0.05, "hammer": 0.006, "relocate": 0.04}  # so that every bonus comes and stays away


@pytest.mark.parametrize("hand", BY_NAMES)
def test_rewards_ends_and_goals(hands, hand):
    """Of positions that are made up, for no random hand comes to where the bonuses are."""
    env, rng, seen = hands[hand], np.random.default_rng(0), set()
    env.reset(seed=0)
    d = env.data
    kept = [(array, array.copy()) for array in (d.qpos, d.qvel, d.xpos, d.site_xpos)]
    if hand == "pen":
        lengths, (env.pen_length, env.tar_length) = (env.pen_length, env.tar_length), (0.2, 0.2)
    for _ in range(500):
        d.xpos[:], d.site_xpos[:] = (
            rng.normal(0, NEAR[hand], d.xpos.shape),
            rng.normal(0, NEAR[hand], d.site_xpos.shape),
        )
        d.xpos[:, 2] += rng.choice([0.0, 0.08])
        if hand == "door":
            d.joint("door_hinge").qpos = rng.choice([0.19, 0.21, 0.99, 1.01, 1.34, 1.35, 1.36]) + rng.normal(0, 1e-3)
        if hand == "pen":  # two directions that are nearly the same
            d.site("eps_ball").xpos = d.body("Object").xpos + rng.normal(0, 0.04, 3)
            for x in ("object", "target"):
                way = np.array([0, 0, 1]) + rng.normal(0, 0.25, 3)
                d.site(f"{x}_top").xpos = d.site(f"{x}_bottom").xpos + 0.2 * way / np.linalg.norm(way)
        if hand == "relocate" or hand == "hammer":
            d.site("S_grasp").xpos = rng.normal(0, 0.3, 3)
        d.qvel[:] = rng.normal(0, 3, len(d.qvel))
        joint = float(d.joint("door_hinge").qpos[0]) if hand == "door" else None
        want = BY_NAMES[hand](lambda x: d.body(x).xpos, lambda x: d.site(x).xpos, joint, d.qvel)
        reward, ended, at_goal = env.judge()
        assert reward == pytest.approx(want[0], abs=1e-9) and (ended, at_goal) == want[1:]
        seen.add((ended, at_goal))
    assert len(seen) == (4 if hand == "pen" else 2)
    for array, values in kept:
        array[:] = values
    if hand == "pen":
        env.pen_length, env.tar_length = lengths


def test_a_success_is_more_than_twenty_or_twenty_five_steps_at_the_goal(hands, monkeypatch):
    for hand, needed in {"pen": 20, "door": 25, "hammer": 25, "relocate": 25}.items():
        env = hands[hand]
        at_goal = [False, True] * 30 if hand == "door" else [True] * 60
        for _ in range(2):  # a new episode counts anew
            env.reset(seed=0)
            told = iter(at_goal)
            monkeypatch.setattr(env, "judge", lambda told=told: (1.0, False, next(told)))
            steps = [env.step(np.zeros(env.model.nu))[-1] for _ in at_goal]
            assert [step["goal_achieved"] for step in steps] == at_goal
            assert [step["success"] for step in steps].index(True) == needed * (2 if hand == "door" else 1) + (
                hand == "door"
            )
        monkeypatch.undo()


def test_actions_are_the_middle_and_half_the_range_of_each_actuator(hands):
    env = hands["door"]
    env.reset(seed=0)
    low, high = env.model.actuator_ctrlrange.T
    for action, want in ((-3, low), (-1, low), (0.5, low + 0.75 * (high - low)), (7, high)):
        env.step(np.full(28, action, np.float32))
        np.testing.assert_allclose(env.data.ctrl, want, atol=1e-12)


def test_starts(hands):
    """The hand at rest where the model has it; the scene within the ranges of D4RL, and reaching their ends."""
    for hand, ranges in {
        "door": [(-0.3, -0.2), (0.25, 0.35), (0.252, 0.35)], "hammer": [None, None, (0.1, 0.25)],
    }.items():  # fmt: skip
        env, scenes = hands[hand], []
        for seed in range(60):
            env.reset(seed=seed)
            scenes.append(env.scene.copy())
            assert (env.data.qpos == env.init_qpos).all() and not env.data.qvel.any()
        for values, limits in zip(np.array(scenes).T, ranges, strict=True):
            low, high = limits or (values[0], values[0])
            assert low <= values.min() <= low + 0.1 * (high - low) and high - 0.1 * (high - low) <= values.max() <= high


# ------------------------------------------------------------------------------------------------ D4RL's own rows


def rows_of(name: str):
    """(observations, actions, rewards, terminals, ends, states with their scene) of a fragment."""
    with h5py.File(FRAGMENTS / f"{name}-v1.hdf5") as file:
        obs, actions, rewards, terminals, timeouts = (
            file[key][()] for key in ("observations", "actions", "rewards", "terminals", "timeouts")
        )
        keys = ("qpos", "qvel", "desired_orien", "door_body_pos", "board_pos")
        states = [file[f"infos/{key}"][()] for key in keys if f"infos/{key}" in file]
    return obs.astype(np.float64), actions, rewards, terminals, terminals | timeouts, np.hstack(states).astype(float)


@needs_fragments
@pytest.mark.parametrize("name", [name[:-3] for name in tasks.HAND_IDS])
def test_one_step_from_a_real_state_gives_the_next_one(hands, name):
    """And its reward and end: D4RL's own, to the rounding of the file."""
    env, (obs, actions, rewards, terminals, ends, states) = hands[name.split("-")[0]], rows_of(name)
    starts = np.append(0, np.flatnonzero(ends)[:-1] + 1)
    errors, reward_errors = [], []
    for row in range(0, len(obs), 5):
        first = starts[starts <= row][-1]
        env.reset(seed=0)
        assert env.place(obs[row], states[row], obs[first], states[first])
        found, reward, ended, truncated, _ = env.step(actions[row])
        assert ended == terminals[row] and not truncated
        reward_errors.append(abs(reward - rewards[row]))
        if not ends[row]:
            errors.append(np.abs(found - obs[row + 1]).max())
    assert np.mean(np.array(errors) < 1e-5) >= (0.92 if name in ("door-cloned", "hammer-cloned") else 0.98)
    assert np.quantile(errors, 0.9) < 1e-5 and max(errors) < 2e-2 and np.quantile(reward_errors, 0.9) < 5e-6
    assert not env.place(obs[0], states[3], obs[0], states[0])  # the state of another row


@needs_fragments
@pytest.mark.parametrize("name", ["pen-human", "door-expert", "relocate-cloned", "hammer-expert"])
def test_a_whole_real_episode_replays_from_its_first_state(hands, name):
    env, (obs, actions, rewards, _, ends, states) = hands[name.split("-")[0]], rows_of(name)
    end = int(np.flatnonzero(ends)[0])
    env.reset(seed=0)
    assert env.place(obs[0], states[0], obs[0], states[0])
    steps = [env.step(action) for action in actions[: end + 1]]
    found = np.array([step[0] for step in steps])
    assert np.abs(found[:-1] - obs[1 : end + 1]).max() < 1e-3
    assert sum(step[1] for step in steps) == pytest.approx(rewards[: end + 1].sum(dtype=np.float64), rel=1e-3)


@needs_fragments
def test_data_and_simulator_agree_and_todays_physics_do_not(capsys):
    for name in ("pen-cloned", "relocate-human"):
        data = datasets.load(f"{name}-v1", str(FRAGMENTS / f"{name}-v1.hdf5"))
        agreement.report_simulator_check(data)
        assert f"data and D4RL's {data.task.robot} agree" in capsys.readouterr().out
        errors = agreement.simulator_errors(data, replace(data.task, d4rl=False), samples=100)
        assert agreement.wrong(errors)
        data.rewards[::10] += 0.5
        assert agreement.wrong(agreement.simulator_errors(data, data.task, samples=100)) == ["rewards"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the stand-ins are not here")
def test_demonstrations_longer_than_the_limit_stay_whole(monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(SHARED))
    data = datasets.load("door-human-v1")
    assert len(data.returns) == 25 and len(data) == 6_729 - 25 and data.next_actions[:-1].isfinite().any()
    assert data.notes == (
        "episodes of up to 300 steps, beyond the time limit of 200 steps: their returns are out of reach in play",
    )
    assert data.returns.mean() == pytest.approx(796, abs=1) and not data.terminations.any()


# ------------------------------------------------------------------------------------------------ D4RL's own policies


def behaviour(name: str):
    """The most likely actions of the policy that made a file: raw observations (B, S) -> (B, A)."""
    with h5py.File(FRAGMENTS / f"{name}-v1.hdf5") as file:
        layers = [
            [torch.as_tensor(file[f"metadata/policy/{layer}/{key}"][()]) for key in ("weight", "bias")]
            for layer in ("fc0", "fc1", "last_fc")
        ]
    cloned = "cloned" in name
    act = torch.relu if cloned else torch.tanh

    def policy(obs):
        for i, (weight, bias) in enumerate(layers):
            obs = obs @ (weight if cloned else weight.T) + bias
            obs = obs if i == 2 else act(obs)
        return obs.clamp(-1, 1)

    return policy


@needs_fragments
@pytest.mark.parametrize(
    ("name", "episodes", "mean", "std", "success"),
    [  # of 100 episodes in D4RL's physics
        ("pen-expert", 16, 3603, 1544, 0.84),
        ("pen-cloned", 16, 2201, 1837, 0.54),
        ("door-expert", 3, 3013, 19, 1.0),
        ("hammer-expert", 3, 16348, 156, 1.0),
        ("relocate-expert", 4, 4378, 621, 1.0),
        ("door-cloned", 2, -60, 3, 0.0),
        ("hammer-cloned", 2, -238, 15, 0.0),
        ("relocate-cloned", 2, -9, 5, 0.0),
    ],
)
def test_the_files_own_policies_play_as_they_should(name, episodes, mean, std, success):
    task = tasks.resolve(f"{name}-v1")
    size = HANDS[task.robot][0]
    evaluator = Evaluator(task, torch.zeros(size), torch.ones(size), episodes)
    returns, successes = evaluator.outcomes(behaviour(name), "cpu")
    assert abs(returns.mean() - mean) < 3 * std / episodes**0.5
    assert abs(successes.mean() - success) <= 3 * (0.5 if 0 < success < 1 else 0) / episodes**0.5


# ------------------------------------------------------------------------------------------------ views and copies


def test_marked_time_outs_are_all_of_them():
    n = 90
    raw = {"observations": np.random.default_rng(0).normal(size=(n, 4)), "actions": np.zeros((n, 2)),
           "rewards": np.ones(n), "terminals": np.arange(n) == 49, "timeouts": np.arange(n) == 79}  # fmt: skip
    view, notes = views.qlearning_view(raw, 40, marked=True)
    assert view["returns"].tolist() == [50, 30, 10] and view["terminations"].nonzero()[0].tolist() == [49]
    assert len(notes) == 1 and notes[0].startswith("episodes of up to 50 steps, beyond the time limit of 40 steps")
    unmarked = raw | {"timeouts": np.zeros(n, bool)}  # nothing is known: the limit is what cuts
    assert views.qlearning_view(unmarked, 40, marked=True)[0]["returns"].tolist() == [40, 10, 40]


def test_copies_of_an_episode_are_held_out_together(data):
    for share in (0.05, 0.3):  # without copies nothing changes: whole episodes in the order that is drawn
        rest, _ = data.hold_out(share, 10)
        order = torch.randperm(len(data.returns), generator=torch.Generator().manual_seed(0))
        lengths = torch.bincount(data.episode, minlength=len(order))[order]
        taken = order[: int((lengths.cumsum(0) <= share * len(data)).sum())]
        assert not torch.isin(rest.episode, taken).any() and len(rest) == (~torch.isin(data.episode, taken)).sum()
    # every episode three times, each copy cut off after another number of rows
    copies = [replace(data.head(len(data) - cut), returns=data.returns) for cut in (0, 3, 7)]
    names = ("obs", "actions", "next_actions", "rewards", "next_obs", "terminations")
    parts = {name: torch.cat([getattr(copy, name) for copy in copies]) for name in names}
    n = len(data.returns)
    whole = replace(
        data, **parts, episode=torch.cat([copy.episode + i * n for i, copy in enumerate(copies)]),
        returns=data.returns.repeat(3),
    )  # fmt: skip
    rest, held_out = whole.hold_out(0.2, 100)
    mine, theirs = set((rest.episode % n).tolist()), set((held_out.episode % n).tolist())
    assert mine and theirs and not mine & theirs and 0.7 < len(rest) / len(whole) < 0.9
    # the best episodes are different ones
    assert set(whole.best(5).tolist()) == set(data.returns.argsort(descending=True)[:5].tolist())
    assert len(set((whole.best(n + 5) % n).tolist())) == n


# ------------------------------------------------------------------------------------------------ clipped observations


def test_observations_are_held_in_data_and_play_and_by_the_policy_alike(data, tmp_path):
    task = replace(data.task, clip=0.5)
    mean, std = torch.full((11,), 0.1), torch.full((11,), 0.02)
    data.task = tasks.resolve(tasks.DEMO)
    raw = data.obs.clone()
    data.standardise(mean, std, 0.5)
    want = ((raw - 0.1) / 0.02).clamp(-0.5, 0.5)
    assert torch.equal(data.obs, want) and torch.equal(data.table[:, :11], want) and data.task.clip == 0.5
    assert data.next_obs.abs().max() == 0.5
    env, plain = envs.make_env(task, mean, std), envs.make_env(task)
    obs, start = (x.reset(seed=0)[0] for x in (env, plain))
    np.testing.assert_allclose(obs, ((start - 0.1) / 0.02).clip(-0.5, 0.5), atol=1e-6)
    assert np.abs(obs).max() == 0.5 and obs.dtype == np.float32

    fields = dict(
        kind="deterministic", obs_dim=11, action_dim=3, hidden_layers=[16, "ReLU"], state_mean=mean, state_std=std,
        algorithm="test", env_id=tasks.DEMO, simulator=task.simulator, seed=0, steps=1, score=1.0, data={},
        made_with={}, examples={"obs": raw[:5]}, clip=0.5,
    )  # fmt: skip
    fields["actor"] = policies.Policy("deterministic", 11, 3, [16, "ReLU"]).state_dict()
    policies.save_policy(tmp_path / "policy.pt", **fields)
    policy = policies.load(tmp_path / "policy.pt")
    assert torch.allclose(policy.act(raw), policy.mode(want))
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(to_onnx(policy, 11, 3).SerializeToString())
    np.testing.assert_allclose(session.run(None, {"obs": raw.numpy()})[0], policy.mode(want), atol=1e-5)
    # an evaluation, of all episodes at once, sees the same
    seen = []
    evaluator = Evaluator(task, mean, std, 2)
    evaluator.returns(lambda x: (seen.append(x.clone()), policy.mode(x))[1], "cpu")
    assert max(x.abs().max() for x in seen) == 0.5

    policies.save_policy(tmp_path / "bad.pt", **fields | {"clip": -1.0})
    with pytest.raises(cli.UserError, match="holds observations within ± -1.0"):
        policies.load(tmp_path / "bad.pt")


# ------------------------------------------------------------------------------------------------ runs

TINY = [
    "--env-id", "pen-human-v1", "--offline-steps", "3", "--device", "cpu", "--no-compile", "--eval-episodes", "2",
    "--online-steps", "110", "--reevaluate-steps", "3",
]  # fmt: skip
MORE = {
    o2sac: ["--offline", "cql", "--align-steps", "3", "--learning-starts", "100", "--utd", "1", "--eval-every", "110"],
    o2td3: ["--offline", "td3_bc", "--align-steps", "3", "--learning-starts", "100", "--eval-every", "110"],
    o2ppo: ["--offline", "bc", "--rollout-steps", "64", "--minibatch-size", "32", "--num-envs", "2"],
}


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A folder for runs, and a file of two episodes of a random hand."""
    folder = tmp_path_factory.mktemp("adroit")
    env, rng, rows = envs.make_env(tasks.resolve("pen-human-v1")), np.random.default_rng(0), []
    for seed in (0, 1):
        obs, done = env.reset(seed=seed)[0], False
        while not done:
            action = rng.uniform(-1, 1, 24).astype(np.float32)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            rows.append((obs, action, reward, terminated, truncated))
            obs, done = next_obs, terminated or truncated
    with h5py.File(folder / "mine.hdf5", "w") as file:
        keys = ("observations", "actions", "rewards", "terminals", "timeouts")
        for key, column in zip(keys, zip(*rows, strict=True), strict=True):
            file[key] = np.array(column)
    return folder


def test_a_loaded_episode_goes_on_with_its_scene():
    first, second = (envs.Episodes(envs.make_env(tasks.resolve("door-human-v1")), seed=0) for _ in range(2))
    rng = np.random.default_rng(0)
    for _ in range(230):  # into the second episode
        first.step(rng.uniform(-1, 1, 28).astype(np.float32))
    second.load_state_dict(first.state_dict())
    hands = first.env.unwrapped, second.env.unwrapped
    assert first.episode == second.episode == 1 and hands[0].scene.any()
    assert (hands[0].scene == hands[1].scene).all() and (first.obs == second.obs).all()
    for _ in range(20):
        action = rng.uniform(-1, 1, 28).astype(np.float32)
        assert all(np.array_equal(a, b) for a, b in zip(first.step(action), second.step(action), strict=True))


@pytest.mark.parametrize("script", MORE)
def test_a_short_run(script, played, run_script):
    code, out, err = run_script(
        script, *TINY, *MORE[script], "--dataset-path", played / "mine.hdf5", "--run-dir", played
    )
    assert code == 0, err
    assert "states of D4RL's pen cannot be rebuilt from observations; not checked" in out
    assert "success in 0% of the last evaluation's episodes." in out
    (path,) = played.glob(f"*{script.__name__}*/policy.pt")
    assert policies.read(path)["clip"] == 10
