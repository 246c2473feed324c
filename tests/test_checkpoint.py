"""Files that are written: never half, never under another process's name, never read back with a bit that differs."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from types import SimpleNamespace

import pytest
import torch

from common import checkpoint, datasets, inert, loop, owner, steps
from common.cli import Interrupted, UserError
from tests.test_datasets import Reply

HOLD = "import sys, time\nfrom pathlib import Path\nfrom common.owner import own\n" \
       "lock = own(Path(sys.argv[1]), 'busy')\nprint('held', flush=True)\ntime.sleep(600)"  # fmt: skip


def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(tmp_path):
    path, state = tmp_path / "stage.pt", {"weights": torch.randn(64), "step": 7, "name": "x"}
    checkpoint.save_tensors(path, state)
    whole = path.read_bytes()
    noticed = 0
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = inert.read_tensors(path, "cpu")
        except UserError as error:
            assert str(path) in str(error) and "damaged" in str(error)
            noticed += 1
            continue
        assert place >= len(whole) - 71  # in the checksum's own name
        assert torch.equal(found["weights"], state["weights"]) and found["step"] == 7
    assert noticed > len(whole) / 3 - 10


def test_a_checkpoint_is_still_one_of_pytorch(tmp_path):
    checkpoint.save_tensors(tmp_path / "a.pt", {"x": torch.arange(3)})
    assert torch.load(tmp_path / "a.pt", weights_only=True)["x"].tolist() == [0, 1, 2]


def test_files_from_elsewhere_have_no_checksum_to_fail(tmp_path):
    torch.save({"x": torch.ones(3)}, tmp_path / "a.pt")
    (tmp_path / "short").write_bytes(b"sha256:")
    checkpoint.verify(tmp_path / "a.pt")
    checkpoint.verify(tmp_path / "short")


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """Each renames what it wrote itself: at no moment there is anything else than one writer's whole file."""
    path, contents = tmp_path / "f", [bytes([i]) * 200_000 for i in range(3)]
    writers = [
        threading.Thread(target=lambda content=content: [checkpoint.write_atomic(path, content) for _ in range(10)])
        for content in contents
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert not path.exists() or path.read_bytes() in contents
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), checkpoint.aside(tmp_path / "f") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------- owners


@pytest.fixture
def held(tmp_path):
    """A lock that another process holds, and that process."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield tmp_path / "lock", process
    process.kill()
    process.wait()


def test_who_comes_second_is_refused(held):
    with pytest.raises(UserError, match="busy; wait"):
        owner.own(held[0], "busy")


def test_who_may_wait_goes_on_when_the_owner_is_killed(held, capsys):
    threading.Timer(0.5, held[1].kill).start()
    start = time.monotonic()
    lock = owner.own(held[0], "busy", wait=True)
    assert time.monotonic() - start > 0.3 and capsys.readouterr().out == "busy: waiting for it\n"
    owner.own(held[0], "busy").release()  # one process may take it twice
    assert lock.is_locked
    lock.release()


def test_one_file_is_downloaded_once(tmp_path, monkeypatch, held):
    """While another process fetches the file, this one waits, and then does not fetch it again."""
    path = tmp_path / "file"
    held[0].rename(tmp_path / "file.lock")  # the lock is the file's, not its name's

    def arrived():
        path.write_text("whole")
        held[1].kill()

    def fetch(*_, **__):
        raise AssertionError("fetched twice")

    monkeypatch.setattr(urllib.request, "urlopen", fetch)
    threading.Timer(0.5, arrived).start()
    datasets.download("http://server/file", path)
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Reply(b"new", 3))
    datasets.download("http://server/file", tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == b"new"


# ----------------------------------------------------------------------------------------------- what is restored


def test_random_generators_go_on_where_they_were():
    state = checkpoint.rng_state()
    drawn = [(torch.rand(3).tolist(), random.random()) for _ in range(2) if checkpoint.set_rng_state(state) is None]
    assert drawn[0] == drawn[1]


def test_the_last_evaluation_alone_is_the_final_one(tmp_path):
    """It has --final-episodes; and what each of them returned goes to the rule that keeps the best."""
    run, asked, offered, logged = Recorder(tmp_path), [], [], []
    run.log = lambda stage, step, scalars: logged.append((step, scalars["charts/score"], scalars["losses/q"]))

    def scalars(policy, device, final):
        asked.append(final)
        return {"score": 7.0}

    best = SimpleNamespace(score=9.0, update=lambda score, actor, origin, returns: offered.append((score, returns)))
    agent, evaluator = SimpleNamespace(act=None, actor=None), SimpleNamespace(scalars=scalars, last=[3.0, 11.0])
    state = {"agent": agent, "best": best, "stepper": SimpleNamespace(means=lambda: {"q": 2.0})}
    stage = loop.Loop(run, "finetune", 3, state, torch.device("cpu"))
    for step in stage:
        if step != 2:
            stage.evaluate(evaluator)
    assert asked == [False, True] and offered == [(7.0, [3.0, 11.0])] * 2 and logged == [(1, 7.0, 2.0), (3, 7.0, 2.0)]


# ----------------------------------------------------------------------------------------------- signals


class Recorder:
    """As much of a run as a loop needs."""

    measure = "score"

    def __init__(self, folder):
        self.dir, self.seconds, self.last_score, self.saved = folder, {}, 0.0, []
        self.args = type("Args", (), {"checkpoint_seconds": 1e9})

    def restore(self, *_):
        return 0, False

    def save(self, stage, step, done, state):
        self.saved.append((step, done))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_a_stage_saves_at_the_end_of_the_step(tmp_path, number):
    run, before = Recorder(tmp_path), signal.getsignal(number)
    with pytest.raises(Interrupted, match="stage is saved at step 3 in"):
        for step in loop.Loop(run, "stage", 10, {}, torch.device("cpu")):
            if step == 3:
                os.kill(os.getpid(), number)
    assert run.saved == [(3, False)] and signal.getsignal(number) == before


def test_between_stages_a_signal_stops_at_once(tmp_path):
    for _ in loop.Loop(Recorder(tmp_path), "stage", 2, {}, torch.device("cpu")):
        pass
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_progress_bar_that_nobody_reads_costs_no_step(tmp_path, monkeypatch):
    """As in `… 2>&1 | tee log.txt`, where Ctrl-C ends tee first."""
    end, begin = os.pipe()
    os.close(end)
    run = Recorder(tmp_path)
    with open(begin, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        bar = loop.Loop(run, "stage", 3, {}, torch.device("cpu"))
        assert list(bar) == [1, 2, 3]
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), begin)  # what is left in the stream's buffer goes there
    assert run.saved == [(3, True)]


@pytest.mark.parametrize("works", [True, False])
def test_a_step_that_is_compiled_says_so_in_the_progress_bar(tmp_path, monkeypatch, capsys, works):
    class Failed(Exception):
        inner_exception = OSError("no compiler")

    def compiling(fn, **_):
        def fast():
            shown.append(capsys.readouterr().err.rstrip().endswith("compiling]"))
            if not works:
                raise Failed
            return fn()

        return fast

    shown = []
    monkeypatch.setattr(torch, "compile", compiling)
    monkeypatch.setattr(torch._dynamo.exc, "BackendCompilerFailed", Failed)
    monkeypatch.setattr(steps, "compiler_works", True)
    step = steps.compiled(lambda: {}, True)
    for _ in loop.Loop(Recorder(tmp_path), "stage", 3, {}, torch.device("cpu")):
        step()
    assert shown == ([True, False, False] if works else [True])
    assert "compiling" not in capsys.readouterr().err.rsplit("\r")[-1] and steps.say.__module__ == "common.steps"
