"""D4RL's registry: names, addresses and reference returns.

It comes from the `d4rl` package, which is read as data: its simulators need mujoco-py and do not import on a current
machine.
"""

import importlib.util
import runpy
from pathlib import Path

from common.cli import UserError

ROBOTS = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4", "ant": "Ant-v4"}
QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "full-replay", "expert")
D4RL_IDS = [f"{robot}-{quality}-v2" for robot in ROBOTS for quality in QUALITIES]


def d4rl_registry() -> dict:
    """The tables of `d4rl/infos.py` (DATASET_URLS, REF_MIN_SCORE, REF_MAX_SCORE), read without importing d4rl."""
    spec = importlib.util.find_spec("d4rl")
    if spec is None:
        raise UserError("the d4rl registry is missing; install it with: pip install --no-deps d4rl==1.1")
    return runpy.run_path(str(Path(spec.submodule_search_locations[0]) / "infos.py"))


def reference_returns(simulator: str) -> tuple[float, float] | None:
    """D4RL's (random, expert) returns of a robot, or None where it has none and scores are plain returns."""
    robot = simulator.split("-")[0].lower()
    if robot not in ROBOTS:
        return None
    infos = d4rl_registry()
    return infos["REF_MIN_SCORE"][f"{robot}-medium-v2"], infos["REF_MAX_SCORE"][f"{robot}-medium-v2"]
