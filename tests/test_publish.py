"""Runs that are kept in a small form give the same page as they did, on another machine, without being run again."""

import dataclasses
import json

import pytest

import o2td3
from common.errors import UserError
from common.run import other_arguments, plain
from experiments import ablations, analysis, arms, harness, publish
from tests.test_comparison import made_up_run

POLICY = harness.ROOT / "datasets" / "policies" / "hopper-medium-demo__td3_bc.pt"


def test_what_is_kept_gives_the_same_page(tmp_path, monkeypatch, run_script):
    args = arms.Args(algorithms=("o2td3",), settings=("full", "naive"), seeds=2, policies=(str(POLICY),),
                     run_dir=str(tmp_path / "runs"), out=str(tmp_path / "pages"))  # fmt: skip
    monkeypatch.setattr(harness, "schedule", lambda *_: pytest.fail("something was started"))
    [here] = arms.on_tasks(args).values()
    folders = []
    for seed in range(args.seeds):
        for name, spec in arms.chosen(here, ablations.settings, "o2td3", seed).items():
            scores = {1_000: 60.0 + seed, 2_000: 70.0 if name == "full" else 30.123456789}
            folders.append(made_up_run(harness.folder(here, spec), 50.0, scores, successes=[1, 0]))
            saved = plain(harness.parsed(here, spec)) | {"script": str(harness.ROOT / "o2td3.py")}
            (folders[-1] / "args.json").write_text(json.dumps(saved | {"run_dir": "/elsewhere/runs"}))

    kept = tmp_path / "evidence"
    code, out, err = run_script(publish, *folders, "--out", kept)
    assert (code, out) == (0, f"4 runs are kept in {kept}\n"), err
    for folder in folders:
        copied = kept / folder.name
        assert [path.name for path in sorted(copied.iterdir())] == ["args.json", "progress.csv", "result.json"]
        assert analysis.summary(copied) == analysis.summary(folder)
        assert "episodic" not in (copied / "progress.csv").read_text()
        words = json.loads((copied / "args.json").read_text())
        assert words["script"] == "o2td3.py" and words["offline"] == str(POLICY.relative_to(harness.ROOT))
        assert not any(str(value).startswith("/") for value in words.values())

    pages = {}
    for run_dir in (args.run_dir, str(kept)):
        monkeypatch.setattr("sys.argv", ["ablations.py"])
        with pytest.raises(SystemExit) as stop:
            changed = dataclasses.replace(args, run_dir=run_dir, go_on=True)
            arms.comparison(changed, "ablations", "What?", ablations.settings, "full")
        assert stop.value.code == 0
        pages[run_dir] = (tmp_path / "pages" / "ablations.md").read_text()
    assert pages[args.run_dir] == pages[str(kept)] and "| naive | 2 |" in pages[str(kept)]


def test_what_was_not_kept_is_no_traceback(tmp_path):
    run = made_up_run(tmp_path / "run", 50.0, {1_000: 60.0})
    with pytest.raises(UserError, match="holds no probe/q_policy of align, for scores alone were kept of it; cho"):
        analysis.measurements(run, "align", "probe/q_policy")


def test_files_may_have_moved_with_their_folders():
    moved = {"dataset_path": "/a/mine.hdf5", "env_id": "/a/task.py:Id", "offline": "/a/policy.pt"}
    args = o2td3.Args(**{name: value.replace("/a", "/b") for name, value in moved.items()})
    assert other_arguments(args, plain(o2td3.Args(**moved))) == ""
    for name in moved:
        old = plain(o2td3.Args(**moved | {name: "/a/other-" + moved[name][3:]}))
        assert other_arguments(args, old).startswith(f"--{name.replace('_', '-')} /a/other")
    minari = [o2td3.Args(env_id=f"mujoco/{robot}/medium-v0") for robot in ("hopper", "walker2d")]
    assert other_arguments(minari[0], plain(minari[1])).startswith("--env-id mujoco/walker2d/medium-v0 (now mujoco/")


def test_what_is_no_finished_run_is_refused_before_anything_is_kept(tmp_path, run_script):
    run = made_up_run(tmp_path / "run", 50.0, {1_000: 60.0})
    (tmp_path / "half").mkdir()
    code, _, err = run_script(publish, run, tmp_path / "half", "--out", tmp_path / "kept")
    assert (
        code == 2 and err == f"error: {tmp_path / 'half'}: no finished run (there is no result.json); leave that out\n"
    )
    assert not (tmp_path / "kept").exists()


def test_no_run_takes_the_place_of_another_of_its_name(tmp_path, run_script):
    """Arguments that are no part of a name, as --reward-scale, make another run in another --run-dir."""
    runs = [made_up_run(tmp_path / run_dir / "run", 50.0, {1_000: end}) for run_dir, end in (("a", 60.0), ("b", 70.0))]
    for run in runs:
        (run / "args.json").write_text("{}")
        (run / "result.json").write_text(json.dumps(analysis.result(run) | {"last_online": run.parent.name}))
    kept = tmp_path / "kept"
    code, _, err = run_script(publish, *runs, "--out", kept)
    assert code == 2 and "two of these runs are called run; keep one of them" in err and not kept.exists()
    for _ in range(2):  # the same run may be kept again, and be named twice
        code, out, err = run_script(publish, runs[0], runs[0], "--out", kept)
        assert (code, out) == (0, f"1 runs are kept in {kept}\n"), err
    code, _, err = run_script(publish, runs[1], "--out", kept)
    assert code == 2 and f"{kept / 'run'} holds another run than {runs[1]}; choose another --out" in err
    assert analysis.summary(kept / "run")["final"] == 60.0


def test_a_run_that_was_measured_again_is_the_same_run(tmp_path, run_script):
    """A finished run that is called again after the code changed trains nothing, and writes its result anew."""
    run, kept = made_up_run(tmp_path / "run", 50.0, {1_000: 60.0}), tmp_path / "kept"
    (run / "args.json").write_text("{}")
    found = analysis.result(run)
    for seconds_per_evaluation in (1.0, 2.0):
        again = found | {"seconds_per_evaluation": seconds_per_evaluation}
        (run / "result.json").write_text(json.dumps(again))
        code, _, err = run_script(publish, run, "--out", kept)
        assert code == 0 and analysis.result(kept / "run") == again, err
    (run / "result.json").write_text(json.dumps(found | {"seconds": {"finetune": 1e6}}))  # another training
    code, _, err = run_script(publish, run, "--out", kept)
    assert code == 2 and "holds another run than" in err


def test_a_damaged_run_leaves_nothing_of_the_others(tmp_path, run_script):
    runs = [made_up_run(tmp_path / name, 50.0, {1_000: 60.0}) for name in ("a", "b")]
    for run in runs:
        (run / "args.json").write_text("{}")
    with (runs[1] / "progress.csv").open("a") as file:
        file.write("finetune\n")
    code, _, err = run_script(publish, *runs, "--out", tmp_path / "kept")
    assert code == 2 and "progress.csv is damaged" in err and not (tmp_path / "kept").exists()
