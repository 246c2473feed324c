"""Does Q jump when fine-tuning starts? Q on held-out states after each stage and through the first online updates, with
and without re-evaluation, beside the returns that the offline policy really gets from those states.

    python experiments/q_stability.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli, policies
from common.foreign import load_policy
from experiments import analysis, harness, rollouts
from experiments.harness import Args, Spec, full

import numpy as np
import torch

UPDATES_FOR = 2_000  # environment steps with updates
WINDOW = 1_000  # environment steps within which a jump counts
NOTE = """
The figure is of the first seed: lines: mean over the states; bands: 10% to 90%; dashed: Q of the data's actions.

Monte Carlo returns are π_off's, and Q is of the policy π at that moment: alignment and fine-tuning change it, so that Q
may rightly lie above them, at the first step already. O2PPO's V is fitted to the data's returns, if not by
`--value-init fqe`. Jumps are divided by the spread of the Monte Carlo returns, 10% to 90%, which is the same for all
settings of an algorithm."""


def settings(args: Args, script: str, seed: int) -> dict[str, Spec]:
    """With re-evaluation, and without: then Q is the offline algorithm's (O2PPO: V starts at random)."""
    harness.check_own(args, "--online-steps", "--probe-every")
    method = full(args, script, seed)
    starts = harness.parsed(args, method)
    if hasattr(starts, "rollout_steps"):  # the probe comes with every rollout; rates fall as in the method's whole run
        anneal = getattr(starts, "anneal_steps", None) or starts.whole_rollouts()
        flags = ("--online-steps", str(5 * starts.rollout_steps), "--anneal-steps", str(anneal))
    else:
        flags = ("--online-steps", str(starts.learning_starts + UPDATES_FOR), "--probe-every", "100")
    name = ("--exp-name", f"{Path(script).stem}-start")
    return {
        "with re-evaluation": method.variant("start", *flags),
        "without": full(args, script, seed, *name, "--no-reevaluate", *flags),
    }


def true_values(args: Args, script: str, seed: int) -> np.ndarray:
    """What Q (O2PPO: V) ought to be at the probe's states: the discounted return of one episode each.

    π_off plays them as in the script's Bellman equation: see `rollouts.returns_ahead`. States that the simulator cannot
    be put into are left out.
    """
    method = full(args, script, seed)
    spec = harness.parsed(args, method)
    data = rollouts.dataset(spec)
    handed_on = harness.folder(args, settings(args, script, seed)["with re-evaluation"]) / "offline.pt"
    path = handed_on if handed_on.exists() else harness.offline_policy(args, method)
    net = policies.module(load_policy(path, data))  # one of another kind was handed on to the script's own
    data = rollouts.held_out(spec, data)
    torch.manual_seed(seed)
    # the probe asks for Q of the most likely action, and O2PPO for V
    first = None if net.kind == "gaussian" else net.mode(net.seen(data.obs))
    return rollouts.returns_ahead([], data, np.arange(len(data)), net, spec, first)


def jump(path: Path, name: str, begins: float, truth: np.ndarray) -> float:
    """The largest change of mean Q within `WINDOW` environment steps once updates begin, over the spread of `truth`.

    That is the same for every run; Q's own is near zero where Q starts at random.
    """
    steps, mean = analysis.series(path, "finetune", name)
    first = int(np.flatnonzero(steps <= begins)[-1])
    steps, mean, (low, high) = steps[first:], mean[first:], np.quantile(truth, [0.1, 0.9])
    changes = [abs(b - a) for s, a in zip(steps, mean, strict=True) for t, b in zip(steps, mean, strict=True)
               if s < t <= s + max(WINDOW, np.diff(steps).max())]  # fmt: skip
    return max(changes) / (high - low)


def draw(panel, groups: dict[str, list[Path]], name: str, truth: np.ndarray) -> None:
    """Mean (line) and 10% to 90% (band) of Q over the states, dashed: of the data's actions; of one seed.

    On the left the critic that each stage begins or ends with, then the first environment steps.
    """
    steps = analysis.series(next(paths[0] for paths in groups.values() if paths), "finetune", name)[0]
    ends = {"offline critic": ("align", 0), "re-evaluated": ("reevaluate", -1), "aligned": ("align", -1)}
    at = dict(zip(ends, steps[-1] * np.array([-0.36, -0.24, -0.12]), strict=True))
    ticks = {}
    for i, (label, paths) in enumerate(groups.items()):
        if not paths:
            continue
        curves = {}
        for scalar in (name, f"{name}_low", f"{name}_high", *["probe/q_data"] * (name != "probe/v")):
            points = []
            for end, (stage, row) in ends.items():
                found_at, found = analysis.series(paths[0], stage, scalar)
                # with re-evaluation, alignment begins with the re-evaluated critic and not with the offline one
                if len(found) and not (end == "offline critic" and (label != "without" or found_at[0])):
                    points.append((at[end], found[row]))
                    ticks[at[end]] = end
            curves[scalar] = np.array(points + list(zip(*analysis.series(paths[0], "finetune", scalar), strict=True))).T
        few = curves[name].shape[1] < 12
        panel.plot(*curves[name], color=f"C{i}", label=label, marker="o" if few else None, markersize=3)
        low, high = curves[f"{name}_low"], curves[f"{name}_high"]
        panel.fill_between(low[0], low[1], high[1], color=f"C{i}", alpha=0.15, linewidth=0)
        if "probe/q_data" in curves:
            panel.plot(*curves["probe/q_data"], color=f"C{i}", linestyle="--", linewidth=1)
    low, high = np.quantile(truth, [0.1, 0.9])
    panel.axhline(truth.mean(), color="0.3", linestyle=":", linewidth=1, label="Monte Carlo return of π_off")
    panel.axhspan(low, high, color="0.5", alpha=0.1, linewidth=0)
    panel.axvline(0, color="0.7", linewidth=0.8)
    ticks |= {x: f"{x:,.0f}" for x in np.linspace(0, steps[-1], 3).round(-2)}
    panel.set_xticks(list(ticks), list(ticks.values()), rotation=40, ha="right", fontsize=8)
    panel.set_xlabel("environment steps of fine-tuning")
    what = "V" if name == "probe/v" else "Q of the policy's actions"
    panel.set_ylabel(f"{what}\n(better: no jump; near the dots\nuntil the policy changes)", fontsize=9)
    analysis.legend(panel, below=60)


def main() -> None:
    args = cli.read(Args, __doc__)
    specs = {(y, seed): settings(args, y, seed) for y in args.algorithms for seed in range(args.seeds)}
    for y in args.algorithms:
        rollouts.check(harness.parsed(args, full(args, y, 0)))
    failures = harness.run_all(args, [spec for runs in specs.values() for spec in runs.values()])
    report = analysis.Report(args, "q_stability", "Does Q jump when fine-tuning starts?")
    titles = [analysis.title_of(args, specs[y, 0]["without"]) for y in args.algorithms]
    figure, panels = analysis.panels(titles, sharey=False)
    lines, everything = [], []
    of_values = [y for y in args.algorithms if hasattr(harness.parsed(args, specs[y, 0]["without"]), "rollout_steps")]
    for panel, y in zip(panels, args.algorithms, strict=True):
        name = "probe/v" if y in of_values else "probe/q_policy"
        came = [seed for seed in range(args.seeds) if harness.finished(args, list(specs[y, seed].values()))]
        if not came:
            continue
        truth = np.stack([true_values(args, y, seed) for seed in came])
        begins = getattr(harness.parsed(args, specs[y, 0]["without"]), "learning_starts", 0)
        groups = {s: harness.finished(args, [specs[y, seed][s] for seed in range(args.seeds)]) for s in specs[y, 0]}
        for setting, paths in groups.items():
            if not paths:
                continue
            found = [analysis.measurements(path, "finetune", name)[1] for path in paths]
            jumps = analysis.interval({"jump": np.array([jump(path, name, begins, truth) for path in paths])})["jump"]
            start, end = np.mean([v[0] for v in found]), np.mean([v[-1] for v in found])
            data = [analysis.series(path, "finetune", "probe/q_data")[1] for path in paths]
            offline = np.mean([analysis.result(path)["offline"] for path in paths])
            low = np.mean([min(analysis.scores(path)[1]) for path in paths])
            of_data = f"{np.mean([v[0] for v in data]):.0f}" if y not in of_values else ""
            values = [f"{truth.mean():.0f}", f"{start:.0f}", of_data, f"{end:.0f}", analysis.number(jumps, 2)]
            lines.append([y, setting, str(len(paths)), *values, f"{offline:.1f}", f"{low:.1f}"])
        draw(panel, {s: harness.finished(args, [specs[y, came[0]][s]]) for s in groups}, name, truth[0])
        everything += [path for paths in groups.values() for path in paths]
    what = analysis.measure(everything)
    columns = ["", "", "runs", "Monte Carlo of π_off", "Q of π at the first step", "of the data's actions",
               "Q of π at the last step", "largest jump / spread of Monte Carlo", f"offline {what}",
               f"lowest {what}"]  # fmt: skip
    report.table(f"Q (O2PPO: V) on held-out states; jump within {WINDOW:,} environment steps", columns, lines)
    report.figure(figure)
    report.text.append(NOTE)
    report.finish(analysis.results(everything), failures)


if __name__ == "__main__":
    cli.run(main)
