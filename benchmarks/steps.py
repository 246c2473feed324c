"""Steps per second of every stage of O2SAC and of CQL, on random data of hopper's size.

    python benchmarks/steps.py                  # this machine's GPU, else its CPU: eager and compiled
    python benchmarks/steps.py --device cpu

The two are timed in turns, so that a machine whose speed drifts does not favour either; the medians are printed.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

import o2sac  # noqa: E402
from common import cli, datasets, report, steps  # noqa: E402
from common.replay import ReplayBuffer  # noqa: E402
from offline import cql  # noqa: E402


@dataclass
class Args:
    device: str = "auto"
    """cpu, cuda, …; auto takes the GPU where there is one"""
    stages: tuple[str, ...] = ("cql", "reevaluate", "align", "update")
    """the stages to time"""
    seconds: float = 2.0
    """length of one turn"""
    turns: int = 5
    """turns of each"""
    transitions: int = 100_000
    """size of the random dataset"""
    obs_dim: int = 11
    """hopper's"""
    action_dim: int = 3
    """hopper's"""
    compile: bool = True
    """time the compiled steps too"""


def random_data(args: Args, device: torch.device) -> datasets.Dataset:
    n = args.transitions
    obs, next_obs = torch.randn(2, n, args.obs_dim, device=device)
    actions, next_actions = torch.rand(2, n, args.action_dim, device=device) * 2 - 1
    ends = (torch.rand(n, device=device) < 0.002).float()
    return datasets.Dataset(
        obs=obs, actions=actions, next_actions=next_actions, rewards=torch.randn(n, device=device), next_obs=next_obs,
        terminations=ends, episode=ends.cumsum(0).long(), returns=torch.zeros(int(ends.sum()) + 1),
        simulator="Hopper-v4", source="random",
    )  # fmt: skip


def make_step(stage: str, data: datasets.Dataset, compile: bool):
    """One gradient step of `stage` (for `update`: one online update), with the paper's sizes."""
    obs_dim, action_dim = data.obs.shape[1], data.actions.shape[1]
    device = data.obs.device
    if stage == "cql":
        args = cql.Args(compile=compile)
        agent = cql.Agent(obs_dim, action_dim, args.hidden_layers).to(device)
        return cql.training_step(args, data, agent, cql.Optimizers(args, agent))
    args = o2sac.Args(compile=compile, utd=1)
    actor = o2sac.Actor(obs_dim, action_dim).state_dict()
    agent = o2sac.Agent(args, dict(obs_dim=obs_dim, action_dim=action_dim, hidden_layers=3, actor=actor)).to(device)
    optimizers = o2sac.Optimizers(args, agent)
    if stage == "reevaluate":
        return o2sac.reevaluation_step(args, data, agent, optimizers)
    if stage == "align":
        return o2sac.alignment_step(args, data, agent, optimizers)
    replay = ReplayBuffer(data, 1_000, "half")
    replay.size.fill_(1_000)
    return o2sac.finetuning_step(args, replay, agent, optimizers, torch.tensor(0.125, device=device))


def turn(stepper: steps.Stepper, seconds: float, device: torch.device) -> float:
    """Steps per second over about `seconds`."""
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        stepper.run(10)
        n += 10
        if device.type == "cuda":
            torch.cuda.synchronize()
    return n / (time.perf_counter() - start)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    device = cli.resolve_device(args.device)
    steps.setup(device, seed=0)
    data = random_data(args, device)
    kinds = ["eager"] + ["compiled"] * (args.compile and steps.can_compile(device))
    table = Table(title=f"steps/s, batch 256, {report.hardware(device)}, PyTorch {torch.__version__}")
    for column in ("stage", *kinds, "ratio"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage in args.stages:
        steppers = [
            steps.Stepper(make_step(stage, data, k == "compiled"), device, graph=k == "compiled") for k in kinds
        ]
        for stepper in steppers:
            stepper.run(20 if stage != "cql" else 3)  # compiles, warms up, captures
        rates = [[turn(stepper, args.seconds, device) for stepper in steppers] for _ in range(args.turns)]
        medians = [statistics.median(column) for column in zip(*rates, strict=True)]
        ratio = statistics.median(row[-1] / row[0] for row in rates)
        table.add_row(stage, *(f"{rate:,.1f}" for rate in medians), f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
