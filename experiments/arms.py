"""An experiment that compares settings of a script, on one task or on several: its runs, and the page about them."""

import dataclasses
import hashlib
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from common import cli
from experiments import analysis, harness
from experiments.analysis import Report
from experiments.harness import Spec

KEYS = ("start", "final", "gain", "area", "drop")  # of a run's summary


@dataclass
class Args(harness.Args):
    env_ids: tuple[str, ...] = ()
    """several datasets in place of --env-id: tables for each, and one over all of them"""
    policies: tuple[str, ...] = ()
    """what the runs start from, one for each dataset: policy files or offline algorithms; none: the script's own"""
    settings: tuple[str, ...] = ()
    """which settings to run, by their names in the tables; none: all"""


def on_tasks(args: Args) -> dict[str, Args]:
    """The arguments on each task, as they would be typed for it alone. Raises UserError where they fit no task."""
    tasks = args.env_ids or (args.env_id,)
    if len(set(tasks)) < len(tasks):
        raise cli.UserError(f"--env-ids names a dataset twice: {' '.join(tasks)}")
    if args.env_ids and args.dataset_path:
        raise cli.UserError("--dataset-path is the file of one dataset; give it with --env-id in place of --env-ids")
    if not args.policies:
        return {task: dataclasses.replace(args, env_id=task) for task in tasks}
    if len(args.policies) != len(tasks):
        raise cli.UserError(f"--policies has {len(args.policies)} for {len(tasks)} datasets; give one for each")
    harness.check_own(args, "--offline")
    found = {}
    for task, policy in zip(tasks, args.policies, strict=True):
        start = shlex.quote(str(Path(policy).absolute() if Path(policy).is_file() else policy))
        found[task] = dataclasses.replace(args, env_id=task, run_flags=f"{args.run_flags} --offline {start}".strip())
    return found


def together(tasks: list[str]) -> str:
    """What several tasks are called in the names of files, which may not be longer than 255."""
    name = "+".join(tasks)
    return name if len(name) <= 120 else f"{len(tasks)}-tasks-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def chosen(args: Args, settings: Callable, script: str, seed: int) -> dict[str, Spec]:
    """Those of a script's settings that --settings names, in their own order. Raises UserError where it has none."""
    runs = settings(args, script, seed)
    found = {name: spec for name, spec in runs.items() if name in (args.settings or runs)}
    if not found:
        raise cli.UserError(f"{script} has none of --settings {shlex.join(args.settings)}, but {quoted(runs)}; "
                            "leave it out of --algorithms, or choose one of those")  # fmt: skip
    return found


def quoted(names: Iterable[str]) -> str:
    """Names in a sentence; some have commas."""
    return ", ".join(map(repr, names))


def compare(report: Report, title: str, groups: dict[str, dict[str, list[Path]]], baseline: str = "") -> None:
    """A table of settings: where they begin and end, how fast they learn, how far they fall, and against a baseline.

    groups[setting][task] lists folders of runs; a setting without runs of each task has no line.
    """
    runs = {name: {task: [[analysis.summary(path)[key] for key in KEYS] for path in paths]
                   for task, paths in of_name.items()} for name, of_name in groups.items()}  # fmt: skip
    if not (values := analysis.matrices(runs)):
        return  # all of them failed, which the page says beneath
    intervals = analysis.intervals(values)
    against = [baseline] * (baseline in values and any(len(found) > 1 for found in values.values()))  # not one run each
    lines = []
    for name, found in values.items():
        line = [name, str(len(found)), *map(analysis.number, intervals[name].T)]
        if against:
            gains = (values[x][..., KEYS.index("gain")] for x in (name, baseline))
            line.append(f"{analysis.improvement(*gains):.2f}" if name != baseline else "")
        lines.append(line)
    what = analysis.measure([path for of_name in groups.values() for paths in of_name.values() for path in paths])
    several = any(len(of_name) > 1 for of_name in groups.values())
    columns = ["", "runs of each" if several else "runs", f"{what} at the start", "final", "gain over offline",
               "area (speed)", "largest drop"]  # fmt: skip
    report.table(title, columns + [f"P(better than {x})" for x in against], lines)


def comparison(
    args: Args, name: str, question: str, settings: Callable, baseline="", draw=None, caption: str = analysis.CURVES
) -> None:
    """A whole experiment: `settings(args, script, seed)` names its runs, to be compared with the `baseline` among them.

    `draw(panel, groups)` draws an algorithm's panel from a dictionary of setting -> run folders; None: learning curves.
    """
    tasks = on_tasks(args)
    cells = {(task, y): [chosen(here, settings, y, seed) for seed in range(args.seeds)]
             for task, here in tasks.items() for y in args.algorithms}  # fmt: skip
    if unknown := set(args.settings).difference(*(seeds[0] for seeds in cells.values())):
        names = quoted(dict.fromkeys(name for y in args.algorithms for name in settings(args, y, 0)))
        raise cli.UserError(f"there is no setting {quoted(sorted(unknown))} here; choose among {names}")
    asked = {task: [spec for y in args.algorithms for runs in cells[task, y] for spec in runs.values()]
             for task in tasks}  # fmt: skip
    done, failures = harness.run_tasks({task: (here, asked[task]) for task, here in tasks.items()})
    report = Report(dataclasses.replace(args, env_id=together(list(tasks))), name, question)
    found = {(task, y): {setting: harness.finished(tasks[task], [runs[setting] for runs in seeds])
                         for setting in seeds[0]} for (task, y), seeds in cells.items() if task in done}  # fmt: skip
    titles = []
    for task, y in found:
        title = analysis.title_of(tasks[task], next(iter(cells[task, y][0].values())))
        titles.append(f"{task}: {title}" if len(tasks) > 1 else title)
    across = len(args.algorithms) if len(args.algorithms) > 1 else None  # a row for each task, or one of all tasks
    figure, panels = analysis.panels(titles, sharey=len(tasks) == 1, across=across)
    names = dict.fromkeys(setting for groups in found.values() for setting in groups)
    for panel, title, ((task, _), groups) in zip(panels, titles, found.items(), strict=True):
        compare(report, title, {setting: {task: paths} for setting, paths in groups.items()}, baseline)
        if draw is None:
            analysis.draw_curves(panel, groups, names)
        else:
            draw(panel, groups)
        analysis.legend(panel)
    if len(done) > 1:
        over_all(report, args, found, baseline)
    report.figure(figure, task="" if len(tasks) > 1 else None)  # each panel names its own
    report.text.append(f"\n{caption}")
    everything = [path for groups in found.values() for paths in groups.values() for path in paths]
    report.finish(analysis.results(everything), failures)


def over_all(report: Report, args: Args, found: dict[tuple[str, str], dict[str, list[Path]]], baseline: str) -> None:
    """A table of each algorithm over all tasks. found[task, algorithm][setting] lists folders of runs."""
    for y in args.algorithms:
        of_task = {
            task: groups for (task, algorithm), groups in found.items() if algorithm == y and any(groups.values())
        }
        if len(of_task) < 2:
            continue  # it has runs of one task, whose table stands above, or of none
        paths = [path for groups in of_task.values() for paths in groups.values() for path in paths]
        if any(analysis.measure([path]) != "score" for path in paths):
            report.text.append("\nReturns of different tasks have no common scale, so there is no table over all.")
            return
        settings = dict.fromkeys(setting for groups in of_task.values() for setting in groups)
        groups = {setting: {task: of.get(setting, []) for task, of in of_task.items()} for setting in settings}
        compare(report, f"{Path(y).stem}: interquartile means over {len(of_task)} tasks", groups, baseline)
