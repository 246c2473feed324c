"""Does alignment align? On held-out states, before and after: the rank correlation of the offline policy's preferences
with Q, how often a sampled action beats the policy's most likely one, and how far the best of them lies from it.

    python experiments/alignment.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli
from experiments import analysis, harness
from experiments.harness import full

import numpy as np

MEASURES = {
    "rank_correlation": "rank correlation of preference and Q",
    "beats_anchor": "share of sampled actions above the anchor in Q",
    "argmax_gap": "distance of the best sampled action from the anchor",
}
SCALES = ("Spearman's ρ: 1 is agreement, 0 chance", "share: less is better, 0.5 is chance",
          "root mean square (range of actions: 2)\nless is better")  # fmt: skip


@dataclass
class Args(harness.Args):
    algorithms: tuple[str, ...] = ("o2sac", "o2td3")
    """the online algorithms; O2PPO has no Q to align"""


def main() -> None:
    args = cli.read(Args, __doc__)
    specs = {y: [full(args, y, seed) for seed in range(args.seeds)] for y in args.algorithms}
    for runs in specs.values():
        harness.check_stages(args, runs[0], "reevaluate", "align")
    failures = harness.run_all(args, [spec for runs in specs.values() for spec in runs])
    report = analysis.Report(args, "alignment", "Does alignment make the critic rank actions as the policy does?")
    figure, panels = analysis.panels(MEASURES.values(), sharey=False)
    lines, everything = [], []
    for i, y in enumerate(args.algorithms):
        paths = harness.finished(args, specs[y])
        everything += paths
        if not paths:
            continue
        for panel, (name, label) in zip(panels, MEASURES.items(), strict=True):
            stages = ("reevaluate", "align", "finetune")
            ends = [np.array([analysis.measurements(p, s, f"probe/{name}")[1][-1] for p in paths]) for s in stages]
            found = analysis.interval({stage: values for stage, values in zip(stages, ends, strict=True)})
            lines.append([y, label, *(analysis.number(found[stage], 3) for stage in stages)])
            for path in paths:
                before = analysis.measurements(path, "reevaluate", f"probe/{name}")[1][-1]
                points = {0: before} | dict(zip(*analysis.measurements(path, "align", f"probe/{name}"), strict=True))
                panel.plot(
                    *zip(*points.items(), strict=True), color=f"C{i}", linewidth=1, label=y if path == paths[0] else ""
                )
    for panel, words in zip(panels, SCALES, strict=True):
        panel.set_xlabel("gradient steps of alignment")
        panel.set_ylabel(words)
    analysis.legend(panels[0])
    columns = ["", "", "re-evaluated", "aligned", "fine-tuned"]
    report.table("On held-out states, 32 sampled actions each", columns, lines)
    report.figure(figure)
    report.finish(analysis.results(everything), failures)


if __name__ == "__main__":
    cli.run(main)
