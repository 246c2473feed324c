"""How long a whole run takes, from the dataset to the fine-tuned agent, stage by stage.

    python benchmarks/protocol.py                              # the paper's budgets, CQL → O2SAC; meant for a GPU
    python benchmarks/protocol.py --num-seeds 5                # five seeds side by side, to be compared with one
    python benchmarks/protocol.py --script o2td3 --offline td3_bc
    python benchmarks/protocol.py --fraction 0.005             # every budget 200 times shorter

The run is an ordinary one in a folder of its own, interrupted and continued as any other; what it prints at the end
includes compiling, logging, evaluation and checkpoints. Of several seeds, the slowest one's times are printed.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import cli, pretrain, stages
from common.bounds import at_least, between
from common.report import duration
from common.run import run_name
from common.usage import flag_of
from offline import algorithm, algorithm_args

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent


@dataclass
class Args:
    script: str = "o2sac"
    """the online algorithm: the name of a script here or in baselines/, or the path of your own"""
    offline: str = "cql"
    """the offline one: the name of a file in offline/, or the path of your own"""
    env_id: str = "hopper-medium-v2"
    """the dataset"""
    dataset_path: str = ""
    """an HDF5 file in D4RL's layout, used in place of the one that --env-id names"""
    fraction: Annotated[float, between(0, 1)] = 1.0
    """of the paper's steps in every stage; evaluations stay as frequent as they are there"""
    seed: Annotated[int, between(0, 2**32 - 1)] = 0
    """seed of the run"""
    num_seeds: Annotated[int, at_least(1)] = 1
    """seeds side by side, from --seed on"""
    device: str = "auto"
    """cpu, cuda, …; auto takes the GPU where there is one"""
    compile: bool = True
    """compile the training steps (and capture them in CUDA graphs on a GPU)"""
    run_dir: str = "runs/protocol"
    """where the run folders are made"""


def command_line(args: Args) -> list[str]:
    """The run's own arguments: the paper's, with shorter budgets."""
    script = stages.online(args.script)
    paper = script.Args()
    budgets = {stage.steps: stage.limit(paper) for stage in script.STAGES}
    budgets |= {name: getattr(paper, name) for name in ["learning_starts"] if hasattr(paper, name)}
    budgets["offline_steps"] = algorithm(args.offline).Args().steps
    name = f"{Path(args.script).stem}-{args.fraction:g}"
    flags = ["--exp-name", name, "--compile" if args.compile else "--no-compile"]
    for name in ("env_id", "dataset_path", "offline", "seed", "num_seeds", "device", "run_dir"):
        flags += [flag_of(name), str(getattr(args, name))]
    for name, steps in budgets.items():
        flags += [flag_of(name), str(max(1, round(steps * args.fraction)))]
    return flags


def times(run) -> tuple[dict, dict[str, float]]:
    """A finished run's result.json, and the seconds of its stages, the offline one first."""
    result = json.loads((Path(run.run_dir) / run_name(run) / "result.json").read_text())
    pretrained = Path(run.run_dir) / pretrain.run_name(algorithm_args(run)[1])
    first = torch.load(pretrained / f"{Path(run.offline).stem}.pt", map_location="cpu", weights_only=True)
    return result, {f"offline: {Path(run.offline).stem}": first["seconds"], **result["seconds"]}


def main() -> None:
    args = cli.read(Args, __doc__)
    if args.num_seeds > 1:  # a folder of their own, lest they find a seed that is finished already
        args.run_dir = f"{args.run_dir}/{args.num_seeds}-seeds"
    flags = command_line(args)
    start = time.perf_counter()
    script = stages.online(args.script)
    if done := subprocess.run([sys.executable, script.__file__, *flags]).returncode:
        sys.exit(done)  # the script has said why
    wall = time.perf_counter() - start

    run = cli.parse(script.Args, script.PRESETS, script.FAMILIES, flags)
    results = [times(replace(run, seed=seed)) for seed in range(run.seed, run.seed + run.num_seeds)]
    result, seconds = max(results, key=lambda found: sum(found[1].values()))
    steps = {stage.name: getattr(run, stage.steps) for stage in script.STAGES}
    steps[next(iter(seconds))] = run.offline_steps
    name = run_name(run) + f" and {args.num_seeds - 1} more" * (args.num_seeds > 1)
    table = Table(title=f"{name}, {result['hardware']}, PyTorch {torch.__version__}", title_justify="left")
    for column in ("stage", "steps", "time", "steps/s"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, spent in seconds.items():
        n = steps.get(stage)  # none where a policy was handed on
        table.add_row(stage, *([f"{n:,}", duration(spent), f"{n / spent:,.0f}"] if n else ["", duration(spent), ""]))
    table.add_row("all stages", "", duration(sum(seconds.values())), "")
    evaluation = result["seconds_per_evaluation"]
    share = evaluation * result["evaluations"] / seconds["finetune"]
    table.add_row(
        "evaluations of fine-tuning", f"{result['evaluations']:,}", f"{evaluation:.2f} s each", f"{share:.1%}"
    )
    Console(width=120).print(table)
    print(f"from start to end: {duration(wall)} (less what an earlier start of this command had done)")


if __name__ == "__main__":
    cli.run(main)
