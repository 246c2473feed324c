"""What each step of the method is worth: the full method against each step left out, and against the naive switch.

python experiments/ablations.py
python experiments/ablations.py --algorithms o2td3 --seeds 5 --scale quick
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli
from experiments.analysis import comparison
from experiments.harness import OFFLINE, Args, Spec

NAIVE = ("--no-reevaluate", "--no-align", "--no-constrain")


def settings(script: str, seed: int) -> dict[str, Spec]:
    """The runs to compare; those that leave out a later step share the earlier ones with the full method."""
    full = Spec(script, OFFLINE[script], seed)
    runs = {"full": full, "no re-evaluation": Spec(script, OFFLINE[script], seed, ("--no-reevaluate",))}
    if script == "o2ppo":  # it has no Q to align
        naive = Spec(script, OFFLINE[script], seed, ("--no-reevaluate", "--no-constrain"))
    else:
        runs["no alignment"] = Spec(script, OFFLINE[script], seed, ("--no-align",), full, ("reevaluate",))
        naive = Spec(script, OFFLINE[script], seed, NAIVE)
    return runs | {"no constraint": Spec(script, OFFLINE[script], seed, ("--no-constrain",), full), "naive": naive}


if __name__ == "__main__":
    title = "What is each step of the method worth?"
    cli.run(lambda: comparison(cli.read(Args, __doc__), "ablations", title, settings, "full"))
