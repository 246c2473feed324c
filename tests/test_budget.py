"""How many steps are enough: which runs are compared, and what the page makes of runs that are there."""

import json
import re
import shutil

import pytest

import o2td3
from common.cli import UserError
from common.log import read_rows
from common.run import plain
from experiments import alignment, analysis, budget, harness, rollouts
from tests.conftest import TINY

AUTO = ["--reevaluate-steps", "auto", "--align-steps", "auto"]


@pytest.mark.parametrize(
    ("scale", "steps"),
    [("paper", [["5,000", "20,000", "100,000", "500,000", "auto"]] * 2),
     ("demo", [["600", "1,500", "6,000", "12,000", "auto"], ["200", "500", "2,000", "4,000", "auto"]])],
)  # fmt: skip
def test_each_stage_has_its_budgets(scale, steps):
    args = budget.Args(scale=scale)
    runs = budget.settings(args, "o2sac", 3)
    assert list(runs) == ["reevaluate", "align"] and [list(found) for found in runs.values()] == steps
    own, auto = harness.full(args, "o2sac", 3), runs["align"].pop("auto")
    assert runs["reevaluate"].pop("auto") == auto and auto.base is None and list(auto.flags[2:]) == AUTO
    parsed = vars(harness.parsed(args, own))
    for stage, found in runs.items():
        assert own in found.values()
        for label, spec in found.items():
            changed = {k: v for k, v in vars(harness.parsed(args, spec)).items() if v != parsed[k] and k != "exp_name"}
            assert changed == ({f"{stage}_steps": int(label.replace(",", ""))} if spec != own else {})
            if spec.base:
                assert (spec.base, spec.shared, stage) == (own, ("reevaluate",), "align")
                harness.check_shared(args, spec)
            assert spec == own or spec.base or stage == "reevaluate"
    assert len({harness.folder(args, spec) for found in runs.values() for spec in found.values()} | {auto}) == 8


def test_budgets_are_shares_of_this_scales_own():
    args = budget.Args(budgets=(0.5, 1e-9, 1.0), run_flags="--reevaluate-steps 10")
    runs = budget.settings(args, "o2td3", 0)
    assert list(runs["reevaluate"]) == ["1", "5", "10", "auto"] and list(runs["align"])[:2] == ["1", "2,500"]
    with pytest.raises(UserError, match="leave --align-steps auto out of --run-flags"):
        budget.settings(budget.Args(run_flags="--align-steps auto"), "o2td3", 0)


def test_stages_that_are_shared_may_not_differ():
    args = harness.Args()
    own = harness.full(args, "o2sac", 0)
    of_alignment = ("--align-steps", "7", "--align-eval-every", "7")
    harness.check_shared(args, own.variant("x", *of_alignment, stages=("reevaluate",)))
    for flag, stages in (("--align-steps", None), ("--reevaluate-steps", ("reevaluate",))):
        with pytest.raises(UserError, match=flag[2:].replace("-", "_")):
            harness.check_shared(args, own.variant("x", flag, "7", stages=stages))


def test_of_finished_runs(tmp_path, run_script, monkeypatch, hdf5):
    """A run with auto, whose stages are too short for a plateau; copies of it with other results stand for the rest."""
    monkeypatch.setattr(rollouts, "returns_ahead", lambda pool, data, rows, *_: 100 + rows % 7 + 0.0)
    tiny = dict(env_id="hopper-medium-demo", reevaluate_steps=16, align_steps=8, online_steps=30, learning_starts=20,
                eval_every=15, align_eval_every=8, log_every=4)  # fmt: skip
    monkeypatch.setitem(o2td3.PRESETS, "demo", tiny)
    flags = " ".join([*TINY, "--regime-episodes", "0", "--offline-steps", "4", "--critic-hidden", "16"])
    args = budget.Args(run_dir=str(tmp_path / "runs"), run_flags=flags, dataset_path=str(hdf5()), budgets=(0.5,),
                       seeds=1, algorithms=("o2td3",), out=str(tmp_path))  # fmt: skip
    runs = budget.settings(args, "o2td3", 0)
    code, _, err = run_script(o2td3, *harness.command_line(args, runs["align"]["auto"]))
    assert code == 0, err
    first = harness.folder(args, runs["align"]["auto"])
    result = json.loads((first / "result.json").read_text())
    for i, spec in enumerate((runs["reevaluate"]["8"], runs["align"]["4"], runs["align"]["8"])):
        other = {"auto": {}, "aligned": 30.0 + i, "seconds": {"reevaluate": 540, "align": 600 * i}}
        copy = shutil.copytree(first, harness.folder(args, spec))
        (copy / "result.json").write_text(json.dumps(result | other))
        started_with = json.loads((copy / "args.json").read_text()) | plain(harness.parsed(args, spec))
        (copy / "args.json").write_text(json.dumps(started_with))
    typed = [f"--run-flags={flags}", "--dataset-path", args.dataset_path, "--run-dir", args.run_dir, "--out", tmp_path]
    typed += ["--seeds", "1", "--budgets", "0.5", "--algorithms", "o2td3", "--states", "256", "--rollouts", "2"]
    code, out, err = run_script(budget, *typed)
    assert code == 0, err
    page = (tmp_path / "budget_data.md").read_text()
    rows = [re.split(r" *\| *", line)[1:-1] for line in page.splitlines() if line.startswith("| o2td3 |")]
    short, own, auto = rows[:3]  # of re-evaluation
    assert [row[1] for row in (short, own, auto)] == ["8", "16", "auto: 16 (0 of 1 at a plateau)"]
    assert short[3] == "9 min" and short[4:8] == own[4:8] == auto[4:8]
    q, returned, bias = (float(cell.split(" ")[0]) for cell in own[4:7])
    assert 100 <= returned <= 106 and q - returned == pytest.approx(bias, abs=0.11)
    last = [row for row in read_rows(first / "progress.csv") if row["stage"] == "reevaluate"][-1]
    assert q == pytest.approx(last["probe/q_policy"], abs=0.051)  # the probe's states are the same
    short, own, auto = rows[3:6]  # of alignment
    assert [(row[1], row[3], row[6]) for row in (short, own)] == [("4", "10 min", "31.0"), ("8", "20 min", "32.0")]
    last = [row for row in read_rows(first / "progress.csv") if row["stage"] == "align"][-1]
    assert own[4:6] == [f"{last[f'probe/{name}']:.2f}" for name in ("rank_correlation", "drift")]
    assert [row[1:5] for row in rows[6:7]] == [["as at this scale", "1", "29 min", "0%"]]
    done = analysis.summary(first)
    assert all(row[-2:] == [f"{done['final']:.1f}", f"{done['area']:.1f}"] for row in rows)
    assert rows[7][1] == "auto" and rows[7][4] in ("99%", "100%") and (tmp_path / "budget_data.png").exists()


def test_refused(run_script, tmp_path):
    for experiment in (budget, alignment):
        code, _, err = run_script(experiment, "--algorithms", "o2sac", "o2ppo", "--out", tmp_path)
        assert code == 2 and err == "error: o2ppo has no stage align, of which this asks; see --algorithms\n"
    code, _, err = run_script(budget, "--budgets", "0.1", "0")
    assert code == 2 and "--budgets is 0.0, but has to be above 0" in err
