"""What do many action dimensions ask for? On the Adroit hand, with its 24 to 30: the paper's constants; rewards a tenth
as large, for Q is in the thousands; O2SAC's threshold and floor, which bound sums over dimensions, for each of them;
O2TD3's distances in alignment, which gather at their clip, of a uniform radius.

    python experiments/dimension.py --env-id pen-cloned-v1 --offline bc
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli
from experiments import arms, harness
from experiments.harness import Spec, scripts

SCALE = 0.1  # of rewards, and with them of O2SAC's temperature, or entropy would weigh ten times more
OWN = {  # an argument of a script, what turns it on, what to call it, the stages before it (None: all but the last)
    "per_dimension": (["--per-dimension"], "τ and floor per dimension", None),
    "align_radius": (["--align-radius", "uniform"], "uniform radius", ("reevaluate",)),
}


@dataclass
class Args(arms.Args):
    env_id: str = "pen-cloned-v1"
    """the dataset"""
    algorithms: tuple[str, ...] = ("o2sac", "o2td3")
    """the online algorithms; O2PPO divides by the number of dimensions already"""
    offline: str = "iql"
    """where they start from: iql, rebrac, awac or bc (CQL and TD3+BC fail on the hand), or the path of a policy"""


def settings(args: Args, script: str, seed: int) -> dict[str, Spec]:
    paper = Spec(script, args.offline, seed)
    chosen = harness.parsed(args, paper)
    scale = ["--reward-scale", f"{SCALE * chosen.reward_scale:g}"]
    scale += ["--alpha", f"{SCALE * chosen.alpha:g}"] if hasattr(chosen, "alpha") else []
    scaled = paper.variant("scaled", *scale, stages=())
    runs = {"the paper's": paper, f"rewards × {SCALE:g}": scaled}
    for argument, (flags, label, before) in OWN.items():
        if hasattr(scripts.online(script).Args, argument):
            runs[label] = paper.variant("own", *flags, stages=before)
            runs["both"] = scaled.variant("both", *scale, *flags, stages=before)
    return runs


def main() -> None:
    args = cli.read(Args, __doc__)
    title = "What do many action dimensions ask for?"
    arms.comparison(args, "dimension", title, settings, "the paper's")


if __name__ == "__main__":
    cli.run(main)
