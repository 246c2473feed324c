"""TensorBoard, started as the README says, is asked for what its page shows."""

import errno
import json
import re
import threading
import urllib.parse
import urllib.request

import numpy as np
import pytest
import torch

import o2sac
from common import cli
from common.errors import UserError
from common.log import Log
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.program import TensorBoard

from offline import cql


def served(folder) -> dict:
    """Of each run in `folder` and each tag the (step, value) that TensorBoard serves its page."""
    board = TensorBoard()
    board.configure(argv=["tensorboard", "--logdir", str(folder), "--port", "0"])
    url = board.launch()

    def ask(path, **query):
        with urllib.request.urlopen(f"{url}data/plugin/scalars/{path}?{urllib.parse.urlencode(query)}") as reply:
            return json.load(reply)

    return {
        run: {tag: [(step, value) for _, step, value in ask("scalars", run=run, tag=tag)] for tag in tags}
        for run, tags in ask("tags").items()
    }


def natural(tag: str) -> list:
    """Sorts as the page does: numbers by their value and before letters."""
    return [(not part.isdigit(), int(part) if part.isdigit() else part) for part in re.findall(r"\d+|\D", tag)]


def test_a_log_holds_the_stages_that_the_run_has(tmp_path):
    log = Log(tmp_path, o2sac.Args())
    for stage in ("reevaluate", "align"):
        log.add(stage, 10, {f"{stage}/q": 1.0})
    log.save()
    (tmp_path / "reevaluate.pt").touch()  # taken over from another run, whose log is here; its alignment is not
    assert [row["stage"] for row in Log(tmp_path, o2sac.Args()).rows] == ["reevaluate"]


def test_tensorboard_shows_every_point_of_every_stage_in_the_runs_order(tmp_path):
    log = Log(tmp_path / "run", o2sac.Args())
    for stage, steps in (("reevaluate", 13), ("align", 5), ("finetune", 10)):
        for step in range(0, 10 * steps, 10):
            log.add(stage, step, {"probe/q_data": step / 2})
            log.add(stage, step, {"charts/score" if stage == "finetune" else f"{stage}/q": step / 4})
    log.save()
    offline = Log(tmp_path / "offline", cql.Args())
    offline.add("cql", 500, {"cql/q": 1.0})
    offline.save()

    curves = served(tmp_path)
    assert curves["offline"] == {"0_cql/q": [(500, 1.0)]}
    order = sorted(curves["run"], key=natural)
    assert order == ["1_reevaluate/probe/q_data", "1_reevaluate/q", "2_align/probe/q_data", "2_align/q", "charts/score",
                     "probe/q_data"]  # fmt: skip
    for name, tags in (("probe/q_data", order[::2][:2] + order[-1:]), ("charts/score", ["charts/score"])):
        logged = [(row["step"], row[name]) for row in log.rows if name in row]
        assert [point for tag in tags for point in curves["run"][tag]] == logged
    assert curves["run"]["1_reevaluate/q"] == [(10 * i, 2.5 * i) for i in range(13)]


def test_tensorboard_shows_a_run_that_goes_on_from_its_beginning_and_nothing_twice(tmp_path):
    for steps in ((1, 2, 3), (4, 5)):
        log = Log(tmp_path, o2sac.Args())
        for step in steps:
            log.add("align", step, {"align/q": step / 2})
        log.save()
        (tmp_path / "align.pt").touch()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("2_align/q")] == [(i, i / 2) for i in range(1, 6)]


def test_what_is_logged_is_a_number_however_it_comes(tmp_path):
    log = Log(tmp_path, o2sac.Args())
    scalars = {"a": torch.tensor(0.5), "b": np.float32(0.25), "c": True, "d": torch.ones(1), "e": 7, "f": 1e22}
    log.add("finetune", 1, scalars)
    log.save()
    (tmp_path / "finetune.pt").touch()
    text, again = (tmp_path / "progress.csv").read_text(), Log(tmp_path, o2sac.Args())
    (row,) = again.rows
    assert row == {"stage": "finetune", "step": 1, "a": 0.5, "b": 0.25, "c": 1.0, "d": 1.0, "e": 7, "f": 1e22}
    again.save()
    assert (tmp_path / "progress.csv").read_text() == text  # by a run that goes on, too
    for wrong in (torch.ones(2), "high", None, [1.0]):
        with pytest.raises(UserError, match="^mine has to be one number to be logged"):
            log.add("finetune", 2, {"mine": wrong})


@pytest.mark.parametrize("line", ["align,5,1.0,2.0", "align,5", "align,five,1.0"])
def test_a_log_that_is_damaged_is_named(line, tmp_path):
    (tmp_path / "progress.csv").write_text(f"stage,step,align/q\nalign,4,1.0\n{line}\n")
    with pytest.raises(UserError, match="progress.csv is damaged; delete the folder, and the command .* again"):
        Log(tmp_path, o2sac.Args())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_ends_a_run_and_names_the_checkpoint_before_it(value, tmp_path):
    log = Log(tmp_path, o2sac.Args())
    words = f"^losses/q became {value} in stage 'align' before step 3; "
    with pytest.raises(UserError, match=f"{words}there is no checkpoint of this stage"):
        log.add("align", 3, {"losses/q": value})
    (tmp_path / "align.pt").touch()
    with pytest.raises(UserError, match=f"{words}the last checkpoint is {tmp_path / 'align.pt'}"):
        log.add("align", 3, {"losses/q": torch.tensor(value)})
    assert log.rows == []


def test_rows_belong_to_a_stage_of_the_script(tmp_path):
    """Of others there is no checkpoint, so that a run which goes on would lose them."""
    log = Log(tmp_path, o2sac.Args())
    with pytest.raises(UserError, match="^x cannot be logged in 'mine'; .* stages are reevaluate, align, finetune$"):
        log.add("mine", 1, {"x": 1.0})
    log.add("transfer", 1, {"transfer/loss": 1.0})
    Log(tmp_path / "offline", cql.Args()).add("cql", 1, {"cql/q": 1.0})


def test_evaluations_are_the_evaluators_alone(tmp_path):
    log = Log(tmp_path, o2sac.Args())
    log.add("align", 5, {"align/score": 40.0})
    log.add("finetune", 5, {"charts/score": 50.0, "losses/score": 1e3, "mine/score": 1e3})
    assert log.evaluations("align") == [(5, 40.0)] and log.evaluations("finetune") == [(5, 50.0)]


def test_a_stage_that_is_made_again_has_its_place(tmp_path):
    log = Log(tmp_path, o2sac.Args())
    for stage in ("finetune", "align", "reevaluate"):
        for step in (1, 2, 3):
            log.add(stage, step, {"probe/q_data": 1.0})
    log.save()
    assert [row["stage"] for row in log.rows] == 3 * ["reevaluate"] + 3 * ["align"] + 3 * ["finetune"]
    log.cut("align", 2)
    log.cut("reevaluate")
    assert [row["stage"] for row in log.rows] == 2 * ["align"] + 3 * ["finetune"]
    assert [row["step"] for row in log.rows] == [1, 2, 1, 2, 3]


def test_a_full_disk_is_said_by_tensorboards_writer_too(tmp_path, monkeypatch):
    log = Log(tmp_path, o2sac.Args())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name, call in (("add_scalar", lambda: log.add("align", 1, {"q": 1.0})), ("flush", log.save)):
        monkeypatch.setattr(log.writer, name, full)
        with pytest.raises(UserError, match="No space left on device.; free some space or"):
            call()


def test_of_threads_tensorboards_alone_says_later_that_the_disk_is_full(capsys):
    class _AsyncWriterThread(threading.Thread): ...  # its writer's

    full = OSError(errno.ENOSPC, "No space left on device")
    for thread, error, said in ((_AsyncWriterThread(), full, False), (threading.Thread(), full, True),
                                (_AsyncWriterThread(), ValueError("mine"), True)):  # fmt: skip
        cli.said_later(threading.ExceptHookArgs((type(error), error, None, thread)))
        assert (str(error) in capsys.readouterr().err) == said
