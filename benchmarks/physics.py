"""How far is one simulated step from what D4RL's files say? In D4RL's physics, and in the installed MuJoCo's own.

    python benchmarks/physics.py --env-ids hopper-medium-v2 halfcheetah-medium-v2 walker2d-medium-v2 ant-medium-v2

Each row is a file: the simulator is put into states of its rows, plays their actions, and is compared with the next
observation and the reward there; the larger of the two errors, in their own units, at the median and at 99%.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import agreement, cli, datasets
from common.bounds import at_least

import mujoco
import numpy as np
from rich.console import Console
from rich.table import Table


@dataclass
class Args:
    env_ids: tuple[str, ...] = ("hopper-medium-v2",)
    """names of D4RL's, whose files are looked for as the scripts do, or the demo's"""
    rows: Annotated[int, at_least(1)] = 1_000
    """how many rows of each file are tried; those whose state cannot be had are left out"""


def quantiles(errors: dict[str, np.ndarray]) -> str:
    """The larger of the median errors, and of those at 99%."""
    return " / ".join(f"{max(np.quantile(found, q) for found in errors.values()):.1e}" for q in (0.5, 0.99))


def main() -> None:
    args = cli.read(Args, __doc__)
    plain = f"Gymnasium's robot, MuJoCo {mujoco.__version__}"
    table = Table("file", "rows", plain, "in D4RL's physics", title="error of one step, median / 99%")
    for env_id in args.env_ids:
        data = datasets.load(env_id)
        if not data.task.d4rl:
            raise cli.UserError(f"{env_id} is not played in D4RL's physics; give a name of D4RL's, as hopper-medium-v2")
        found = [agreement.simulator_errors(data, replace(data.task, d4rl=d4rl), args.rows) for d4rl in (False, True)]
        if not all(found):
            raise cli.UserError(f"no state of {env_id} can be rebuilt from its rows, so nothing can be compared")
        table.add_row(env_id, str(len(found[1]["next observations"])), *map(quantiles, found))
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
