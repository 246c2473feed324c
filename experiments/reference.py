"""When should the reference policy move? At the best evaluation so far, at fixed intervals, or by a rule that needs no
evaluation at all (`--reference adaptive`).

    python experiments/reference.py

At intervals the paper has another threshold, at the end a quarter of the other rules' (not where a preset sets it):
what is compared are the paper's two ways, and --algorithms o2sac --run-flags="--kl-threshold-end 2" (o2td3:
--mse-threshold-end 0.04; on (medium-)expert data 0.125 and 6.25e-4) makes them differ in the rule alone. O2PPO's
intervals are rounded to whole rollouts. Adaptive starts from the aligned policy as π_ref, the others from the better of
it and the offline policy.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli
from experiments import analysis, arms, harness
from experiments.arms import Args
from experiments.harness import Spec, full

INTERVALS = (1_000, 5_000, 10_000)  # the paper's and two longer ones
OF_ROLLOUTS = (2_500, 5_000, 10_000)  # O2PPO's
CAPTION = (
    "Adaptive moves π_ref after 20 episodes of training at the earliest (twice --reference-window), which are 20,000 "
    "steps where none ends early."
)


def settings(args: Args, script: str, seed: int) -> dict[str, Spec]:
    harness.check_own(args, "--reference", "--reference-interval")
    best = full(args, script, seed)
    runs, chosen = {"best so far": best}, harness.parsed(args, best)
    intervals = OF_ROLLOUTS if hasattr(chosen, "rollout_steps") else INTERVALS
    for n in [n for n in intervals if n < chosen.online_steps]:  # else it never moves
        name = f"every {n:,} steps"
        runs[name] = best.variant(f"every{n}", "--reference", "interval", "--reference-interval", str(n))
    return runs | {"adaptive": best.variant("adaptive", "--reference", "adaptive")}


if __name__ == "__main__":
    title = "When should the reference policy move?"
    caption = f"{analysis.CURVES} {CAPTION}"
    cli.run(
        lambda: arms.comparison(cli.read(Args, __doc__), "reference", title, settings, "best so far", caption=caption)
    )
