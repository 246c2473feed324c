"""What the machine says to a script: threads that wait, compilers and folders that do not work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    str(path.relative_to(ROOT))
    for path in [*ROOT.glob("*.py"), *(path for path in ROOT.glob("[!.]*/*.py") if path.parent.name != "tests")]
    if "__main__" in path.read_text()
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_threads_are_told_to_wait_quietly_before_pytorch_is_loaded(script, tmp_path):
    (tmp_path / "torch.py").write_text("import os; print(os.environ['OMP_WAIT_POLICY']); os._exit(0)")
    for own, expected in ({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | own
        command = [sys.executable, ROOT / script]
        done = subprocess.run(command, env=environment | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
        assert done.stdout == expected + "\n", done.stderr
