"""Several seeds of one run side by side, each in a process and a run folder of its own: `--num-seeds 5`."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from common.cli import Interrupted
from common.run import make_folder, run_name

COLUMNS = {"offline": "offline", "aligned": "aligned", "best_online": "best online", "last_online": "last online",
           "mean_of_last_3": "mean of the last 3", "best": "best.pt"}  # fmt: skip


def train(args, device: torch.device) -> int:
    """Run this command once for each of `--num-seeds` seeds from `--seed` on; its exit code.

    A seed computes what it would compute alone on as many threads. On a CPU as many run at once as there are cores,
    which they share (unless OMP_NUM_THREADS says otherwise); on a GPU all do, see `shared_gpu`.
    """
    folders = {}
    for seed in range(args.seed, args.seed + args.num_seeds):
        folders[seed] = Path(args.run_dir) / run_name(dataclasses.replace(args, seed=seed))
        make_folder(folders[seed])
        (folders[seed] / "output.txt").unlink(missing_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    at_once = min(args.num_seeds, cores) if device.type == "cpu" else args.num_seeds
    environment = {"OMP_NUM_THREADS": str(max(1, cores // at_once))} | os.environ
    waiting, running, codes = list(folders), {}, {}
    with shared_gpu(device) as service, Live(console=Console(stderr=True), auto_refresh=False) as screen:
        environment |= service
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    seed = waiting.pop(0)
                    command = [sys.executable, *sys.argv, "--num-seeds", "1", "--seed", str(seed)]
                    with open(folders[seed] / "output.txt", "wb") as output:
                        running[seed] = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
                time.sleep(0.5)
                for seed in [seed for seed, process in running.items() if process.poll() is not None]:
                    codes[seed] = running.pop(seed).returncode
                lines = [f"seed {seed}: {last_line(folder)}" for seed, folder in folders.items()]
                screen.update(Text("\n".join(lines), no_wrap=True, overflow="ellipsis"), refresh=True)
        except KeyboardInterrupt:
            for process in running.values():
                process.send_signal(signal.SIGINT)  # each saves its checkpoint
            for process in running.values():
                process.wait()
            raise Interrupted("every seed is saved; the same command continues them") from None
    if done := {seed: folders[seed] for seed in folders if codes[seed] == 0}:
        summarise(args, done)
    for seed, code in codes.items():
        if code:
            print(f"seed {seed}: {last_line(folders[seed])}; all it said is in {folders[seed] / 'output.txt'}",
                  file=sys.stderr)  # fmt: skip
    return max(abs(code) for code in codes.values())


@contextlib.contextmanager
def shared_gpu(device: torch.device):
    """NVIDIA's Multi-Process Service while the block runs: the environment variables that make a process use it.

    Without it the processes on a GPU take turns, and kernels as small as ours leave most of it idle. It comes with the
    driver and needs no rights; where it is missing or does not work, or is running already, there are no variables.
    """
    control = shutil.which("nvidia-cuda-mps-control")
    if device.type != "cuda" or "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="mps") as folder:
        service = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}

        def succeeds(*command: str, **kwargs) -> bool:
            quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            return subprocess.run(command, env=os.environ | service, **quiet, **kwargs).returncode == 0

        started = control is not None and succeeds(control, "-d")
        try:
            if started and succeeds(sys.executable, "-c", f"import torch; torch.zeros(1, device={str(device)!r})"):
                print("the seeds share the GPU through NVIDIA's Multi-Process Service")
                yield service
            else:
                print("NVIDIA's Multi-Process Service does not run here: the seeds take turns on the GPU")
                yield {}
        finally:
            if started:
                succeeds(control, input=b"quit\n")


def last_line(folder: Path) -> str:
    """What a run says at the moment: its progress bar, or its last words."""
    try:
        with open(folder / "output.txt", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2_000))
            lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    except FileNotFoundError:
        return "waits"
    return next((line.strip() for line in reversed(lines) if line.strip()), "starts")


def summarise(args, folders: dict[int, Path]) -> None:
    """Print the scores of every seed, and their means with standard deviations."""
    results = {seed: json.loads((folder / "result.json").read_text()) for seed, folder in folders.items()}
    title = f"{args.exp_name} from {args.offline} on {args.env_id}, {len(results)} of {args.num_seeds} seeds"
    table = Table(title=title, title_justify="left")
    names = [name for name in COLUMNS if next(iter(results.values()))[name] is not None]
    for column in ("seed", *(COLUMNS[name] for name in names)):
        table.add_column(column, justify="right")
    for seed, result in results.items():
        table.add_row(str(seed), *(f"{result[name]:.1f}" for name in names))
    scores = np.array([[result[name] for name in names] for result in results.values()])
    table.add_section()
    table.add_row("mean ± std", *(f"{m:.1f} ± {s:.1f}" for m, s in zip(scores.mean(0), scores.std(0), strict=True)))
    Console().print(table)
