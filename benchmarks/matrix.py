"""Every offline algorithm into every online one, several seeds each: a table of scores before and after.

    python benchmarks/matrix.py                                                   # the table in the README
    python benchmarks/matrix.py --offline cql --online o2sac --seeds 5            # the demo's five seeds

Runs are processes of their own with one thread each, `--workers` at a time. Finished ones are kept: started again, the
command does what is missing.
"""

import concurrent.futures
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

ROOT = Path(__file__).parent.parent


@dataclass
class Args:
    offline: tuple[str, ...] = ("cql", "iql", "td3_bc")
    """the offline algorithms"""
    online: tuple[str, ...] = ("o2sac", "o2td3", "o2ppo")
    """the online ones"""
    seeds: int = 3
    """seeds 0, 1, … of each pair"""
    preset: str = "demo"
    """the scripts' --preset"""
    env_id: str = "hopper-medium-demo"
    """the dataset"""
    run_dir: str = "runs/matrix"
    """where run folders are made"""
    workers: int = os.cpu_count() or 1
    """processes at a time"""


def run(args: Args, script: str, seed: int, *flags: str) -> str | None:
    """Run a script to its end; what it said last if it failed."""
    command = [sys.executable, script, "--preset", args.preset, "--env-id", args.env_id, "--seed", str(seed)]
    done = subprocess.run(
        [*command, "--run-dir", args.run_dir, *flags], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    return None if done.returncode == 0 else f"{script} --seed {seed} {' '.join(flags)}: {done.stderr.splitlines()[-1]}"


def result(args: Args, offline: str, online: str, seed: int) -> dict | None:
    path = ROOT / args.run_dir / f"{args.env_id}__{online}__{offline}__{seed}__{args.preset}" / "result.json"
    return json.loads(path.read_text()) if path.exists() else None


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    cells = [(x, y, seed) for y in args.online for seed in range(args.seeds) for x in args.offline]
    missing = [cell for cell in cells if result(args, *cell) is None]
    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        policies = {(x, seed) for x, _, seed in missing}  # first, so that no two processes train the same one
        jobs = [pool.submit(run, args, f"offline/{x}.py", seed) for x, seed in sorted(policies)]
        failures = [job.result() for job in tqdm(jobs, desc="offline", unit="run")]
        jobs = [pool.submit(run, args, f"{y}.py", seed, "--offline", x) for x, y, seed in missing]
        failures += [job.result() for job in tqdm(jobs, desc="online", unit="run")]
    for failure in filter(None, failures):
        print(failure, file=sys.stderr)

    title = f"{args.env_id}, preset {args.preset}, {args.seeds} seeds: offline → mean of the last three evaluations"
    table = Table(title=title, title_justify="left")
    for column in ("", *args.online):
        table.add_column(column)
    for x in args.offline:
        row = []
        for y in args.online:
            found = [r for seed in range(args.seeds) if (r := result(args, x, y, seed))]
            before, after = ([r[key] for r in found] for key in ("offline", "mean_of_last_3"))
            better = sum(b > a for a, b in zip(before, after, strict=True))
            text = f"{np.mean(before):.1f} → {np.mean(after):.1f} ± {np.std(after):.1f}, {better}/{len(found)} better"
            row.append(text if found else "failed")
        table.add_row(x, *row)
    Console(width=140).print(table)
    for x, y, seed in cells:
        if r := result(args, x, y, seed):
            scores = {key: r[key] for key in ("offline", "aligned", "best_online", "last_online", "mean_of_last_3")}
            print(x, y, seed, " ".join(f"{key} {value:.1f}" for key, value in scores.items() if value is not None))
    sys.exit(2 if any(failures) else 0)


if __name__ == "__main__":
    main()
