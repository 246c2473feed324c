"""The comparison of methods on runs made up so that the answers are known."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch

from common.cli import UserError
from experiments import analysis, comparison, harness


def made_up_run(folder, offline, scores, successes=(), **result):
    """A finished run: its scores by environment step, whether its training episodes were a success."""
    folder.mkdir(parents=True)
    rows = [("charts/score", step, score) for step, score in scores.items()]
    rows += [("charts/episodic_success", step + 1, x) for step, x in enumerate(successes)]
    lines = [
        f"finetune,{step},{value}," if name == "charts/score" else f"finetune,{step},,{value}"
        for name, step, value in rows
    ]
    (folder / "progress.csv").write_text("\n".join(["stage,step,charts/score,charts/episodic_success", *lines]) + "\n")
    fixed = {"references": [0.0, 100.0], "regime": None, "seconds": {"finetune": 120.0}, "source": "made up",
             "simulator": "a robot", "hardware": "none", "eval_episodes": 10, "measure": "score",
             "offline_steps": 5}  # fmt: skip
    (folder / "result.json").write_text(json.dumps(fixed | {"offline": offline} | result))
    return folder


def test_a_run_in_numbers(tmp_path):
    run = made_up_run(tmp_path / "a", 60.0, {10_000: 45, 20_000: 70, 40_000: 90})
    found = analysis.summary(run)
    assert found["area"] == pytest.approx(67.5) and found["drop"] == 15 and found["regret"] == pytest.approx(0.3375)
    assert found["final"] == pytest.approx(205 / 3) and found["smooth_drop"] == 0
    falling = analysis.summary(made_up_run(tmp_path / "b", 60.0, {1: 30, 2: 50, 3: 40, 4: 20, 5: 120}))
    assert found["gain"] == pytest.approx(205 / 3 - 60)
    assert falling["drop"] == 40 and falling["smooth_drop"] == pytest.approx(60 - 110 / 3)
    assert falling["regret"] == pytest.approx(np.mean([0.4, 0.7, 0.5, 0.6, 0.8, 0]))  # 120 counts as 100


def test_returns_have_no_regret(tmp_path):
    found = analysis.summary(made_up_run(tmp_path / "a", 2_000.0, {1: 2_500}, measure="return"))
    assert np.isnan(found["regret"]) and found["gain"] == 500
    assert analysis.number((found["regret"],) * 3) == "–"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds no score"),
        (b"", "holds no score"),
        (b"stage,step,charts/score\nfinetune,5,\n", "holds no score"),
        (b"stage,step,charts/score\nfinetune,5,\xff\n", "is damaged"),
        (b"stage,step,charts/score\nfinetune,5,many\n", "is damaged"),
        (b"stage,step,charts/score\nfinetune,5\n", "is damaged"),
        (b"stage,step,charts/score\nfinetune,5,1,2\n", "is damaged"),
        (b"finetune,5,1\nfinetune,6,2\n", "is damaged"),
    ],
)
def test_a_finished_run_without_its_scores_is_named(tmp_path, content, words):
    run = made_up_run(tmp_path / "a", 60.0, {8: 50})
    (run / "progress.csv").unlink()
    if content is not None:
        (run / "progress.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"{words}; delete .*folder, and the command that made the run makes it again"):
        analysis.summary(run)


def test_training_regret(tmp_path):
    """A row of O2PPO's is the mean over the episodes of a rollout."""
    maze = made_up_run(tmp_path / "a", 60.0, {8: 50}, [0, 1, 1, 0, 1, 1, 1, 1])
    assert comparison.training_regret(maze) == 0.25
    assert comparison.training_regret(made_up_run(tmp_path / "b", 60.0, {8: 50})) is None
    rollouts = made_up_run(tmp_path / "c", 60.0, {8: 50})
    header = "stage,step,charts/score,charts/episodic_success,charts/episodes"
    (rollouts / "progress.csv").write_text(f"{header}\nfinetune,4,,0.5,8\nfinetune,8,50,1,2\n")
    assert comparison.training_regret(rollouts) == pytest.approx(0.4)


def test_aggregates(monkeypatch):
    monkeypatch.setattr(comparison, "REPS", 50)
    values = {"a": {"x": [1, 2, 3], "y": [4, 5]}, "b": {"x": [6, 7], "y": [8, 9]}, "c": {"x": [1, 1], "y": []}}
    found = analysis.matrices(values)
    assert found.keys() == {"a", "b"}  # c lacks a task
    assert found["a"].tolist() == [[1, 4], [2, 5]] and found["b"].tolist() == [[6, 8], [7, 9]]
    finals = {"a": {"x": [1.0, 2], "y": [5, 6], "z": [-9]}, "b": {"x": [0.0, 0], "y": [5, 6], "z": []},
              "c": {"x": [3, 0, 3], "y": [], "z": []}, "d": {"w": [1]}}  # fmt: skip
    chances = comparison.probabilities(finals, ["a"], ["a", "b", "c", "d"])
    assert chances.keys() == {("a", "b"), ("a", "c")}
    (probability, low, high) = chances["a", "b"]  # on the tasks that both have runs of
    assert probability == pytest.approx((1 + 0.5) / 2)  # always on one task, half with ties on the other
    assert low <= probability <= high and chances["a", "c"][0] == pytest.approx(1 / 3)
    named = comparison.probabilities({"a": finals["a"], "mine, new": finals["b"]}, ["a"], ["mine, new"])  # as its file
    assert named == {("a", "mine, new"): chances["a", "b"]}
    curves = np.broadcast_to(np.arange(5.0), (8, 1, 5)).copy()
    curves[0] += 1_000  # which an interquartile mean leaves out
    iqm, low, high = analysis.intervals({"a": curves}, 50)["a"]
    assert iqm.tolist() == [0, 1, 2, 3, 4] and (low <= iqm).all() and (iqm <= high).all()


def test_curves_on_a_grid(tmp_path):
    grid = comparison.on_grid(*analysis.curve(made_up_run(tmp_path / "a", 0.0, {10_000: 50, 20_000: 100})))
    np.testing.assert_allclose(grid, np.linspace(0, 100, 21))


def test_a_wrong_name_is_said_before_the_first_run(tmp_path, monkeypatch, run_script):
    monkeypatch.setattr(harness, "run_tasks", lambda *_: pytest.fail("it has begun"))
    code, _, err = run_script(comparison, "--env-ids", "hopper-medium-v2", "nonsense-v9", "--published", "")
    assert code == 2 and "nonsense-v9" in err


def test_pairs():
    found = comparison.pairs(comparison.Args(algorithms=("o2td3", "o2ppo", "iql", "rlpd")))
    assert found == {
        "o2td3 from td3_bc": ("o2td3", "td3_bc"), "o2td3 from iql": ("o2td3", "iql"), "o2ppo": ("o2ppo", "iql"),
        "iql": ("iql", "iql"), "rlpd": ("rlpd", "scratch"),
    }  # fmt: skip
    found = comparison.pairs(comparison.Args(algorithms=("o2td3@iql", "o2ppo@offline/bc.py", "iql@iql")))
    assert found == {
        "o2td3 from iql": ("o2td3", "iql"), "o2ppo from bc": ("o2ppo", "offline/bc.py"), "iql": ("iql", "iql"),
    }  # fmt: skip


def test_the_whole_page(tmp_path, monkeypatch, run_script):
    """Runs end at 90 (O2TD3), 50 (IQL) and 20 (RLPD) on one task, and at 10 more on the other."""
    ends = {"o2td3": 90, "iql": 50, "rlpd": 20}

    def missing(args, specs):
        for spec in specs:
            trained = harness.trained_for(args, spec)
            if trained:
                trained[0].parent.mkdir(parents=True, exist_ok=True)
                torch.save({"seconds": 600.0}, trained[0].parent / f"{spec.offline}.pt")
            end = ends[spec.script] + 10 * (args.env_id == "walker2d-medium-v2")
            regime = {"regime": "superior", "policy": 40.0, "data": 30.0}
            assert spec.flags == ("--online-steps", "4096", "--eval-every", "2048")
            made_up_run(harness.folder(args, spec), 40.0, {1000 * i: end for i in (1, 2, 3, 4)}, regime=regime)
        return {}

    monkeypatch.setattr(harness, "missing", missing)
    monkeypatch.setattr(comparison, "REPS", 50)
    walker, hopper, published = "walker2d-medium-v2", "hopper-medium-v2", tmp_path / "published"
    published.mkdir()
    common = ("--seeds", "2", "--online-steps", "4096", "--run-dir", tmp_path / "runs",
              "--published", published)  # fmt: skip
    asked = [("o2td3", "iql", "--env-ids", walker), ("o2td3", "iql", "rlpd", "--env-ids", hopper)]  # in two sessions
    for methods in asked:
        code, out, err = run_script(comparison, "--algorithms", *methods, *common, "--out", published)
        assert code == 0, err
    assert "Without runs of every task: rlpd." in (published / "comparison.md").read_text()
    before = (published / "runs_demo_4096.csv").read_bytes()
    code, out, err = run_script(
        comparison, "--algorithms", "rlpd", "--env-ids", walker, *common, "--out", tmp_path / "out"
    )
    assert code == 0, err
    assert (published / "runs_demo_4096.csv").read_bytes() == before  # another folder's page takes them, no more
    page = (tmp_path / "out" / "comparison.md").read_text()
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| ")}
    assert "| o2td3 from iql | 2 | 40.0 | 90.0 [90.0, 90.0] | 83.8 [83.8, 83.8] | 0.0 [0.0, 0.0]" in page
    assert "| rlpd | 2 | 40.0 | 20.0 [20.0, 20.0] | 22.5 [22.5, 22.5] | 20.0 [20.0, 20.0] | 20.0" in page
    assert "0.76 [0.76, 0.76] | – | superior 2 | 5 | 4 | – | 2.0 |" in page  # RLPD's regret; it has no offline minutes
    assert "| superior 2 | 5 | 1 | 10.0 | 2.0 |" in page
    assert lines["o2td3 from td3_bc"].split("|")[2:-1] == [" 1.00 [1.00, 1.00] "] * 2  # against IQL and RLPD
    assert "| iql | 2 | 55.0 [55.0, 55.0] |" in page  # over both tasks
    assert (tmp_path / "out" / "comparison.png").exists() and (tmp_path / "out" / "comparison_efficiency.png").exists()
    with open(tmp_path / "out" / "curves_demo_4096.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 2 * 5  # tasks, pairs, seeds, points
    mine = [r for r in rows if (r["dataset"], r["method"], r["seed"]) == ("walker2d-medium-v2", "rlpd", "1")]
    assert [(int(r["step"]), float(r["score"])) for r in mine] == [(0, 40)] + [(1000 * i, 30) for i in (1, 2, 3, 4)]
    with open(tmp_path / "out" / "runs_demo_4096.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 and {row["offline_seconds"] for row in rows} == {"600.0", ""}
    assert {row["regime"] for row in rows} == {"superior"} and {float(row["policy_mean"]) for row in rows} == {40}
    assert "4,096 environment steps each" in page and "Simulator: a robot." in page
    assert f"16 runs (14 of them stood in {published} before)" in page


@pytest.mark.parametrize("tasks", [("hopper-medium-v2",), ("hopper-medium-v2", "walker2d-medium-v2")])
def test_returns_of_different_tasks_are_not_averaged(tasks, tmp_path, monkeypatch, run_script):
    def missing(args, specs):
        for spec in specs:
            made_up_run(harness.folder(args, spec), 40.0, {1000: 50, 2000: 60}, measure="return")
        return {}

    monkeypatch.setattr(harness, "missing", missing)
    monkeypatch.setattr(comparison, "REPS", 50)
    drawn = []
    monkeypatch.setattr(analysis, "save", lambda figure, path: drawn.extend(figure.axes))
    code, _, err = run_script(
        comparison, "--algorithms", "rlpd", "--seeds", "2", "--env-ids", *tasks, "--online-steps", "2048",
        "--run-dir", tmp_path / "runs", "--out", tmp_path / "out", "--published", "",
    )  # fmt: skip
    assert code == 0, err
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert ("**All tasks: IQM" in page) == (len(tasks) == 1)
    assert ("Returns of different tasks have no common scale" in page) == (len(tasks) > 1)
    assert {panel.get_ylabel() for panel in drawn} == {"return\nhigher is better"}


def test_a_task_that_fails_does_not_take_the_others_with_it(tmp_path, monkeypatch, run_script):
    def missing(args, specs):
        for spec in specs:
            if not harness.folder(args, spec).exists():
                made_up_run(harness.folder(args, spec), 40.0, {2_048: 60.0})
        if args.env_id.startswith("walker2d"):
            raise UserError("runs of other arguments")
        return {}

    monkeypatch.setattr(harness, "missing", missing)
    monkeypatch.setattr(comparison, "REPS", 50)
    flags = ["--algorithms", "rlpd", "--seeds", "1", "--run-dir", tmp_path / "runs", "--out", tmp_path / "out"]
    both = ["hopper-medium-v2", "walker2d-medium-v2"]
    code, _, err = run_script(comparison, *flags, "--published", "", "--env-ids", *both)
    assert code == 2 and err == "failed: walker2d-medium-v2: runs of other arguments\n"
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert page.count("| rlpd | 1 | 40.0 | 60.0 |") == 1 and "walker2d-medium-v2: runs of other arguments" in page
    assert "walker2d" not in (tmp_path / "out" / "runs_demo_10240.csv").read_text()
    code, _, err = run_script(comparison, *flags, "--published", "", "--env-ids", *both[::-1])
    assert code == 2 and err == "error: runs of other arguments\n"  # of the first it is said at once


def test_nothing_that_ships_is_compared_with_what_was_trained_for_it():
    """It is one seed's, and had more steps. Without such a policy the preset's own number of steps stands."""
    args = comparison.Args()
    assert comparison.spec(args, ("o2td3", "iql"), 1).flags[-2:] == ("--offline-steps", "10000")
    for pair, env_id in ((("iql", "iql"), args.env_id), (("o2td3", "iql"), "hopper-medium-v2")):
        assert "--offline-steps" not in comparison.spec(dataclasses.replace(args, env_id=env_id), pair, 1).flags


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(online_steps=20_000), "multiple of 2,048.*try 20480"),
        (dict(algorithms=("o2td3", "o2td3.py")), "two of --algorithms are called o2td3 from td3_bc"),
        (dict(run_flags="--seed 5"), "sets --seed itself"),
        (dict(run_flags="--offline iql"), "sets --offline itself"),
    ],
)
def test_what_would_be_compared_wrongly_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        args = comparison.Args(**changes)
        comparison.budget(args)
        for pair in comparison.pairs(args).values():
            comparison.spec(args, pair, 0)


def test_published_runs_are_of_the_same_budgets(tmp_path):
    files, row = {"a.csv": comparison.CURVE_COLUMNS}, dict(dataset="x", method="iql", seed=0, step=1, score=0.5)
    analysis.write_csv(tmp_path / "a.csv", row, [row])
    args = comparison.Args(published=str(tmp_path), out=str(tmp_path / "mine"))
    assert comparison.published(args, files) == [[row]]
    for own in (dict(offline_steps=5), dict(run_flags="--matmul bfloat16"), dict(dataset_path="mine.hdf5")):
        assert comparison.published(dataclasses.replace(args, **own), files) == [[]]
        with pytest.raises(UserError, match="choose another --out"):
            comparison.published(dataclasses.replace(args, out=str(tmp_path), **own), files)


def test_published_runs_are_read_before_the_first_run(tmp_path, monkeypatch, run_script):
    monkeypatch.setattr(harness, "run_tasks", lambda *_: pytest.fail("it has begun"))
    code, _, err = run_script(comparison, "--published", tmp_path / "nothing")
    assert code == 2 and "there is no folder" in err
    (tmp_path / "curves_demo_10240.csv").write_text("a,b\n1,2\n")
    code, _, err = run_script(comparison, "--published", tmp_path)
    assert code == 2 and "curves_demo_10240.csv has other columns" in err


def published_copy(folder):
    """Our own published files as those of the demo's budget; the rows of the first, and what reads both."""
    names = ["runs_demo_10240.csv", "curves_demo_10240.csv"]
    for name in names:
        published = harness.ROOT / "docs" / "comparison" / name.replace("demo_10240", "quick_20480")
        (folder / name).write_bytes(published.read_bytes())
    files = dict(zip(names, (comparison.RUN_COLUMNS, comparison.CURVE_COLUMNS), strict=True))
    return folder / names[0], lambda: comparison.published(comparison.Args(published=str(folder)), files)


def test_what_is_published_can_be_read(tmp_path):
    path, read = published_copy(tmp_path)
    runs, curves = before = read()
    assert len(runs) == 51 and len(curves) == 561 and {type(run["seed"]) for run in runs} == {int}
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))  # as a spreadsheet leaves it
    assert read() == before
    runs[0]["regret"] = np.nan  # of returns
    analysis.write_csv(path, comparison.RUN_COLUMNS, runs)
    assert np.isnan(read()[0][0]["regret"])


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"66.31312236363941", b"much", "line 2: final is 'much', no number; restore the file"),
        (b"66.31312236363941", b"", "line 2: final is '', no number"),
        (b"66.31312236363941", b"nan", "line 2: final is 'nan', no number"),
        (b"66.31312236363941,", b"", "line 2: 25 fields where there are 26 columns"),
        (b"66.31312236363941,", b"66.31312236363941,1,", "line 2: 27 fields"),
        (b"66.31312236363941", b"\xff", "line 2: this is not UTF-8"),
        (b"\nhopper", b"\n<<<<<<< HEAD\nhopper", "line 2: 1 fields"),
        (b"td3_bc,1,", b"td3_bc,0,", "line 3: this stands there twice"),
        (b"td3_bc,1,", b"td3_bc,7,", "one alone has hopper-medium-v2 o2td3 from td3_bc 1"),
        (b"score,10", b",10", "line 2: measure is ''"),
    ],
)
def test_damage_in_what_is_published_is_said_before_the_first_run(tmp_path, old, new, words):
    path, read = published_copy(tmp_path)
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(UserError, match=words):
        read()


@pytest.mark.parametrize(
    ("script", "start", "steps", "updates"),
    [("off2on", "cql", 25, 1), ("aca", "sac_ml", 5, 1), ("o2ppo", "iql", 5, None), ("iql", "iql", 5, 1)],
)
def test_updates_and_offline_steps_of_each_method(tmp_path, script, start, steps, updates):
    args = comparison.Args(env_id="hopper-medium-v2", scale="quick", run_dir=str(tmp_path))
    run = made_up_run(tmp_path / "a", 60.0, {8: 50})
    found = comparison.measured(args, comparison.spec(args, (script, start), 0), run)
    assert (found["offline_steps"], found["utd"]) == (steps, updates)


def test_published_runs_of_other_data_do_not_stand_beside_ours():
    old = [dict(dataset=task, method=method, source="a stand-in") for task in ("x", "y") for method in ("iql", "pex")]
    assert comparison.others(old, [dict(dataset="x", source="a stand-in")], {("x", "mine")}) == old
    assert comparison.others(old, [dict(dataset="x", source="a stand-in")], {("x", "iql")}) == old[1:]
    assert comparison.others(old, [dict(dataset="x", source="D4RL")], {("x", "mine")}) == old[2:]
    assert comparison.others(old, [], {("x", "iql")}) == old[1:]  # it was to be run, and came to no end


def test_its_own_budgets_are_no_run_flags():
    with pytest.raises(UserError, match="sets --online-steps itself"):
        comparison.spec(comparison.Args(run_flags="--gamma 0.9 --online-steps 5"), ("o2td3", "iql"), 0)


def test_the_datasets_are_those_that_are_asked_for():
    walker = "walker2d-medium-v2"
    assert comparison.env_ids(comparison.Args()) == (harness.Args.env_id,)
    assert comparison.env_ids(comparison.Args(scale="quick")) == comparison.TASKS
    own = comparison.Args(scale="quick", dataset_path="mine.hdf5")
    assert comparison.env_ids(own) == (harness.Args.env_id,)  # one file is not nine tasks
    with pytest.raises(UserError, match="--dataset-path is the file of one dataset"):
        comparison.env_ids(dataclasses.replace(own, env_ids=comparison.TASKS[:2]))
    for args in (dict(env_id=walker), dict(env_id=walker, scale="quick"), dict(env_ids=(walker,), scale="paper")):
        assert comparison.env_ids(comparison.Args(**args)) == (walker,)
