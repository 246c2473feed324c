"""What each step of the method is worth: the full method against each step left out, and against the naive switch.

    python experiments/ablations.py
    python experiments/ablations.py --algorithms o2td3 --seeds 5 --scale quick
    python experiments/ablations.py --settings full naive --env-ids hopper-medium-v2 walker2d-medium-v2

Runs that are finished are kept, so the same command goes on where it was stopped.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli
from experiments import arms, harness
from experiments.arms import Args
from experiments.harness import Spec, full, scripts


def settings(args: Args, script: str, seed: int) -> dict[str, Spec]:
    """The runs to compare: each part left out that the script declares, after the full method's earlier stages."""
    method, declared = full(args, script, seed), scripts.online(script)
    if not (parts := scripts.ablations_of(harness.parsed(args, method))):
        raise cli.UserError(f"{script} has no ABLATIONS, parts that can be left out; see --algorithms")
    harness.check_own(args, *(f"--no-{name}" for name in parts))
    before = [stage.name for stage in declared.STAGES[:-1]]
    runs = {"full": method}
    for name in parts:
        flag = (f"--no-{name}",)
        shared = tuple(before[: before.index(name)] if name in before else before)
        runs[f"no {name}"] = Spec(script, method.offline, seed, flag, method if shared else None, shared)
    return runs | {"naive": full(args, script, seed, *(f"--no-{name}" for name in parts))}


if __name__ == "__main__":
    title = "What is each step of the method worth?"
    cli.run(lambda: arms.comparison(cli.read(Args, __doc__), "ablations", title, settings, "full"))
