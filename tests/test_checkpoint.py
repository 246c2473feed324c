"""Files that are written: never half, never under another process's name, never read back with a bit that differs."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import o2sac
from common import checkpoint, datasets, inert, loop, owner, steps
from common.cli import Interrupted, UserError
from common.run import Run
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


def test_a_seed_is_that_of_every_generator():
    def draw(seed):
        checkpoint.seed_everything(seed)
        return random.random(), np.random.rand(), torch.rand(()).item()

    first, again, other = draw(3), draw(3), draw(4)
    assert first == again and not set(first) & set(other)


CPU = torch.device("cpu")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Opens a run of O2SAC in one folder, as another start of its command does."""
    monkeypatch.setattr("common.run.code_of", lambda *_: {})

    def open_run(**given):
        opened = Run(o2sac.Args(run_dir=str(tmp_path), **given), "run", None)
        opened.lock.release()
        return opened

    return open_run


def parts() -> dict:
    """As much of a stage's state as a checkpoint needs."""
    return {"net": torch.nn.Linear(1, 1), "stepper": steps.Stepper(None, CPU)}


@pytest.mark.parametrize("done", [True, False])
def test_a_run_goes_on_with_what_it_knew_of_its_last_evaluation(start, done):
    """What fine-tuning starts from, and what the best policy is held against."""
    run = start()
    run.last_score, run.last_returns, run.seconds["align"] = 7.0, [6.0, 8.0], 5.0
    run.save("align", 3, done, parts())
    again = start()
    assert again.restore("align", parts(), CPU) == (3, done)
    assert (again.last_score, again.last_returns, again.seconds) == (7.0, [6.0, 8.0], {"align": 5.0})


def test_a_checkpoint_that_changed_on_the_disk_is_not_trained_on(start):
    run, state = start(), parts()
    run.save("align", 3, False, state)
    path = run.dir / "align.pt"
    content = path.read_bytes()
    weight = state["net"].weight.detach().numpy().tobytes()
    assert content.count(weight) == 1
    path.write_bytes(content.replace(weight, weight[::-1]))
    with pytest.raises(UserError, match=r"align.pt is damaged: .* delete it"):
        start().restore("align", parts(), CPU)


def steps_of(run, stage: str, n: int, per_step: int = 1) -> None:
    """Takes what is left of a stage of `n` steps, each of which is logged and saved."""
    first, done = run.restore(stage, parts(), CPU)
    for step in range(first + 1, n + 1) if not done else ():
        for row in range(per_step):
            run.log(stage, step, {f"{stage}/q": step + row / 10})
        run.save(stage, step, step == n, parts())


def test_no_row_is_lost_or_doubled_wherever_a_run_is_killed(start, tmp_path, monkeypatch):
    """Between its rows and its checkpoint, too, which are two files."""

    def whole():
        run = start()
        for stage in ("reevaluate", "align"):
            steps_of(run, stage, 2)
        return run.logged.rows

    rows, fsync = whole(), os.fsync
    for deaths in range(99):
        shutil.rmtree(tmp_path / "run")
        writes = iter(range(100))

        def deadly(file, deaths=deaths, writes=writes):
            if next(writes) == deaths:
                raise KeyboardInterrupt
            fsync(file)

        monkeypatch.setattr(os, "fsync", deadly)
        try:
            whole()
            break  # no write is left
        except KeyboardInterrupt:
            assert whole() == rows
    assert 9 <= deaths < 98  # args.json, then rows and checkpoint of each step, at least


def test_a_stage_that_is_made_again_takes_no_row_from_the_next_one(start):
    """With other code, say, that logs more of them."""
    run = start()
    steps_of(run, "reevaluate", 2)
    for step in (1, 2, 3):
        run.log("align", step, {"align/q": 1.0})
    run.save("align", 3, False, parts())
    (run.dir / "reevaluate.pt").unlink()
    again = start()
    steps_of(again, "reevaluate", 2, per_step=4)
    again.restore("align", parts(), CPU)
    assert [row["stage"] for row in again.logged.rows] == 8 * ["reevaluate"] + 3 * ["align"]


def test_a_checkpoint_of_older_code_which_counts_the_rows_of_all_stages_doubles_none(start):
    run = start()
    steps_of(run, "reevaluate", 2)
    run.log("align", 1, {"align/q": 1.0})
    run.save("align", 1, False, parts())
    path = run.dir / "align.pt"
    content = torch.load(path, weights_only=True)
    checkpoint.save_tensors(path, {key: v for key, v in content.items() if key != "own_rows"} | {"rows": 3})
    run.log("align", 2, {"align/q": 2.0})
    run.logged.save()  # and was killed before it wrote its checkpoint
    again = start()
    assert again.restore("align", parts(), CPU) == (1, False)
    assert [(row["stage"], row["step"]) for row in again.logged.rows] == [
        ("reevaluate", 1),
        ("reevaluate", 2),
        ("align", 1),
    ]


def test_what_a_killed_process_left_half_written_is_cleared_away(start):
    run = start()
    run.save("align", 3, False, parts())
    half = run.dir / "align.pt.0123456789ab.part"
    half.write_text("half")
    start()
    assert not half.exists() and (run.dir / "align.pt").exists()


def test_where_and_how_a_run_is_watched_is_no_other_experiment(start):
    run = start()
    run.save("align", 3, False, parts())
    elsewhere = dict(device="cpu", compile=False, eval_workers=2, checkpoint_seconds=1, capture_video=True, num_seeds=2)
    for name, value in elsewhere.items():
        assert getattr(run.args, name) != value
    assert start(**elsewhere).restore("align", parts(), CPU) == (3, False)
    with pytest.raises(UserError, match=r"other arguments: --gamma 0.99 \(now 0.9\)"):
        start(gamma=0.9)


def test_time_goes_on_from_start_to_start(tmp_path, monkeypatch):
    """That of the stage in all, the pace of this start alone, and a checkpoint every so many seconds of either."""
    now = SimpleNamespace(seconds=50.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    run = Recorder(tmp_path)
    run.restore, run.seconds, run.args.checkpoint_seconds = lambda *_: (10, False), {"stage": 300.0}, 5
    stage = loop.Loop(run, "stage", 20, {}, CPU)
    now.seconds += 1_000  # of whatever comes before the first step
    for step in stage:
        now.seconds += 2
        assert stage.rate == pytest.approx((step - 10) / (2 * (step - 10)))
    assert run.seconds == {"stage": 320} and run.saved == [(13, False), (16, False), (19, False), (20, True)]


@pytest.mark.parametrize(("start", "logged"), [(0, [0, 4, 8, 10]), (4, [4, 8, 10]), (5, [8, 10])])
def test_the_critic_is_measured_before_every_so_many_steps_and_at_the_end(start, logged, tmp_path):
    run, taken, found = Recorder(tmp_path), [], []
    run.restore, run.args.probe_every = lambda *_: (start, False), 4
    run.log = lambda stage, step, scalars: found.append((step, scalars))
    for step in loop.Loop(run, "stage", 10, {}, CPU, lambda: len(taken)):
        taken.append(step)
    assert found == [(step, step - start) for step in logged]  # after so many steps of this start


def test_the_best_policy_stays_as_it_was_when_it_was_found():
    net = torch.nn.Linear(2, 1)
    best = checkpoint.BestPolicy(1.0, net, "offline policy", [1.0], 0.0)
    before = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.add_(1)
    assert torch.equal(best.weights["weight"], before)
    assert not best.update(1.0, net, "as good") and best.update(2.0, net, "better", [2.0])
    again = checkpoint.BestPolicy(3.0, torch.nn.Linear(2, 1), "another")
    again.load_state_dict(best.state_dict())
    assert (again.score, again.origin, again.returns) == (2.0, "better", [2.0])
    assert torch.equal(again.weights["weight"], before + 1)


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


def test_what_nohup_ignores_ends_no_stage(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = Recorder(tmp_path)
        for _ in loop.Loop(run, "stage", 3, {}, CPU):
            os.kill(os.getpid(), signal.SIGHUP)
        assert run.saved == [(3, True)] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


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
