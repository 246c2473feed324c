"""The method against those that it is compared with, and two more: scores, speed, falls, regret, time.

python experiments/comparison.py                                                     # hopper-medium-demo, minutes a run
python experiments/comparison.py --env-ids hopper-medium-v2 walker2d-medium-v2 --scale quick --online-steps 50000

Every method has the same environment steps, warm-up and random steps included, and the same seeds, from its own offline
algorithm; the first three from those of the compared methods, too. Constants, rewards, states and updates a step are
each method's own. Curves and numbers of every run are written to docs/comparison/ as CSV.
"""

import collections
import csv
import dataclasses
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli
from common.bounds import at_least
from common.checkpoint import write_atomic
from experiments import analysis, harness
from experiments.harness import Spec

import numpy as np
import torch
from rliable import library as rly
from rliable import metrics
from scipy.stats import trim_mean

OURS = {"o2sac": ("td3_bc", "cql"), "o2td3": ("td3_bc", "iql"), "o2ppo": ("iql",)}  # the second: a compared method's
TASKS = (
    *(f"{robot}-{data}-v2" for robot in ("hopper", "halfcheetah", "walker2d") for data in ("medium", "medium-replay")),
    "antmaze-umaze-v2", "antmaze-umaze-diverse-v2", "pen-cloned-v1",
)  # fmt: skip
BUDGETS = {"demo": 10_000, "quick": 20_000, "paper": 100_000}
GRID = 20  # points of a sample-efficiency curve after the first
REPS = 2_000  # of the bootstrap
KEYS = {"final": "final", "area": "area (speed)", "drop": "deepest fall", "smooth_drop": "… of means of 3",
        "regret": "evaluation regret"}  # fmt: skip

EXPLAINED = """
Final: mean of the last three evaluations. Area: mean score over the environment steps. Deepest fall: below the offline
score; the least of many evaluations of few episodes is biased downwards, which the means of three are less. Evaluation
regret: mean of 1 - score / 100, clipped to 0…1, over all evaluations and the offline policy's. Training regret: share
of training episodes without a success (CORL's). Regime: see common/regime.py, with the number of seeds. Minutes: as
they were on that machine, with all that ran beside; "–" where a policy that ships was taken or there is none."""


@dataclass
class Args(harness.Args):
    algorithms: tuple[str, ...] = (*OURS, "awac", "iql", "pex", "off2on", "cal_ql", "aca", "rlpd", "wsrl")
    """the methods: names of scripts here or in baselines/, or paths of your own"""
    run_dir: str = "runs/comparison"
    """where run folders are made"""
    out: str = "runs/comparison"
    """where figures and tables are written"""
    env_ids: tuple[str, ...] = ()
    """the datasets; none: --env-id at the scale demo or if it is another one, else medium and medium-replay of three
    robots, AntMaze umaze and umaze-diverse, and pen-cloned"""
    online_steps: Annotated[int | None, at_least(1)] = None
    """environment steps of every run; None: 10,000, at the scale quick 20,000, paper 100,000"""
    offline_steps: Annotated[int | None, at_least(1)] = None
    """gradient steps of every offline algorithm; None: its own at that scale"""
    curves: str = "docs/comparison"
    """where the CSV files are written"""


def env_ids(args: Args) -> tuple[str, ...]:
    return args.env_ids or (TASKS if args.scale != "demo" and args.env_id == harness.Args.env_id else (args.env_id,))


def pairs(args: Args) -> dict[str, tuple[str, str]]:
    """What is compared, by its name: a script, and the offline algorithm that it starts from."""
    found = {}
    for script in args.algorithms:
        starts = OURS.get(Path(script).stem, (harness.offline_of(args, script),))
        for start in starts:
            found[f"{Path(script).stem} from {start}" if len(starts) > 1 else Path(script).stem] = (script, start)
    return found


def spec(args: Args, pair: tuple[str, str], seed: int) -> Spec:
    harness.check_own(args, "--online-steps", "--offline-steps")  # they are arguments here
    steps = args.online_steps or BUDGETS[args.scale]
    flags = ("--online-steps", str(steps))
    if args.offline_steps and pair[1] != "scratch":
        flags += ("--offline-steps", str(args.offline_steps))
    return Spec(*pair, seed, flags)


# ---------------------------------------------------------------------------------------------- numbers


def training_regret(path: Path) -> float | None:
    """The share of the training episodes without a success, as CORL has it; None where nothing says what one is."""
    _, successes = analysis.series(path, "finetune", "charts/episodic_success")
    return float(1 - successes.mean()) if len(successes) else None


def offline_seconds(args: Args, run: Spec) -> float | None:
    """What training the policies took that a run started from; None where there was nothing to train."""
    trained = harness.trained_for(args, run)
    if trained is None:
        return None
    [checkpoint] = [path for path in trained[0].parent.glob("*.pt") if path != trained[0]]
    members = getattr(harness.parsed(args, run), "members", 1)  # of one algorithm, a seed each
    return members * torch.load(checkpoint, weights_only=True)["seconds"]


def measured(args: Args, run: Spec) -> dict:
    """All that the tables and the CSV hold of a run."""
    path = harness.folder(args, run)
    result = analysis.result(path)
    return analysis.summary(path) | {
        "offline": result["offline"], "training_regret": training_regret(path), "regime": result["regime"],
        "seconds": sum(result["seconds"].values()), "offline_seconds": offline_seconds(args, run),
    }  # fmt: skip


def on_grid(path: Path) -> np.ndarray:
    """A run's scores at 0, 1/20, … of its budget, (21,), between its evaluations by straight lines."""
    steps, values = analysis.curve(path)
    return np.interp(np.linspace(0, steps[-1], GRID + 1), steps, values)


def matrices(values: dict[str, dict[str, list]]) -> dict[str, np.ndarray]:
    """values[name][task] lists runs: arrays (runs, tasks, …) of those names that have runs of every task that any has.

    Where a task has more runs than another, its first ones are taken.
    """
    tasks = {task for of_name in values.values() for task, runs in of_name.items() if runs}
    whole = {name: [of_name[task] for task in sorted(tasks)] for name, of_name in values.items()
             if all(of_name.get(task) for task in tasks)}  # fmt: skip
    n = {name: min(map(len, lists)) for name, lists in whole.items()}
    return {name: np.stack([np.array(runs[: n[name]], float) for runs in lists], 1) for name, lists in whole.items()}


def intervals(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Interquartile means over runs and tasks with 95% stratified bootstrap intervals, column by column.

    Arrays (runs, tasks, columns) by name become (3, columns): mean, low and high.
    """
    points, bounds = rly.get_interval_estimates(
        values, lambda x: trim_mean(x.reshape(-1, x.shape[-1]), 0.25, axis=0), reps=REPS,
        random_state=np.random.RandomState(0),
    )  # fmt: skip
    return {name: np.stack([points[name], *bounds[name]]) for name in values}


def probabilities(
    finals: dict[str, np.ndarray], names: list[str], others: list[str]
) -> dict[tuple[str, str], tuple[float, float, float]]:
    """That a run of one of `names` ends higher than one of each of `others` on the same task, ties counting half, with
    95% intervals: (probability, low, high) by both names."""
    both = {f"{x},{y}": (finals[x], finals[y]) for x in names for y in others if x != y}
    if not both:
        return {}
    points, bounds = rly.get_interval_estimates(
        both, lambda x, y: np.array([metrics.probability_of_improvement(x, y)]), reps=REPS,
        random_state=np.random.RandomState(0),
    )  # fmt: skip
    return {tuple(key.split(",")): (float(points[key][0]), *map(float, bounds[key][:, 0])) for key in both}


# ---------------------------------------------------------------------------------------------- pages


def write_csv(path: Path, lines: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.getvalue().encode())


def minutes(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known) / 60:.1f}" if known else "–"


def mean(values: list[float | None], digits: int = 1) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.{digits}f}" if known else "–"


def task_table(report: analysis.Report, task: str, runs: dict[str, list[dict]]) -> None:
    """A table of one task: offline score, where each method ends and how it gets there, its regime, its time."""
    runs = {name: found for name, found in runs.items() if found}
    columns = intervals(
        {name: np.array([[[run[key] for key in KEYS]] for run in found]) for name, found in runs.items()}
    )
    lines = []
    for name, found in runs.items():
        regimes = collections.Counter(run["regime"]["regime"] for run in found if run["regime"])
        lines.append([
            name, str(len(found)), mean([run["offline"] for run in found]),
            *(analysis.number(x, 2 if key == "regret" else 1) for key, x in zip(KEYS, columns[name].T, strict=True)),
            mean([run["training_regret"] for run in found], 2),
            ", ".join(f"{word} {n}" for word, n in regimes.most_common()) or "–",
            minutes([run["offline_seconds"] for run in found]), minutes([run["seconds"] for run in found]),
        ])  # fmt: skip
    report.table(
        task, ["", "runs", "offline", *KEYS.values(), "training regret", "regime", "offline min", "online min"], lines
    )


def main() -> None:
    args = cli.read(Args, __doc__)
    tasks, compared = env_ids(args), pairs(args)
    failures, found = [], {}
    for task in tasks:
        here = dataclasses.replace(args, env_id=task)
        specs = {name: [spec(here, pair, seed) for seed in range(args.seeds)] for name, pair in compared.items()}
        failures += harness.run_all(here, [run for runs in specs.values() for run in runs])
        for name, runs in specs.items():
            found[name, task] = [(run, path) for run in runs for path in harness.finished(here, [run])]

    report = analysis.Report(args, "comparison", "The method against those that it is compared with")
    figure, panels = analysis.panels(tasks, sharey=False)
    numbers, curves = [], []
    values = {name: {} for name in compared}
    for panel, task in zip(panels, tasks, strict=True):
        here, runs = dataclasses.replace(args, env_id=task), {}
        for name in compared:
            runs[name] = [measured(here, run) for run, _ in found[name, task]]
            values[name][task] = list(zip(runs[name], [path for _, path in found[name, task]], strict=True))
            for numbers_of, (run, path) in zip(runs[name], found[name, task], strict=True):
                about = {"dataset": task, "method": name, "offline_algorithm": run.offline, "seed": run.seed}
                regime = numbers_of["regime"] or {"regime": None, "policy": None, "data": None}
                flat = {"regime": regime["regime"], "policy_mean": regime["policy"], "data_mean": regime["data"]}
                numbers.append(about | numbers_of | flat)
                points = np.stack(analysis.curve(path), 1)
                curves += [about | {"step": int(step), "score": f"{score:.3f}"} for step, score in points]
        task_table(report, task, runs)
        analysis.draw_curves(panel, {name: [path for _, path in found[name, task]] for name in compared}, compared)
    panels[0].legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    report.figure(figure)
    report.text.append(f"\n{analysis.CURVES}")
    together(report, args, values)
    folder = harness.ROOT / args.curves
    if numbers:
        write_csv(folder / f"runs_{args.scale}.csv", numbers)
        write_csv(folder / f"curves_{args.scale}.csv", curves)
    report.text.append(EXPLAINED)
    report.finish([path for runs in found.values() for _, path in runs], failures)


def together(report: analysis.Report, args: Args, values: dict) -> None:
    """Over all tasks: aggregates, probabilities of improvement, and sample-efficiency curves."""
    ends = matrices({name: {task: [[run["final"], run["area"]] for run, _ in runs] for task, runs in of_name.items()}
                     for name, of_name in values.items()})  # fmt: skip
    if not ends:
        return
    lines = [[name, *(analysis.number(x) for x in columns.T)] for name, columns in intervals(ends).items()]
    report.table("All tasks: IQM [95% interval]", ["", "final", "area (speed)"], lines)
    finals = {name: found[..., 0] for name, found in ends.items()}
    ours = [name for name in finals if name.split(" ")[0] in OURS]
    others = [name for name in finals if name not in ours]
    chances = probabilities(finals, ours, others)
    if chances:
        lines = [[x, *(analysis.number(chances[x, y], 2) for y in others)] for x in ours]
        report.table("Probability that a run of … ends higher than one of", ["", *others], lines)
    figure, [panel] = analysis.panels([f"IQM over {len(next(iter(finals.values()))[0])} tasks"])
    on_tasks = matrices({name: {task: [on_grid(path) for _, path in runs] for task, runs in of_name.items()}
                         for name, of_name in values.items()})  # fmt: skip
    grid = np.linspace(0, 1, GRID + 1)
    for i, (name, (iqm, low, high)) in enumerate(intervals(on_tasks).items()):
        panel.plot(grid, iqm, color=f"C{i}", label=name, linewidth=1.5)
        panel.fill_between(grid, low, high, color=f"C{i}", alpha=0.1, linewidth=0)
    panel.set_xlabel("share of the environment steps")
    panel.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    report.figure(figure, "_efficiency")


if __name__ == "__main__":
    cli.run(main)
