"""Kill runs at random moments, start them again, and compare how they end with a run that was left alone.

    python benchmarks/kills.py --kills 200

A killed process says no word: whatever it had not written is gone. Started again, it has to end with the same policies,
the same log and the same checkpoint, bit for bit, wherever it was: in the offline stage, while a policy is handed on,
in an evaluation, at a checkpoint.
"""

import csv
import itertools
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import h5py
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli, tasks
from common.bounds import at_least

import torch

ROOT = Path(__file__).parent.parent
COMMON = """--device cpu --no-compile --eval-episodes 2 --regime-episodes 2 --checkpoint-seconds 0 --offline-steps 40
    --reevaluate-steps 40 --log-every 10"""
TWO = "--align-steps 40 --align-eval-every 20 --online-steps 120 --learning-starts 60 --eval-every 40 --batch-size 32"
ROLLOUTS = """--reevaluate-batch-size 32 --online-steps 192 --rollout-steps 64 --minibatch-size 32 --update-epochs 2
    --eval-every 64"""
COMMANDS = [  # the second and third hand a policy of another kind on first
    ["o2td3.py", "--offline", "td3_bc", *TWO.split()],
    ["o2sac.py", "--offline", "iql", "--utd", "2", *TWO.split()],
    ["o2ppo.py", "--offline", "bc", *ROLLOUTS.split()],
]


@dataclass
class Args:
    kills: Annotated[int, at_least(1)] = 200
    """how many processes are killed"""
    rows: Annotated[int, at_least(100)] = 5_000
    """transitions of the dataset"""
    seed: Annotated[int, at_least(0)] = 0
    """of the moments"""


def start(command: list[str], folder: Path, data: Path) -> subprocess.Popen:
    flags = [*command[1:], *COMMON.split(), "--env-id", tasks.DEMO, "--dataset-path", str(data)]
    with open(folder / "output.txt", "ab") as output:  # the same words in every folder, for a policy keeps them
        return subprocess.Popen([sys.executable, ROOT / command[0], *flags], cwd=folder, stdout=output, stderr=output)


def contents(folder: Path) -> dict:
    """All that a run leaves but times: tensors, scores, rows of the log, by name."""
    found = {}
    for path in sorted((folder / "runs").rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".pt":
            saved = torch.load(path, weights_only=True)
            found |= flat(name, {k: v for k, v in saved.items() if k not in ("seconds", "made_with")})
        elif path.name == "progress.csv":
            with open(path, newline="") as file:
                for i, row in enumerate(csv.DictReader(file)):
                    found[f"{name}, row {i}"] = {k: v for k, v in row.items() if k != "charts/SPS"}
        elif path.suffix == ".part":
            found[name] = "left behind"
    return found


def flat(name: str, value) -> dict:
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flat(f"{name}: {key}", part).items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, part in enumerate(value) for k, v in flat(f"{name}[{i}]", part).items()}
    return {name: value}


def differences(a: dict, b: dict) -> list[str]:
    def same(x, y) -> bool:
        return torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y

    return sorted(name for name in a.keys() | b.keys() if name not in a or name not in b or not same(a[name], b[name]))


def main() -> None:
    args = cli.read(Args, __doc__)
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = folder / "small.hdf5"
        with h5py.File(tasks.SHIPPED / f"{tasks.DEMO}.hdf5") as whole, h5py.File(data, "w") as file:
            for name in whole:
                file[name] = whole[name][: args.rows]
        alone = []
        for i, command in enumerate(COMMANDS):
            (folder / str(i)).mkdir()
            began = time.monotonic()
            if start(command, folder / str(i), data).wait():
                raise cli.UserError(f"{command[0]} does not run: {(folder / str(i) / 'output.txt').read_text()[-300:]}")
            alone.append((contents(folder / str(i)), time.monotonic() - began))
        killed, runs, lost, other = 0, itertools.count(), [], []
        with tqdm(total=args.kills, desc="kills") as bar:
            while killed < args.kills:
                which = moments.randrange(len(COMMANDS))
                place = folder / f"run{next(runs)}"
                place.mkdir()
                expected, seconds = alone[which]
                while killed < args.kills and moments.random() < 0.8:  # often the second start is killed as well
                    process = start(COMMANDS[which], place, data)
                    time.sleep(moments.uniform(0, seconds))
                    if process.poll() is not None:
                        break
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    killed += 1
                    bar.update()
                if start(COMMANDS[which], place, data).wait():
                    lost.append(f"{place.name}: {(place / 'output.txt').read_text()[-300:]}")
                elif found := [name for name in differences(expected, contents(place)) if not name.endswith(".part")]:
                    other.append(f"{place.name} ({COMMANDS[which][0]}): {', '.join(found[:3])}")
    print(f"{killed} processes killed, {len(lost)} runs lost, {len(other)} ended otherwise")
    for line in (*lost, *other):
        print(line)
    sys.exit(1 if lost or other else 0)


if __name__ == "__main__":
    cli.run(main)
