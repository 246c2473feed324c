"""From finished runs to numbers with intervals, tables and figures."""

import csv
import io
import itertools
import math
import shlex
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from common.checkpoint import write_atomic
from common.errors import UserError
from common.log import REMAKE, read_rows
from common.run import dataset_label, read_json
from experiments import harness

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rliable import library as rly
from scipy.integrate import trapezoid

warnings.filterwarnings("ignore", category=FutureWarning, module="arch")  # of how rliable calls it


def scores(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Environment steps and scores of a run's evaluations while it was fine-tuned. Raises UserError where none are."""
    steps, values = series(path, "finetune", "charts/score")
    if not len(values):
        raise UserError(f"{path} is finished, but its progress.csv holds no score; {REMAKE}")
    return steps, values


def series(path: Path, stage: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a logged scalar in one stage."""
    rows = read_rows(path / "progress.csv")
    points = [(row["step"], row[name]) for row in rows if row.get("stage") == stage and {"step", name} <= row.keys()]
    return tuple(np.array(points, float).reshape(-1, 2).T)


def measurements(path: Path, stage: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The same of a scalar that has to be there. Raises UserError where it is not, as in runs kept by publish.py."""
    steps, values = series(path, stage, name)
    if not len(values):
        raise UserError(
            f"{path} holds no {name} of {stage}, for scores alone were kept of it; choose another --run-dir"
        )
    return steps, values


def curve(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same, with the offline policy's score at step 0 before them."""
    steps, values = scores(path)
    return np.concatenate([[0.0], steps]), np.concatenate([[result(path)["offline"]], values])


def results(paths: Iterable[Path]) -> list[dict]:
    return [result(path) for path in paths]


def result(path: Path) -> dict:
    return read_json(path / "result.json", "delete it, and the command that made the run makes it again")


def simulator(result: dict) -> str:
    """What a run was played in, with MuJoCo's version where its results say it."""
    mujoco = result.get("made_with", {}).get("versions", {}).get("MuJoCo")
    return result["simulator"] + (f", MuJoCo {mujoco}" if mujoco else "")


def arguments(path: Path) -> dict:
    """What a run was started with; nothing where only its results were kept."""
    found = path / "args.json"
    return read_json(found, REMAKE) if found.exists() else {}


def measure(paths: list[Path]) -> str:
    """What the evaluations of these runs give: a score or, where the task has no reference returns, a return."""
    return result(paths[0]).get("measure", "score") if paths else "score"


def summary(path: Path) -> dict[str, float]:
    """One run in a few numbers, all but the last on the scale of its evaluations.

    start: the score that fine-tuning begins with; final: mean of the last three evaluations; gain: final minus offline;
    area: mean score over the environment steps (speed); drop: the most that an evaluation fell below the offline
    policy, 0 if none did (instability); smooth_drop: the same of the means of three in a row, for the least of many
    evaluations is partly bad luck; regret: mean of 1 - score / 100, clipped to 0…1, over all evaluations and the
    offline policy's, NaN of returns. The offline policy counts as the evaluation at step 0, before re-evaluation and
    alignment.
    """
    steps, points = curve(path)
    offline, values = points[0], points[1:]
    threes = np.convolve(values, np.full(3, 1 / 3), "valid") if len(values) >= 3 else values
    return {
        "start": float(result(path).get("start", offline)),
        "final": float(values[-3:].mean()),
        "gain": float(values[-3:].mean() - offline),
        "area": float(trapezoid(points, steps) / steps[-1]),
        "drop": float(max(0.0, offline - values.min())),
        "smooth_drop": float(max(0.0, offline - threes.min())),
        "regret": float(1 - np.clip(points / 100, 0, 1).mean()) if measure([path]) == "score" else math.nan,
    }


def bootstrap(values: dict, statistic: Callable, reps: int) -> tuple[dict, dict]:
    """rliable's estimates of a statistic and their 95% intervals, by name: the same for the same values.

    Values are a matrix with a row for each run, or a tuple of two to be compared; one run has no interval, here NaN.
    """
    np.random.seed(0)  # it draws from NumPy's own generator, whatever random_state it is given
    points, bounds = rly.get_interval_estimates(values, statistic, reps=reps)
    for name, found in values.items():
        if max(map(len, found if isinstance(found, tuple) else (found,))) == 1:
            bounds[name] = np.full_like(bounds[name], np.nan)
    return points, bounds


def interval(values: dict[str, np.ndarray], reps: int = 5_000) -> dict[str, tuple[float, float, float]]:
    """Interquartile mean of each setting's runs with a 95% stratified bootstrap interval: name -> (iqm, low, high).

    Values are (runs,) of one task or (runs, tasks). One run has no interval, here NaN; with two or three it is from the
    lowest to the highest, and with five it holds the mean of normal values nine times in ten.
    """
    matrices = {name: np.asarray(v, float).reshape(len(v), -1) for name, v in values.items()}
    points, bounds = bootstrap(matrices, lambda x: np.array([middle(x)]), reps)
    return {name: (float(points[name][0]), *map(float, bounds[name][:, 0])) for name in values}


def intervals(values: dict[str, np.ndarray], reps: int = 5_000) -> dict[str, np.ndarray]:
    """The same of several numbers of a run at once: arrays (runs, tasks, columns) become (3, columns)."""
    points, bounds = bootstrap(values, lambda x: middle(x.reshape(-1, x.shape[-1]), 0), reps)
    return {name: np.stack([points[name], *bounds[name]]) for name in values}


def matrices(values: dict[str, dict[str, list]]) -> dict[str, np.ndarray]:
    """values[name][task] lists runs: arrays (runs, tasks, …) of those names that have runs of every task that any has.

    Where a task has more runs than another, its first ones are taken.
    """
    tasks = {task for of_name in values.values() for task, runs in of_name.items() if runs}
    if not tasks:
        return {}
    whole = {name: [of_name[task] for task in sorted(tasks)] for name, of_name in values.items()
             if all(of_name.get(task) for task in tasks)}  # fmt: skip
    n = {name: min(map(len, lists)) for name, lists in whole.items()}
    return {name: np.stack([np.array(runs[: n[name]], float) for runs in lists], 1) for name, lists in whole.items()}


def middle(values, axis: int | None = None) -> np.ndarray:
    """The interquartile mean of all values or, with axis 0, of each column.

    It and `improvement` are rliable's, without SciPy's checks: milliseconds, in each of a bootstrap's thousands.
    """
    values = np.sort(values, axis)
    quarter = len(values) // 4
    return values[quarter : len(values) - quarter].mean(0)


def improvement(x: np.ndarray, y: np.ndarray) -> float:
    """Probability that a run of `x` ends higher than one of `y` on the same task, ties counting half, mean over tasks.

    (runs,) of one task or (runs, tasks), where runs may be more of one than of the other.
    """
    x, y = (np.asarray(v, float).reshape(len(v), -1) for v in (x, y))
    return float(np.mean((x[:, None] > y) + 0.5 * (x[:, None] == y)))


class Report:
    """Tables and figures of one experiment, written to `<out>/<name>.md` and `<out>/<name>*.png`.

    Of other data than the experiment's usual ones the name is `<name>_<data>`.
    """

    def __init__(self, args: harness.Args, name: str, question: str):
        data = dataset_label(args)
        self.args, self.script = args, name
        self.name = name if data == type(args).env_id else f"{name}_{data}"
        self.folder = harness.ROOT / args.out
        self.folder.mkdir(parents=True, exist_ok=True)
        self.text = [f"# {question}\n"]

    def table(self, title: str, columns: list[str], lines: list[list[str]]) -> None:
        """Show a table on the screen and keep it for the page."""
        shown = Table(title=title, title_justify="left")
        for column in columns:
            shown.add_column(column, overflow="fold")
        for line in lines:
            shown.add_row(*line)
        Console(width=160, markup=False).print(shown)
        self.text += [f"\n**{title}**\n", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        self.text += ["| " + " | ".join(line) + " |" for line in lines]

    def figure(self, figure, suffix: str = "", task: str | None = None) -> None:
        """Keep a figure for the page, under a title that says what runs it shows. `task`: the data, None: --env-id."""
        args = self.args
        parts = [dataset_label(args) if task is None else task, f"{args.seeds} seed{'s' * (args.seeds > 1)}",
                 f"budgets: {' '.join([args.scale, args.run_flags]).strip()}"]  # fmt: skip
        write_title(figure, ", ".join(filter(None, parts)))
        path = self.folder / f"{self.name}{suffix}.png"
        save(figure, path)
        self.text.append(f"\n![{self.name}]({path.name})")

    def finish(self, made: list[dict], failures: list[str], older: int = 0, folder: str = "") -> None:
        """Write the page, with what every number depends on beneath it; leave with exit code 2 if runs failed.

        `made` are the runs' results, of which "source", "simulator", "hardware" and "eval_episodes" are read; as many
        as `older` of them stood in a `folder` already.
        """
        for failure in failures:
            print(f"failed: {failure}", file=sys.stderr)
            self.text.append(f"\n**Failed, and not in any number here**: {failure}")
        sources, machines, episodes = (
            sorted({f"{r[key]}" for r in made}) for key in ("source", "hardware", "eval_episodes")
        )
        command = shlex.join([f"experiments/{self.script}.py", *sys.argv[1:]])
        others = f" ({older} of them stood in {folder} before)" if older else ""
        self.text += [
            f"\nMade by `python {command}`: {len(made)} runs{others} at the scale `{self.args.scale}`, data: "
            f"{'; '.join(sources)}. Simulator: {'; '.join(sorted(set(map(simulator, made))))}. "
            f"{' or '.join(episodes)} episodes an "
            f"evaluation. Machine: {'; '.join(machines)}, PyTorch {torch.__version__}. Intervals: 95%, stratified "
            "bootstrap; with two or three runs of one task that is from the lowest to the highest."
        ]
        write_atomic(self.folder / f"{self.name}.md", ("\n".join(self.text) + "\n").encode(), "choose another --out")
        print(f"{self.folder / self.name}.md holds the page")
        sys.exit(2 if failures else 0)


def plt():
    """Matplotlib's pyplot, drawing to files alone."""
    import matplotlib.pyplot

    return matplotlib.pyplot


def write_title(figure, text: str) -> None:
    """A title over the whole figure, on as many lines as it takes."""
    figure.suptitle(textwrap.fill(text, int(13 * figure.get_figwidth())), fontsize=9, parse_math=False)


def save(figure, path: Path) -> None:
    """Write a picture, whose file's ending says of what kind. Raises UserError where the disk does not take it."""
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110, format=path.suffix[1:])
    write_atomic(path, picture.getvalue(), "choose another --out")


def write_csv(path: Path, columns: Iterable[str], rows: list[dict]) -> None:
    """Write rows, of which fields may be missing. Raises UserError where the disk does not take them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode(), "choose another --out")


def panels(names, sharey: bool = True, across: int | None = None) -> tuple:
    """A figure with one panel for each name, side by side, or `across` of them in a row at most, rows alike."""
    rows = math.ceil(len(names) / (across or len(names)))
    across = math.ceil(len(names) / rows)
    figure, axes = plt().subplots(
        rows, across, figsize=(max(5.6, 4.2 * across), 3.6 * rows), sharey=sharey, squeeze=False, layout="constrained"
    )
    for panel, name in itertools.zip_longest(axes.flat, names):
        if name is None:
            panel.remove()
            continue
        panel.set_title(textwrap.fill(name, 44, break_on_hyphens=False), fontsize=10, parse_math=False)
        panel.grid(alpha=0.2)
    return figure, list(axes.flat[: len(names)])


def named(panels) -> dict[str, object]:
    """What the panels show, each name once."""
    shown = [zip(*panel.get_legend_handles_labels(), strict=True) for panel in panels]
    return {label: handle for pairs in shown for handle, label in pairs}


def legend(panel, below: float = 34, panels=()) -> None:
    """The names of a panel's lines, or of several `panels`', off the data: so many points below it, however high the
    names leave it."""
    from matplotlib.transforms import ScaledTranslation

    found, shift = named(panels or [panel]), ScaledTranslation(0, -below / 72, panel.figure.dpi_scale_trans)
    panel.legend(found.values(), found.keys(), fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 0),
                 bbox_transform=panel.transAxes + shift)  # fmt: skip


def style(i: int) -> dict:
    """The colour and line of setting i, no two alike among the first 30."""
    return {"color": f"C{i % 10}", "linestyle": ("-", "--", "-.")[i // 10 % 3]}


def draw_curves(panel, groups: dict[str, list[Path]], names: Iterable[str] = ()) -> None:
    """Score over environment steps of a setting's runs; see `draw_points`."""
    paths = [path for found in groups.values() for path in found]
    points = {name: [curve(path) for path in found] for name, found in groups.items()}
    draw_points(panel, points, measure(paths), names)
    waiting = min((arguments(path).get("learning_starts", 0) for path in paths), default=0)
    last = max((steps[-1] for curves in points.values() for steps, _ in curves), default=0)
    if waiting > last / 100:  # else nobody would see it
        panel.axvspan(0, min(waiting, last), color="0.93", zorder=0, label="no update yet")


def draw_points(panel, groups: dict[str, list], what: str, names: Iterable[str] = ()) -> None:
    """Curves of a setting's runs: their interquartile mean, as in the tables, and their range as a band.

    A run is (steps, values), the offline policy's at step 0 first. `names` are the settings of all panels, so that a
    setting has the same colour in each.
    """
    index = {name: i for i, name in enumerate(dict.fromkeys([*names, *groups]))}
    for name, curves in groups.items():
        if not curves:
            continue
        length = min(len(values) for _, values in curves)
        steps, values = curves[0][0][1:length], np.stack([values[:length] for _, values in curves])
        look, low, high = style(index[name]), values[:, 1:].min(0), values[:, 1:].max(0)
        alone = len(steps) == 1  # a dot, and its range as a bar: a line and a band of one point show nothing
        dot = {"marker": "o", "markersize": 4} if alone else {}
        panel.plot(steps, list(map(middle, values[:, 1:].T)), label=name, linewidth=1.5, **dot | look)
        if alone:
            panel.vlines(steps, low, high, color=look["color"], alpha=0.3, linewidth=3)
        else:
            panel.fill_between(steps, low, high, color=look["color"], alpha=0.12, linewidth=0)
        panel.axhline(middle(values[:, 0]), color=look["color"], linestyle=":", linewidth=1)
    panel.locator_params(axis="x", nbins=5)
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.set_xlabel("environment steps")
    panel.set_ylabel(f"{what}\nhigher is better")


def number(point: tuple[float, float, float], digits: int = 1) -> str:
    """An interquartile mean with its interval, if it has one; – if it is none."""
    if math.isnan(point[0]):
        return "–"
    iqm, low, high = (f"{x:.{digits}f}" for x in point)
    return iqm if math.isnan(point[1]) else f"{iqm} [{low}, {high}]"


CURVES = "Lines: interquartile means over seeds, as in the table; bands: their range; dotted: the offline policies."


def title_of(args: harness.Args, spec: harness.Spec) -> str:
    """A run's script, and what it starts from: an algorithm, or a policy's file, known by its folder where its own name
    is the one that every run gives it."""
    start = Path(harness.parsed(args, spec).offline).absolute()
    name = start.parent.name if start.name in ("policy.pt", "best.pt") else start.stem
    return f"{Path(spec.script).stem} from {name}"
