"""Runs of the compared methods at tiny budgets: what they leave, how they resume, what they refuse."""

import json

import pytest
import torch

import o2sac

from baselines import aca, awac, cal_ql, iql, off2on, pex, rlpd, wsrl
from common import cli, regime
from common.identity import ROOT
from common.run import Run, run_name
from tests.conftest import OFTEN, TINY

SMALL = ["--env-id", "hopper-medium-demo", "--offline-steps", "4", "--online-steps", "90", "--eval-every", "30"]
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
    # and every network that the offline run handed over, or that is new, has moved
    moments = {key: value for key, value in whole.items() if "optimizer/exp_avg_sq" in key}
    still = [key for key, moment in moments.items() if not (moment > 0).any() and "multiplier" not in key]
    assert moments and not still


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
