"""The service through which several processes share a GPU, with a stand-in for its control program."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from common import seeds

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
