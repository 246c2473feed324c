"""The rule that ends a stage, on curves whose end is known; stages that end by it, interrupted and not."""

import dataclasses
import json
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import o2ppo
import o2sac
import o2td3
from benchmarks import protocol
from common import cli, loop, plateau, stages, steps, timing
from common.plateau import CHANGE, LOOKS, SHORTEST, Plateau
from common.run import Run
from tests.conftest import TINY
from tests.test_checkpoint import Recorder


def end(curve) -> int | None:
    """After how many of its values a curve is at rest."""
    rule = Plateau("")
    return next((i for i, value in enumerate(curve, 1) if rule.add(float(value))), None)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.9, 1.1), min_size=3 * SHORTEST, max_size=8 * SHORTEST))
def test_the_rule_is_its_formula(values):
    rule = Plateau("")
    found = [rule.add(value) for value in values]
    assert not any(found[: 4 * SHORTEST - 1])
    w = len(values) // 4
    before, last = np.array(values[len(values) - 2 * w : len(values) - w]), np.array(values[len(values) - w :])
    error = np.sqrt(before.var(ddof=1) / w + last.var(ddof=1) / w)
    change = abs(last.mean() - before.mean()) + error
    assert found[-1] == (w >= SHORTEST and change <= CHANGE * last.mean()) or abs(change - CHANGE * last.mean()) < 1e-12


RANDOM = np.random.default_rng(0).normal(size=(50, LOOKS))
T = np.arange(LOOKS)


def test_an_approach_ends_when_it_has_arrived():
    """1 - exp(-t / T): within 4% for T of 4 and of 12 looks, noisy or not, and not long after that."""
    for pace, latest in ((4, 45), (12, 90)):
        for scale in (0.0, 0.01, 0.03):
            ends = np.array([end(1 - np.exp(-T / pace) + scale * x) for x in RANDOM])
            assert np.exp(-ends / pace).max() < 0.04 and ends.max() <= latest


@pytest.mark.parametrize("climb", [T / 20, np.sqrt(T) / 5, np.log1p(T) / 5, 1 - np.exp(-T / 60)])
@pytest.mark.parametrize("scale", [0, 0.05])
def test_a_climb_does_not_end_whatever_its_pace_and_noise(climb, scale):
    assert sum(end(climb + scale * x) is not None for x in RANDOM) <= 1


def test_noise_takes_the_longer_the_larger_it_is():
    small, middle, large = ([end(1 + scale * x) or LOOKS + 1 for x in RANDOM] for scale in (0.01, 0.05, 0.2))
    assert max(small) == 4 * SHORTEST and 4 * SHORTEST < np.median(middle) < 60 and min(large) > LOOKS
    assert end(np.ones(LOOKS)) == 4 * SHORTEST and end(-np.ones(LOOKS)) == 4 * SHORTEST
    assert not any(end(x) for x in RANDOM)  # around 0


def test_steps_end_only_on_a_long_tread():
    stairs = np.floor(T / 7) + 1
    assert not any(end(stairs + 0.1 * x) for x in RANDOM)
    once = np.where(T < 10, 0.3, 1.0)
    ends = [end(once + 0.01 * x) for x in RANDOM]
    assert min(ends) == max(ends) == 4 * SHORTEST  # the quarters no longer reach back to the step


def test_a_saved_rule_goes_on():
    curve = 1 - np.exp(-T / 8) + 0.02 * RANDOM[0]
    rule, whole = Plateau(""), end(curve)
    for value in curve[: whole - 1]:
        rule.add(float(value))
    again = Plateau("")
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert not again.reached and again.add(float(curve[whole - 1])) and again.state_dict()["reached"] is True


# ------------------------------------------------------------------------------------------------ what is a limit


def parsed(script, *flags):
    return cli.parse(script.Args, script.PRESETS, script.FAMILIES, list(flags))


def test_the_limit_is_what_stands_there_otherwise():
    auto = ("--reevaluate-steps", "auto", "--align-steps", "auto")
    limits = {
        (): (500_000, 500_000), ("--preset", "demo"): (6_000, 2_000), ("--preset", "quick"): (50_000, 20_000),
        ("--env-id", "antmaze-umaze-v2"): (500_000, 1_000_000),
    }  # fmt: skip
    for flags, expected in limits.items():
        args = parsed(o2sac, *flags, *auto)
        assert args.align_steps == "auto" and tuple(stage.limit(args) for stage in o2sac.STAGES[:2]) == expected
        assert [stage.number(args) for stage in o2sac.STAGES[:2]] == list(expected)
    assert o2ppo.REEVALUATE.limit(parsed(o2ppo, "--reevaluate-steps", "auto")) == 1_000_000
    assert o2sac.ALIGN.number(parsed(o2sac, *auto, "--no-align")) == 0
    typed = parsed(o2sac, "--align-steps", "7")
    assert not o2sac.ALIGN.auto(typed) and o2sac.ALIGN.limit(typed) == 7


def test_a_script_may_have_it_as_its_default(monkeypatch):
    monkeypatch.setitem(o2td3.PRESETS, "quick", {"align_steps": "auto"})
    assert o2td3.ALIGN.limit(parsed(o2td3, "--preset", "quick")) == 500_000
    monkeypatch.setattr(o2td3.Args, "align_steps", "auto")
    with pytest.raises(cli.UserError, match="--align-steps is auto in the script too"):
        o2td3.ALIGN.limit(dataclasses.replace(o2td3.Args(), align_steps="auto"))


@pytest.mark.parametrize(("typed", "words"), [("0", "--align-steps is 0, but has to be at least 1"), ("often", "auto")])
def test_other_words_and_numbers_are_refused(typed, words, run_script, tmp_path):
    code, _, err = run_script(o2td3, "--preset", "demo", "--align-steps", typed, "--run-dir", tmp_path / "runs")
    assert code == 2 and words in err and "Traceback" not in err and not (tmp_path / "runs").exists()


def test_other_commands_take_the_limit(monkeypatch):
    flags = protocol.command_line(protocol.Args(script="o2td3", fraction=0.1))
    assert flags[flags.index("--align-steps") + 1] == "50000"


# ------------------------------------------------------------------------------------------------ stages that end


@pytest.fixture
def short(monkeypatch):
    """Budgets in which Q comes to rest, for it looks one step ahead, and in which alignment is too short for that."""
    demo = dict(env_id="hopper-medium-demo", reevaluate_steps=400, align_steps=5, align_eval_every=2, online_steps=30,
                learning_starts=20, eval_every=15, log_every=100, gamma=0.0, critic_lr=0.02,
                critic_hidden=(16,))  # fmt: skip
    monkeypatch.setitem(o2td3.PRESETS, "demo", demo)
    monkeypatch.setattr(plateau, "CHANGE", 0.1)
    return [*TINY, "--preset", "demo", "--regime-episodes", "0", "--reevaluate-steps", "auto", "--align-steps", "auto"]


def reevaluated(flags, data, folder) -> tuple[Run, dict]:
    """A run after re-evaluation, and that stage's checkpoint."""
    torch.manual_seed(0)
    data = dataclasses.replace(data, rewards=data.rewards + 1)
    args = parsed(o2td3, *flags, "--run-dir", str(folder))
    agent, optimizers = timing.untrained(args, data)
    run = Run(args, "run", data)
    try:
        stages.train(run, o2td3.REEVALUATE, data, agent, optimizers, o2td3.critic_probe(args, agent, data.head(64)))
    finally:
        run.lock.release()
    return run, torch.load(folder / "run" / "reevaluate.pt", weights_only=True)


def same(a, b) -> bool:
    """Nested containers, equal to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_stage_ends_at_its_plateau_whether_interrupted_or_not(short, data, tmp_path, monkeypatch):
    whole, checkpoint = reevaluated(short, data, tmp_path / "whole")
    n = checkpoint["step"]
    assert whole.auto == {"reevaluate": {"steps": n, "limit": 400, "ended_by": "plateau"}}
    assert 4 * 4 * SHORTEST <= n < 400 and n % 4 == 0 and checkpoint["done"]  # looks are 400 / LOOKS steps apart
    assert reevaluated([*short, "--log-every", "1"], data, tmp_path / "logged")[1]["step"] == n  # whatever is logged

    run, ran = steps.Stepper.run, 0

    def interrupted(self, count):
        nonlocal ran
        run(self, count)
        ran += count
        if ran == n - 8:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(steps.Stepper, "run", interrupted)
    with pytest.raises(cli.Interrupted, match=f"reevaluate is saved at step {n - 8} "):
        reevaluated(short, data, tmp_path / "cut")
    again, resumed = reevaluated(short, data, tmp_path / "cut")
    assert again.auto == whole.auto and again.logged.rows == whole.logged.rows
    assert same(resumed["state"], checkpoint["state"]) and same(resumed["rng"]["torch"], checkpoint["rng"]["torch"])
    finished, _ = reevaluated(short, data, tmp_path / "cut")  # trains nothing, and knows how it ended
    assert finished.auto == whole.auto and ran == n

    typed, number = reevaluated([*short, "--reevaluate-steps", str(n)], data, tmp_path / "typed")
    assert typed.auto == {} and "plateau" not in number["state"]
    assert all(same(number["state"][part], checkpoint["state"][part]) for part in ("agent", "critic_optimizer"))


def test_where_a_stage_rests_it_is_evaluated_for_the_last_time(tmp_path):
    run, asked, looks = Recorder(tmp_path), [], iter(range(1, 9))
    run.log = lambda stage, step, scalars: asked.append((step, "align/score" in scalars))
    rule = SimpleNamespace(scalar="probe/x", add=lambda value: value == 3)
    ended = loop.train(
        run, "align", lambda: lambda: {"q": torch.zeros(())}, 100, {}, device=torch.device("cpu"), log_every=4,
        evaluate=lambda last: asked.append(last) or {"score": 7.0}, evaluate_every=5,
        probe=lambda: {"probe/x": next(looks)}, plateau=rule,
    )  # fmt: skip
    assert asked == [(0, False), (4, False), False, (5, True), True, (8, True)]
    assert ended == 8 and run.saved == [(8, True)]


def test_a_run_says_how_its_stages_ended(short, run_script, tmp_path):
    code, out, err = run_script(o2td3, *short, "--run-dir", tmp_path)
    assert code == 0, err
    result = json.loads((tmp_path / "hopper-medium-demo__o2td3__td3_bc__0__demo" / "result.json").read_text())
    n = result["auto"]["reevaluate"]["steps"]
    assert result["auto"] == {"reevaluate": {"steps": n, "limit": 400, "ended_by": "plateau"},
                              "align": {"steps": 5, "limit": 5, "ended_by": "limit"}}  # fmt: skip
    assert "estimated time: at most" in out and f"reevaluate: {n} of at most 400 steps, ended by the plateau" in out
    assert f"re-evaluated ({n} steps, plateau)" in out and "aligned (5 steps, limit)" in out
