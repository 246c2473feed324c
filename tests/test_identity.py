"""A run is its code and its data: what is the same, what is another, and who may work in a folder."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import o2td3
from common import cli, identity, run, tasks
from common.errors import UserError
from common.cli import OnlineArgs
from common.steps import Stepper
from offline import bc
from tests.conftest import TINY

ROOT = Path(o2td3.__file__).parent


@pytest.fixture
def script(tmp_path):
    """Writes a script and gives its hash."""

    def write(text: str) -> str:
        path = tmp_path / "mymethod.py"
        path.write_text(text)
        return identity.code_of(path)["mymethod.py"]

    return write


def test_comments_blank_lines_and_docstrings_are_no_code(script):
    plain = script("def f(x):\n    return 2 * x\n")
    assert script('"""Doubles."""\n\n\ndef f(x):  # twice\n    """Twice."""\n    return 2 * x\n') == plain
    assert script("def f(x):\n    return 3 * x\n") != plain
    assert script("def f(x):\n    'a string'.upper()\n    return 2 * x\n") != plain


def test_every_python_sees_the_same_code(script):
    """The tree's own printed form differs from version to version; a change of versions is no change of code."""
    text = (
        "@d\nasync def f(x: int = 3, /, *a: str, k=(1, b'y'), **kw) -> list[int]:\n    return [f'{x!r:>9}' 'z', *a]\n"
    )
    assert script(text + "class C(A, metaclass=M):\n    y: int\n    def g(self): pass\n") == "1350d5d3e6a987b4"


def test_modules_beside_a_script_and_what_a_started_file_imports_are_its_code(tmp_path, monkeypatch):
    (tmp_path / "mymethod.py").write_text("import losses\nfrom o2td3 import FAMILIES, PRESETS, Args, main\n")
    (tmp_path / "losses.py").write_text("scale = 1\n")
    code = identity.code_of(tmp_path / "mymethod.py")
    assert {"mymethod.py", "losses.py", "o2td3.py", "common/nn.py"} <= code.keys()
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "mymethod.py"), "--env-id", "hopper-medium-demo"])
    args = cli.parse(o2td3.Args, o2td3.PRESETS, o2td3.FAMILIES)
    assert args.exp_name == "mymethod" and identity.script_of(args) == tmp_path / "mymethod.py"
    assert (
        cli.parse(o2td3.Args, o2td3.PRESETS, o2td3.FAMILIES, ["--preset", "demo"]).exp_name == "o2td3"
    )  # no command line of ours


def test_the_code_of_a_script_is_all_that_it_imports():
    code = identity.code_of(ROOT / "o2td3.py")
    assert {"o2td3.py", "common/replay.py", "common/nn.py", "offline/__init__.py", "common/datasets.py"} <= code.keys()
    assert "o2sac.py" not in code and "offline/cql.py" not in code
    assert {"offline/bc.py", "common/pretrain.py"} <= identity.code_of(Path(bc.__file__)).keys()


@pytest.fixture
def begin(tmp_path, data, monkeypatch):
    """Opens the run folder "run" as another start would, with arguments and code of its own."""

    def open_run(code=None, of=data, saved=True, **changes):
        monkeypatch.setattr(run, "code_of", lambda *_: {"mine.py": "1", "common/nn.py": "2"} | (code or {}))
        arguments = dict(run_dir=str(tmp_path), script=bc.__file__) | changes
        opened = run.Run(OnlineArgs(**arguments), "run", of)
        opened.lock.release()
        if saved:
            (tmp_path / "run" / "bc.pt").touch()
        return opened

    return open_run


def test_other_code_is_named_and_asked_about(begin, tmp_path, capsys):
    begin()
    begin()
    with pytest.raises(UserError, match=r"other code: common/nn.py, mine.py changed since.*--exp-name.*--continue"):
        begin({"mine.py": "3", "common/nn.py": "4"})
    begin({"mine.py": "3"}, go_on=True)
    assert "mine.py changed since" in capsys.readouterr().out
    kept = json.loads((tmp_path / "run" / "args.json").read_text())
    assert kept["made_with"]["code"]["mine.py"] == "3"
    assert [before["code"]["mine.py"] for before in kept["made_with_before"]] == ["1"]
    begin({"mine.py": "3"})  # it is the run's code now


def test_an_argument_that_came_later_was_at_its_default(begin, tmp_path):
    begin()
    path = tmp_path / "run" / "args.json"
    older = json.loads(path.read_text())
    for name in ("holdout", "best_margin"):
        del older[name]
    path.write_text(json.dumps(older))
    with pytest.raises(UserError, match=r"other arguments: --holdout 0.01 \(now 0.2\);"):
        begin(holdout=0.2)
    begin()


def test_other_arguments_are_said_as_they_are_typed(begin):
    begin(track=False, deterministic=True, dataset_path="data/hopper-medium-v2.hdf5", hidden=(64, 32))
    words = (
        "--dataset-path data/hopper-medium-v2.hdf5 (now ''), --deterministic (now --no-deterministic), "
        "--hidden 64 32 (now None);"
    )
    with pytest.raises(UserError, match=re.escape(f"other arguments: {words}")):
        begin()


def test_a_folder_in_which_nothing_was_saved_holds_no_run(begin, tmp_path, capsys):
    """As one whose offline part was refused, or that was killed at once: the corrected command begins it."""
    begin(saved=False)
    begin({"mine.py": "3"}, saved=False, holdout=0.2)
    kept = json.loads((tmp_path / "run" / "args.json").read_text())
    assert kept["holdout"] == 0.2 and kept["made_with"]["code"]["mine.py"] == "3" and "made_with_before" not in kept
    (tmp_path / "run" / "result.json").write_text("{}")  # its checkpoints were deleted
    with pytest.raises(UserError, match=r"other arguments: --holdout 0.2 \(now 0.01\);"):
        begin({"mine.py": "3"})


def test_other_versions_are_said_and_not_refused(begin, monkeypatch, capsys):
    begin()
    monkeypatch.setattr(run, "versions", lambda: identity.versions() | {"MuJoCo": "9.9"})
    begin()
    out = capsys.readouterr().out
    assert "begun with MuJoCo" in out and "9.9" in out and out.count("note:") == 1


def test_other_data_under_the_same_name_are_refused(begin, data):
    begin()
    other = dataclasses.replace(data, rewards=data.rewards + torch.eye(len(data))[3])
    with pytest.raises(UserError, match="on other data: hopper-medium-v2 is not what it was"):
        begin(of=other)


def test_another_policy_under_the_same_name_is_refused(begin, tmp_path):
    policy, opened = tmp_path / "policy.pt", begin(offline="cql")
    policy.write_text("weights")
    opened.starts_from(policy)
    begin(offline="cql").starts_from(policy)
    assert (
        opened.made_with["offline"] == json.loads((tmp_path / "run" / "args.json").read_text())["made_with"]["offline"]
    )
    policy.write_text("others")
    again = begin(offline="cql")
    with pytest.raises(UserError, match="from another policy: cql is not what it was"):
        again.starts_from(policy)


def test_each_of_several_policies_is_known(begin, tmp_path):
    """The ones beside the first by their folders; a run that was made before they were noted goes on."""
    files = [tmp_path / name / "policy.pt" for name in ("cql__0", "cql__1000", "cql__2000")]
    for path in files:
        path.parent.mkdir()
        path.write_text("weights")
    begin(offline="cql").starts_from(files[0])
    begin(offline="cql").starts_from(*files)
    begin(offline="cql").starts_from(*files)
    files[2].write_text("others")
    with pytest.raises(UserError, match="from another policy: cql__2000 is not what it was"):
        begin(offline="cql").starts_from(*files)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"made_with": 3}', '{"seed": 0'])
def test_damaged_arguments_are_named(begin, tmp_path, text):
    begin()
    (tmp_path / "run" / "args.json").write_text(text)
    with pytest.raises(UserError, match=r"args.json is damaged|on other data|other arguments"):
        begin()


def test_a_folder_belongs_to_one_process(begin, tmp_path):
    begin()
    program = (
        "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire()\n"
        "print('mine', flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match="another process is at work in"):
            begin()
        other.kill()  # the lock ends with its process
        other.wait()
        begin()


FLAGS = ["--env-id", "hopper-medium-demo", "--offline", "bc", "--offline-steps", "4", "--reevaluate-steps", "4",
         "--align-steps", "4", "--align-eval-every", "4", "--log-every", "4", "--online-steps", "20",
         "--learning-starts", "10", "--eval-every", "20", *TINY]  # fmt: skip


def test_a_finished_run_says_so_and_a_copy_is_another_run(tmp_path, run_script, monkeypatch):
    flags = [*FLAGS, "--run-dir", str(tmp_path)]
    code, out, err = run_script(o2td3, *flags)
    assert code == 0 and "finished already" not in out, err
    code, out, _ = run_script(o2td3, *flags)
    assert code == 0 and "is finished already, nothing is trained" in out and "last online" in out
    path = tmp_path / "hopper-medium-demo__o2td3__bc__0" / "result.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"last_online": 1e6}))
    path.with_name("finetune.pt").unlink()  # its last stage is trained again, and that is what its result is of
    code, out, _ = run_script(o2td3, *flags)
    assert code == 0 and f"{path.parent} is finished already" not in out
    assert json.loads(path.read_text())["last_online"] == whole["last_online"]
    result = json.loads((tmp_path / "hopper-medium-demo__o2td3__bc__0" / "result.json").read_text())
    assert result["made_with"]["code"]["o2td3.py"] and result["made_with"]["versions"]["PyTorch"] == torch.__version__
    monkeypatch.setattr(o2td3, "__file__", str(tmp_path / "mymethod.py"))
    (tmp_path / "mymethod.py").write_text((ROOT / "o2td3.py").read_text())
    code, out, err = run_script(o2td3, *flags)
    assert code == 0 and "o2td3__bc" not in out and (tmp_path / "hopper-medium-demo__mymethod__bc__0").is_dir(), err


@pytest.mark.parametrize("wrong", [["--env-id", "hoper"], ["--offline", "nothing.pt"], ["--gamma", "2"]])
def test_a_command_that_is_refused_leaves_nothing(tmp_path, run_script, wrong):
    code, _, err = run_script(o2td3, *FLAGS, "--run-dir", str(tmp_path / "runs"), *wrong)
    assert code == 2 and err.startswith("error: ") and not (tmp_path / "runs").exists()


def test_the_file_of_a_task_belongs_to_the_code(tmp_path, monkeypatch, data):
    """A changed reward is another experiment, wherever the environment is registered."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    register = "gymnasium.register('one-v0', 'gymnasium.envs.mujoco.hopper_v4:HopperEnv')"
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "task_one.py").write_text(f"import gymnasium\nfrom gains import REWARD\n{register}\n")
    (tmp_path / "one" / "gains.py").write_text("REWARD = 1\n")

    def made_with(env_id):
        monkeypatch.delitem(sys.modules, "gains", raising=False)
        arguments = OnlineArgs(run_dir=str(tmp_path), script=bc.__file__, env_id=env_id)
        opened = run.Run(arguments, "run", data)
        opened.lock.release()
        (tmp_path / "run" / "bc.pt").touch()
        return opened.made_with["code"]

    monkeypatch.chdir(tmp_path / "one")
    code = made_with("task_one.py:one-v0")
    assert {"task_one.py", "gains.py", "common/nn.py"} <= code.keys()
    (tmp_path / "one" / "gains.py").write_text("REWARD = 3\n")
    with pytest.raises(UserError, match=r"other code: gains.py changed since"):
        made_with("task_one.py:one-v0")
    assert tasks.registrar("gymnasium:Hopper-v4") is None  # installed, so known by its version
    assert tasks.registrar("hopper-medium-demo") is None


def test_a_task_that_cannot_be_told_from_another_module_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "json.py").write_text("")
    with pytest.raises(UserError, match=r"a module json is there already \(.*\); rename your file"):
        tasks.registrar(f"{tmp_path}/json.py:Mine-v0")
    with pytest.raises(UserError, match=r"absent.py:Mine-v0: there is no file .*absent.py; see to its name"):
        tasks.registrar(f"{tmp_path}/absent.py:Mine-v0")
    (tmp_path / "leaves.py").write_text("raise SystemExit('no display')\n")
    (tmp_path / "divides.py").write_text("n = 0\nm = 1 / n\n")
    (tmp_path / "folder_alone").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for env_id, words in {"leaves.py:Mine-v0": r"cannot be imported \(SystemExit: no display, leaves.py line 1\); mend",
                          "divides.py:Mine-v0": r"\(ZeroDivisionError: division by zero, divides.py line 2\); mend",
                          "no_such:Mine-v0": r"there is no module no_such; see to its name, or install it",
                          "my.task.py:Id": "rename my.task.py"}.items():  # fmt: skip
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=words):
            tasks.registrar(env_id)
    (tmp_path / "large.py").write_text("raise MemoryError\n")
    with pytest.raises(MemoryError):  # see `cli.run`
        tasks.registrar("large.py:Mine-v0")
    assert tasks.registrar("folder_alone:Id") is tasks.registrar("sys:Id") is None


def test_what_a_task_in_a_package_imports_is_its_code(tmp_path):
    package = tmp_path / "mypackage"
    maze = ["from . import rewards", "from .walls import wall", "from ..shared import x"]
    maze += ["import mypackage.other", "import beside", "from .... import beyond"]
    files = {"tasks/maze.py": "\n".join(maze), "tasks/__init__.py": "", "tasks/rewards.py": "a = 1",
             "tasks/walls.py": "wall = 1", "tasks/beside.py": "z = 1", "shared.py": "x = 1",
             "other.py": "y = 1"}  # fmt: skip
    (package / "tasks").mkdir(parents=True)
    for name, text in (files | {"__init__.py": "", "not_imported.py": ""}).items():
        (package / name).write_text(text)
    found = identity.code_of(ROOT / "o2td3.py", package / "tasks" / "maze.py")
    assert found.keys() == {f"mypackage/{name}" for name in files} | identity.code_of(ROOT / "o2td3.py").keys()
    script = package / "tasks" / "mymethod.py"  # which Python starts as a file, and so finds what lies beside it
    script.write_text("import beside\n")
    assert identity.code_of(script).keys() == {"mypackage/tasks/mymethod.py", "mypackage/tasks/beside.py"}


def test_what_lies_beside_a_task_hides_none_of_the_projects_code(tmp_path):
    """Python imports the project's own, which comes first in its path."""
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "nn.py").write_text("another = 1\n")
    (tmp_path / "mytask.py").write_text("import common.nn\n")
    alone, beside = (identity.code_of(ROOT / "o2td3.py", *more) for more in ((), (tmp_path / "mytask.py",)))
    assert beside["common/nn.py"] == alone["common/nn.py"]


def test_a_checkpoint_that_other_code_cannot_read_stays_the_first_codes(begin, tmp_path):
    """An edit of the networks is refused, and undoing it is enough: args.json is what it was."""
    begin().save("bc", 3, False, {"net": torch.nn.Linear(2, 3), "stepper": Stepper(None, torch.device("cpu"))})
    before = json.loads((tmp_path / "run" / "args.json").read_text())
    edited = begin({"mine.py": "3"}, go_on=True)
    with pytest.raises(UserError, match=r"bc.pt does not fit the changed code \(size mismatch for .*\); undo"):
        edited.restore("bc", {"net": torch.nn.Linear(2, 4)}, torch.device("cpu"))
    assert json.loads((tmp_path / "run" / "args.json").read_text()) == before
    assert begin().restore("bc", {"net": torch.nn.Linear(2, 3)}, torch.device("cpu")) == (3, False)
