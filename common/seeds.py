"""Several seeds of one run side by side, each in a process and a run folder of its own: `--num-seeds 5`."""

import contextlib
import dataclasses
import json
import os
import re
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

from common import plots
from common.checkpoint import write_atomic
from common.cli import STARTER, Interrupted
from common.run import make_folder, own_run, read_json, run_name

COLUMNS = {"best_online": "best online", "last_online": "last online", "mean_of_last_3": "mean of the last 3",
           "best": "best.pt", "best_fresh": "on fresh starts"}  # fmt: skip
BAR = re.compile(r"(\S+) *: *(\d+%)\|.*?(?:, ((?:score |return |compiling)[^]]*))?\]")  # a progress bar
MINUTE = 60.0


def train(args, device: torch.device) -> int:
    """Run this command once for each of `--num-seeds` seeds from `--seed` on; its exit code.

    A seed computes what it would compute alone on as many threads. On a CPU as many run at once as there are cores,
    which they share (unless OMP_NUM_THREADS says otherwise); on a GPU all do, see `shared_gpu`.
    """
    folders = {}
    for seed in range(args.seed, args.seed + args.num_seeds):
        folders[seed] = Path(args.run_dir) / run_name(dataclasses.replace(args, seed=seed))
        make_folder(folders[seed])
        own_run(folders[seed]).release()  # lest a run that goes on loses its output.txt
    for folder in folders.values():
        (folder / "output.txt").unlink(missing_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    at_once = min(args.num_seeds, cores) if device.type == "cpu" else args.num_seeds
    environment = {"OMP_NUM_THREADS": str(max(1, cores // at_once))} | os.environ | {STARTER: str(os.getpid())}
    waiting, running, codes = list(folders), {}, {}
    with shared_gpu(device) as service, screen() as show:
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
                show({seed: "done" if codes.get(seed) == 0 else now_at(folder) for seed, folder in folders.items()})
        except KeyboardInterrupt:
            for process in running.values():
                process.terminate()  # each saves its checkpoint
            for process in running.values():
                process.wait()
            raise Interrupted("what each seed has saved is kept; the same command continues them") from None
    failed = {seed: reason(code, folders[seed]) for seed, code in codes.items() if code}
    if len(failed) < len(folders):
        summarise(args, {seed: folder for seed, folder in folders.items() if seed not in failed}, failed)
    for seed, words in failed.items():
        print(f"seed {seed}: {words}; all it said is in {folders[seed] / 'output.txt'}", file=sys.stderr)
    return max(code if code >= 0 else 128 - code for code in codes.values())  # as a shell counts signals


def reason(code: int, folder: Path) -> str:
    """Why a seed's process ended: its last words, or the signal that left it none."""
    return f"killed ({signal.Signals(-code).name}); the same command continues it" if code < 0 else last_words(folder)


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


@contextlib.contextmanager
def screen():
    """A function that shows what the seeds say, {seed: words}: live in a terminal, else in one plain line a minute."""
    console, due = Console(stderr=True), 0.0
    with Live(console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as live:

        def show(said: dict[int, str]) -> None:
            nonlocal due
            if live:
                lines = "\n".join(f"seed {seed}: {words}" for seed, words in said.items())
                live.update(Text(lines, no_wrap=True, overflow="ellipsis"), refresh=True)
            elif time.monotonic() >= due:
                due = time.monotonic() + MINUTE
                words = "; ".join(f"seed {seed}: {brief(words)}" for seed, words in said.items())
                print(f"{time.strftime('%H:%M')} {words}", file=sys.stderr, flush=True)

        yield show


def latest(folder: Path) -> list[str]:
    """The last lines that a run printed, the very last first."""
    try:
        with open(folder / "output.txt", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4_000))
            lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    except FileNotFoundError:
        return ["waits"]
    return [line.strip() for line in reversed(lines) if line.strip()] or ["starts"]


def last_words(folder: Path) -> str:
    return latest(folder)[0]


def now_at(folder: Path) -> str:
    """What a run is at: its last progress bar, whatever it has said since; before the first one its last words."""
    lines = latest(folder)
    return next(filter(BAR.search, lines), lines[0])


def brief(line: str) -> str:
    """A progress bar without its bar: "finetune 37%, score 47.1 (best 53.2)"; of anything else the beginning."""
    bar = BAR.search(line)
    return ", ".join(filter(None, [f"{bar[1]} {bar[2]}", bar[3]])) if bar else line[:60]


def summarise(args, folders: dict[int, Path], failed: dict[int, str]) -> None:
    """Print the scores of every seed with their means and standard deviations; leave seeds.json and seeds.png."""
    remedy = "delete it, and the same command makes it again"
    results = {seed: read_json(folder / "result.json", remedy) for seed, folder in folders.items()}
    first = next(iter(results.values()))
    names = first["evaluated"] + [name for name in COLUMNS if name in first]
    scores = np.array([[result[name] for name in names] for result in results.values()])
    mean, std = scores.mean(0), scores.std(0)

    seeds = [*folders, *failed]
    together = Path(args.run_dir) / run_name(dataclasses.replace(args, seed=f"{min(seeds)}-{max(seeds)}"))
    make_folder(together)
    summary = {"mean": dict(zip(names, mean, strict=True)), "std": dict(zip(names, std, strict=True)),
               "results": results, "failed": failed}  # fmt: skip
    write_atomic(together / "seeds.json", json.dumps(summary, indent=2).encode())
    plots.draw(together / "seeds.png", plots.seeds, list(folders.values()), args, height=5.0)

    of, data = first["offline_algorithm"], first["dataset"]
    title = f"{args.exp_name} from {of} on {data}, {len(results)} of {args.num_seeds} seeds: {first['measure']}s"
    table = Table(title=title, title_justify="left")
    for column in ("seed", *(COLUMNS.get(name, name) for name in names)):
        table.add_column(column, justify="right")
    for seed, row in zip(results, scores, strict=True):
        table.add_row(str(seed), *(f"{score:.1f}" for score in row))
    table.add_section()
    table.add_row("mean ± std", *(f"{m:.1f} ± {s:.1f}" for m, s in zip(mean, std, strict=True)))
    Console(markup=False, width=None if sys.stdout.isatty() else 140).print(table)
    codes = [result.get("made_with", {}).get("code") for result in results.values()]
    if any(code != codes[0] for code in codes):
        print("note: the code was changed while the seeds ran, and not all of them are of the same")
    print("best.pt:", "; ".join(f"seed {seed} {result['best_from']}" for seed, result in results.items()))
    print(f"{together} holds seeds.png, their curves, and seeds.json")
