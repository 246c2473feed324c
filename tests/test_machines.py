"""What the machine says to a script: threads that wait, compilers and folders that do not work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import o2td3
from common import cli, nn, steps
from tests.conftest import DEMO

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    str(path.relative_to(ROOT))
    for path in [
        *ROOT.glob("*.py"),
        *(path for path in ROOT.glob("[!.]*/*.py") if path.parent.name not in ("tests", "docs")),
    ]
    if "__main__" in path.read_text()
]


NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def told(script, folder, **own):
    """What those variables are where PyTorch would be loaded, with `own` ones from the user."""
    (folder / "torch.py").write_text(
        f"import os; print(*[os.environ.get(name) for name in {NAMES}], flush=True); os._exit(0)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in NAMES} | own | {"PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, ROOT / script], env=environment, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_threads_are_told_to_wait_quietly_before_pytorch_is_loaded(script, tmp_path):
    assert told(script, tmp_path) == "PASSIVE 1000"


def test_threads_wait_as_the_user_says(tmp_path):
    assert told("o2sac.py", tmp_path, OMP_WAIT_POLICY="ACTIVE") == "ACTIVE None"
    assert told("o2sac.py", tmp_path, GOMP_SPINCOUNT="5") == "PASSIVE 5"


COMPILE = """
import o2td3
from common import cli, nn, steps

import torch
steps.setup(torch.device("cpu"), 0)
step = steps.compiled(lambda: torch.arange(3).float() + 1, enabled=True)
print([step().tolist() for _ in range(2)], steps.compiler_works)
"""
RESULT = "[[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]"


def test_a_compiler_that_does_not_work_costs_speed_alone(tmp_path):
    compiler = tmp_path / "c++"
    says = "case $1 in -*version) echo c++ 13.2.0;; *) echo fatal error: no licence; exit 1; esac"
    compiler.write_text(f"#!/bin/sh\n{says}\n")
    compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True)
    said, result = done.stdout.splitlines()
    assert said == "nothing is compiled, which makes steps slower: fatal error: no licence"
    assert result == f"{RESULT} False"


def test_a_cache_folder_that_cannot_be_made_costs_the_cache_alone(tmp_path):
    (tmp_path / "file").touch()
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "cache"), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True)
    said, result = done.stdout.splitlines()
    assert str(tmp_path / "file" / "cache") in said and "is not kept" in said
    assert result == f"{RESULT} True"
    assert not list(tmp_path.glob("o2rl-compiled-*"))


def test_processors_of_other_kinds_share_no_compiled_code(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    folders = []
    for capability in ("AVX512", "AVX2", "AVX512"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda found=capability: found)
        for _ in range(2):  # once more, as a process does that this one has started
            steps.choose_cache_folder()
            folders.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folders == [folders[0]] * 2 + [folders[2]] * 2 + [folders[0]] * 2 and folders[0] != folders[2]
    assert {str(path) for path in tmp_path.iterdir()} == {folders[0], folders[2]}


SAYS = """
from common import cli
from rich.console import Console
from rich.table import Table
def main():
    table = Table("τ → 5", title="cost [/b] of π")
    for _ in range(5_000):
        print("offline → online, τ", flush=True)
    Console(markup=False).print(table)
    open(FILE, "w").write("done")
cli.run(main)
"""


def test_a_file_that_may_not_be_used_is_named(run_script, tmp_path):
    """Whatever asks for it: a name too long for the disk stands for all that the system refuses."""
    code, _, err = run_script(o2td3, *DEMO, "--offline", "x" * 300)
    assert code == 2 and err.startswith(f"error: {'x' * 300} cannot be used (File name too long)")
    code, _, err = run_script(o2td3, *DEMO, "--exp-name", "x" * 300, "--run-dir", tmp_path)
    assert code == 2 and "File name too long" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("read", [True, False])
def test_what_is_said_never_ends_a_run(encoding, read, tmp_path):
    """Neither a character that the terminal lacks, nor a terminal that was closed."""
    program = SAYS.replace("FILE", repr(str(tmp_path / "end")))
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    if read:
        out = process.communicate()[0].decode(encoding)
        assert out.startswith("offline → online, τ" if encoding == "utf-8" else "offline ? online, ?")
        assert "cost [/b]" in out and process.returncode == 0
    else:
        process.stdout.readline()
        process.stdout.close()  # with more in it than a pipe holds
        process.communicate()
    assert (tmp_path / "end").read_text() == "done"


@pytest.mark.parametrize("one_kernel", [True, False])
def test_a_pytorch_without_the_kernels_for_many_tensors_computes_the_same(one_kernel, monkeypatch):
    assert nn.ONE_KERNEL  # of the PyTorch here
    monkeypatch.setattr(nn, "ONE_KERNEL", one_kernel)
    mine, theirs = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    theirs.load_state_dict(mine.state_dict())
    optimizer = nn.Adam(mine.parameters(), 0.01, eps=1e-5)
    reference = torch.optim.Adam(theirs.parameters(), 0.01, eps=1e-5)
    for _ in range(20):
        x = torch.randn(8, 5)
        grads = torch.autograd.grad(mine(x).square().sum(), list(mine.parameters()))
        optimizer.step(nn.clip_grad_norm(grads, 0.5))
        reference.zero_grad()
        theirs(x).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), atol=1e-6, rtol=1e-5)
    target = torch.nn.Linear(5, 3)
    want = {name: 0.9 * x + 0.1 * mine.state_dict()[name] for name, x in target.state_dict().items()}
    nn.polyak(target, mine, 0.1)
    torch.testing.assert_close(target.state_dict(), want)


def test_a_pytorch_that_cannot_compile_a_step_is_said_and_costs_speed_alone(monkeypatch, capsys):
    monkeypatch.setattr(torch._dynamo, "config", object())
    assert not steps.can_compile(torch.device("cpu"))
    assert f"(this is {torch.__version__})" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mps", "meta", "xpu:0"])
def test_a_device_that_nobody_has_tried_is_refused_by_name(name):
    with pytest.raises(cli.UserError, match=f"^--device {name} is not supported: .* train on --device cpu, too$"):
        cli.resolve_device(name)


def test_pip_install_says_that_scripts_are_run_from_the_folder():
    done = subprocess.run([sys.executable, "setup.py", "egg_info"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("o2rl is not installed: ") and done.stderr.count("\n") == 1
