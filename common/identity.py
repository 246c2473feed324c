"""What a run is made of besides its arguments: its code, its data, and the versions of what it stands on."""

import ast
import functools
import hashlib
import platform
import sys
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import torch

ROOT = Path(__file__).parent.parent


def script_of(args) -> Path:
    """The script that these arguments belong to: the file that was started, or was called by that one."""
    return Path(args.script or sys.modules[type(args).__module__].__file__).resolve()


def code_of(script: Path, *others: Path | None) -> dict[str, str]:
    """One hash a file, for a script, `others`, and every module of the project, or beside them, that they import.

    What is hashed is the syntax tree without its docstrings: what Python runs. Comments and blank lines change nothing.
    """
    waiting = [script, *filter(None, others)]
    hashes, folders = {}, (ROOT, *(folder for file in waiting for folder in homes(file)))
    searched = (script.parent, *folders)  # in this order, as Python does
    while waiting:
        path = waiting.pop()
        name = str(path.relative_to(next(folder for folder in folders if path.is_relative_to(folder))))
        if name in hashes:
            continue
        hashes[name], names = read(path.read_bytes())
        waiting += [file for file in files_of(names, searched, path) if any(map(file.is_relative_to, folders))]
    return dict(sorted(hashes.items()))


@functools.lru_cache(1_000)
def read(source: bytes) -> tuple[str, list[str]]:
    """The hash of a file's code, and what its import statements name."""
    tree = ast.parse(source)
    return hashlib.sha256(repr(shape(tree)).encode()).hexdigest()[:16], imported(tree)


def homes(file: Path) -> list[Path]:
    """The folders from which a file and what lies beside it are imported: the one outside of all packages, where it is
    a part of these, and its own, where it is started or named by its path."""
    outside = next(folder for folder in file.parents if not (folder / "__init__.py").is_file())
    return [outside] if file.name == "__init__.py" else [outside, file.parent]


def changed(was: dict[str, str], now: dict[str, str]) -> list[str]:
    """The files that differ, are new or are gone."""
    return sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))


def shape(node) -> object:
    """A syntax tree as tuples, without strings that stand alone and without what is empty: so all Pythons agree."""
    if isinstance(node, list):
        return [shape(x) for x in node if not (isinstance(x, ast.Expr) and is_text(x.value))]
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
        return type(node).__name__, *((name, shape(value)) for name, value in fields)
    return node


def is_text(node) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def imported(tree: ast.AST) -> list[str]:
    """The modules that a file's import statements name, and what they may take from these; .name: beside the file."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names += [module, *(f"{module}{'.' * bool(node.module)}{alias.name}" for alias in node.names)]
    return names


def files_of(names: list[str], folders: tuple[Path, ...], here: Path) -> list[Path]:
    """The files of the modules that a file, `here`, names: each in the first of the folders that has it, if one has."""
    places = []
    for name in names:
        parts = name.lstrip(".").split(".")
        level = len(name) - len(name.lstrip("."))
        places.append([folder.joinpath(*parts) for folder in (here.parents[level - 1 : level] if level else folders)])
    files = [[file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py")] for paths in places]
    return [found for those in files if (found := next((file for file in those if file.is_file()), None))]


def versions() -> dict[str, str]:
    return {"Python": platform.python_version(), "PyTorch": str(torch.__version__), "NumPy": np.__version__,
            "Gymnasium": gymnasium.__version__, "MuJoCo": mujoco.__version__}  # fmt: skip


def fingerprint(data) -> str:
    """The hash of a dataset's transitions, before they are standardised: their file may be touched or moved."""
    if data is None:
        return "none"
    table = np.ascontiguousarray(data.table.cpu().numpy())
    return hashlib.sha256(table).hexdigest()
