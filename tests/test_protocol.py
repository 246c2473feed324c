"""The whole protocol as one command, at a millionth of the paper's budgets."""

import re

from benchmarks import protocol

from tests.conftest import DEMO


def test_times_every_stage(run_script, tmp_path):
    flags = [*DEMO, "--fraction", "4e-6", "--no-compile", "--device", "cpu"]
    code, out, err = run_script(protocol, *flags, "--run-dir", tmp_path)
    assert code == 0, err
    rows = {m[1].strip(): m[2].strip() for m in re.finditer(r"│ ([\w:\- ]+?) +│ +([\d,]*) │", out)}
    assert rows["offline: cql"] == "4" and rows["reevaluate"] == rows["align"] == "2" and rows["finetune"] == "1"
    assert rows["evaluations of fine-tuning"] == "1" and "all stages" in rows
    assert "from start to end" in out


def test_times_several_seeds_apart_from_one(run_script, tmp_path):
    flags = [*DEMO, "--fraction", "4e-6", "--no-compile", "--device", "cpu", "--seed", "3"]
    code, out, err = run_script(protocol, *flags, "--num-seeds", "2", "--run-dir", tmp_path)
    assert code == 0, err
    assert "and 1 more" in out and "from start to end" in out
    results = sorted(path.parent.name for path in tmp_path.glob("2-seeds/*o2sac*/result.json"))
    assert [name.split("__")[-1] for name in results] == ["3", "4"]


def test_refuses_a_fraction_that_is_none(run_script):
    code, _, err = run_script(protocol, "--fraction", "2")
    assert code == 2 and "--fraction is 2.0" in err and "Traceback" not in err
