"""What Weights & Biases gets with --track, and how it may refuse. A stand-in keeps what it is given."""

import sys
from pathlib import Path
from types import SimpleNamespace

from filelock import FileLock

import o2sac
from common import track
from common.log import read_rows

from tests.conftest import TINY
from tests.test_pipeline import SMALL


class Wandb:
    """Stands in for Weights & Biases: a run that is kept from one process to the next, and takes no step twice."""

    def __init__(self):
        self.rows, self.opened = {}, []

    def init(self, **options):
        self.opened.append(options)
        write = sys.stdout.write
        sys.stdout.write = lambda text: write(text)  # it reads along

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "global_step")

    @property
    def run(self):
        return SimpleNamespace(step=len(self.rows))

    def log(self, row, step):
        assert step == len(self.rows)
        self.rows[step] = row


def test_weights_and_biases_gets_every_row_once(run_script, tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    flags = [*SMALL, *TINY, "--run-dir", tmp_path, "--track", "--exp-name", "cost: 5%"]
    assert run_script(o2sac, *flags)[0] == 0
    [folder] = tmp_path.glob("*cost: 5%*")
    rows = read_rows(folder / "progress.csv")
    sent = [(row["stage"], row["global_step"], len(row)) for row in wandb.rows.values()]
    assert sent == [(row["stage"], row["step"], len(row)) for row in rows]
    (folder / "finetune.pt").unlink()  # as after a kill
    assert run_script(o2sac, *flags)[0] == 0 and len(wandb.rows) == len(rows)
    first, second = wandb.opened
    assert first["id"] == second["id"] and not set(first["id"]) & set("/\\#?%: ")
    assert "dir" not in first and not first.get("sync_tensorboard")  # lest it finds its own files among the run's


def test_a_refusal_of_weights_and_biases_comes_before_any_file(run_script, tmp_path, monkeypatch):
    wandb = Wandb()
    wandb.init = lambda **_: Path("/nowhere/api_key").read_text()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    code, _, err = run_script(o2sac, *SMALL, *TINY, "--run-dir", tmp_path, "--track")
    assert code == 2 and "api_key" in err and "wandb login" in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_second_start_leaves_the_run_of_the_first_alone(run_script, tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert run_script(o2sac, *SMALL, *TINY, "--run-dir", tmp_path)[0] == 0
    [folder] = tmp_path.glob("*o2sac*")
    with FileLock(folder / ".lock"):
        code, _, err = run_script(o2sac, *SMALL, *TINY, "--run-dir", tmp_path, "--track")
    assert code == 2 and "another process is at work" in err and not wandb.opened


def test_every_run_has_an_id_of_its_own():
    names = ["a:b", "a-b", "a%b", "x" * 200, "x" * 201, "hopper__o2sac__0"]
    ids = [track.run_id(name) for name in names]
    assert len(set(ids)) == len(names) and max(map(len, ids)) <= 128 and ids[-1] == names[-1]
