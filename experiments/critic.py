"""Does the critic's start matter at all? The offline algorithm's critic, a random one, a re-evaluated one, and one that
is aligned as well, under the same constraint, each without and with a warm-up: the offline policy plays the first
steps, and the critic alone learns.

    python experiments/critic.py
    python experiments/critic.py --algorithms o2td3 --warmup-steps 5000
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli
from common.bounds import at_least
from experiments import arms, harness
from experiments.harness import Spec, full, scripts

STARTS = {
    "offline critic": ("--no-reevaluate", "--no-align"),
    "random": ("--no-reevaluate", "--no-align", "--critic-init", "random"),
    "re-evaluated": ("--no-align",),
    "aligned": (),
}


@dataclass
class Args(arms.Args):
    algorithms: tuple[str, ...] = ("o2sac", "o2td3")
    """the online algorithms; O2PPO has no Q, and always begins with rollouts"""
    warmup_steps: Annotated[int | None, at_least(1)] = None
    """environment steps of the warm-up; None: those before the first update and then 4,000, which makes 5,000 on the
    robots at the paper's budgets, or a fifth of the run where that is less"""


def settings(args: Args, script: str, seed: int) -> dict[str, Spec]:
    """The runs to compare; a stage that a run has is the whole method's."""
    harness.check_own(args, "--warmup-steps", "--critic-init")
    method, declared = full(args, script, seed), scripts.online(script)
    if not {"critic_init", "warmup_steps"} <= vars(declared.Args()).keys():
        raise cli.UserError(f"{script} has no --critic-init or no --warmup-steps; see --algorithms")
    harness.check_stages(args, method, "reevaluate", "align")
    chosen = harness.parsed(args, method)
    n = args.warmup_steps or chosen.learning_starts + min(4_000, chosen.online_steps // 5)
    if not chosen.learning_starts < n < chosen.online_steps:
        raise cli.UserError(
            f"in a warm-up of {n:,} steps {script} would not learn a critic first and then a policy: its updates begin "
            f"after {chosen.learning_starts:,} steps and end at {chosen.online_steps:,}; see --warmup-steps"
        )
    runs = {}
    for start, flags in STARTS.items():
        shared = tuple(stage.name for stage in declared.STAGES[:-1] if f"--no-{stage.name}" not in flags)
        for warm_up in (False, True):
            # the name of a run's folder says by itself which parts are left out
            marks = ["random"] * (start == "random") + [f"warm{n}"] * warm_up
            name = ("--exp-name", "-".join([Path(script).stem, *marks])) if marks else ()
            more = ("--warmup-steps", str(n)) if warm_up else ()
            spec = Spec(script, method.offline, seed, (*name, *flags, *more), method if shared else None, shared)
            runs[f"{start}, warm-up of {n:,}" if warm_up else start] = spec if spec.flags else method
    return runs


if __name__ == "__main__":
    title = "Does the critic's start matter at all?"
    cli.run(lambda: arms.comparison(cli.read(Args, __doc__), "critic", title, settings, "aligned"))
