"""The examples of docs/extend.md, as they are printed there."""

import re
import subprocess
import sys

import pytest

from tests.conftest import TINY
from tests.test_pipeline import ENVIRONMENT, ROOT, SMALL

GUIDE = (ROOT / "docs" / "extend.md").read_text()


def changed(source: str, diff: str) -> str:
    """`source` with the lines that `diff` takes out replaced by those that it puts in."""
    for old, new in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", diff, re.M):
        old, new = (re.sub("^.", "", lines, flags=re.M) for lines in (old, new))
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


@pytest.mark.parametrize("diff", re.findall(r"in `o2sac.py`.*?```diff\n(.*?)```", GUIDE, re.S))
def test_changed_scripts_run(diff, tmp_path):
    script = ROOT / "o2sac.py"
    copy = tmp_path / "mymethod.py"
    copy.write_text(changed(script.read_text(), diff))
    command = [sys.executable, copy, *SMALL, *TINY, "--run-dir", tmp_path / "runs"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "last online" in done.stdout
