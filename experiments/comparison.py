"""The method against those that it is compared with, and two more: scores, speed, falls, regret, time.

    python experiments/comparison.py                                        # hopper-medium-demo, minutes a run
    python experiments/comparison.py --env-ids hopper-medium-v2 walker2d-medium-v2 --scale quick --online-steps 51200

Every method has the same environment steps, warm-up and random steps included, is evaluated as often, and starts from
the policy that its own offline algorithm learned with the same seed; O2TD3 from IQL's, too, and O2SAC from CQL's, of
three layers where Off2On's have two. Constants, rewards, states and updates a step are each method's own, but for what
its preset changes (see PRESETS): at the scale quick, beside steps of training, O2SAC's updates a step (4 for 10), the
warm-up of O2SAC and O2TD3 (2,000 steps for 1,000, O2SAC's 5,000 on AntMaze), O2PPO's --value-lr (3e-4 for 1e-4) and
--beta-steps, and the actor's rate of CQL and Cal-QL (3e-4 for 3e-5 and 1e-4); at the demo's much more. Curves
and numbers of every run are written beside the page as CSV. Those that docs/comparison/ has of other methods and tasks
at the same budget are shown with them, so that on the same data your own method alone has to be run:

    python experiments/comparison.py --env-ids hopper-medium-v2 --scale quick --algorithms mine.py
"""

import collections
import csv
import dataclasses
import io
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

import offline
from common import cli
from common.bounds import at_least
from common.usage import flag_of
from experiments import analysis, harness
from experiments.harness import Spec

import numpy as np
import torch
from matplotlib.lines import Line2D

OURS = {
    "o2sac": ("td3_bc", "cql"),
    "o2td3": ("td3_bc", "iql"),
    "o2ppo": ("iql",),
}  # the second: one of theirs
TASKS = (
    *(f"{robot}-{data}-v2" for robot in ("hopper", "halfcheetah", "walker2d") for data in ("medium", "medium-replay")),
    "antmaze-umaze-v2", "antmaze-umaze-diverse-v2", "pen-cloned-v1",
)  # fmt: skip
ROLLOUT = 2_048  # O2PPO learns and is evaluated after as many steps, so all are
BUDGETS = {"demo": 5 * ROLLOUT, "quick": 10 * ROLLOUT, "paper": 49 * ROLLOUT}
RUN = ("dataset", "method", "seed")  # what a run is known by
CURVE_COLUMNS = (*RUN, "step", "score")
RUN_COLUMNS = (
    *RUN, "offline_algorithm", "start", "final", "gain", "area", "drop", "smooth_drop", "regret", "offline",
    "training_regret", "regime", "policy_mean", "data_mean", "seconds", "offline_seconds", "offline_steps", "utd",
    "measure", "eval_episodes", "source", "simulator", "hardware", "matmul",
)  # fmt: skip
TEXT = {"dataset", "method", "offline_algorithm", "regime", "measure", "source", "simulator", "hardware", "matmul"}
MAY_BE_EMPTY = {"start", "training_regret", "regime", "policy_mean", "data_mean", "offline_seconds", "offline_steps",
                "utd"}  # fmt: skip
GRID = 20  # points of a sample-efficiency curve after the first
REPS = 2_000  # of the bootstrap
KEYS = {"final": "final", "area": "area (speed)", "drop": "deepest fall", "smooth_drop": "… of means of 3",
        "regret": "evaluation regret"}  # fmt: skip

EXPLAINED = """
Final: mean of the last three evaluations. Area: mean score over the environment steps, from the offline policy's on,
with which every curve begins (what alignment leaves, and PEX's composition with a new policy, stand in the CSV as
`start`, which older runs of PEX lack); RLPD's "offline" is the score of networks that nothing has trained. Deepest
fall: below the offline score; the least of many evaluations of few episodes is biased downwards, which the means of
three are less. Evaluation regret: mean of 1 - score / 100, clipped to 0…1, over all evaluations and the offline
policy's. Training regret: share of training episodes without a success (CORL's). Policy to data: see common/regime.py,
with the number of seeds. Offline steps and minutes: Off2On's of all its members. Updates: of the critics, after an
environment step (Off2On: ten in the first 1,000 that have any). Minutes: as they were on that machine, with all that
ran beside; online those of re-evaluation and alignment are included."""


@dataclass
class Args(harness.Args):
    algorithms: tuple[str, ...] = (*OURS, "awac", "iql", "pex", "off2on", "cal_ql", "aca", "rlpd", "wsrl")
    """the methods: names of scripts here or in baselines/, or paths of your own; o2td3@iql: from that offline algorithm
    alone"""
    run_dir: str = "runs/comparison"
    """where run folders are made"""
    out: str = "runs/comparison"
    """where figures and tables are written"""
    env_ids: tuple[str, ...] = ()
    """the datasets; none: --env-id at the scale demo or if it is another one, else medium and medium-replay of three
    robots, AntMaze umaze and umaze-diverse, and pen-cloned"""
    online_steps: Annotated[int | None, at_least(1)] = None
    """environment steps of every run, a multiple of 2,048; None: 10,240, at the scale quick 20,480, paper 100,352"""
    offline_steps: Annotated[int | None, at_least(1)] = None
    """gradient steps of every offline algorithm; None: its own at that scale"""
    published: str = "docs/comparison"
    """a folder with CSV files of this experiment, from which runs of other methods and tasks are taken; "": none"""


def env_ids(args: Args) -> tuple[str, ...]:
    usual = args.env_id == harness.Args.env_id and not args.dataset_path
    found = args.env_ids or (TASKS if args.scale != "demo" and usual else (args.env_id,))
    if args.dataset_path and len(found) > 1:
        raise cli.UserError("--dataset-path is the file of one dataset; give it with --env-id in place of --env-ids")
    return found


def pairs(args: Args) -> dict[str, tuple[str, str]]:
    """What is compared, by its name: a script, and the offline algorithm that it starts from."""
    found = {}
    for algorithm in args.algorithms:
        script, chosen = algorithm, ""
        if "@" in algorithm and not Path(algorithm).is_file():
            script, _, chosen = algorithm.rpartition("@")
        usual = OURS.get(Path(script).stem, (harness.offline_of(args, script),))
        for start in (chosen,) if chosen else usual:
            alone = len(usual) == 1 and start == usual[0]
            name = Path(script).stem if alone else f"{Path(script).stem} from {Path(start).stem}"
            if name in found:
                words = "leave one out, or give one of the files another name"
                raise cli.UserError(f"two of --algorithms are called {name}; {words}")
            found[name] = (script, start)
    return found


def spec(args: Args, pair: tuple[str, str], seed: int) -> Spec:
    harness.check_own(args, "--online-steps", "--offline-steps", "--offline", "--eval-every")  # set here, run by run
    run = Spec(*pair, seed, ("--online-steps", str(budget(args)), "--eval-every", str(ROLLOUT)))
    chosen = harness.parsed(args, run)
    if offline.from_scratch(chosen):
        return run
    own = offline.is_algorithm(chosen.offline) and offline.algorithm_args(chosen)[1].steps
    steps = args.offline_steps or (own if offline.shipped(chosen) else None)  # what ships is one seed's, and longer
    return dataclasses.replace(run, flags=(*run.flags, "--offline-steps", str(steps))) if steps else run


def budget(args: Args) -> int:
    """Environment steps of every run. Raises UserError where O2PPO would have fewer than the others."""
    steps = args.online_steps or BUDGETS[args.scale]
    if steps % ROLLOUT:
        nearest = max(1, round(steps / ROLLOUT)) * ROLLOUT
        raise cli.UserError(f"--online-steps has to be a multiple of {ROLLOUT:,}, O2PPO's rollout; try {nearest}")
    return steps


# ---------------------------------------------------------------------------------------------- numbers


def training_regret(path: Path) -> float | None:
    """The share of the training episodes without a success, as CORL has it; None where nothing says what one is."""
    _, successes = analysis.series(path, "finetune", "charts/episodic_success")
    _, episodes = analysis.series(path, "finetune", "charts/episodes")  # of O2PPO's rollouts, in the same rows
    weights = episodes if len(episodes) else None
    return 1 - float(np.average(successes, weights=weights)) if len(successes) else None


def members(args: Args, run: Spec) -> int:
    """How many offline runs of one algorithm, a seed each, a run starts from."""
    return getattr(harness.parsed(args, run), "members", 1)


def offline_seconds(args: Args, run: Spec) -> float | None:
    """What training the policies took that a run started from; None where there was nothing to train, or is no more."""
    trained = harness.trained_for(args, run)
    if trained is None:
        return None
    checkpoints = [path for path in trained[0].parent.glob("*.pt") if path != trained[0]]
    if not checkpoints:
        return None
    return members(args, run) * torch.load(checkpoints[0], "cpu", weights_only=True)["seconds"]


def measured(args: Args, run: Spec, path: Path) -> dict:
    """All that the tables and the CSV hold of a run, beside what it is a run of."""
    result, args_of_run = analysis.result(path), harness.parsed(args, run)
    steps = result["offline_steps"]
    regime = result["regime"] or dict.fromkeys(("regime", "policy", "data"))
    return analysis.summary(path) | {
        "offline": result["offline"], "training_regret": training_regret(path), "regime": regime["regime"],
        "policy_mean": regime["policy"], "data_mean": regime["data"], "seconds": sum(result["seconds"].values()),
        "offline_seconds": offline_seconds(args, run), "offline_steps": steps and members(args, run) * steps,
        **{key: result[key] for key in ("measure", "eval_episodes", "source", "hardware")},
        "simulator": analysis.simulator(result),
        "utd": getattr(args_of_run, "utd", None), "matmul": args_of_run.matmul,
    }  # fmt: skip


def by_run(curves: list[dict]) -> dict[tuple, tuple[np.ndarray, np.ndarray]]:
    """Environment steps and scores of each run, the offline policy's first, out of all curves' rows."""
    points = collections.defaultdict(list)
    for row in curves:
        points[known_by(row)].append((row["step"], row["score"]))
    return {run: tuple(np.array(found, float).T) for run, found in points.items()}


def known_by(row: dict) -> tuple:
    return tuple(row[key] for key in RUN)


def on_grid(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A run's scores at 0, 1/20, … of its budget, (21,), between its evaluations by straight lines."""
    return np.interp(np.linspace(0, steps[-1], GRID + 1), steps, values)


def probabilities(
    finals: dict[str, dict[str, list]], names: list[str], others: list[str]
) -> dict[tuple[str, str], tuple[float, float, float]]:
    """That a run of one of `names` ends higher than one of each of `others` on the same task, ties counting half, with
    95% intervals: (probability, low, high) by both names. finals[name][task] lists runs; tasks that only one of two has
    do not count, and two that share none are left out."""
    both = {}
    for x, y in itertools.product(names, others):
        if shared := [task for task, runs in finals[x].items() if x != y and runs and finals[y].get(task)]:
            found = analysis.matrices({name: {task: finals[name][task] for task in shared} for name in (x, y)})
            both[x, y] = found[x], found[y]
    if not both:
        return {}
    points, bounds = analysis.bootstrap(both, lambda x, y: np.array([analysis.improvement(x, y)]), REPS)
    return {pair: (float(points[pair][0]), *map(float, bounds[pair][:, 0])) for pair in both}


# ---------------------------------------------------------------------------------------------- pages


def read_csv(path: Path, columns: tuple[str, ...]) -> list[dict]:
    """Its rows, numbers as numbers and empty fields as None; none where there is no such file.

    Raises UserError where it has other columns, or a line that nobody could have written here.
    """
    if not path.exists():
        return []

    def damaged(line: int, what: str) -> cli.UserError:
        return cli.UserError(f"{path}, line {line}: {what}; restore the file, or choose another --published")

    try:
        text = path.read_bytes().decode("utf-8-sig")  # spreadsheets put a mark before the first column
    except UnicodeDecodeError as error:
        raise damaged(error.object.count(b"\n", 0, error.start) + 1, "this is not UTF-8") from error
    reader, rows = csv.reader(io.StringIO(text, newline="")), {}
    try:
        if tuple(next(reader, ())) != columns:
            raise cli.UserError(f"{path} has other columns than this experiment's; choose another --published")
        for fields in filter(None, reader):
            if len(fields) != len(columns):
                raise damaged(reader.line_num, f"{len(fields)} fields where there are {len(columns)} columns")
            row = {name: field(name, value) for name, value in zip(columns, fields, strict=True)}
            known = (*known_by(row), row.get("step"))
            if known in rows:  # as where both sides of a merge were kept
                raise damaged(reader.line_num, "this stands there twice")
            rows[known] = row
    except (ValueError, csv.Error) as error:
        raise damaged(reader.line_num, str(error)) from error
    return list(rows.values())


def field(name: str, text: str) -> str | float | None:
    """What stands in a column. Raises ValueError where that cannot be."""
    if not text and name in MAY_BE_EMPTY:
        return None
    if text and name in TEXT:
        return text
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) or (name, text) == ("regret", "nan")):
        raise ValueError(f"{name} is {text!r}" + (", no number" if name not in TEXT else ""))
    return int(text) if text.lstrip("-").isdigit() else number


def published(args: Args, files: dict[str, tuple[str, ...]]) -> list[list[dict]]:
    """The rows of each of the published `files`, which are given with their columns; none where these runs differ from
    theirs in more than method, task and seeds.

    Raises UserError where there is no such folder, its files are damaged or not of the same runs, or would be written
    over without their rows.
    """
    nothing = [[] for _ in files]
    if not args.published:
        return nothing
    folder = harness.ROOT / args.published
    if not folder.is_dir():
        raise cli.UserError(f'there is no folder {args.published}; choose another --published, or none with ""')
    if own := [flag for flag in ("offline_steps", "run_flags", "dataset_path") if getattr(args, flag)]:
        words = f"{flag_of(own[0])} makes other runs than those in {args.published}"
        if folder.resolve() == (harness.ROOT / args.out).resolve():
            raise cli.UserError(f"{words}; choose another --out")
        print(f"note: {words}, which are left out")
        return nothing
    tables = [read_csv(folder / name, columns) for name, columns in files.items()]
    of_each = [set(map(known_by, table)) for table in tables]
    if lone := set.union(*of_each) - set.intersection(*of_each):
        run = " ".join(map(str, min(lone)))
        words = "restore both files, or choose another --published"
        raise cli.UserError(f"of {' and '.join(files)} in {args.published} one alone has {run}; {words}")
    return tables


def others(published: list[dict], new: list[dict], here: set[tuple[str, str]]) -> list[dict]:
    """The published runs of what was not asked for `here`, (dataset, method): other methods on the same data as the
    `new` runs are on, or other datasets."""
    sources = {(row["dataset"], row["source"]) for row in new}
    known = {row["dataset"] for row in new}
    return [row for row in published if (row["dataset"], row["method"]) not in here
            and (row["dataset"] not in known or (row["dataset"], row["source"]) in sources)]  # fmt: skip


def minutes(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known) / 60:.1f}" if known else "–"


def mean(values: list[float | None], digits: int = 1) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.{digits}f}" if known else "–"


def task_table(report: analysis.Report, task: str, runs: dict[str, list[dict]]) -> None:
    """A table of one task: offline score, where each method ends and how it gets there, its regime, its time."""
    of_runs = {name: np.array([[[run[key] for key in KEYS]] for run in found]) for name, found in runs.items()}
    values = analysis.intervals(of_runs, REPS)
    lines = []
    for name, found in runs.items():
        regimes = collections.Counter(run["regime"] for run in found if run["regime"])
        lines.append([
            name, str(len(found)), mean([run["offline"] for run in found]),
            *(analysis.number(x, 2 if key == "regret" else 1) for key, x in zip(KEYS, values[name].T, strict=True)),
            mean([run["training_regret"] for run in found], 2),
            ", ".join(f"{word} {n}" for word, n in regimes.most_common()) or "–",
            mean([run["offline_steps"] for run in found], 0), mean([run["utd"] for run in found], 0),
            minutes([run["offline_seconds"] for run in found]), minutes([run["seconds"] for run in found]),
        ])  # fmt: skip
    columns = ["", "runs", "offline", *KEYS.values(), "training regret", "policy to data", "offline steps", "updates",
               "offline min", "online min"]  # fmt: skip
    sources = sorted({run["source"] for of_name in runs.values() for run in of_name})
    report.table(f"{task} ({'; '.join(sources)})", columns, lines)


def main() -> None:
    args = cli.read(Args, __doc__)
    names = [f"{what}_{args.scale}_{budget(args)}.csv" for what in ("runs", "curves")]
    old_runs, old_curves = published(args, dict(zip(names, (RUN_COLUMNS, CURVE_COLUMNS), strict=True)))
    compared, runs, curves = pairs(args), [], []
    # of all tasks, before the first run
    on_task = {task: dataclasses.replace(args, env_id=task) for task in env_ids(args)}
    asked = {task: {name: [spec(here, pair, seed) for seed in range(args.seeds)] for name, pair in compared.items()}
             for task, here in on_task.items()}  # fmt: skip
    done, failures = harness.run_tasks(
        {task: (on_task[task], [run for of_name in specs.values() for run in of_name]) for task, specs in asked.items()}
    )
    for task in done:
        here = on_task[task]
        for name, of_name in asked[task].items():
            for run in of_name:
                for path in harness.finished(here, [run]):
                    about = dict(zip(RUN, (task, name, run.seed), strict=True))
                    runs.append(about | {"offline_algorithm": run.offline} | measured(here, run, path))
                    points = np.stack(analysis.curve(path), 1)
                    curves += [about | {"step": int(step), "score": round(score, 3)} for step, score in points]

    every = dataclasses.replace(args, env_id=Args.env_id, dataset_path="")  # data share a page
    report = analysis.Report(every, "comparison", "The method against those that it is compared with")
    here = {(task, name) for task, specs in asked.items() for name in specs}  # whether they came to their end or not
    older = others(old_runs, runs, here)
    kept = set(map(known_by, older))
    elsewhere = sorted({(row["dataset"], row["source"]) for row in old_runs
                        if known_by(row) not in kept and (row["dataset"], row["method"]) not in here})  # fmt: skip
    if elsewhere:
        words = "; ".join(f"{task} from {source}" for task, source in elsewhere)
        if (harness.ROOT / args.published).resolve() == report.folder.resolve():
            for failure in failures:
                print(f"failed: {failure}", file=sys.stderr)
            raise cli.UserError(f"{args.published} has runs on other data ({words}); choose another --out")
        print(f"note: runs in {args.published} on other data than here are left out: {words}")
    runs, curves = older + runs, [row for row in old_curves if known_by(row) in kept] + curves
    if runs:
        analysis.write_csv(report.folder / names[0], RUN_COLUMNS, runs)
        analysis.write_csv(report.folder / names[1], CURVE_COLUMNS, curves)
        show(report, runs, curves)
    report.text.append(f"\n{budget(args):,} environment steps each.{EXPLAINED}")
    report.finish(runs, failures, len(older), args.published)


def show(report: analysis.Report, runs: list[dict], curves: list[dict]) -> None:
    """A table and a panel for each task, and what holds over all tasks."""
    tasks = sorted({run["dataset"] for run in runs}, key=lambda task: (*TASKS, task).index(task))
    order = [name for name in pairs(Args()) if any(run["method"] == name for run in runs)]
    order += dict.fromkeys(run["method"] for run in runs if run["method"] not in order)
    values = {name: {task: [run for run in runs if (run["method"], run["dataset"]) == (name, task)] for task in tasks}
              for name in order}  # fmt: skip
    points = by_run(curves)
    figure, panels = analysis.panels(tasks, sharey=False, across=3)
    for panel, task in zip(panels, tasks, strict=True):
        here = {name: of_name[task] for name, of_name in values.items() if of_name[task]}
        task_table(report, task, here)
        lines = {name: [points[known_by(run)] for run in found] for name, found in here.items()}
        analysis.draw_points(panel, lines, next(iter(here.values()))[0]["measure"], order)
    looks = [Line2D([], [], label=name, **analysis.style(i)) for i, name in enumerate(order)]
    figure.legend(handles=looks, loc="outside lower center", ncols=2 * min(3, len(tasks)), fontsize=8, frameon=False)
    report.figure(figure, task="")
    report.text.append(f"\n{analysis.CURVES}")
    together(report, values, points)
    chances(report, values)


def chances(report: analysis.Report, values: dict[str, dict[str, list[dict]]]) -> None:
    """A table of the probabilities that ours end higher than each of the others."""
    finals = {name: {task: [run["final"] for run in runs] for task, runs in of_name.items()}
              for name, of_name in values.items()}  # fmt: skip
    ours = [name for name in finals if name.split(" ")[0] in OURS]
    theirs = [name for name in finals if name not in ours]
    found = probabilities(finals, ours, theirs)
    if found:
        lines = [[x, *(analysis.number(found[x, y], 2) if (x, y) in found else "–" for y in theirs)] for x in ours]
        title = "Probability that a run of … ends higher than one of …, on the tasks that both have runs of"
        report.table(title, ["", *theirs], lines)
        report.text.append("\nBy chance alone three runs all end above three others on a task once in 20 times.")


def together(report: analysis.Report, values: dict[str, dict[str, list[dict]]], points: dict) -> None:
    """Over all tasks: aggregates, and sample-efficiency curves."""
    runs = [run for of_name in values.values() for found in of_name.values() for run in found]
    n, measures = len({run["dataset"] for run in runs}), {run["measure"] for run in runs}
    if n > 1 and measures != {"score"}:
        report.text.append("\nReturns of different tasks have no common scale, so there is no table over all.")
        return
    ends = analysis.matrices(
        {name: {task: [[run["final"], run["area"]] for run in found] for task, found in of_name.items()}
         for name, of_name in values.items()}
    )  # fmt: skip
    if not ends:
        report.text.append("\nNo method has runs of every task, so there is nothing to say over all of them.")
        return
    lines = [[name, str(len(ends[name])), *(analysis.number(x) for x in columns.T)]
             for name, columns in analysis.intervals(ends, REPS).items()]  # fmt: skip
    report.table("All tasks: IQM [95% interval]", ["", "runs of each", "final", "area (speed)"], lines)
    if lacking := [name for name in values if name not in ends]:
        report.text.append(f"\nWithout runs of every task: {', '.join(lacking)}.")
    figure, [panel] = analysis.panels([f"IQM over {n} task{'s' * (n > 1)}"])
    on_tasks = analysis.matrices({name: {task: [on_grid(*points[known_by(run)]) for run in found]
                                for task, found in of_name.items()} for name, of_name in values.items()})  # fmt: skip
    grid = np.linspace(0, 1, GRID + 1)
    for name, (iqm, low, high) in analysis.intervals(on_tasks, REPS).items():
        look = analysis.style(list(values).index(name))
        panel.plot(grid, iqm, label=name, linewidth=1.5, **look)
        panel.fill_between(grid, low, high, color=look["color"], alpha=0.1, linewidth=0)
    panel.set_xlabel("share of the environment steps")
    panel.set_ylabel(f"{measures.pop()}\nhigher is better")
    analysis.legend(panel)
    report.figure(figure, "_efficiency", task="")
    report.text.append("\nLines: interquartile means over runs and tasks; bands: their 95% intervals.")


if __name__ == "__main__":
    cli.run(main)
