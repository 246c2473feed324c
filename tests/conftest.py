"""Shared fixtures: a small dataset in D4RL's layout, and a command line that runs in this process."""

import signal
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from common import datasets, tasks

# Both are ignored by all that `nohup make test &` starts, and runs respect that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

TINY = [
    "--device", "cpu", "--no-compile", "--checkpoint-seconds", "3600", "--batch-size", "32", "--eval-episodes", "2",
    "--regime-episodes", "2",
]  # fmt: skip


def first_rows(folder: str, n: int) -> Path:
    """The demo's data without all but the first rows, under the same name: what a run computes of all takes seconds."""
    path = Path(folder, f"{tasks.DEMO}.hdf5")
    with h5py.File(tasks.SHIPPED / path.name) as whole, h5py.File(path, "w") as part:
        part.attrs.update(whole.attrs)
        for key, values in whole.items():
            part[key] = values[:n]
    return path


FOLDER = tempfile.TemporaryDirectory()  # as long as the process
DEMO = ["--env-id", tasks.DEMO, "--dataset-path", str(first_rows(FOLDER.name, 10_000))]
OFTEN = ["--checkpoint-seconds", "0"]  # a checkpoint with every step, of some megabytes each


KILL = """
import os, signal, sys
sys.argv[0] = "{script}.py"
sys.argv += {often}
import {script} as script
from common import cli, loop, run
save, blocks = run.Run.save, loop.Loop.blocks
def deadly(self, stage, step, done, state):
    if stage == "{stage}" and step >= {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    if done or {every} and step % {every} == 0:
        save(self, stage, step, done, state)
run.Run.save = deadly
loop.Loop.blocks = lambda self, size: blocks(self, 1 if callable(size) else size)
cli.run(script.main)
"""


def kill_at(script: str, stage: str, step: int, every: int) -> str:
    """A program that runs a script, saves it every `every` steps, and dies, without a word, at a step of a stage."""
    return KILL.format(script=script, often=OFTEN, stage=stage, step=step, every=every)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def random_raw():
    """Arrays in D4RL's layout with terminals and time-outs at random places."""

    def make(n=2_000, seed=0, next_observations=False, timeouts=True):
        rng = np.random.default_rng(seed)
        raw = {
            "observations": rng.normal(size=(n, 11)).astype(np.float32),
            "actions": rng.uniform(-1, 1, (n, 3)).astype(np.float32),
            "rewards": rng.normal(size=n).astype(np.float32),
            "terminals": rng.random(n) < 0.02,
        }
        if timeouts:
            raw["timeouts"] = rng.random(n) < 0.01
        if next_observations:  # the next row's, but after an end, where that is another episode's
            raw["next_observations"] = rng.normal(size=(n, 11)).astype(np.float32)
            goes_on = ~(raw["terminals"] | raw.get("timeouts", False))[:-1]
            raw["next_observations"][:-1][goes_on] = raw["observations"][1:][goes_on]
        return raw

    return make


@pytest.fixture
def hdf5(tmp_path, random_raw):
    """Writes an HDF5 file in D4RL's layout, with some arrays replaced or left out (None); returns its path."""

    def write(name="data.hdf5", **changes):
        raw = random_raw() | changes
        with h5py.File(tmp_path / name, "w") as file:
            for key, value in raw.items():
                if value is not None:
                    file[key] = value
        return tmp_path / name

    return write


@pytest.fixture
def data(random_raw):
    """A standardised dataset of 1,999 random transitions of hopper's size."""
    view = datasets.qlearning_view(random_raw(), 1_000)[0]
    tensors = {key: torch.as_tensor(value) for key, value in view.items() if key != "ordered"}
    data = datasets.Dataset(**tensors, task=tasks.resolve(tasks.DEMO), source="random")
    data.standardise(*data.statistics())
    return data


@pytest.fixture
def raw_data(data, tmp_path, monkeypatch):
    """The same, not standardised, as `datasets.load` leaves it, in a folder where no file "executed" may appear."""
    monkeypatch.chdir(tmp_path)
    data.standardise(torch.full((11,), -0.5), torch.full((11,), 0.4))
    yield data
    assert not list(tmp_path.rglob("executed"))


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Runs a script's `main` under `cli.run` with a command line: (exit code, what it printed to stdout, to stderr)."""
    from common import cli

    def run(module, *argv):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, argv)])
        try:
            cli.run(module.main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run
