"""Keep what finished runs found, in some ten kilobytes each: their arguments, results and evaluations.

    python experiments/publish.py runs/experiments/*__o2td3*          # into docs/evidence

An experiment that compares scores (ablations, alignment_variants, constraint, critic, dimension, matrix, reference)
makes its page of them again with `--run-dir docs/evidence --continue`, without training anything, and `compare.py` sets
your own runs beside them. Checkpoints, and what the critic was measured by, stay where they are.
"""

import collections
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli
from common.checkpoint import write_atomic
from common.log import read_rows
from common.run import make_folder, read_json
from experiments import analysis
from experiments.harness import ROOT

import tyro


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """run folders"""
    out: str = str(ROOT / "docs" / "evidence")
    """where a folder is made for each"""


def evaluations(path: Path) -> list[dict]:
    """What of a run's progress.csv its evaluations are."""
    rows = [{key: value for key, value in row.items() if key in ("stage", "step") or key.endswith("/score")}
            for row in read_rows(path)]  # fmt: skip
    return [row for row in rows if len(row) > 2]


def portable(arguments: dict) -> dict:
    """A run's arguments without this machine's folders: files of the project are named from its root, others alone."""

    def shortened(value):
        path = Path(value) if isinstance(value, str) else None
        if path is None or not path.is_absolute():
            return value
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name

    return {name: shortened(value) for name, value in arguments.items()}


def read(paths: list[Path], out: Path) -> dict[Path, tuple[dict, dict, list[dict]]]:
    """What each run is kept as, by its folder in `out`: its arguments, its result and its evaluations.

    Raises UserError where one is not finished, or would take the place of another of the same name.
    """
    if lacking := [str(path) for path in paths if not (path / "result.json").is_file()]:
        raise cli.UserError(f"{', '.join(lacking)}: no finished run (there is no result.json); leave that out")
    names = collections.Counter(path.resolve().name for path in paths)
    if twice := [name for name, n in names.items() if n > 1]:
        raise cli.UserError(f"two of these runs are called {twice[0]}; keep one of them by itself, with another --out")
    runs = {}
    for path in paths:
        target = out / path.resolve().name
        args, result = (read_json(path / f"{name}.json", "leave that run out") for name in ("args", "result"))
        rows, kept = evaluations(path / "progress.csv"), target / "progress.csv"
        if kept.exists():  # result.json is measured again where the code changed: a run is known by what it trained
            there = read_json(target / "result.json", "delete its folder")
            if read_rows(kept) != rows or there.get("seconds") != result.get("seconds"):
                raise cli.UserError(
                    f"{target} holds another run than {path}; choose another --out, or delete that folder"
                )
        runs[target] = portable(args), result, rows
    return runs


def main() -> None:
    args = cli.read(Args, __doc__)
    paths = list({path.resolve(): path for path in map(Path, args.runs)}.values())
    for target, (arguments, result, rows) in read(paths, Path(args.out)).items():
        make_folder(target, "--out")
        for name, content in (("args", arguments), ("result", result)):
            write_atomic(target / f"{name}.json", f"{json.dumps(content, indent=1)}\n".encode(), "choose another --out")
        analysis.write_csv(target / "progress.csv", dict.fromkeys(name for row in rows for name in row), rows)
    print(f"{len(paths)} runs are kept in {args.out}")


if __name__ == "__main__":
    cli.run(main)
