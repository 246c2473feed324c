"""What each script takes for each kind of data, against a table of its own; and the bounds of all arguments."""

import dataclasses
import importlib.util
import math
import re
import typing

import gymnasium as gym
import pytest
import torch
import tyro

import o2ppo
import o2sac
import o2td3
from benchmarks import kills, protocol, steps
from baselines import off2on
from common import bounds, cli, datasets, tasks, usage
from common.foreign import load_policy
from common.identity import ROOT
from experiments import alignment, harness
from offline import awac, bc, cql, iql, rebrac, td3_bc
from tests.test_collect import collect

SCRIPTS = [o2sac, o2td3, o2ppo, awac, bc, cql, iql, rebrac, td3_bc]
QUALITIES = ["random", "medium", "medium-replay", "full-replay", "medium-expert", "expert"]
NAMES = [(robot, quality) for robot in ("halfcheetah", "hopper", "walker2d") for quality in QUALITIES]

# (actor, critic), in the order of QUALITIES
REBRAC = {
    "halfcheetah": [(1e-3, 0.1), (1e-3, 0.01), (0.01, 1e-3), (1e-3, 0.1), (0.01, 0.1), (0.01, 0.01)],
    "hopper": [(1e-3, 0.01), (0.01, 0.01), (0.05, 0.5), (0.01, 0.01), (0.1, 0.01), (0.1, 0.1)],
    "walker2d": [(0.01, 0), (0.05, 0.1), (0.05, 0.01), (0.01, 0.01), (0.01, 0.01), (0.01, 0.5)],
}


def taken(script, **given) -> dict:
    return dataclasses.asdict(cli.complete(script.Args(**given)))


def expected(script, robot: str, quality: str, reference: str) -> dict:
    """The paper's: E are expert and medium-expert, whose constants are the same."""
    e, interval = quality in ("expert", "medium-expert"), reference == "interval"
    part = 4 if interval else 1
    if script is o2sac:
        seldom = interval and e and robot == "hopper"
        return {
            "alpha": 0.5 if e else 0.2,
            "kl_threshold_start": 0.005 if e else 0.125,
            "kl_threshold_end": (0.125 if e else 2.0) / part,
            "reference_interval": 10_000 if seldom else 1_000,
            "actor_grad_norm": 0.25 if seldom else None,
        }
    if script is o2td3:
        seldom = interval and ((robot == "hopper" and e) or (robot == "walker2d" and quality == "expert"))
        return {
            "exploration_noise": 0.05 if e else 0.1,
            "mse_threshold_start": 2.5e-5 if e else 0.0025,
            "mse_threshold_end": (6.25e-4 if e else 0.04) / part,
            "reference_interval": 10_000 if seldom else 1_000,
            "actor_grad_norm": 0.25 if seldom else None,
        }
    return {
        "beta_steps": 500_000 if e else 250_000,
        "update_epochs": 5 if e and robot == "hopper" else 10,
        "max_std_start": 0.05 if e and robot == "hopper" else None,
        "scale_rewards": robot == "halfcheetah",
        "reference_interval": 10_000 if e and robot == "hopper" else 2_500,
        "max_grad_norm": 0.5,
    }


@pytest.mark.parametrize("script", [o2sac, o2td3])
@pytest.mark.parametrize(("interval", "norm"), [(None, 0.25), (10_000, 0.25), (1_000, None)])
def test_the_clip_belongs_to_the_long_interval(script, interval, norm):
    found = taken(script, env_id="hopper-expert-v2", reference="interval", reference_interval=interval)
    assert found["actor_grad_norm"] == norm


@pytest.mark.parametrize("reference", ["best", "interval"])
@pytest.mark.parametrize("script", [o2sac, o2td3, o2ppo])
@pytest.mark.parametrize(("robot", "quality"), NAMES)
def test_constants_of_a_d4rl_name(script, robot, quality, reference):
    got, want = taken(script, env_id=f"{robot}-{quality}-v2", reference=reference), {}
    for name, value in expected(script, robot, quality, reference).items():
        want[name] = value if value is None else pytest.approx(value, rel=1e-12)
    assert {name: got[name] for name in want} == want


@pytest.mark.parametrize(("robot", "quality"), NAMES)
def test_weights_of_rebrac(robot, quality):
    got = taken(rebrac, env_id=f"{robot}-{quality}-v2")
    assert (got["actor_bc_coef"], got["critic_bc_coef"]) == REBRAC[robot][QUALITIES.index(quality)]


def test_rebrac_is_set_up_as_its_paper_is():
    got = taken(rebrac)
    assert (got["actor_lr"], got["critic_lr"], got["batch_size"], got["hidden"]) == (1e-3, 1e-3, 1024, (256, 256, 256))
    assert not got["standardise"]
    layers = [type(layer).__name__ for layer in rebrac.Critic(11, 3, 3).net]
    assert layers == ["EnsembleLinear", "ReLU", "EnsembleLayerNorm"] * 3 + ["EnsembleLinear"]
    assert not any("Norm" in type(layer).__name__ for layer in rebrac.Actor(11, 3, 3).net)


def test_rebrac_sees_observations_as_they_are_and_its_critic_is_handed_on_as_it_is(tmp_path):
    data = datasets.load(tasks.DEMO).head(500)
    raw = data.obs.clone()
    small = dict(steps=4, batch_size=8, eval_episodes=1, compile=False, run_dir=str(tmp_path), env_id=tasks.DEMO)
    path = rebrac.train(cli.complete(rebrac.Args(**small)), data)
    policy = load_policy(path, datasets.load(tasks.DEMO).head(500))
    assert torch.equal(data.obs, raw) and not policy["state_mean"].any() and (policy["state_std"] == 1).all()
    critic = rebrac.Critic(11, 3, 3)
    critic.load_state_dict(policy["critic"]["critic"])
    naive = o2td3.Agent(cli.complete(o2td3.Args(reevaluate=False)), policy)
    torch.testing.assert_close(naive.critic(raw, data.actions), critic(raw, data.actions))


def test_rebrac_says_where_nothing_is_published(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rebrac.pretrain, "train", lambda *_: tmp_path / "policy.pt")
    for env_id, said in (("ant-medium-v2", "no weights of imitation for ant-medium-v2"), ("hopper-medium-v2", "")):
        data.task = tasks.resolve(env_id)
        rebrac.train(cli.complete(rebrac.Args(env_id=env_id)), data)
        out = capsys.readouterr().out
        assert said in out and bool(said) == bool(out)


@pytest.mark.parametrize(
    ("env_id", "path", "expert"),
    [
        ("hopper-medium-v2", "data/hopper_medium_expert-v2.hdf5", True),
        ("hopper-medium-v2", "data/my-Expert-rows.hdf5", True),
        ("hopper-expert-v2", "expert/rows.hdf5", False),  # the file's own name, not its folder's nor the simulator's
        ("hopper-expert-v2", "hopper_medium_replay-v2.hdf5", False),
    ],
)
def test_constants_of_a_file_go_by_its_name(env_id, path, expert):
    given = dict(env_id=env_id, dataset_path=path)
    assert taken(o2sac, **given)["alpha"] == (0.5 if expert else 0.2)
    assert taken(o2td3, **given)["exploration_noise"] == (0.05 if expert else 0.1)
    assert taken(o2ppo, **given)["update_epochs"] == (5 if expert else 10)


@pytest.mark.parametrize(
    ("name", "simulator", "robot", "quality"),
    [
        ("mujoco/hopper/expert-v0", "Hopper-v5", "hopper", "expert"),
        ("mujoco/halfcheetah/medium-v0", "HalfCheetah-v5", "halfcheetah", "medium"),
        ("mujoco/walker2d/simple-v0", "Walker2d-v5", "walker2d", ""),
        ("team/walker2d/medium_expert-v3", "Walker2d-v5", "walker2d", "medium-expert"),
    ],
)
def test_constants_of_a_minari_name(name, simulator, robot, quality, monkeypatch):
    task = tasks.Task("minari", name, name, simulator, gym.spec(simulator))
    monkeypatch.setattr(tasks, "resolve", lambda *_: task)
    assert (task.robot, task.quality) == (robot, quality)
    for script in (o2sac, o2td3, o2ppo):
        got, want = taken(script, env_id=name), expected(script, robot, quality, "best")
        assert {key: got[key] for key in want} == want
    got = taken(rebrac, env_id=name)
    want = REBRAC[robot][QUALITIES.index(quality)] if quality else (0.01, 0.01)
    assert (got["actor_bc_coef"], got["critic_bc_coef"]) == want


def test_the_user_wins_over_the_preset_and_the_preset_over_the_data():
    flags = [
        "--env-id",
        "hopper-expert-v2",
        "--preset",
        "demo",
        "--kl-threshold-start",
        "0.3",
        "--reference",
        "interval",
    ]
    args = cli.parse(o2sac.Args, o2sac.PRESETS, o2sac.FAMILIES, flags)
    assert args.kl_threshold_start == 0.3 and args.alpha == 0.5
    assert args.kl_threshold_end == o2sac.PRESETS["demo"]["kl_threshold_end"]  # as it stands there, not a quarter of it


# ----------------------------------------------------------------------------------------------- bounds


def numeric(hint) -> bool:
    if typing.get_origin(hint) is typing.Literal or hint is bool:
        return False
    return hint in (int, float) or any(numeric(part) for part in typing.get_args(hint))


@pytest.mark.parametrize("script", [*SCRIPTS, harness, alignment, kills, protocol, steps, collect])
def test_every_number_has_a_bound(script):
    hints, marks = typing.get_type_hints(script.Args), list(bounds.marks_of(script.Args))
    [_, suppressed] = typing.get_args(tyro.conf.Suppress[int])  # what nobody can type needs none
    names = [field.name for field in dataclasses.fields(script.Args) if (field.name, suppressed) not in marks]
    numbers = {name for name in names if numeric(hints[name])}
    assert len(numbers) >= 2 and numbers == bounds.bounds_of(script.Args).keys()


def choices(hint) -> set:
    """What may be typed for a word or a switch."""
    if typing.get_origin(hint) is typing.Literal:
        return set(typing.get_args(hint))
    return {True, False} if hint is bool else set().union(*map(choices, typing.get_args(hint)))


FILES = [f"{folder}.{path.stem}" for folder in ("offline", "baselines") for path in ROOT.glob(f"{folder}/[!_]*.py")]


@pytest.mark.parametrize("script", ["o2sac", "o2td3", "o2ppo", *sorted(FILES)])
def test_what_an_argument_needs_can_be_set(script):
    args = importlib.import_module(script).Args
    hints, marks = typing.get_type_hints(args), [m for _, m in bounds.marks_of(args) if isinstance(m, bounds.OnlyWith)]
    assert str(bounds.only_with(align=False, buffer="part")) == "--no-align or --buffer part"  # as it is typed
    assert marks and all(value in choices(hints[name]) for mark in marks for name, value in mark.values)


@pytest.mark.parametrize(("script", "flag"), [(alignment, "--seeds"), (kills, "--kills"), (steps, "--turns")])
def test_scripts_that_start_others_refuse_a_number_out_of_range_too(script, flag, run_script):
    code, _, err = run_script(script, flag, "0")
    assert code == 2 and err == f"error: {flag} is 0, but has to be at least 1\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_number_is_not_a_number(script):
    for name in bounds.bounds_of(script.Args):
        flag = "--" + name.replace("_", "-")
        for value in (math.nan, math.inf, -math.inf):
            with pytest.raises(cli.UserError, match=f"^{flag} is {value}, but has to "):
                cli.complete(script.Args(**{name: value}))


@pytest.mark.parametrize(
    ("script", "name", "value", "words"),
    [
        (o2sac, "gamma", 1.99, "--gamma is 1.99, but has to lie between 0 and 1"),
        (o2sac, "critic_lr", -3e-4, "--critic-lr is -0.0003, but has to be at least 0"),
        (o2sac, "alpha", -1.0, "--alpha is -1.0, but has to be at least 0"),
        (o2sac, "lagrange_init", 0.0, "--lagrange-init is 0.0, but has to be above 0"),
        (o2sac, "lagrange_expectile", 1.7, "--lagrange-expectile is 1.7, but has to lie between 0 and 1"),
        (o2sac, "reference_window", 1, "--reference-window is 1, but has to be at least 2"),
        (o2sac, "holdout", 0.6, "--holdout is 0.6, but has to lie between 0 and 0.5"),
        (o2sac, "eval_workers", -1, "--eval-workers is -1, but has to be at least 0"),
        (o2td3, "tau", 5.0, "--tau is 5.0, but has to lie between 0 and 1"),
        (o2td3, "batch_size", 33, "--batch-size is 33, but has to be an even number above 0"),
        (o2ppo, "rollout_steps", 1, "--rollout-steps is 1, but has to be at least 2"),
        (o2ppo, "gae_lambda", -0.1, "--gae-lambda is -0.1, but has to lie between 0 and 1"),
        (iql, "expectile", 1.7, "--expectile is 1.7, but has to lie between 0 and 1"),
        (awac, "temperature", 0.0, "--temperature is 0.0, but has to be above 0"),
        (bc, "top_fraction", 2.0, "--top-fraction is 2.0, but has to lie between 0 and 1"),
        (rebrac, "actor_bc_coef", -0.1, "--actor-bc-coef is -0.1, but has to be at least 0"),
    ],
)
def test_a_number_out_of_range_is_refused_in_one_sentence(script, name, value, words):
    with pytest.raises(cli.UserError) as refusal:
        cli.complete(script.Args(**{name: value}))
    assert str(refusal.value) == words


def test_one_episode_has_no_standard_error():
    with pytest.raises(cli.UserError, match="--best-margin counts standard errors, which one episode has none of"):
        cli.complete(o2td3.Args(best_margin=2.0, eval_episodes=1))


def test_seeds_beyond_the_last_are_refused_before_the_first_is_trained():
    with pytest.raises(cli.UserError, match="--seed 4294967295 --num-seeds 2 goes beyond"):
        cli.complete(o2td3.Args(seed=2**32 - 1, num_seeds=2))
    cli.complete(o2td3.Args(seed=2**32 - 2, num_seeds=2))
    with pytest.raises(cli.UserError, match="--seed 4294966000 with --members 3 needs the seed 4294968000"):
        cli.complete(off2on.Args(seed=4_294_966_000, members=3))


def test_what_may_not_be_infinite_says_so():
    with pytest.raises(cli.UserError, match="^--checkpoint-seconds is inf, but has to be finite and be at least 0$"):
        cli.complete(o2td3.Args(checkpoint_seconds=math.inf))


def test_a_refused_number_leaves_nothing_behind(run_script, tmp_path):
    flags = ["--env-id", "hopper-medium-demo", "--device", "cpu", "--run-dir", tmp_path / "runs"]
    code, out, err = run_script(o2td3, *flags, "--critic-lr", "nan")
    assert code == 2 and err == "error: --critic-lr is nan, but has to be at least 0\n" and not out
    assert not (tmp_path / "runs").exists()


def help_of(script, capsys, *flags) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.parse(script.Args, script.PRESETS, script.FAMILIES, [*flags, "--help"])
    assert stop.value.code in (0, None)
    return capsys.readouterr().out


def test_help_has_the_sections_of_the_source(capsys):
    text = help_of(o2sac, capsys)
    titles = re.findall(r"^\W+ (.+) options \W+$", text, re.M)
    assert titles[-4:] == ["every stage", "1. re-evaluation", "2. alignment", "3. constrained fine-tuning"]
    assert "--reevaluate-tau" in text.split("1. re-evaluation options")[1].split("2. alignment options")[0]
    assert titles.index("the run") == 0 and "sets, and in brackets" not in text
    assert set(usage.described(o2ppo.Args)) == {field.name for field in dataclasses.fields(o2ppo.Args)}


@pytest.mark.parametrize("preset", ["demo", "quick"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_what_a_preset_sets_beside_the_papers_values(script, preset, capsys):
    text = " ".join(help_of(script, capsys, "--preset", preset).replace("│", " ").split())
    without = taken(script, env_id=script.PRESETS[preset].get("env_id", "hopper-medium-v2"))
    for name, value in script.PRESETS[preset].items():
        before = without[name]
        if name != "env_id" and value != before:
            assert f"{' '.join(usage.flag(name, value))} ({usage.shown(name, before)})" in text
            assert f"without the preset {usage.shown(name, before)}" in text


@pytest.mark.parametrize("script", [o2sac, o2td3, o2ppo])
def test_a_script_without_arguments_says_what_to_type(script, run_script):
    code, out, err = run_script(script)
    assert code == 2 and err.startswith("error: say what to run: ") and err.count("\n") == 1 and not out
    assert "--preset demo" in err and "--env-id hopper-medium-v2" in err and "--help" in err


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_bounds(script, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse(script.Args, script.PRESETS, script.FAMILIES, ["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stop.value.code in (0, None)
    assert "(default: 10; at least 1)" in text and "(default: None" in text
    assert ("(default: 0.99; between 0 and 1)" in text) == hasattr(script.Args, "gamma")
