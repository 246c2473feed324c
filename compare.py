"""Compare finished runs with others: a table, and one picture with the curves of both.

    python compare.py runs/*__mymethod__* --against runs/*__o2sac__*

For each dataset that both have runs of: interquartile means with 95% stratified bootstrap intervals (rliable), and the
probability that a run of the first ends higher than one of the second. Runs of one method are its seeds: with two or
three of them an interval is from the lowest to the highest, with five it is a little too narrow.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common import cli
from common.run import read_json
from experiments import analysis

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

COLUMNS = {
    "final": "mean of the last 3",
    "gain": "gain over offline",
    "area": "area (speed)",
    "drop": "largest drop (less is better)",
}


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """run folders"""
    against: tuple[str, ...]
    """run folders to compare them with"""
    out: str = "compare.png"
    """the picture"""


def finished(folders: tuple[str, ...]) -> list[Path]:
    """Those folders that hold a finished run; what is no run, as an offline policy, is named. Raises UserError."""
    paths = [Path(folder) for folder in folders]
    lacking = [path for path in paths if not (path / "result.json").is_file()]
    words = f"{', '.join(map(str, lacking))}: no finished run (there is no result.json)"
    args = [path / "args.json" for path in lacking if (path / "args.json").is_file()]
    unfinished = any("offline" in read_json(path, "delete that folder") for path in args)
    if len(lacking) == len(paths) or unfinished:
        if absent := [str(path) for path in lacking if not path.exists()]:
            raise cli.UserError(f"there is no folder {', '.join(absent)}; see to its name")
        raise cli.UserError(f"{words}; finish it with the command that began it, or leave it out")
    if lacking:
        print(f"left out: {words}")
    return [path for path in paths if path not in lacking]


def check_alike(paths: list[Path], side: str) -> None:
    """Refuse runs on a dataset that are no seeds of one another. Raises UserError."""
    results = [analysis.result(path) for path in paths]
    for name in ("preset", "simulator", "measure", "source"):
        if len(found := sorted({str(result.get(name)) for result in results})) > 1:
            raise cli.UserError(f"{side}: runs of the {name} {' and '.join(found)} are mixed; choose those of one")
    if len(steps := {tuple(analysis.scores(path)[0].astype(int)) for path in paths}) > 1:
        words = " and ".join(f"{len(found)} times up to {max(found, default=0)}" for found in sorted(steps))
        raise cli.UserError(f"{side}: runs evaluated at different steps ({words}) are mixed; choose alike ones")
    seed, times = Counter(result.get("seed") for result in results).most_common(1)[0]
    if times > 1:
        raise cli.UserError(f"{side}: seed {seed} is there {times} times; choose the runs of one setting")


def check_comparable(mine: list[Path], theirs: list[Path], dataset: str) -> None:
    """Refuse sides that were measured otherwise, and say where they had other budgets. Raises UserError."""
    first, second = (analysis.result(paths[0]) for paths in (mine, theirs))
    for name in ("simulator", "measure"):
        if first.get(name) != second.get(name):
            words = f"the {name} is {first.get(name)} of the first, {second.get(name)} of the others"
            raise cli.UserError(f"runs on {dataset} cannot be compared: {words}; choose runs in which it is the same")
    steps = [int(analysis.scores(paths[0])[0][-1]) for paths in (mine, theirs)]
    told = [(name, first.get(name), second.get(name)) for name in ("preset", "source")]
    for name, x, y in (*told, ("environment steps", *steps)):
        if x != y:
            print(f"note: {dataset}: {name} {x} of the first, {y} of the others")


def label(paths: list[Path], otherwise: str) -> str:
    """What these runs are called: their experiment, and where it is the same what they started from."""
    parts = {tuple(path.resolve().name.split("__")[1:3]) for path in paths}
    experiments = {part[:1] for part in parts}
    found = next((found.pop() for found in (parts, experiments) if len(found) == 1), ())  # () of a renamed folder, too
    return " from ".join(found) or otherwise


def by_dataset(paths: list[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in paths:
        found.setdefault(analysis.result(path)["dataset"], []).append(path)
    return found


def main() -> None:
    args = cli.read(Args, __doc__)
    out, kinds = Path(args.out), ("png", "pdf", "svg", "jpg", "jpeg")
    if not out.resolve().parent.is_dir():
        raise cli.UserError(f"there is no folder for {out}; make it, or choose another --out")
    if out.is_dir() or out.suffix[1:].lower() not in kinds:
        raise cli.UserError(f"{out} names no picture; give --out an ending such as .png, .pdf or .svg")
    sides = [finished(args.runs), finished(args.against)]
    names = [label(sides[0], "runs"), label(sides[1], "others")]
    if names[0] == names[1]:
        names = [f"{names[0]} ({side})" for side in ("first", "second")]
    mine, theirs = map(by_dataset, sides)
    shared = [dataset for dataset in mine if dataset in theirs]
    if not shared:
        raise cli.UserError(f"no dataset has runs of both: {', '.join(mine)} here, {', '.join(theirs)} there")
    for dataset in shared:
        for name, side in zip(names, (mine, theirs), strict=True):
            check_alike(side[dataset], f"{name} on {dataset}")
        check_comparable(mine[dataset], theirs[dataset], dataset)
    figure, panels = analysis.panels(shared, sharey=False)
    for panel, dataset in zip(panels, shared, strict=True):
        groups = {names[0]: mine[dataset], names[1]: theirs[dataset]}
        runs = {name: [analysis.summary(path) for path in paths] for name, paths in groups.items()}
        measure = analysis.measure(mine[dataset])
        table = Table(title=f"{dataset}, {measure}s: IQM [95% interval]", title_justify="left")
        for column in ("", "runs", *COLUMNS.values()):
            table.add_column(column)
        values = {key: analysis.interval({n: np.array([r[key] for r in rs]) for n, rs in runs.items()})
                  for key in COLUMNS}  # fmt: skip
        for name, found in runs.items():
            table.add_row(name, str(len(found)), *(analysis.number(values[key][name]) for key in COLUMNS))
        Console(markup=False, width=140).print(table)
        ends = [np.array([run["final"] for run in found]) for found in runs.values()]
        print(f"probability that a run of {names[0]} ends higher: {analysis.improvement(*ends):.2f}")
        analysis.draw_curves(panel, groups)
    shown = analysis.named(panels)
    counts = " and ".join(f"{len(side)} of {name}" for name, side in zip(names, sides, strict=True))
    analysis.write_title(figure, f"Runs: {counts}. {analysis.CURVES}")
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=len(shared), fontsize=8, frameon=False
    )
    analysis.save(figure, out)
    print(f"{out} shows the curves")


if __name__ == "__main__":
    cli.run(main)
