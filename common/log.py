"""A run's scalars: rows in memory, `progress.csv` on disk, TensorBoard, and Weights & Biases if asked for."""

import csv
import io
import math
from collections.abc import Callable
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from common.checkpoint import write_atomic, writing
from common.cli import UserError
from common.stages import stages_of


def tag(args, stage: str, name: str) -> str:
    """What a scalar of progress.csv is called in TensorBoard, whose page sorts its curves by their names.

    Each stage counts its steps from 0, and a curve whose steps go back loses the points before that. So the stages
    before fine-tuning have tags of their own, numbered in the run's order: "1_reevaluate/q", "2_align/probe/q_data".
    """
    if stage == "finetune":
        return name
    return f"{stage_number(args, stage)}_{stage}/{name.removeprefix(stage + '/')}"


def stage_number(args, stage: str) -> int:
    """A stage's number in the run's order; 0 of what is none of its script's: handing a policy on, an offline run."""
    order = [declared.name for declared in stages_of(args)]
    return order.index(stage) + 1 if stage in order else 0


class Log:
    """Everything that a run logged so far, one dictionary a row: `rows` is the content of progress.csv."""

    def __init__(self, folder: Path, args, send: Callable[[int, dict], None] | None = None):
        self.dir, self.args, self.send = folder, args, send
        # of stages whose checkpoint is here: a run that takes another's first stages over gets its whole log with them
        self.rows = [row for row in read_rows(folder / "progress.csv") if (folder / f"{row['stage']}.pt").exists()]
        for old in folder.glob("events.out.tfevents*"):
            old.unlink()  # written again from progress.csv, so that a resumed run shows no step twice
        with writing(f"to {self.dir}"):
            self.writer = SummaryWriter(str(folder))
            self.writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + "\n".join(
                f"|{key}|{value}|" for key, value in vars(args).items()))  # fmt: skip
        for place, row in enumerate(self.rows):
            self._show(place, row)

    def add(self, stage: str, step: int, scalars: dict[str, float]) -> None:
        """Log scalars under their names in progress.csv. Raises UserError when one of them is NaN or infinite, or
        where the script declares no such stage, whose rows no checkpoint would keep."""
        names = [declared.name for declared in stages_of(self.args)]  # an offline script declares none
        if names and stage not in ("transfer", *names):
            words = f"{', '.join(scalars)} cannot be logged in {stage!r}"
            raise UserError(f"{words}; this script's stages are {', '.join(names)}")
        scalars = {name: number(name, value) for name, value in scalars.items()}
        for name, value in scalars.items():
            if not math.isfinite(value):
                saved = self.dir / f"{stage}.pt"
                with writing(f"to {self.dir}"):
                    self.writer.flush()
                last = f"the last checkpoint is {saved}" if saved.exists() else "there is no checkpoint of this stage"
                raise UserError(
                    f"{name} became {value} in stage {stage!r} before step {step}; {last}. Look at the losses in "
                    "TensorBoard, and try a smaller learning rate"
                )
        row = {"stage": stage, "step": step, **scalars}
        self.rows.append(row)
        self._show(len(self.rows) - 1, row)

    def _show(self, place: int, row: dict) -> None:
        """Hand a row on to TensorBoard and to Weights & Biases."""
        scalars = {tag(self.args, row["stage"], k): v for k, v in row.items() if k not in ("stage", "step")}
        with writing(f"to {self.dir}"):
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, row["step"])
        if self.send:
            self.send(place, {**scalars, "stage": row["stage"], "global_step": row["step"]})

    def cut(self, stage: str, length: int = 0) -> None:
        """Leave the first `length` rows of a stage and no more."""
        own = [row for row in self.rows if row["stage"] == stage]
        dropped = {id(row) for row in own[length:]}
        self.rows = [row for row in self.rows if id(row) not in dropped]

    def save(self) -> None:
        """Write progress.csv, in the order of the stages, one of which may have been made again, and TensorBoard's."""
        self.rows.sort(key=lambda row: stage_number(self.args, row["stage"]))
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomic(self.dir / "progress.csv", text.getvalue().encode())
        with writing(f"to {self.dir}"):
            self.writer.flush()

    def evaluations(self, stage: str) -> list[tuple[int, float]]:
        """Step and score of every evaluation of a stage, in order."""
        name = score_of(stage)
        return [(row["step"], row[name]) for row in self.rows if row["stage"] == stage and name in row]


def score_of(stage: str) -> str:
    """What the score of a stage's evaluations is called."""
    return "charts/score" if stage == "finetune" else f"{stage}/score"


def number(name: str, value) -> float | int:
    """The number that is logged, of a tensor or an array its one element. Raises UserError for what is none."""
    try:
        value = value.item() if hasattr(value, "item") else value
        return value if type(value) in (int, float) else float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} has to be one number to be logged ({str(error).splitlines()[0]})") from error


REMAKE = "delete the folder, and the command that made the run makes it again"  # of what is damaged in a run's folder


def read_rows(path: Path) -> list[dict]:
    """The rows of a progress.csv, each with what was logged in it, numbers as numbers; none where there is no file.

    Raises UserError where it is damaged.
    """
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            return [{k: v if k == "stage" else _number(v) for k, v in row.items() if v != ""} for row in rows]
    except (TypeError, ValueError, csv.Error) as error:  # the first: of a row that is shorter or longer than the header
        raise UserError(f"{path} is damaged; {REMAKE}") from error


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() and "." not in text and "e" not in text else value
