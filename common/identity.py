"""What a run is made of besides its arguments: its code, its data, and the versions of what it stands on."""

import ast
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
    """The file in which the class of these arguments was written: the script that was started, or was called by one."""
    return Path(sys.modules[type(args).__module__].__file__).resolve()


def code_of(script: Path) -> dict[str, str]:
    """One hash a file, for a script and every module of the project that it or its modules import.

    What is hashed is the syntax tree without its docstrings: what Python runs. Comments and blank lines change nothing.
    """
    hashes, waiting = {}, [script]
    while waiting:
        path = waiting.pop()
        name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        if name in hashes:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        waiting += imported(tree)
        hashes[name] = hashlib.sha256(ast.dump(Bare().visit(tree)).encode()).hexdigest()[:16]
    return dict(sorted(hashes.items()))


class Bare(ast.NodeTransformer):
    """Leaves out strings that stand alone: docstrings, also those of fields."""

    def visit_Expr(self, node: ast.Expr):
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node


def imported(tree: ast.AST) -> list[Path]:
    """The project's files that a module names in its import statements."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    paths = [ROOT.joinpath(*name.split(".")) for name in names]
    return [file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]


def versions() -> dict[str, str]:
    return {"Python": platform.python_version(), "PyTorch": str(torch.__version__), "NumPy": np.__version__,
            "Gymnasium": gymnasium.__version__, "MuJoCo": mujoco.__version__}  # fmt: skip


def fingerprint(data) -> str:
    """The hash of a dataset's transitions, before they are standardised: their file may be touched or moved."""
    if data is None:
        return "none"
    table = np.ascontiguousarray(data.table.cpu().numpy())
    return hashlib.sha256(table).hexdigest()
