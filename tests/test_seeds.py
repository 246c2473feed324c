"""What several seeds show and leave; the service through which they share a GPU, with a stand-in for its program."""

import json
import os
import shutil
import sys
from pathlib import Path

import o2sac
import pytest
import torch
from common import seeds
from common.log import Log

CUDA = torch.device("cuda:0")


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A control program that notes how it was called; what it noted, a line each."""
    notes = tmp_path / "notes"
    program = tmp_path / "nvidia-cuda-mps-control"
    program.write_text(f'#!/bin/sh\n[ "$1" ] || read said\necho "$CUDA_MPS_PIPE_DIRECTORY $1$said" >>{notes}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    return lambda: notes.read_text().splitlines() if notes.exists() else []


def test_the_service_runs_as_long_as_the_seeds_do(calls, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("true"))  # a GPU answers through the service
    with pytest.raises(KeyboardInterrupt), seeds.shared_gpu(CUDA) as service:
        folder = service["CUDA_MPS_PIPE_DIRECTORY"]
        assert calls() == [f"{folder} -d"] and Path(folder).is_dir()
        raise KeyboardInterrupt
    assert calls() == [f"{folder} -d", f"{folder} quit"] and not Path(folder).exists()


def test_a_service_that_does_not_answer_is_ended_and_not_used(calls, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with seeds.shared_gpu(CUDA) as service:
        assert service == {}
    assert [line.split()[1] for line in calls()] == ["-d", "quit"]
    assert "take turns" in capsys.readouterr().out


@pytest.mark.parametrize("device, running", [("cpu", None), ("cuda", "/somewhere")])
def test_no_service_is_started_where_none_is_needed(calls, monkeypatch, device, running):
    if running:  # the user's own; its variables reach the seeds anyway
        monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", running)
    with seeds.shared_gpu(torch.device(device)) as service:
        assert service == {} and calls() == []


def test_without_the_program_the_seeds_take_turns(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with seeds.shared_gpu(CUDA) as service:
        assert service == {}
    assert "take turns" in capsys.readouterr().out


BAR = "finetune  :  37%|███▋      | 33/90 [00:01<00:02, 21.71step/s, score 47.1 (best 53.2)]"


def test_a_bar_in_words():
    assert seeds.brief(BAR) == "finetune 37%, score 47.1 (best 53.2)"
    assert seeds.brief("reevaluate:   5%|▌    | 300/6000 [01:01<19:22,  4.9step/s]") == "reevaluate 5%"
    assert seeds.brief(BAR.replace("score", "return")) == "finetune 37%, return 47.1 (best 53.2)"
    assert seeds.brief(BAR.replace("score 47.1 (best 53.2)", "compiling")) == "finetune 37%, compiling"
    assert seeds.brief("waits") == "waits" and len(seeds.brief("error: " + 100 * "x")) == 60


def test_a_seed_is_at_its_stage_whatever_it_printed_since(tmp_path):
    assert seeds.now_at(tmp_path) == "waits"
    output = tmp_path / "output.txt"
    output.write_text("")
    assert seeds.now_at(tmp_path) == "starts"
    output.write_text("estimated time: 9 min\n")
    assert seeds.now_at(tmp_path) == "estimated time: 9 min"
    output.write_text(
        f"before\n\rreevaluate: 100%|█| 9/9 [00:01<00:00]\r{BAR}\n\nruns/x/curve.png shows the whole run.\n"
    )
    assert seeds.now_at(tmp_path) == BAR and seeds.last_words(tmp_path) == "runs/x/curve.png shows the whole run."


def test_without_a_terminal_a_plain_line_a_minute(monkeypatch, capsys):
    now = 1000.0
    monkeypatch.setattr(seeds.time, "monotonic", lambda: now)
    with seeds.screen() as show:
        for now in range(1000, 1150):  # noqa: B007
            show({0: BAR, 1: "waits"})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and len({line[5:] for line in lines}) == 1
    assert lines[0][5:] == " seed 0: finetune 37%, score 47.1 (best 53.2); seed 1: waits" and lines[0].isascii()


def test_in_a_terminal_a_live_line_for_each(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with seeds.screen() as show:
        show({0: BAR, 1: "waits"})
    shown = capsys.readouterr().err.replace("\r", "")
    assert f"seed 0: {BAR}\nseed 1: waits" in shown


def test_what_several_seeds_leave(tmp_path, capsys):
    args, folders = o2sac.Args(run_dir=str(tmp_path), offline="cql", env_id="hopper-medium-demo", num_seeds=3), {}
    for seed, gain in ((4, 0.0), (5, 8.0)):
        folders[seed] = tmp_path / str(seed)
        log = Log(folders[seed], args)
        log.add("finetune", 10, {"charts/score": 30.0 + gain})
        log.save()
        result = dict(offline=20.0, evaluated=["offline"], start=20.0, best_online=30.0 + gain,
                      last_online=30.0 + gain, seed=seed,
                      mean_of_last_3=30.0 + gain, best=30.0 + gain, best_from="online, step 10",
                      offline_algorithm="cql", dataset="some-data", references=None, measure="return")  # fmt: skip
        (folders[seed] / "result.json").write_text(json.dumps(result))
    seeds.summarise(args, folders, {6: "error: out of luck"})
    out = capsys.readouterr().out
    assert (
        "o2sac from cql on some-data, 2 of 3 seeds" in out
        and "34.0 ± 4.0" in out
        and "aligned" not in out
        and "returns" in out
    )
    assert "best.pt: seed 4 online, step 10; seed 5 online, step 10" in out
    together = tmp_path / "hopper-medium-demo__o2sac__cql__4-6"
    summary = json.loads((together / "seeds.json").read_text())
    assert summary["mean"]["last_online"] == 34 and summary["std"]["last_online"] == 4
    assert summary["results"]["5"]["best"] == 38 and summary["failed"] == {"6": "error: out of luck"}
    assert (together / "seeds.png").read_bytes().startswith(b"\x89PNG") and str(together) in out
