"""What should alignment train, and how fast? The actor follows the critics there while these still learn. As the paper
has it; the actor's learning rate a tenth; fine-tuning's penalty there too; the actor frozen, so the critics alone; from
π_off again, with the critics as the paper's alignment leaves them; no alignment.

    python experiments/alignment_variants.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli
from experiments import arms, harness
from experiments.harness import Spec, full, scripts


@dataclass
class Args(arms.Args):
    algorithms: tuple[str, ...] = ("o2sac", "o2td3")
    """the online algorithms; O2PPO has no alignment"""


def settings(args: Args, script: str, seed: int) -> dict[str, Spec]:
    """The runs to compare, all after the same re-evaluation."""
    if not hasattr(scripts.online(script).Args, "align_restore"):
        raise cli.UserError(f"{script} has no --align-restore, of which this asks; see --algorithms")
    harness.check_own(args, "--align-restore", "--align-constrain", "--align-actor-lr")
    paper, before = full(args, script, seed), ("reevaluate",)
    harness.check_stages(args, paper, "align")
    tenth = str(0.1 * harness.parsed(args, paper).actor_lr)
    return {
        "the paper's": paper,
        "actor's rate × 0.1": paper.variant("align-slow", "--align-actor-lr", tenth, stages=before),
        "penalty": paper.variant("align-penalty", "--align-constrain", stages=before),
        "actor frozen": paper.variant("align-frozen", "--align-actor-lr", "0", stages=before),
        "from π_off": paper.variant("align-restore", "--align-restore"),
        "none": Spec(script, paper.offline, seed, ("--no-align",), paper, before),
    }


if __name__ == "__main__":
    title = "What should alignment train, and how fast?"
    cli.run(lambda: arms.comparison(cli.read(Args, __doc__), "alignment_variants", title, settings, "the paper's"))
