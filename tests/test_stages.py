"""A script declares what it is made of: a copy under another name works wherever scripts are named."""

import ast
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import o2sac
import offline
from benchmarks import protocol
from benchmarks import steps as benchmark
from common import cli, policies, stages
from common.cli import UserError
from common.identity import ROOT
from common.run import run_name
from experiments import ablations, constraint, harness, q_stability
from tests.conftest import TINY
from tests.test_pipeline import SMALL


@pytest.fixture
def mymethod(tmp_path):
    """A copy of O2SAC in a folder of the user's, with a stage's name of its own."""
    path = tmp_path / "mymethod.py"
    source = (ROOT / "o2sac.py").read_text()
    path.write_text(source.replace('Stage("align", "align_steps", ', 'Stage("sort", "align_steps", '))
    return path


def test_a_copy_is_found_by_its_path(mymethod, monkeypatch):
    script = stages.online(str(mymethod))
    assert script.Args is not o2sac.Args and stages.online(str(mymethod)) is script
    assert stages.online("o2sac") is o2sac
    assert [stage.name for stage in stages.stages_of(script.Args())] == ["reevaluate", "sort", "finetune"]
    monkeypatch.chdir(mymethod.parent)
    assert stages.online("mymethod") is script


def test_what_a_copy_lacks_is_named(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("class Args: ...\nSTAGES = ()\n")
    with pytest.raises(UserError, match=r"mine.py lacks PRESETS, FAMILIES, KIND, Agent, Optimizers, main; .*extend.md"):
        stages.online(str(path))
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_that_name\n")
    words = "broken.py cannot be imported: ModuleNotFoundError: .*, broken.py line 1; install what it needs"
    with pytest.raises(UserError, match=words):
        stages.online(str(path))
    path.write_text("raise MemoryError\n")
    with pytest.raises(MemoryError):  # see `cli.run`
        stages.online(str(path))
    with pytest.raises(UserError, match="there is no script nowhere: neither .*baselines/nowhere.py, nor nowhere.py"):
        stages.online("nowhere")


@pytest.mark.parametrize(("old", "new", "words"), [
    ('KIND = "squashed_gaussian"', 'KIND = "gausian"', "KIND has to be one of .*deterministic, not gausian"),
    ('"align_steps", alignment_step', '"aline_steps", alignment_step', r"has no aline_steps \(of the stage sort\)"),
    ('"fine-tuned", "eval_every"', '"fine-tuned", "eval_evry"', r"no eval_evry \(of the stage finetune\)"),
    ('ABLATIONS = ("reevaluate",', 'ABLATIONS = ("reevalute",', r"no reevalute \(of ABLATIONS\)"),
    ('    "constrain", "online_steps",', '    "constrian", "online_steps",', r"no constrian \(of FINETUNING_ARGS\)"),
    ("STAGES = (REEVALUATE, ALIGN, FINETUNE)", "STAGES = ()", "a tuple of one Stage or more"),
    ("STAGES = (REEVALUATE, ALIGN, FINETUNE)", "STAGES = ('align', FINETUNE)", "a tuple of one Stage or more"),
    ("STAGES = (REEVALUATE, ALIGN, FINETUNE)", "STAGES = (REEVALUATE, ALIGN)", "last of its STAGES .* named finetune"),
    ("PRESETS = {", "PRESET = {", "mymethod.py lacks PRESETS"),
])  # fmt: skip
def test_what_a_copy_declares_wrongly_is_named(mymethod, old, new, words):
    text = mymethod.read_text()
    assert text.count(old) == 1
    mymethod.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=f"mymethod.py.*{words}.*extend.md|{words}.*extend.md"):
        stages.online(str(mymethod))


def test_a_copy_that_is_started_itself_says_what_it_lacks(mymethod):
    mymethod.write_text(mymethod.read_text().replace('KIND = "squashed_gaussian"', ""))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, mymethod, "--preset", "demo"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.endswith("mymethod.py lacks KIND; see the foot of o2sac.py, and docs/extend.md\n")


@pytest.mark.parametrize("folder", [".", "ideas.v2"])
def test_a_name_with_dots_is_a_name_too(folder, tmp_path, monkeypatch):
    """Inside the project, where files are imported as its modules, as well as elsewhere."""
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    path = tmp_path / folder / "my.method-v2.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text((ROOT / "o2td3.py").read_text())
    assert stages.online(str(path)).KIND == "deterministic"
    monkeypatch.chdir(path.parent)
    assert stages.online("my.method-v2") is stages.online("my.method-v2.py") is stages.online(str(path))


def test_a_bare_name_is_the_projects_wherever_it_is_typed(tmp_path, monkeypatch):
    """In baselines/ lies an iql.py that is no offline algorithm."""
    monkeypatch.chdir(ROOT / "baselines")
    assert stages.find("iql", "offline") == ROOT / "offline" / "iql.py"
    assert stages.find("iql.py", "offline") == ROOT / "baselines" / "iql.py"
    monkeypatch.chdir(tmp_path)
    assert stages.find("iql.py", "offline") == ROOT / "offline" / "iql.py"


def test_experiments_take_a_copy(mymethod):
    args, script = harness.Args(algorithms=(str(mymethod),)), str(mymethod)
    runs = ablations.settings(args, script, 0)
    assert list(runs) == ["full", "no reevaluate", "no align", "no constrain", "naive"]
    assert runs["no constrain"].shared == ("reevaluate", "sort") and runs["no reevaluate"].base is None
    harness.check_shared(args, runs["no constrain"])
    assert "mymethod-no-constrain__" in harness.folder(args, runs["no constrain"]).name
    assert str(mymethod) == str(harness.file_of(script))
    assert constraint.threshold_flags(args, runs["full"], 10)[0] == "--kl-threshold-start"
    start = q_stability.settings(args, script, 0)["with re-evaluation"]
    assert "__mymethod-start__" in harness.folder(args, start).name
    harness.check_shared(args, start)


@pytest.mark.parametrize(
    ("script", "parts"),
    [("o2sac", ["reevaluate", "align", "constrain"]), ("o2td3", ["reevaluate", "align", "constrain"]),
     ("o2ppo", ["reevaluate", "constrain"])],
)  # fmt: skip
def test_each_part_of_the_method_is_left_out(script, parts):
    args = harness.Args()
    runs = ablations.settings(args, script, 0)
    assert list(runs) == ["full", *(f"no {part}" for part in parts), "naive"]
    assert all(harness.trained_for(args, spec) is None for spec in runs.values())  # the preset's policy, which ships
    names = {setting: harness.parsed(args, spec) for setting, spec in runs.items()}
    assert run_name(names["naive"]).count("-no-") == len(parts)
    for spec in runs.values():
        if spec.base:
            harness.check_shared(args, spec)
    if "no align" in runs:
        assert runs["no align"].shared == ("reevaluate",)


def test_benchmarks_take_a_copy(mymethod):
    whole = benchmark.chosen(str(mymethod))
    assert whole == [f"{mymethod}-{stage}" for stage in ("reevaluate", "sort", "finetune")]
    assert benchmark.chosen(whole[1]) == [whole[1]] and benchmark.chosen("iql") == ["iql"]
    with pytest.raises(UserError, match="no script o2sac-update"):
        benchmark.chosen("o2sac-update")
    data = benchmark.random_data(benchmark.Args(transitions=500), torch.device("cpu"))
    assert benchmark.make_step(whole[1], data, compile=False)()["aligned_loss"].isfinite()
    flags = protocol.command_line(protocol.Args(script=str(mymethod), fraction=0.1))
    assert flags[flags.index("--exp-name") + 1] == "mymethod-0.1" and "--align-steps" in flags


def test_the_estimate_counts_what_is_run():
    args = o2sac.Args(reevaluate_steps=7, align_steps=8, online_steps=9, align=False)
    assert [stage.number(args) for stage in o2sac.STAGES] == [7, 0, 9]
    ppo = stages.online("o2ppo")
    args = ppo.Args(online_steps=20_480, rollout_steps=2_048, update_epochs=5)
    assert ppo.STAGES[-1].number(args) == 50


def test_schedules_reach_a_step_as_tensors():
    schedule = stages.Schedules({"x": lambda step: 2.0 * step, "y": lambda step: -1.0}, torch.device("cpu"))
    x = schedule.tensors["x"]
    schedule.fill(3)
    assert x == 6 and schedule.scalars() == {"charts/x": 6.0, "charts/y": -1.0}
    stages.Schedules({"x": lambda step: 1 / step}, torch.device("cpu"))  # the first step is 1
    with pytest.raises(UserError, match="the schedule x has to be a function of the step"):
        stages.Schedules({"x": 3.0}, torch.device("cpu"))


def test_a_stage_is_evaluated_logged_and_probed_as_its_arguments_say(data, monkeypatch):
    """And the returns of its last evaluation are known to what compares policies start by start."""
    asked = []

    def train(run, name, make_step, steps, state, *, evaluate, **more):
        asked.append(dict(name=name, steps=steps, state=set(state), **more))
        return asked[-1] | {"found": evaluate and evaluate(True)}

    monkeypatch.setattr(stages.loop, "train", train)
    agent = SimpleNamespace(act="act")
    evaluator = SimpleNamespace(scalars=lambda *given: {"score": given}, last=np.array([3.0, 11.0]))
    run = SimpleNamespace(
        args=o2sac.Args(reevaluate_steps=70, align_steps=80, align_eval_every=9, log_every=4), auto={}
    )
    for stage in (o2sac.REEVALUATE, o2sac.ALIGN):
        run.last_returns = []
        stages.train(run, stage, data, agent, {"critic_optimizer": 1}, "probe", evaluator)
        aligns = stage is o2sac.ALIGN
        assert asked[-1].items() >= dict(
            name=stage.name, steps=80 if aligns else 70, state={"agent", "critic_optimizer"}, log_every=4,
            probe="probe", evaluate_every=9 if aligns else 0, plateau=None,
        ).items()  # fmt: skip
        assert run.last_returns == ([3.0, 11.0] if aligns else []) and run.auto == {}


def test_a_copy_runs_for_several_seeds(mymethod, run_script, tmp_path, monkeypatch):
    """Its stages are in the table by the words that it declares, and the seeds' table shows what it evaluates."""
    mymethod.write_text(mymethod.read_text().replace('"aligned", "align_eval_every"', '"sorted", "align_eval_every"'))
    script = stages.online(str(mymethod))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    flags = [*SMALL, *TINY, "--run-dir", tmp_path / "runs", "--num-seeds", "2", "--online-steps", "90"]
    code, out, err = run_script(script, *flags)
    assert code == 0, err
    assert "mymethod from cql on hopper-medium-demo, 2 of 2 seeds" in out and "sorted" in out
    [said] = (tmp_path / "runs").glob("*__mymethod__cql__1/output.txt")
    assert "sorted" in said.read_text() and "estimated time" in said.read_text()
    assert dataclasses.asdict(script.Args())["exp_name"] == "mymethod"


def test_an_offline_algorithm_of_ones_own_is_found_by_its_file(tmp_path, run_script):
    path = tmp_path / "mybc.py"
    path.write_text((ROOT / "offline" / "bc.py").read_text())
    flags = [*SMALL, *TINY, "--run-dir", tmp_path / "runs", "--online-steps", "90", "--offline", path]
    code, out, err = run_script(o2sac, *flags)
    assert code == 0, err
    assert "offline policy: mybc, 4 steps" in out and "estimated time" in out
    assert {folder.name for folder in (tmp_path / "runs").iterdir()} == {
        "hopper-medium-demo__mybc-4__0", "hopper-medium-demo__o2sac__mybc__0"
    }  # fmt: skip


def test_what_an_offline_algorithm_lacks_is_named_before_anything_is_written(tmp_path, run_script):
    path = tmp_path / "mine.py"
    path.write_text((ROOT / "offline" / "bc.py").read_text().replace("def train(", "def fit("))
    code, _, err = run_script(o2sac, *SMALL, *TINY, "--run-dir", tmp_path / "runs", "--offline", path)
    assert code == 2 and "mine.py lacks train; offline/bc.py" in err and not (tmp_path / "runs").exists()
    code, _, err = run_script(o2sac, *SMALL, *TINY, "--run-dir", tmp_path / "runs", "--offline", "nowhere.py")
    assert code == 2 and "there is no script nowhere.py" in err


@pytest.mark.parametrize("name", ["o2sac", "o2td3", "o2ppo"])
def test_what_fine_tuning_alone_reads_is_read_by_no_other_stage(name):
    """Runs that differ in it share the stages before, which would be another run's if one of them read it."""
    script = stages.online(name)
    tree = ast.parse(Path(script.__file__).read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    waiting = ["Agent", *(stage.make_step.__name__ for stage in script.STAGES[:-1])]
    seen, read = {"Args", "Optimizers"}, set()  # a learning rate is in no checkpoint
    while waiting:
        if (called := waiting.pop()) not in seen and called in functions:
            seen.add(called)
            nodes = list(ast.walk(functions[called]))
            waiting += [node.id for node in nodes if isinstance(node, ast.Name)]
            read |= {ast.unparse(node).removeprefix("args.") for node in nodes if isinstance(node, ast.Attribute)}
    assert {"gamma", "batch_size"} & read
    assert not read & set(script.FINETUNING_ARGS)
    names = list(script.Args.__annotations__)
    below = names[names.index("constrain") :]  # the section of fine-tuning
    assert set(script.FINETUNING_ARGS) == {*below, "probe_every"}


@pytest.mark.parametrize(("old", "new", "where"), [
    ("align_steps=20_000,", "aline_steps", "'quick'"), ("critics=1,", "critix", "'antmaze'"),
])  # fmt: skip
def test_a_preset_of_an_argument_that_is_not_there_is_named(tmp_path, old, new, where):
    (path := tmp_path / "mine.py").write_text((ROOT / "o2sac.py").read_text().replace(old, f"{new}=1,", 1))
    script = stages.online(str(path))
    with pytest.raises(UserError, match=rf"mine.py: Args has no {new}, which {where} sets"):
        cli.parse(script.Args, script.PRESETS, script.FAMILIES, ["--preset", "demo"])


def test_critics_of_another_shape_cannot_go_on_with_the_offline_ones(tmp_path):
    """A third critic is the user's; the naive switch needs two."""
    source = (ROOT / "o2td3.py").read_text().replace("ensemble_mlp(2, ", "ensemble_mlp(3, ")
    (path := tmp_path / "three.py").write_text(source.replace("n: int = 2", "n: int = 3"))
    script = stages.online(str(path))
    policy = policies.read(ROOT / "datasets/policies/hopper-medium-demo__td3_bc.pt")

    def check(*argv):
        argv = ["--preset", "demo", *argv]
        offline.check_critic(cli.parse(script.Args, script.PRESETS, script.FAMILIES, argv), policy)

    with pytest.raises(UserError, match=r"the critic of td3_bc, .* does not fit .*size mismatch.*--critic-init random"):
        check("--no-reevaluate")
    check()
    check("--no-reevaluate", "--critic-init", "random")


@pytest.mark.parametrize("policy", ["td3_bc", "iql", "cql"])
@pytest.mark.parametrize("script", ["o2sac", "o2td3"])
def test_critics_of_a_policy_of_another_kind_go_on(script, policy):
    """The naive switch from every policy that ships; the actor is handed on later."""
    script = stages.online(script)
    argv = ["--preset", "demo", "--offline", policy, "--no-reevaluate"]
    found = policies.read(ROOT / f"datasets/policies/hopper-medium-demo__{policy}.pt")
    offline.check_critic(cli.parse(script.Args, script.PRESETS, script.FAMILIES, argv), found)
