"""The examples of docs/extend.md, as they are printed there."""

import ast
import re
import subprocess
import sys

import offline
import pytest
from common import envs, stages
from common.datasets import load

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


def test_a_changed_offline_algorithm_trains(tmp_path):
    [diff] = re.findall(r"in `offline/bc.py`.*?```diff\n(.*?)```", GUIDE, re.S)
    copy = tmp_path / "mybc.py"
    copy.write_text(changed((ROOT / "offline" / "bc.py").read_text(), diff))
    script = stages.load(copy, offline.NEEDED, "")
    args = script.Args(env_id="hopper-medium-demo", steps=2, compile=False, eval_episodes=1, run_dir=str(tmp_path))
    assert script.train(args, load(args.env_id).head(500)).exists()


def test_a_task_of_ones_own(tmp_path, monkeypatch, hdf5):
    [module] = re.findall(r"`mytask.py`:\n\n```python\n(.*?)```", GUIDE, re.S)
    (tmp_path / "mytask.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    [words] = re.findall(r"`--env-id path/to/(\S+) --dataset-path rows.hdf5`", GUIDE)
    rows = str(hdf5())
    data = load(words, rows)
    [by_name] = re.findall(r"`--env-id (mytask:\S+)`", GUIDE)
    assert load(by_name, rows).task.spec == data.task.spec
    env = envs.make_env(data.task)
    env.reset(seed=0)
    _, reward, *_, info = env.step(env.action_space.low * 0)
    assert data.task.measure == "return" and reward == pytest.approx(1 - info["x_velocity"], abs=0.01)


def imported(path) -> set[str]:
    """What a script takes from common/, as "module.name"."""
    tree = ast.parse(path.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules = {alias.name for node in imports if node.module == "common" for alias in node.names}
    names = {f"{node.module.removeprefix('common.')}.{alias.name}"
             for node in imports if node.module.startswith("common.") for alias in node.names}  # fmt: skip
    attributes = (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return names | {name for name in attributes if name.count(".") == 1 and name.split(".")[0] in modules}


def test_every_name_that_a_script_imports_stands_in_the_table():
    scripts = [*ROOT.glob("o2*.py"), *ROOT.glob("offline/[a-z]*.py"), *ROOT.glob("baselines/[a-z]*.py")]
    found = set().union(*map(imported, scripts))
    table = GUIDE.split("## What a script imports")[1]
    listed = {name for line in re.findall(r"^\| (`.*?`) \| \S", table, re.M) for name in re.findall("`(.*?)`", line)}
    assert len(scripts) >= 10 and "nn.polyak" in found and found == listed


def test_what_a_script_needs_is_what_is_asked_for():
    [needed] = re.findall(r"It needs (`.*?`)\.", GUIDE, re.S)
    assert set(re.findall("`(.*?)`", needed)) == set(offline.NEEDED)
    method = GUIDE.split("## A whole method")[1].split("\n## ")[0]
    listed = set(re.findall(r"`([A-Z]\w*)[`(]", method))
    assert set(stages.NEEDED) - {"Args", "PRESETS", "FAMILIES", "main"} <= listed
