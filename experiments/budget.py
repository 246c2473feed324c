"""How many steps are enough? Re-evaluation and alignment of several lengths, and of as many steps as the probe asks
for (`--reevaluate-steps auto --align-steps auto`): Q beside what the offline policy really gets, the ranking of
actions, how far the actor drifts, the score in the end, and the time that is saved.

    python experiments/budget.py
    python experiments/budget.py --algorithms o2td3 --budgets 0.1 0.5
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli
from common.bounds import above, at_least, between
from common.probe import STATES
from common.report import duration
from common.usage import flag_of
from experiments import analysis, harness, rollouts, truth
from experiments.harness import Spec, full, scripts

import numpy as np

AUTO = "auto"
MEASURES = {  # of each stage: the columns of its table, and what the probe says while it goes on
    "reevaluate": (["Q", "return", "bias", "correlation over states"], "q_policy", "Q of the policy's actions"),
    "align": (["ρ", "drift", "aligned"], "rank_correlation", "Spearman's ρ of preference and Q"),
}
NOTE = """
In a row one stage has that number of steps, and all else what it has at this scale; auto has neither, but this
scale's numbers as the limits, whatever --run-flags says. Q, return and bias: of the offline policy's most likely
action, after re-evaluation; behind ± are standard errors over states. ρ: rank correlation of Q and the policy's
preference; drift: distance of the actor's actions from the offline policy's; aligned: its score; means over the runs.
Brackets: intervals over seeds. In the picture the longest runs; dashed: where auto ended; dotted: the return."""


@dataclass
class Args(harness.Args):
    algorithms: tuple[str, ...] = ("o2sac", "o2td3")
    """the online algorithms; O2PPO has no Q to be judged"""
    budgets: Annotated[tuple[float, ...] | None, above(0)] = None
    """either stage has so many times the steps that it has at this scale, and once as many; None: 0.01 0.04 0.2 at the
    scale paper, which are 5k, 20k and 100k of 500k, else 0.1 0.25 2"""
    states: Annotated[int, between(3, STATES)] = 128
    """held-out states that are played from, as far as the simulator can be put into them"""
    rollouts: Annotated[int, at_least(1)] = 2
    """episodes from each"""
    actions: ClassVar[int] = 0  # of truth.Args: none but the most likely one is played, with the equation's noise later
    noise: ClassVar[bool] = True


def settings(args: Args, script: str, seed: int) -> dict[str, dict[str, Spec]]:
    """The runs of either stage by their number of steps, the fewest first and auto last."""
    own, runs, flags = full(args, script, seed), {}, []
    shares = args.budgets or ((0.01, 0.04, 0.2) if args.scale == "paper" else (0.1, 0.25, 2.0))
    for stage in scripts.online(script).STAGES:
        if stage.name in MEASURES:
            chosen, flag, before = harness.parsed(args, own), flag_of(stage.steps), tuple(runs)
            if stage.auto(chosen):
                raise cli.UserError(f"auto is a row of this experiment; leave {flag} auto out of --run-flags")
            n = stage.limit(chosen)
            steps = sorted({n, *(max(1, round(share * n)) for share in shares)})
            runs[stage.name] = {
                f"{m:,}": own if m == n else own.variant(f"{stage.name}{m}", flag, str(m), stages=before) for m in steps
            }
            flags += [flag, AUTO]
    return {stage: found | {AUTO: own.variant(AUTO, *flags, stages=())} for stage, found in runs.items()}


def steps_of(name: str, stage: str, paths: list[Path]) -> str:
    """How many steps a stage had, with auto in each of the runs."""
    if name != AUTO:
        return name
    ends = [analysis.result(path)["auto"][stage] for path in paths]
    steps, rested = ", ".join(f"{end['steps']:,}" for end in ends), sum(end["ended_by"] == "plateau" for end in ends)
    return f"auto: {steps} ({rested} of {len(ends)} at a plateau)"


def seconds(paths: list[Path], *stages: str) -> float:
    """How long these stages took together, the mean over runs."""
    return float(np.mean([sum(analysis.result(path)["seconds"][stage] for stage in stages) for path in paths]))


def online(groups: dict[str, list[Path]]) -> dict[str, list[str]]:
    """The score in the end and the area under its curve, with intervals."""
    found = {name: [] for name in groups}
    for key in ("final", "area"):
        values = {name: np.array([analysis.summary(path)[key] for path in paths]) for name, paths in groups.items()}
        for name, point in analysis.interval(values).items():
            found[name].append(analysis.number(point))
    return found


def lines(args: Args, stage: str, done: dict[str, list[Spec]], panel, known: dict) -> list[list[str]]:
    """A stage's table, from finished runs, and its panel; `known` are returns of policies that were played before."""
    _, scalar, label = MEASURES[stage]
    paths, found = {name: harness.finished(args, specs) for name, specs in done.items()}, []
    scores = online(paths)
    for name, specs in done.items():
        if stage == "reevaluate":
            measured = [truth.measured(args, spec, known) for spec in specs]
            level = truth.level([q["re-evaluated"] for q, *_ in measured], [x.mean(0) for *_, x in measured])
            cells = [truth.pm(value, 2 if key == "correlation" else 1) for key, value in level.items()]
            panel.axhline(level["return"][0], color="0.3", linestyle=":", linewidth=1)
        else:
            ends = [[analysis.measurements(path, stage, f"probe/{key}")[1][-1] for key in (scalar, "drift")]
                    + [analysis.result(path)["aligned"]] for path in paths[name]]  # fmt: skip
            cells = [f"{mean:.{digits}f}" for mean, digits in zip(np.mean(ends, 0), (2, 2, 1), strict=True)]
        steps, time = steps_of(name, stage, paths[name]), duration(seconds(paths[name], stage))
        found.append([steps, str(len(specs)), time, *cells, *scores[name]])
    for path in next((paths[name] for name in reversed(paths) if name != AUTO), []):
        panel.plot(*analysis.measurements(path, stage, f"probe/{scalar}"), color="C0", linewidth=1)
    for path in paths.get(AUTO, []):
        panel.axvline(analysis.result(path)["auto"][stage]["steps"], color="C1", linestyle="--", linewidth=1)
    panel.set_xlabel("gradient steps")
    panel.set_ylabel(label)
    return found


def main() -> None:
    args = cli.read(Args, __doc__)
    for y in args.algorithms:
        harness.check_stages(args, full(args, y, 0), *MEASURES)
        rollouts.check(harness.parsed(args, full(args, y, 0)))
    specs = {y: [settings(args, y, seed) for seed in range(args.seeds)] for y in args.algorithms}
    everything = [spec for runs in specs.values() for run in runs for stage in run.values() for spec in stage.values()]
    failures = harness.run_all(args, everything)
    report = analysis.Report(args, "budget", "How many steps of re-evaluation and alignment are enough?")
    figure, panels = analysis.panels([f"{Path(y).stem}: {stage}" for y in specs for stage in MEASURES], sharey=False)
    tables, both = {stage: [] for stage in MEASURES}, []
    for i, (y, runs) in enumerate(specs.items()):
        known = {}
        for stage, panel in zip(MEASURES, panels[2 * i : 2 * i + 2], strict=True):
            done = {name: [run[stage][name] for run in runs if harness.finished(args, [run[stage][name]])]
                    for name in runs[0][stage]}  # fmt: skip
            done = {name: found for name, found in done.items() if found}
            tables[stage] += [[y, *line] for line in lines(args, stage, done, panel, known)]
        pair = {"as at this scale": [full(args, y, seed) for seed in range(args.seeds)], AUTO: done.get(AUTO, [])}
        pair = {name: paths for name, found in pair.items() if (paths := harness.finished(args, found))}
        scores, times = online(pair), {name: seconds(paths, *MEASURES) for name, paths in pair.items()}
        for name, paths in pair.items():
            saved = f"{1 - times[name] / next(iter(times.values())):.0%}"
            both.append([y, name, str(len(paths)), duration(times[name]), saved, *scores[name]])
    what = analysis.measure(harness.finished(args, everything))
    for stage, (columns, *_) in MEASURES.items():
        report.table(stage, ["", "steps", "runs", "time", *columns, f"final {what}", "area (speed)"], tables[stage])
    report.table("both stages", ["", "", "runs", "time", "saved", f"final {what}", "area (speed)"], both)
    report.figure(figure)
    report.text.append(NOTE)
    report.finish(analysis.results(harness.finished(args, everything)), failures)


if __name__ == "__main__":
    cli.run(main)
