"""When should the reference policy move? At the best evaluation so far, at fixed intervals, or by a rule that needs no
evaluation at all (`--reference adaptive`).

    python experiments/reference.py

At intervals the paper has another threshold, at the end a quarter of the other rules' (not where a preset sets it):
what is compared are the paper's two ways, and --algorithms o2sac --run-flags="--kl-threshold-end 2" (o2td3:
--mse-threshold-end 0.04) makes them differ in the rule alone.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli
from experiments import arms, harness
from experiments.arms import Args
from experiments.harness import Spec, full

INTERVALS = (1_000, 5_000, 10_000)


def settings(args: Args, script: str, seed: int) -> dict[str, Spec]:
    best = full(args, script, seed)
    runs = {"best so far": best}
    steps = harness.parsed(args, best).online_steps
    for n in [n for n in INTERVALS if n < steps]:  # else it never moves
        name = f"every {n:,} steps"
        runs[name] = best.variant(f"every{n}", "--reference", "interval", "--reference-interval", str(n))
    return runs | {"adaptive": best.variant("adaptive", "--reference", "adaptive")}


if __name__ == "__main__":
    title = "When should the reference policy move?"
    cli.run(lambda: arms.comparison(cli.read(Args, __doc__), "reference", title, settings, "best so far"))
