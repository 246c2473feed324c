"""The commands on policies and on finished runs: play, export, compare."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import compare
import experiments
import export
import play
from common import policies, tasks
from common.datasets import load
from common.evaluation import FRESH, Evaluator
from common.foreign import load_policy
from common.foreign.programs import check_layers
from experiments import analysis

SHIPPED = tasks.SHIPPED / "policies"


def test_play_gives_the_score_of_fresh_starts_with_its_error(run_script):
    path = SHIPPED / "hopper-medium-demo__iql.pt"
    code, out, err = run_script(play, path, "--episodes", "3")
    assert code == 0, err
    policy = policies.read(path)
    evaluator = Evaluator(tasks.resolve(tasks.DEMO), policy["state_mean"], policy["state_std"], 3)
    returns = evaluator.returns(policies.module(policy).mode, "cpu", range(FRESH, FRESH + 3))
    scores = [evaluator.score(r) for r in returns]
    error = np.std(scores, ddof=1) / 3**0.5
    assert f"score {np.mean(scores):.1f} ± {error:.1f}" in out
    assert "iql (gaussian, 100,000 steps) in D4RL's hopper" in out


def test_play_says_what_it_needs(run_script, tmp_path):
    code, _, err = run_script(play, tmp_path / "none.pt")
    assert code == 2 and "there is no file" in err
    for script in (play, export):
        code, _, err = run_script(script, tmp_path)
        assert code == 2 and f"{tmp_path} is a folder; name the file in it, as policy.pt" in err
    (tmp_path / "policy.onnx").touch()
    code, _, err = run_script(play, tmp_path / "policy.onnx")
    assert code == 2 and "does not say where it is played" in err and "--env-id" in err


def test_play_films_an_episode(run_script, tmp_path):
    path = shutil.copy(SHIPPED / "hopper-medium-demo__iql.pt", tmp_path)
    if importlib.util.find_spec("moviepy") is None:
        code, out, err = run_script(play, path, "--episodes", "2", "--video")
        assert code == 2 and err == "error: --video needs MoviePy; install it with: pip install moviepy\n" and not out
        pytest.skip("moviepy is not installed")
    code, out, err = run_script(play, path, "--episodes", "2", "--video")
    if code and "MUJOCO_GL" in err:
        pytest.skip("nothing can be drawn here")
    assert code == 0 and f"{tmp_path / 'videos'} holds the video" in out, err
    [film] = (tmp_path / "videos").glob("*.mp4")
    assert film.stat().st_size > 1_000


def test_a_graphics_library_that_is_missing_keeps_nobody_from_training():
    words = "from common import physics; import mujoco; print(mujoco.MjModel.__name__)"
    environment = os.environ | {"MUJOCO_GL": "nonsense"}
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout == "MjModel\n"
    assert done.stderr.startswith("warning: MUJOCO_GL=nonsense does not work here (") and "filmed" in done.stderr


@pytest.mark.parametrize("missing", [["rliable"], ["rliable", "scipy"]])
def test_what_compare_lacks_is_named_with_the_command_that_installs_it(missing, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else found(name))
    with pytest.raises(SystemExit) as stop:
        importlib.reload(experiments)
    words = f"error: this needs {' and '.join(missing)}: pip install -r requirements-experiments.txt\n"
    assert stop.value.code == 2 and capsys.readouterr().err == words


LAYERS = [[8, "ReLU", 8, "Tanh"], [8, "LayerNorm", "ELU", "Clip"], [8, "LeakyReLU", 8, "SiLU", 8, "GELU"]]


@pytest.mark.parametrize("hidden", LAYERS, ids=str)
@pytest.mark.parametrize("ranged", [False, True])
@pytest.mark.parametrize("kind", policies.KINDS)
def test_an_exported_policy_acts_as_it_did(kind, ranged, hidden):
    policy = policies.Policy(kind, 11, 3, hidden)
    policy.state_mean, policy.state_std = torch.randn(11), torch.rand(11) + 0.5
    for buffer in policy.net.buffers():  # the bounds of Clip
        buffer.fill_(0.3 if buffer[0] > 0 else -0.3)
    if ranged:
        policy.action_range = torch.tensor([[-2.0, 0.0, -1.6], [2.0, 1.0, 0.5]])
    model = export.to_onnx(policy.requires_grad_(False), 11, 3)
    check_layers(Path("policy.onnx"), model)  # `--offline policy.onnx` takes it back without --trust-checkpoint
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for n in (1, 7):
        obs = torch.randn(n, 11)
        [actions] = session.run(None, {"obs": obs.numpy()})
        np.testing.assert_allclose(actions, policy.act(obs).numpy(), atol=1e-5)


def test_home_is_found_where_the_shell_leaves_it(run_script, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, _, err = run_script(export, SHIPPED / "hopper-medium-demo__iql.pt", "--out=~/iql.onnx")
    assert code == 0 and (tmp_path / "iql.onnx").is_file(), err
    code, _, err = run_script(compare, "~/none", "--against", tmp_path)  # in quotes, and one of several
    assert code == 2 and f"no folder {tmp_path}/none" in err


def test_an_exported_policy_is_taken_back(run_script, tmp_path):
    path = SHIPPED / "hopper-medium-demo__td3_bc.pt"
    code, out, err = run_script(export, path, "--out", tmp_path / "policy.onnx")
    assert code == 0 and "obs (batch, 11) → actions (batch, 3) in [-1, 1]" in out, err
    data = load(tasks.DEMO).head(500)
    policy = load_policy(tmp_path / "policy.onnx", data)
    actions = policies.player(policy).mode((data.obs - policy["state_mean"]) / policy["state_std"])
    torch.testing.assert_close(actions, policies.load(path).act(data.obs), atol=1e-4, rtol=0)
    # and in an environment of another range, which takes the file's actions as they are
    ranged = policies.read(path) | {"action_range": torch.tensor([[-2.0, 0.0, -1.6], [2.0, 1.0, 0.5]]).double()}
    policies.save_policy(tmp_path / "own.pt", **ranged)
    code, out, err = run_script(export, tmp_path / "own.pt")
    assert code == 0 and "(batch, 3) in the environment's range" in out, err
    data.task = dataclasses.replace(data.task, action_range=tuple(map(tuple, ranged["action_range"].tolist())))
    policy = load_policy(tmp_path / "own.onnx", data)
    again = policies.player(policy).mode((data.obs - policy["state_mean"]) / policy["state_std"])
    torch.testing.assert_close(again, actions, atol=1e-4, rtol=0)
    code, _, err = run_script(export, path, "--out", tmp_path / "nowhere" / "policy.onnx")
    assert code == 2 and err.count("\n") == 1 and "No such file or directory" in err and "choose another --out" in err
    code, _, err = run_script(export, tmp_path / "policy.onnx")
    assert code == 2 and "Traceback" not in err and re.search("policy.onnx", err)


def made_up_run(folder: Path, scores: list[float], dataset: str = "some-data", **result) -> Path:
    folder.mkdir(parents=True)
    rows = [f"finetune,{10 * (i + 1)},{score}" for i, score in enumerate(scores)]
    (folder / "progress.csv").write_text("\n".join(["stage,step,charts/score", *rows]) + "\n")
    result = {"offline": 20.0, "dataset": dataset, "measure": "score", "seed": int(folder.name[-1])} | result
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_two_sets_of_runs_are_compared(run_script, tmp_path, monkeypatch):
    monkeypatch.setattr(analysis.interval, "__defaults__", (100,))  # resamples
    mine = [made_up_run(tmp_path / f"d__mine__iql__{i}", [30, 40, 50 + i, 60]) for i in range(3)]
    theirs = [made_up_run(tmp_path / f"d__o2sac__iql__{i}", [30, 10, 30, 40 - i]) for i in range(3)]
    out_file, drawn = tmp_path / "both.png", []
    monkeypatch.setattr(
        analysis, "save", lambda figure, path, save=analysis.save: [save(figure, path), drawn.append((figure, path))]
    )
    code, out, err = run_script(compare, *mine, "--against", *theirs, "--out", out_file)
    assert code == 0, err
    assert "probability that a run of mine from iql ends higher: 1.00" in out and "some-data, scores" in out
    rows = {cells[1]: cells[2:] for line in out.splitlines() if len(cells := [c.strip() for c in line.split("│")]) > 5}
    assert (
        rows["mine from iql"][0] == "3"
        and rows["mine from iql"][1].startswith("50.3 [50")
        and rows["o2sac from iql"][4].startswith("10.0")
    )
    assert out_file.read_bytes().startswith(b"\x89PNG")
    [[figure, _]] = drawn
    title, legend = figure._suptitle.get_window_extent(), figure.legends[0].get_window_extent()
    assert "Runs: 3 of mine from iql and 3 of o2sac from iql" in figure.get_suptitle().replace("\n", " ")
    for box in (title, legend):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width  # nothing is cut off, of one panel neither
    longer = made_up_run(tmp_path / "f__o2sac__iql__0", [30, 10, 30, 40, 50], preset="quick")
    code, out, err = run_script(compare, *mine, "--against", longer, "--out", out_file)
    assert code == 0 and "note: some-data: environment steps 40 of the first, 50 of the others" in out, err
    assert "preset None of the first, quick of the others" in out
    paths = [tmp_path / f"x__{name}__0" for name in ("mine__iql", "mine__bc", "yours__bc")]
    assert [compare.label(paths[:n], "runs") for n in (1, 2, 3)] == ["mine from iql", "mine", "runs"]
    assert compare.label([tmp_path / "best run"], "others") == "others"  # a folder that was renamed
    rows_of_another = made_up_run(tmp_path / "h__o2sac__iql__0", [30, 10, 30, 40], source="D4RL")
    code, out, err = run_script(compare, *mine, "--against", rows_of_another, "--out", out_file)
    assert code == 0 and "note: some-data: source None of the first, D4RL of the others" in out, err
    elsewhere = made_up_run(tmp_path / "g__o2sac__iql__0", [30, 10, 30, 40], simulator="another robot")
    code, _, err = run_script(compare, *mine, "--against", elsewhere)
    assert code == 2 and "runs on some-data cannot be compared: the simulator is None of the first, another" in err
    other = made_up_run(tmp_path / "e__o2sac__iql__0", [1.0, 2.0], dataset="other-data")
    code, _, err = run_script(compare, *mine, "--against", other)
    assert code == 2 and "no dataset has runs of both: some-data here, other-data there" in err
    code, _, err = run_script(compare, *mine, "--against", tmp_path / "nowhere")
    assert code == 2 and f"there is no folder {tmp_path / 'nowhere'}; see to its name" in err
    (left := tmp_path / "d__o2sac__iql__0-2").mkdir()  # what --num-seeds leaves beside its runs
    code, out, err = run_script(compare, *mine, "--against", *theirs, left, "--out", out_file)
    assert code == 0 and f"left out: {left}: no finished run" in out, err
    (left / "args.json").write_text('{"offline": "iql"}')  # a run that has not ended: others are no fair sample without
    code, _, err = run_script(compare, *mine, "--against", *theirs, left)
    assert code == 2 and f"{left}: no finished run (there is no result.json); finish it with the command" in err


def test_runs_that_do_not_belong_together_are_not_averaged(run_script, tmp_path):
    theirs = made_up_run(tmp_path / "d__o2sac__iql__0", [30, 10, 30])
    first, scores = made_up_run(tmp_path / "d__mine__iql__0", [1, 2, 3], preset="demo"), [1, 2, 3]
    others = {
        "the preset demo and quick are mixed": made_up_run(tmp_path / "d__mine__iql__1", scores, preset="quick"),
        "different steps (3 times up to 30 and 4 times up to 40)": made_up_run(
            tmp_path / "d__mine__iql__2", [1, 2, 3, 4], preset="demo"
        ),
        "seed 0 is there 2 times": made_up_run(tmp_path / "again" / "d__mine__iql__0", scores, preset="demo"),
        "the source D4RL and None are mixed": made_up_run(
            tmp_path / "d__mine__iql__4", scores, preset="demo", source="D4RL"
        ),
        "measure return and score are": made_up_run(
            tmp_path / "d__mine__iql__3", scores, preset="demo", measure="return"
        ),
    }
    for words, other in others.items():
        code, _, err = run_script(compare, first, other, "--against", theirs)
        assert code == 2 and words in err and "mine from iql on some-data" in err
    (first / "result.json").write_text("{")
    code, _, err = run_script(compare, first, "--against", theirs)
    assert code == 2 and "result.json is damaged" in err and "Traceback" not in err
    for out in (tmp_path, tmp_path / "x.jpgg", tmp_path / "x"):
        code, _, err = run_script(compare, theirs, "--against", theirs, "--out", out)
        assert code == 2 and err == f"error: {out} names no picture; give --out an ending such as .png, .pdf or .svg\n"
    code, _, err = run_script(compare, theirs, "--against", theirs, "--out", tmp_path / "nowhere" / "x.png")
    assert code == 2 and "there is no folder for" in err


def test_play_does_not_ignore_what_is_typed(run_script):
    policy = SHIPPED / "hopper-medium-demo__iql.pt"
    for flags in (["--normalize-from", "1"], ["--dataset-path", "nowhere.hdf5"]):
        code, _, err = run_script(play, policy, *flags)
        assert code == 2 and "need --env-id" in err
