"""Every offline algorithm into every online one: scores before and after.

    python experiments/matrix.py           # CQL, IQL and TD3+BC, three seeds
    python experiments/matrix.py --offline cql --algorithms o2sac --seeds 5           # one pair alone, five seeds

Runs that are finished are kept, so the same command goes on where it was stopped.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli
from experiments import analysis, harness
from experiments.harness import Spec


@dataclass
class Args(harness.Args):
    offline: tuple[str, ...] = ("cql", "iql", "td3_bc")
    """the offline algorithms"""


def main() -> None:
    args = cli.read(Args, __doc__)
    harness.check_own(args, "--offline")
    cells = {(x, y): [Spec(y, x, seed) for seed in range(args.seeds)] for x in args.offline for y in args.algorithms}
    failures = harness.run_all(args, [spec for specs in cells.values() for spec in specs])

    report = analysis.Report(args, "matrix", "Any offline policy into any online algorithm")
    found = {cell: harness.finished(args, specs) for cell, specs in cells.items()}
    lines, detail = [], []
    for x in args.offline:
        line = [x]
        for y in args.algorithms:
            results = [analysis.result(path) for path in found[x, y]]
            before, after = ([r[key] for r in results] for key in ("offline", "mean_of_last_3"))
            better = sum(b > a for a, b in zip(before, after, strict=True))
            line.append(
                f"{analysis.middle(before):.1f} → {analysis.middle(after):.1f}, {better}/{len(results)}"
                if results
                else "failed"
            )
            for r in results:
                row = [r["offline"], r["start"], r["best_online"], r["last_online"], r["mean_of_last_3"]]
                detail.append([f"{x} → {y}", str(r["seed"]), *(f"{v:.1f}" for v in row)])
        lines.append(line)
    title = "Offline → mean of the last three evaluations, interquartile means over seeds; on how many it is better"
    report.table(title, ["", *args.algorithms], lines)
    names = ["", "seed", "offline", "before fine-tuning", "best online", "last online", "mean of the last 3"]
    report.table("Each run", names, detail)
    figure, panels = analysis.panels(args.algorithms)
    for panel, y in zip(panels, args.algorithms, strict=True):
        analysis.draw_curves(panel, {x: found[x, y] for x in args.offline})
    analysis.legend(panels[-1], panels=panels)
    report.figure(figure)
    report.finish(analysis.results(path for paths in found.values() for path in paths), failures)


if __name__ == "__main__":
    cli.run(main)
