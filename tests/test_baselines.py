"""Runs of the compared methods at tiny budgets: what they leave, how they resume, what they refuse."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import o2sac
import o2td3
import offline

from baselines import aca, awac, cal_ql, iql, off2on, pex, rlpd, wsrl
from common import cli, datasets, policies, regime, report, tasks
from common.evaluation import Evaluator
from common.identity import ROOT
from common.run import FREE_ARGS, Run, run_name
from offline import cal_ql as offline_cal_ql
from tests.conftest import DEMO, OFTEN, TINY

SMALL = [*DEMO, "--offline-steps", "4", "--online-steps", "90", "--eval-every", "30"]
WAIT = ["--learning-starts", "20"]
FLAGS = {
    iql: [],
    awac: [],
    cal_ql: [],
    aca: WAIT,
    pex: WAIT,
    rlpd: [*WAIT, "--utd", "2"],
    wsrl: [*WAIT, "--utd", "2"],
    off2on: [*WAIT, "--members", "2", "--first-steps", "10", "--first-updates", "3"],
}
# of the critics, the 4 of the offline run included where their optimiser goes on from it; Cal-QL's wait for an end
UPDATES = {iql: 4 + 89, awac: 4 + 89, aca: 70, pex: 70, rlpd: 2 * 70, wsrl: 4 + 2 * 70, off2on: 3 * 10 + 60}


@pytest.fixture(params=FLAGS, ids=lambda script: script.__name__.split(".")[1])
def script(request):
    return request.param


def command(script, folder, *more):
    return [*SMALL, *FLAGS[script], *TINY, "--run-dir", str(folder), *more]


def folder_of(script, flags):
    args = cli.parse(script.Args, script.PRESETS, script.FAMILIES, flags)
    return run_name(args)


def tensors(thing, name=""):
    """Every tensor in nested dictionaries and lists, by its place."""
    if isinstance(thing, torch.Tensor):
        return {name: thing}
    pairs = thing.items() if isinstance(thing, dict) else enumerate(thing) if isinstance(thing, list | tuple) else ()
    return {key: value for k, part in pairs for key, value in tensors(part, f"{name}/{k}").items()}


def test_a_run_that_was_stopped_ends_as_one_that_was_not(script, run_script, tmp_path, monkeypatch):
    flags = command(script, tmp_path / "whole")
    code, out, err = run_script(script, *flags)
    assert code == 0, err
    name = folder_of(script, flags)
    left = {path.name for path in (tmp_path / "whole" / name).iterdir()}
    assert {"args.json", "progress.csv", "result.json", "curve.png", "finetune.pt"} <= left
    assert "last online" in out and "estimated time" in out and "finetune  : 100%" in err
    assert out.count("regime: ") == 1
    columns = (tmp_path / "whole" / name / "progress.csv").read_text().splitlines()[0].split(",")
    page = (ROOT / "docs" / "scalars.md").read_text()
    assert not [column for column in columns if column not in ("stage", "step") and f"`{column}`" not in page]
    result = json.loads((tmp_path / "whole" / name / "result.json").read_text())
    assert result["evaluations"] == 3 and result["best_fresh"] is not None
    assert (result["start"] == result["offline"]) == (script is not pex)  # whose composition begins, not π_off
    assert ("│ before the first step" in out) == (script is pex)
    assert result["regime"]["regime"] in regime.WORDS and result["regime"]["episodes"] == 2

    save = Run.save

    def stopping(self, stage, step, done, state):
        save(self, stage, step, done, state)
        if stage == "finetune" and step == 47:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", stopping)
    flags = command(script, tmp_path / "stopped", *OFTEN)
    assert run_script(script, *flags)[0] == 130
    monkeypatch.setattr(Run, "save", save)
    code, out, err = run_script(script, *flags)
    assert code == 0 and "continuing at step 47" in out, err
    whole, stopped = (
        tensors(torch.load(tmp_path / kind / name / "finetune.pt", weights_only=True)) for kind in ("whole", "stopped")
    )
    assert whole.keys() == stopped.keys() and len(whole) > 20
    for key, tensor in whole.items():
        assert torch.equal(tensor, stopped[key]), key
    if script in UPDATES:
        assert whole["/state/critic_optimizer/steps/0"] == UPDATES[script]
    if script is rlpd:  # whose first actions are uniform: whole multiples of what `torch.rand` counts in
        first = whole["/state/replay/table"][:20, 11:14].double()
        assert ((first + 1) * 2**23 % 1 == 0).all() and first.min() < -0.5 and first.max() > 0.5
    # and every network that the offline run handed over, or that is new, has moved
    moments = {key: value for key, value in whole.items() if "optimizer/exp_avg_sq" in key}
    still = [key for key, moment in moments.items() if not (moment > 0).any() and "multiplier" not in key]
    assert moments and not still


def test_off2on_notes_every_policy_that_it_starts_from(run_script, tmp_path, monkeypatch):
    """By which a later start knows whether one of them was trained anew (tests/test_identity.py)."""
    known = []

    def starts_from(run, *files):
        known.extend(json.loads(path.with_name("args.json").read_text())["seed"] for path in files if path.is_file())
        raise cli.UserError("that is enough")

    monkeypatch.setattr(Run, "starts_from", starts_from)
    code, _, err = run_script(off2on, *command(off2on, tmp_path))
    assert code == 2 and err.endswith("error: that is enough\n") and known == [0, 1_000]


def test_what_a_run_is_said_to_start_from_is_what_plays(script, run_script, tmp_path, monkeypatch):
    """paths.png shows its ways through a maze: of Off2On all members as one, of RLPD networks at random."""
    seen = {}

    def finetune(*given):
        [agent] = [thing for thing in given if isinstance(thing, script.Agent)]
        seen["agent"] = copy.deepcopy(agent)
        for parameter in agent.parameters():
            parameter.data.add_(1.0)

    monkeypatch.setattr(script, "finetune", finetune)
    monkeypatch.setattr(report, "finish", lambda run, policy, *_: seen.update(policy=policy))
    code, _, err = run_script(script, *command(script, tmp_path))
    assert code == 0, err
    obs = torch.randn(20, 11, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        starts = seen["agent"].actor.offline(obs)[0] if script is pex else seen["agent"].act(obs)  # it has two
        torch.testing.assert_close(policies.module(seen["policy"]).mode(obs), starts)


@pytest.mark.parametrize("env_id", ["hopper-medium-v2", "antmaze-umaze-v2", "pen-cloned-v1"])
def test_all_are_evaluated_alike(env_id):
    if env_id == "pen-cloned-v1":
        pytest.importorskip("gymnasium_robotics")

    def protocol(script):
        args = cli.parse(script.Args, script.PRESETS, script.FAMILIES, ["--env-id", env_id])
        return args.eval_every, args.eval_episodes, args.final_episodes, args.best_margin

    assert {protocol(script) for script in FLAGS} == {protocol(o2sac)}


def test_a_policy_alone_is_refused_before_anything_is_written(run_script, tmp_path):
    shipped = "datasets/policies/hopper-medium-demo__iql.pt"
    code, _, err = run_script(iql, *command(iql, tmp_path / "runs", "--offline", shipped))
    assert code == 2 and "does not hold what iql goes on with ('learner')" in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("script", "other", "words"), [
    (iql, "cql", "cql does not hold what iql goes on with"), (awac, "iql", "iql does not hold what awac goes on with"),
    (off2on, "iql", "iql has no --critic-hidden"), (wsrl, "cql", "cql has no --critics, --layer-norm, --calibrate"),
])  # fmt: skip
def test_another_algorithm_is_refused_before_it_is_trained(script, other, words, run_script, tmp_path):
    code, _, err = run_script(script, *command(script, tmp_path / "runs", "--offline", other))
    assert code == 2 and words in err and "leave --offline out" in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------- what they go on from


def parsed(script, *flags):
    return cli.parse(script.Args, script.PRESETS, script.FAMILIES, list(flags))


@pytest.mark.parametrize("env_id", ["hopper-medium-v2", "antmaze-umaze-v2", "antmaze-large-play-v2", "pen-cloned-v1"])
@pytest.mark.parametrize("preset", ["none", "quick", "demo"])
def test_an_offline_run_of_its_own_is_the_one_that_a_script_would_train(env_id, preset):
    """Else `offline/NAME.py`, and then the script that starts from it, ends in "a run with other arguments"."""
    flags = ["--env-id", env_id, "--preset", preset]
    for script in (o2sac, aca, awac, cal_ql, iql, off2on, pex, wsrl):
        args = parsed(script, *flags)
        names = offline.ALGORITHMS if script is o2sac else [args.offline]
        for name in names:
            algorithm, found = offline.algorithm_args(dataclasses.replace(args, offline=name))
            alone = parsed(algorithm, *flags)
            if found.exp_name == alone.exp_name:
                differ = {k: (v, getattr(found, k)) for k, v in vars(alone).items() if v != getattr(found, k)}
                assert set(differ) <= set(FREE_ARGS), (script.__name__, name, differ)
            if script is not o2sac:
                assert offline.other_values(args, {}) == ""


def test_q_and_v_of_other_rewards_are_not_gone_on_with():
    data = datasets.load("hopper-medium-demo", "", "cpu")
    flags = ["--env-id", "hopper-medium-demo", "--reward-scale", "0.1", "--gamma", "0.999"]
    with pytest.raises(cli.UserError, match=r"reward-scale 1 \(here 0.1\), --gamma 0.99 \(here 0.999\)"):
        offline.check(parsed(iql, *flags), data)
    naive, usual = parsed(o2td3, *flags, "--no-reevaluate"), parsed(o2td3, "--env-id", "hopper-medium-demo")
    assert offline.takes_critic(naive) and "reward-scale 1 (here 0.1)" in offline.other_values(naive, {})
    assert not offline.takes_critic(usual) and offline.other_values(usual, {}) == ""
    mine = {"learner": {"args": {"reward_scale": 2.0, "gamma": 0.99}}}
    by_path = dataclasses.replace(usual, offline="some/policy.pt")
    assert (
        offline.other_values(by_path, mine) == "--reward-scale 2 (here 1)" and offline.other_values(by_path, {}) == ""
    )


def test_what_was_learned_otherwise_is_said():
    left = {
        "algorithm": "iql",
        "learner": {"args": {"expectile": 0.7, "beta": 3.0, "seed": 5, "log_every": 9, "hidden": [8]}},
    }
    flags = ["--env-id", "hopper-medium-demo"]
    assert offline.other_losses(parsed(iql, *flags), left) == ""
    assert offline.other_losses(parsed(iql, *flags, "--expectile", "0.9"), left) == (
        "; learned with --expectile 0.7 (here 0.9)"
    )
    assert offline.other_losses(parsed(pex, *flags), left) == "; learned with --beta 3.0 (here 10.0)"
    mine = {"algorithm": "mine", "learner": {"args": {"lagrange": True, "calibrate_online": False}}}
    assert offline.other_losses(parsed(cal_ql, *flags), mine) == (
        "; learned with --no-calibrate-online (here --calibrate-online), --lagrange (here --no-lagrange)"
    )
    assert offline.other_losses(parsed(o2td3, *flags), left) == ""  # which takes the policy alone
    older = left | {"algorithm": "awac"}  # from before there was the argument
    found = offline.other_losses(parsed(awac, *flags, "--weights", "softmax"), older)
    assert "--weights exp (here softmax)" in found


@pytest.mark.parametrize("env_id", ["hopper-medium-v2", "antmaze-umaze-v2", "pen-cloned-v1"])
def test_the_conservative_gap_is_not_clipped(env_id):
    for script in (cal_ql, offline_cal_ql):
        assert parsed(script, "--env-id", env_id).min_gap is None


def test_calibration_knows_failures_whatever_the_rewards_are_scaled_by():
    """A maze's episode that never succeeds goes on failing: r / (1 - γ), r = scale · 0 + shift."""
    for scale, shift in ((10.0, -5.0), (1.0, -1.0)):
        flags = ["--env-id", "antmaze-umaze-v2", "--reward-scale", str(scale), "--reward-shift", str(shift)]
        args = parsed(cal_ql, *flags)
        rewards = scale * torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0]) + shift
        found = cal_ql.follow(args, rewards, torch.zeros(5), torch.tensor([0, 0, 1, 1, 1]))
        torch.testing.assert_close(found[:2], torch.full((2,), shift / (1 - args.gamma)))
        assert (found[2:] > found[0]).all()
    args = parsed(cal_ql, "--env-id", "antmaze-umaze-v2", "--gamma", "1")  # where that has no limit
    rewards = 10 * torch.tensor([0.0, 0.0, 0.0, 1.0]) - 5
    found = cal_ql.follow(args, rewards, torch.zeros(4), torch.tensor([0, 0, 1, 1]))
    assert found.tolist() == [-math.inf, -math.inf, 0.0, 5.0]


def test_only_calibration_needs_whole_episodes(data):
    """Without it, as after offline/cal_ql.py --no-calibrate, which is CQL, rows may stand in any order."""
    data.ordered = False
    flags = ["--env-id", "hopper-medium-v2", "--online-steps", "5"]
    with pytest.raises(cli.UserError, match="calibration by returns needs whole episodes"):
        cal_ql.experience(parsed(cal_ql, *flags), data)
    assert len(cal_ql.experience(parsed(cal_ql, *flags, "--no-calibrate-online"), data).offline) == len(data)


def test_pex_is_evaluated_alike_however_often_and_by_however_many():
    """What an evaluation draws does not depend on those before it, and so not on who plays it."""
    torch.manual_seed(0)
    task = tasks.resolve("hopper-medium-demo")
    actors = [iql.Actor(11, 3, (8,)) for _ in range(2)]
    agent = torch.nn.Module()
    agent.actor = pex.Composition(*actors, pex.Critic(11, 3, (8,)), 1.0, 0.5)
    agent.act = agent.actor.mode
    evaluator = Evaluator(task, torch.zeros(11), torch.ones(11), episodes=2)
    first, second = (evaluator.returns(agent.actor.mode, "cpu") for _ in range(2))
    assert np.array_equal(first, second) and int(agent.actor.played) == 0
