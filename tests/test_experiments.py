"""The analysis on runs made up so that the answers are known; the scheduler with runs that die."""

import dataclasses
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from rliable import metrics

import offline
from common import cli, pretrain, stages
from common.cli import UserError
from common.datasets import load
from common.errors import Interrupted
from common.identity import code_of
from common.log import read_rows
from common.run import plain
from experiments import (
    ablations,
    alignment_variants,
    analysis,
    comparison,
    constraint,
    critic,
    dimension,
    harness,
    matrix,
    q_stability,
    reference,
)
from experiments.harness import Spec
from offline import td3_bc

TINY = ("--reevaluate-steps", "10", "--align-steps", "10", "--online-steps", "60",
        "--learning-starts", "20", "--eval-every", "30", "--eval-episodes", "1", "--no-compile",
        "--regime-episodes", "0")  # fmt: skip


def made_up_run(folder, offline, rows):
    folder.mkdir(parents=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(str(row.get(name, "")) for name in names) for row in rows]
    (folder / "progress.csv").write_text("\n".join([",".join(names), *lines]) + "\n")
    (folder / "result.json").write_text(json.dumps({"offline": offline}))
    return folder


def test_summary(tmp_path):
    rows = [{"stage": "finetune", "step": 10 * (i + 1), "charts/score": s} for i, s in enumerate((40, 20, 50, 60))]
    rows.insert(0, {"stage": "align", "step": 99, "align/score": 1.0})
    found = analysis.summary(made_up_run(tmp_path / "a", 30.0, rows))
    assert found["final"] == pytest.approx((20 + 50 + 60) / 3)
    assert found["gain"] == pytest.approx((20 + 50 + 60) / 3 - 30)
    assert found["area"] == pytest.approx((35 + 30 + 35 + 55) / 4)  # trapezoids from the offline score on
    assert found["drop"] == 10 and found["start"] == 30
    path = tmp_path / "a" / "result.json"
    path.write_text(json.dumps({"offline": 30.0, "start": 55.0}))  # after alignment
    assert analysis.summary(path.parent) == found | {"start": 55.0}


def test_no_drop_is_zero(tmp_path):
    run = made_up_run(tmp_path / "a", 30.0, [{"stage": "finetune", "step": 10, "charts/score": 31}])
    assert analysis.summary(run)["drop"] == 0


def test_a_panel_shows_where_no_run_was_updated_yet(tmp_path):
    rows = [{"stage": "finetune", "step": step, "charts/score": 31} for step in (1_000, 2_000, 3_000)]
    groups = {name: [made_up_run(tmp_path / name, 30.0, rows)] for name in ("early", "late")}
    for name, waiting in (("early", 1_500), ("late", 2_000)):
        (tmp_path / name / "args.json").write_text(json.dumps({"learning_starts": waiting}))
    _, [panel] = analysis.panels(["a task"])
    analysis.draw_curves(panel, groups)
    [span] = [patch for patch in panel.patches if patch.get_label() == "no update yet"]
    assert (span.get_x(), span.get_width()) == (0, 1_500)
    (tmp_path / "early" / "args.json").write_text("{}")  # it rolls out first, and has no such argument
    _, [panel] = analysis.panels(["a task"])
    analysis.draw_curves(panel, groups)
    assert not panel.patches


def test_interval_is_an_interquartile_mean():
    found = analysis.interval({"a": np.array([1.0, 2, 3, 4, 5, 6, 7, 100]), "b": np.full(4, 3.0)}, reps=500)
    iqm, low, high = found["a"]
    assert iqm == pytest.approx(4.5) and low < 4.5 < high
    assert found["b"] == (3.0, 3.0, 3.0)


def test_one_run_has_no_interval():
    found = analysis.interval({"one": np.array([3.0]), "two": np.array([3.0, 5.0])}, reps=50)
    assert analysis.number(found["one"]) == "3.0" and analysis.number(found["two"]) == "4.0 [3.0, 5.0]"
    finals = {name: {"a task": [value]} for name, value in (("a", 2.0), ("b", 1.0))}
    assert analysis.number(comparison.probabilities(finals, ["a"], ["b"])["a", "b"]) == "1.0"


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 11])
def test_statistics_are_those_of_rliable(n):
    rng = np.random.default_rng(n)
    x, y = rng.integers(0, 5, (n, 3)).astype(float), rng.integers(0, 5, (n + 2, 3)).astype(float)  # with ties
    assert analysis.middle(x) == pytest.approx(metrics.aggregate_iqm(x))
    assert analysis.middle(x, 0) == pytest.approx([metrics.aggregate_iqm(column) for column in x.T])
    assert analysis.improvement(x, y) == pytest.approx(metrics.probability_of_improvement(x, y))


def test_a_reference_that_never_moves_is_not_compared():
    args = harness.Args()
    assert list(reference.settings(args, "o2sac", 0)) == ["best so far", "every 1,000 steps", "every 5,000 steps",
                                                          "adaptive"]  # fmt: skip
    paper = dataclasses.replace(args, scale="paper")
    assert "every 10,000 steps" in reference.settings(paper, "o2sac", 0)
    assert "every 2,500 steps" in reference.settings(paper, "o2ppo", 0)  # the paper's, which rollouts of 2,048 can keep


@pytest.mark.parametrize(
    ("experiment", "script", "flags"),
    [(reference, "o2sac", "--reference adaptive"), (critic, "o2td3", "--warmup-steps=5000"),
     (alignment_variants, "o2sac", "--align-restore"), (ablations, "o2td3", "--no-align"),
     (constraint, "o2sac", "--no-constrain"), (constraint, "o2ppo", "--beta-start 2")],
)  # fmt: skip
def test_what_an_experiment_varies_is_not_set_for_all_its_runs(experiment, script, flags):
    with pytest.raises(UserError, match=f"sets {flags.replace('=', ' ').split()[0]} itself"):
        experiment.settings(experiment.Args(run_flags=flags), script, 0)


@pytest.mark.parametrize("n", [700, 10_000])
def test_a_warm_up_teaches_a_critic_and_leaves_time_for_a_policy(n):
    args = critic.Args(run_flags="--online-steps 10000 --learning-starts 700", warmup_steps=n)
    with pytest.raises(UserError, match="updates begin after 700 steps and end at 10,000; see --warmup-steps"):
        critic.settings(args, "o2sac", 0)


def test_the_papers_beta_is_the_run_that_others_share_stages_with():
    runs = constraint.settings(harness.Args(scale="paper"), "o2ppo", 0)
    assert runs["β 1"] == harness.full(harness.Args(scale="paper"), "o2ppo", 0)


@pytest.mark.parametrize("script", ["o2sac", "o2td3"])
def test_a_multiplier_at_rest_and_one_ten_times_as_fast_differ_from_the_method_in_its_rate_alone(script):
    args = harness.Args(scale="paper")
    runs = constraint.settings(args, script, 0)
    own = vars(harness.parsed(args, runs["τ × 1"]))
    for name, rate in {"λ's rate × 0": 0.0, "λ's rate × 10": 5e-4}.items():
        other = vars(harness.parsed(args, runs[name]))
        assert {key for key in own if own[key] != other[key]} == {"exp_name", "lagrange_lr"}
        assert other["lagrange_lr"] == pytest.approx(rate)


def test_a_script_without_a_multipliers_rate_is_asked_for_its_threshold_alone(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text((harness.ROOT / "o2td3.py").read_text().replace("lagrange_lr", "dual_rate"))
    assert list(constraint.settings(harness.Args(), str(mine), 0)) == [f"τ × {x:g}" for x in constraint.FACTORS]


@pytest.mark.parametrize("lines", [2, 12])
def test_names_of_lines_leave_the_axis_its_own(lines):
    figure, [panel] = analysis.panels(["a title that is as long as a policy's whole name"])
    figure.suptitle("two lines\nof it")
    for i in range(lines):
        panel.plot([0, 1], [0, i], label=f"setting {i}")
    panel.set_xlabel("environment steps")
    analysis.legend(panel)
    figure.canvas.draw()
    assert panel.get_legend().get_window_extent().y1 < panel.xaxis.label.get_window_extent().y0


def test_runs_of_one_evaluation_are_seen():
    """A dot, and the range of the seeds as a bar; what has more is a line."""
    _, [one, two] = analysis.panels(["one", "two"])
    steps, values = np.array([0.0, 2_048, 4_096]), np.array([[1.0, 2, 3], [1, 4, 5]])
    for panel, n in ((one, 2), (two, 3)):
        analysis.draw_points(panel, {"mine": [(steps[:n], row[:n]) for row in values]}, "score")
    line, _ = one.get_lines()  # the second: the offline policies'
    [bar] = [found for found in one.collections if isinstance(found, LineCollection)]
    assert line.get_marker() == "o" and line.get_xydata().tolist() == [[2_048, 3]]
    assert bar.get_segments()[0].tolist() == [[2_048, 2], [2_048, 4]]
    assert two.get_lines()[0].get_marker() == "None"
    assert not any(isinstance(found, LineCollection) for found in two.collections)


def test_long_numbers_of_steps_are_easy_to_read():
    _, [panel] = analysis.panels(["a title"])
    analysis.draw_points(panel, {"full": [(np.array([0.0, 5e4, 1e5]), np.array([1.0, 2, 3]))]}, "score")
    panel.figure.canvas.draw()
    assert "100,000" in [label.get_text() for label in panel.get_xticklabels()]


def test_improvement():
    assert analysis.improvement(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1.0
    assert analysis.improvement(np.array([1.0]), np.array([1.0])) == 0.5
    assert analysis.improvement(np.array([0.0, 2.0]), np.array([1.0])) == 0.5


def test_jump(tmp_path):
    """Q climbs by 30 within 1,000 steps and by 40 over all; the Monte Carlo returns spread by 80, whatever Q does."""
    q, truth = {0: 100, 500: 90, 1000: 100, 2000: 130, 3000: 140}, np.linspace(0, 100, 101)
    for spread in (0, 5):
        rows = [{"stage": "finetune", "step": t, "probe/v": v, "probe/v_low": v - spread, "probe/v_high": v + spread}
                for t, v in q.items()]  # fmt: skip
        run = made_up_run(tmp_path / str(spread), 0.0, rows)
        assert q_stability.jump(run, "probe/v", 0, truth) == pytest.approx(30 / 80)
        assert q_stability.jump(run, "probe/v", 2000, truth) == pytest.approx(10 / 80)  # not what came before


@pytest.mark.parametrize(("script", "name"), [("o2td3", "probe/q_policy"), ("o2ppo", "probe/v")])
def test_a_page_of_jumps_says_whose_returns_and_whose_q_it_shows(script, name, tmp_path, monkeypatch, run_script):
    """Q goes from 300 before alignment to 350, and to 370 within 1,000 steps; π_off gets from 260 to 340."""
    scalars = [(name, 0), (f"{name}_low", -9), (f"{name}_high", 9), ("probe/q_data", -50)]
    points = [("align", 0, 300), ("align", 9, 350), ("finetune", 0, 350), ("finetune", 2000, 350),
              ("finetune", 3000, 370)]  # fmt: skip
    rows = [{"stage": stage, "step": step, "charts/score": 40} | {scalar: q + more for scalar, more in scalars}
            for stage, step, q in points]  # fmt: skip
    kept = {"offline": 50.0} | dict.fromkeys(("source", "simulator", "hardware", "eval_episodes"), "made up")
    run = made_up_run(tmp_path / "run", 50.0, rows)
    (run / "result.json").write_text(json.dumps(kept))
    panels = []
    monkeypatch.setattr(analysis, "legend", lambda panel, **_: panels.append(panel))
    monkeypatch.setattr(harness, "run_all", lambda *_: [])
    monkeypatch.setattr(harness, "finished", lambda _, specs: [run] * len(specs))
    monkeypatch.setattr(q_stability, "true_values", lambda *_: np.linspace(250, 350, 101))
    code, _, err = run_script(q_stability, "--algorithms", script, "--seeds", "1", "--out", tmp_path)
    assert code == 0, err
    text = (tmp_path / "q_stability.md").read_text()
    [header, *lines] = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
                        if line.startswith("| ")]  # fmt: skip
    for line in lines:
        found = dict(zip(header, line, strict=True))
        assert found["Monte Carlo of π_off"] == "300" and found["Q of π at the first step"] == "350"
        assert found["largest jump / spread of Monte Carlo"] == "0.25"
    assert [line[1] for line in lines] == ["with re-evaluation", "without"]
    assert "may rightly lie above them" in " ".join(text.split())
    assert "until the policy changes" in panels[0].get_ylabel()


def test_the_updates_that_are_measured_are_the_methods_first():
    """O2PPO's run ends after five rollouts, and its rates do not."""
    args = harness.Args()
    chosen = [harness.parsed(args, spec) for spec in q_stability.settings(args, "o2ppo", 0).values()]
    method = harness.parsed(args, harness.full(args, "o2ppo", 0))
    whole, *starts = (stages.online("o2ppo").STAGES[-1].schedules(a) for a in (method, *chosen))
    for name, wanted in whole.items():
        for step in range(0, chosen[0].online_steps, method.rollout_steps):
            assert [start[name](step) for start in starts] == [wanted(step)] * 2
    args = harness.Args(run_flags="--anneal-steps 50000")
    spec = q_stability.settings(args, "o2ppo", 0)["without"]
    assert harness.parsed(args, spec).anneal_steps == 50_000


@pytest.fixture
def ray_is_local(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(harness.ROOT))
    monkeypatch.setenv("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE", "1")


def test_scheduler_with_runs_that_die(tmp_path, ray_is_local):
    (tmp_path / "once.py").write_text(
        "import os, pathlib, signal\nmark = pathlib.Path(__file__).with_suffix('.mark')\n"
        "if not mark.exists():\n    mark.touch()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "mark.with_suffix('.done').touch()\n"
    )
    (tmp_path / "always.py").write_text("raise SystemExit('no more memory')\n")
    (tmp_path / "mistake.py").write_text(
        "import pathlib, sys\nwith open(__file__ + '.count', 'a') as f:\n    f.write('x')\nsys.exit(2)\n"
    )
    (tmp_path / "fine.py").write_text("import pathlib\npathlib.Path(__file__).with_suffix('.done').touch()\n")
    (tmp_path / "shared.pt").write_text("weights")
    jobs = {
        "once": ([str(tmp_path / "once.py")], [], []),
        "always": ([str(tmp_path / "always.py")], [], []),
        "mistake": ([str(tmp_path / "mistake.py")], [], []),
        "after a failure": ([str(tmp_path / "never.py")], [], ["always"]),
        "after once": ([str(tmp_path / "fine.py")], [(tmp_path / "shared.pt", tmp_path / "run" / "s.pt")], ["once"]),
    }
    failures = harness.schedule(harness.Args(retries=1), jobs)
    assert (tmp_path / "once.done").exists() and (tmp_path / "fine.done").exists()
    assert (tmp_path / "run" / "s.pt").read_text() == "weights"
    assert len(failures) == 3
    assert sum("always.py: no more memory" in failure for failure in failures) == 2
    assert sum(failure.startswith("not started") for failure in failures) == 1
    assert (tmp_path / "mistake.py.count").read_text() == "x"  # what the user has to mend is not tried again


@pytest.mark.parametrize(("address", "remedy"), [(None, "start it later"), ("1.2.3.4:5", "see --ray-address")])
def test_ray_that_does_not_start_is_said_in_a_sentence(monkeypatch, address, remedy):
    import ray

    def init(*_, **__):
        raise Exception("The current node timed out during startup.\nThis could happen because …")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UserError, match=rf"Ray does not start \(The current node timed out.*{remedy}"):
        harness.schedule(harness.Args(ray_address=address), {})


def test_a_stop_says_what_becomes_of_the_runs(monkeypatch):
    """Ctrl-C, and SIGTERM, as a cluster sends it, for which Ray has a handler of its own."""
    import ray

    def stopped(_):
        os.kill(os.getpid(), signal.SIGTERM)

    def init(*_, **__):
        signal.signal(signal.SIGTERM, lambda *_: pytest.fail("Ray's handler was called"))

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as cli.run does: it is Ctrl-C's
    shut = []
    for name, stand_in in {"init": init, "cluster_resources": lambda: {"CPU": 2}, "wait": stopped,
                           "shutdown": lambda: shut.append(True)}.items():  # fmt: skip
        monkeypatch.setattr(ray, name, stand_in)
    remote = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: "a job"))
    monkeypatch.setattr(ray, "remote", lambda _: remote)
    with pytest.raises(Interrupted, match="goes on from what they saved"):
        harness.schedule(harness.Args(), {"run": (["x.py"], [], [])})
    signal.signal(signal.SIGTERM, before)
    assert shut


def test_shared_stages_change_nothing(tmp_path, ray_is_local, monkeypatch):
    """A run that takes its first stages over from another ends with the same weights as one that trains them."""
    args = harness.Args(seeds=1, algorithms=("o2td3",), run_dir=str(tmp_path / "runs"))
    td3_bc.train(
        td3_bc.Args(env_id=args.env_id, steps=10, eval_episodes=1, run_dir=str(tmp_path), compile=False),
        load(args.env_id),
    )
    policy = str(next(tmp_path.glob("*/policy.pt")))
    base = Spec("o2td3", policy, 0, TINY)
    shared = Spec("o2td3", policy, 0, (*TINY, "--exp-name", "shared", "--mse-threshold-end", "5.0"), base)
    alone = Spec("o2td3", policy, 0, (*TINY, "--exp-name", "alone", "--mse-threshold-end", "5.0"))
    assert harness.run_all(args, [shared, alone]) == []
    weights = [torch.load(harness.folder(args, s) / "policy.pt", weights_only=True)["actor"] for s in (shared, alone)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    mine, theirs = ([{k: v for k, v in row.items() if k != "charts/SPS"} for row in
                     read_rows(harness.folder(args, s) / "progress.csv")] for s in (shared, alone))  # fmt: skip
    assert mine == theirs

    stamp = (harness.folder(args, alone) / "policy.pt").stat().st_mtime_ns
    assert harness.run_all(args, [shared, alone]) == []  # nothing is done twice
    assert (harness.folder(args, alone) / "policy.pt").stat().st_mtime_ns == stamp

    longer = dataclasses.replace(base, flags=(*TINY, "--eval-every", "20"))
    with pytest.raises(UserError, match=r"finished run with other arguments: --eval-every 30 \(now 20\); .*--run-dir"):
        harness.run_all(args, [longer])

    more = dataclasses.replace(alone, seed=1)
    with monkeypatch.context() as patch:  # a seed more, on a machine whose data are others
        patch.setattr(harness, "fingerprint", lambda data: "another")
        with pytest.raises(UserError, match=r"on other data than .* \(.*__0__demo and the data at hand\); choose"):
            harness.missing(args, [alone, more])
    assert list(harness.missing(args, [alone, more])) == [harness.folder(args, more)]
    (there := harness.folder(args, more)).mkdir()
    saved = json.loads((harness.folder(args, alone) / "args.json").read_text())
    (there / "args.json").write_text(json.dumps(saved | {"seed": 1, "made_with": saved["made_with"] | {"data": "x"}}))
    (there / "result.json").write_text("{}")
    with pytest.raises(UserError, match=r"on other data than .* \(.*__0__demo and .*__1__demo\); choose"):
        harness.missing(args, [alone, more])

    monkeypatch.setattr(harness, "code_of", lambda *files: code_of(*files) | {"o2td3.py": "edited"})
    with pytest.raises(UserError, match=r"2 finished runs are of other code .*o2td3.py changed since.*--continue"):
        harness.run_all(args, [shared, alone])
    assert harness.run_all(dataclasses.replace(args, go_on=True), [shared, alone]) == []
    with pytest.raises(UserError, match="differ in gamma .* FINETUNING_ARGS"):
        harness.check_shared(args, Spec("o2td3", policy, 0, (*TINY, "--gamma", "0.9"), base))


def test_what_no_run_waits_for_is_not_trained(tmp_path):
    """As where of a page's runs those of one setting alone were kept."""
    args = harness.Args(run_dir=str(tmp_path / "runs"), out=str(tmp_path), go_on=True)
    policy = str(harness.ROOT / "datasets/policies/hopper-medium-demo__td3_bc.pt")
    base = Spec("o2td3", policy, 0)
    spec, other = (base.variant(name, "--mse-threshold-end", end) for name, end in (("one", "1.0"), ("two", "2.0")))
    here, there, whole = (harness.folder(args, s) for s in (spec, other, base))
    assert list(harness.missing(args, [spec])) == [whole, here]
    here.mkdir(parents=True)
    (here / "args.json").write_text(json.dumps(plain(harness.parsed(args, spec))))
    (here / "result.json").write_text("{}")
    assert harness.missing(args, [spec]) == {}
    assert list(harness.missing(args, [spec, other])) == [whole, there]
    assert list(harness.missing(args, [base, spec])) == [whole]


def test_two_runs_that_would_be_one_are_refused(tmp_path):
    """A copy under the same name, or a flag that makes one setting another: their numbers would be one run's."""
    (copy := tmp_path / "o2td3.py").write_text((harness.ROOT / "o2td3.py").read_text())
    args = harness.Args(run_dir=str(tmp_path / "runs"), out=str(tmp_path))
    with pytest.raises(UserError, match="two runs of this experiment would be one, .*o2td3__td3_bc__0__demo"):
        harness.missing(args, [Spec("o2td3", "td3_bc", 0), Spec(str(copy), "td3_bc", 0)])
    args = dataclasses.replace(args, run_flags="--no-reevaluate")
    with pytest.raises(UserError, match="two runs of this experiment would be one, .*o2td3-no-reevaluate"):
        harness.missing(args, [Spec("o2td3", "td3_bc", 0), Spec("o2td3", "td3_bc", 0, ("--no-reevaluate",))])


def test_runs_of_several_tasks_wait_in_one_queue(tmp_path, monkeypatch):
    """A core that is through with one task goes on with the next."""
    queues = []
    monkeypatch.setattr(harness, "schedule", lambda args, jobs: queues.append(jobs) or [])
    args = harness.Args(run_dir=str(tmp_path / "runs"), out=str(tmp_path))
    (file := tmp_path / "another.hdf5").symlink_to(harness.ROOT / "datasets/hopper-medium-demo.hdf5")
    tasks = {"hopper-medium-demo": args, "hopper-medium-v2": dataclasses.replace(args, dataset_path=str(file))}
    policy = str(harness.ROOT / "datasets/policies/hopper-medium-demo__td3_bc.pt")
    on_task = {t: (dataclasses.replace(here, env_id=t), [Spec("o2td3", policy, 0)]) for t, here in tasks.items()}
    with pytest.raises(UserError, match="no run came to its end"):
        harness.run_tasks(on_task)
    assert [list(jobs) for jobs in queues] == [[harness.folder(here, spec) for here, [spec] in on_task.values()]]


def test_flags_of_runs_that_cannot_be_are_refused_before_any_run(tmp_path):
    spec = Spec("o2td3", "iql", 0)
    with pytest.raises(UserError, match="cannot be read"):
        harness.command_line(harness.Args(run_flags='--gamma "0.9'), spec)
    with pytest.raises(UserError, match="sets --online-steps itself"):
        q_stability.settings(q_stability.Args(run_flags="--gamma 0.9 --online_steps=5"), "o2td3", 0)
    with pytest.raises(UserError, match="iql goes on with the Q and V of iql"):
        harness.run_all(harness.Args(out=str(tmp_path), run_dir=str(tmp_path / "runs"), run_flags="--gamma 0.9"),
                        [Spec("iql", "iql", 0)])  # fmt: skip
    assert not (tmp_path / "runs").exists()
    with pytest.raises(UserError, match="fewer than 9999 CPUs a run"):
        harness.schedule(harness.Args(cpus_per_run=9999), {})
    (file := tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to the folder .*; choose --out"):
        harness.run_all(harness.Args(out=str(file / "pages")), [spec])


@pytest.mark.parametrize(
    ("spec", "words"),
    [(Spec("o2td3", "nothing", 0), "there is no checkpoint nothing; give --offline the name of a file in offline/"),
     (Spec("o2td3", "POLICY", 0, ("--no-reevaluate",)), "has no critic, which --no-reevaluate needs"),
     (Spec("baselines/iql.py", "cql", 0), "cql does not hold what iql goes on with")],
)  # fmt: skip
def test_where_a_run_cannot_start_from_is_said_before_anything_is_trained(spec, words, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "schedule", lambda *_: pytest.fail("something was started"))
    args = harness.Args(run_dir=str(tmp_path / "runs"), out=str(tmp_path))
    if spec.offline == "POLICY":
        found = torch.load(harness.ROOT / "datasets/policies/hopper-medium-demo__td3_bc.pt", weights_only=True)
        torch.save({key: value for key, value in found.items() if key != "critic"}, tmp_path / "policy.pt")
        spec = dataclasses.replace(spec, offline=str(tmp_path / "policy.pt"))
    with pytest.raises(UserError, match=words):
        harness.run_all(args, [spec])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", ["o2sac", "o2td3"])
def test_threshold_is_scaled_at_both_ends(script):
    args = harness.Args()
    flags = constraint.threshold_flags(args, Spec(script, "cql", 0), 10)
    plain, scaled = (harness.parsed(args, Spec(script, "cql", 0, tuple(f))) for f in ([], flags))
    schedules = stages.online(script).STAGES[-1].schedules
    for step in (0, 5_000, 10**6):
        [(_, at)], [(_, ten_times)] = (schedules(a).items() for a in (plain, scaled))
        assert ten_times(step) == pytest.approx(10 * at(step))


@pytest.mark.parametrize(
    ("script", "own"), [("o2sac", {"per_dimension": True}), ("o2td3", {"align_radius": "uniform"}), ("o2ppo", {})]
)
def test_arms_of_many_dimensions(script, own):
    args = dimension.Args(env_id="hopper-medium-demo", offline="bc", run_flags="--eval-every 77")
    runs = dimension.settings(args, script, 3)
    policy = harness.offline_policy(args, runs["the paper's"])
    assert policy.parts[-2:] == ("hopper-medium-demo__bc__3__demo", "policy.pt")
    for spec in filter(lambda spec: spec.base, runs.values()):
        harness.check_shared(args, spec)
    arms = {label: vars(harness.parsed(args, spec)) for label, spec in runs.items()}
    paper, scaled = arms.pop("the paper's"), arms.pop("rewards × 0.1")
    changes = {"reward_scale": 0.1} | ({"alpha": 0.02} if script == "o2sac" else {})

    def differ(arm):
        return {name: arm[name] for name in paper if arm[name] != paper[name] and name != "exp_name"}

    assert (paper["seed"], paper["offline"], paper["eval_every"]) == (3, "bc", 77) and differ(scaled) == changes
    assert [differ(arm) for arm in arms.values()] == ([own, own | changes] if own else [])


@pytest.mark.parametrize(
    "flags", ["", "--matmul bfloat16 --eval-episodes 3 --no-compile", "--offline-steps 7 --hidden 8 8 --continue"]
)
@pytest.mark.parametrize(
    ("script", "algorithm"), [("o2td3", "iql"), ("o2ppo", "bc"), ("off2on", "cql"), ("wsrl", "cal_ql")]
)
def test_a_policy_is_trained_with_the_arguments_of_the_run_that_starts_from_it(script, algorithm, flags):
    args, spec = harness.Args(env_id="hopper-medium-v2", run_flags=flags), Spec(script, algorithm, 3)
    path, (file, *words) = harness.trained_for(args, spec)
    theirs, wanted = offline.algorithm_args(harness.parsed(args, spec))
    assert file == theirs.__file__ and cli.parse(theirs.Args, theirs.PRESETS, theirs.FAMILIES, words) == wanted
    assert path == harness.offline_policy(args, spec) == Path(wanted.run_dir) / pretrain.run_name(wanted) / "policy.pt"


@pytest.mark.parametrize(
    ("flags", "name", "title"),
    [
        ("", "hopper-medium-demo__iql.pt", "iql"),
        ("--offline here.pt", "here.pt", "here"),
        ("--offline runs/mine__0/policy.pt", "policy.pt", "mine__0"),
        ("--offline best.pt", "best.pt", harness.ROOT.name),
    ],
)
def test_a_policy_that_is_there_is_not_trained(flags, name, title):
    args, spec = harness.Args(run_flags=flags), Spec("o2ppo", "iql", 0)
    assert harness.trained_for(args, spec) is None and harness.offline_policy(args, spec).name == name
    assert analysis.title_of(args, spec) == f"o2ppo from {title}"


@pytest.mark.parametrize("script", ["o2sac", "o2td3"])
def test_variants_of_alignment_differ_in_it_alone(script):
    args = alignment_variants.Args()
    runs = alignment_variants.settings(args, script, 0)
    chosen = {name: vars(harness.parsed(args, spec)) for name, spec in runs.items()}
    paper = chosen.pop("the paper's")
    changes = {name: {k: v for k, v in found.items() if v != paper[k] and k != "exp_name"}
               for name, found in chosen.items()}  # fmt: skip
    assert changes == {
        "actor's rate × 0.1": {"align_actor_lr": pytest.approx(1e-5)}, "penalty": {"align_constrain": True},
        "actor frozen": {"align_actor_lr": 0}, "from π_off": {"align_restore": True}, "none": {"align": False},
    }  # fmt: skip
    assert len({harness.folder(args, spec) for spec in runs.values()}) == len(runs)
    for name, spec in runs.items():
        if spec.base:
            harness.check_shared(args, spec)
            assert spec.shared == (("reevaluate", "align") if name == "from π_off" else ("reevaluate",))
    assert runs["none"] == ablations.settings(args, script, 0)["no align"]  # one run for both
    with pytest.raises(UserError, match="o2ppo has no --align-restore"):
        alignment_variants.settings(args, "o2ppo", 0)
    with pytest.raises(UserError, match="leave --no-align out"):
        alignment_variants.settings(alignment_variants.Args(run_flags="--no-align"), script, 0)


@pytest.mark.parametrize(
    ("experiment", "flags", "words"),
    [
        (ablations, ["--algorithms", "awac"], "awac has no ABLATIONS, parts that can be left out; see --algorithms"),
        (reference, ["--algorithms", "awac"], "awac has no --reference interval --reference-interval 1000, which "),
        (reference, ["--run-flags=--num-seeds 5"], "this experiment sets --num-seeds itself"),
        (matrix, ["--run-flags=--offline bc"], "this experiment sets --offline itself"),
        (reference, ["--run-flags=--gama 0.9"], "o2sac has no --gama 0.9, which this experiment gives to it"),
        (critic, ["--run-flags=--tau 1 --align-steps=x"], "o2sac cannot read a value in '--run-flags=--tau 1 --align-"),
    ],
)
def test_what_a_script_has_not_is_said_before_anything_runs(experiment, flags, words, tmp_path):
    command = [sys.executable, experiment.__file__, *flags, "--run-dir", str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {words}") and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ["o2sac", "o2td3"])
def test_critics_share_the_stages_that_they_have(script):
    args = critic.Args(run_flags="--online-steps 10000 --learning-starts 700")
    runs = critic.settings(args, script, 0)
    chosen = {name: harness.parsed(args, spec) for name, spec in runs.items()}
    assert len({harness.folder(args, spec) for spec in runs.values()}) == 2 * len(critic.STARTS)
    assert {name: found.warmup_steps for name, found in chosen.items() if "warm" not in name} == dict.fromkeys(
        critic.STARTS, 0
    )
    assert {found.warmup_steps for name, found in chosen.items() if "warm" in name} == {700 + 2_000}
    assert [name for name, found in chosen.items() if found.critic_init == "random"] == [
        "random",
        "random, warm-up of 2,700",
    ]
    assert all(found.constrain for found in chosen.values())
    shared = {name: spec.shared for name, spec in runs.items() if spec.base}
    both = ("reevaluate", "align")
    assert shared == {"re-evaluated": both[:1], "re-evaluated, warm-up of 2,700": both[:1],
                      "aligned, warm-up of 2,700": both}  # fmt: skip
    for spec in runs.values():
        if spec.base:
            harness.check_shared(args, spec)
    assert runs["aligned"] == harness.full(args, script, 0)
    with pytest.raises(UserError, match="o2ppo has no --critic-init"):
        critic.settings(args, "o2ppo", 0)
    with pytest.raises(UserError, match="leave --no-reevaluate out"):
        critic.settings(critic.Args(run_flags="--no-reevaluate"), script, 0)


@pytest.mark.parametrize(
    "name",
    [
        "matrix",
        "ablations",
        "alignment",
        "alignment_variants",
        "budget",
        "constraint",
        "dimension",
        "q_stability",
        "reference",
        "comparison",
        "critic",
        "truth",
    ],
)
def test_every_experiment_explains_itself(name, capsys, monkeypatch):
    script = str(harness.ROOT / "experiments" / f"{name}.py")
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(script, run_name="__main__")
    text = capsys.readouterr().out
    assert stop.value.code in (0, None) and "--ray-address" in text and f"experiments/{name}.py" in text
