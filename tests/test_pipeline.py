"""The whole of O2SAC at tiny budgets: what it writes, how it resumes, what it refuses."""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import o2sac
from common import checkpoint, cli
from common.cli import UserError
from common.replay import PrioritisedBuffer, ReplayBuffer
from common.run import run_name
from tests.conftest import DEMO, OFTEN, TINY, kill_at
from tests.test_collect import collect

ROOT = Path(o2sac.__file__).parent
SMALL = [
    *DEMO, "--offline-steps", "4", "--reevaluate-steps", "12", "--align-steps", "12",
    "--online-steps", "120", "--learning-starts", "60", "--utd", "2", "--eval-every", "40", "--align-eval-every", "6",
    "--log-every", "5",
]  # fmt: skip
NAME = "hopper-medium-demo__o2sac__cql__0"


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}  # as a user starts a run


def execute(command):
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run, in a process of its own; its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "o2sac.py", *SMALL, *TINY, "--run-dir", str(folder)]
    done = execute(command)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, done.stderr


def weights(folder):
    saved = torch.load(folder / NAME / "finetune.pt", weights_only=True)
    state = dict(saved["state"]["agent"])
    for name in ("actor_optimizer", "critic_optimizer", "alpha_optimizer", "lagrange_optimizer"):
        for moment in ("exp_avg", "exp_avg_sq"):
            state |= {f"{name}.{moment}.{i}": t for i, t in enumerate(saved["state"][name][moment])}
    return state | {"replay": saved["state"]["replay"]["table"], "rng": saved["rng"]["torch"]}


def progress(folder):
    with open(folder / NAME / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ----------------------------------------------------------------------------------------------- a run


def test_what_a_run_leaves(finished):
    folder, out, err = finished
    run = folder / NAME
    stages = {"reevaluate.pt", "align.pt", "finetune.pt", "policy.pt", "best.pt"}
    assert stages | {"args.json", "progress.csv", "result.json", "curve.png"} <= {path.name for path in run.iterdir()}
    assert not list(folder.rglob("*.part"))
    result = json.loads((run / "result.json").read_text())
    assert "not D4RL" in result["source"] and result["seconds"].keys() == {"reevaluate", "align", "finetune"}
    for word in ("simulator check", "estimated time", "aligned", "best online", "last online", "not D4RL's data"):
        assert word in out
    for stage in ("cql", "reevaluate", "align", "finetune"):
        assert f"{stage:<10}: 100%" in err and "step/s" in err
    rows = progress(folder)
    scores = {int(row["step"]): float(row["charts/score"]) for row in rows if row.get("charts/score")}
    assert list(scores) == [40, 80, 120] and result["best_online"] == max(scores.values())
    assert {"losses/critic_loss", "losses/kl", "losses/lagrange", "charts/SPS"} <= rows[0].keys()


def test_tensorboard_has_every_scalar_once(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / NAME))
    events.Reload()
    assert {"charts/score", "charts/episodic_return", "losses/actor_loss", "2_align/score", "1_reevaluate/q"} <= set(
        events.Tags()["scalars"]
    )
    assert [event.step for event in events.Scalars("charts/score")] == [40, 80, 120]


def test_a_finished_stage_is_not_run_again(finished):
    folder, *_ = finished
    before = (folder / NAME / "align.pt").stat().st_mtime_ns
    command = [sys.executable, "o2sac.py", *SMALL, *TINY, "--run-dir", str(folder)]
    done = execute(command)
    assert done.returncode == 0 and "step/s" not in done.stderr and "last online" in done.stdout
    assert (folder / NAME / "align.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize(("stage", "step"), [("reevaluate", 8), ("align", 11), ("finetune", 95)])
def test_a_killed_run_ends_with_the_same_weights(finished, tmp_path, stage, step):
    command = [sys.executable, "-c", kill_at("o2sac", stage, step, 10), *SMALL, *TINY, "--run-dir", str(tmp_path)]
    killed = execute(command)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    command = [sys.executable, "o2sac.py", *SMALL, *TINY, "--run-dir", str(tmp_path)]
    done = execute(command)
    assert done.returncode == 0, done.stderr
    assert ("continuing at step" in done.stdout) == (step > 10)
    assert_same_weights(weights(finished[0]), weights(tmp_path))
    for a, b in zip(progress(finished[0]), progress(tmp_path), strict=True):
        assert {k: v for k, v in a.items() if k != "charts/SPS"} == {k: v for k, v in b.items() if k != "charts/SPS"}


def test_seeds_side_by_side_are_those_that_run_alone(finished, tmp_path):
    command = [sys.executable, "o2sac.py", *SMALL, *TINY, "--run-dir", str(tmp_path), "--num-seeds", "2"]
    done = execute(command)
    assert done.returncode == 0, done.stderr
    assert_same_weights(weights(finished[0]), weights(tmp_path))
    scores = [json.loads((tmp_path / f"{NAME[:-1]}{seed}" / "result.json").read_text()) for seed in (0, 1)]
    mean = sum(result["last_online"] for result in scores) / 2
    assert f"{mean:.1f} ±" in done.stdout and scores[0]["last_online"] != scores[1]["last_online"]
    left = {path.name for path in (tmp_path / f"{NAME[:-1]}0-1").iterdir()}
    assert left == {"seeds.json", "seeds.png"} and "seed 0: " in done.stderr.splitlines()[0]


def test_a_seed_that_fails_is_named(finished, tmp_path):
    policy = str(finished[0] / "hopper-medium-demo__cql-4__0" / "policy.pt")
    (tmp_path / "cql.pt").write_bytes(Path(policy).read_bytes())
    flags = [*SMALL, *TINY, "--run-dir", str(tmp_path), "--offline", str(tmp_path / "cql.pt"), "--num-seeds", "2"]
    broken = tmp_path / run_name(cli.parse(o2sac.Args, o2sac.PRESETS, o2sac.FAMILIES, [*flags, "--seed", "1"]))
    broken.mkdir()
    (broken / "args.json").write_text(json.dumps({"utd": 3}))
    (broken / "reevaluate.pt").touch()
    done = execute([sys.executable, "o2sac.py", *flags])
    assert done.returncode == 2 and "1 of 2 seeds" in done.stdout and "Traceback" not in done.stderr
    assert "holds a run with other arguments" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("seed 1: ")


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    flags = [*SMALL, *TINY, *OFTEN, "--online-steps", "100000", "--run-dir", str(tmp_path)]
    command = [sys.executable, "-u", "o2sac.py", *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    seen = ""
    while "finetune" not in seen:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 130
    assert "the same command continues from there" in rest and "Traceback" not in rest
    assert torch.load(tmp_path / NAME / "finetune.pt", weights_only=True)["step"] > 0


def test_ctrl_c_saves_every_seed(tmp_path):
    flags = [*SMALL, *TINY, *OFTEN, "--online-steps", "100000", "--run-dir", str(tmp_path), "--num-seeds", "2"]
    process = subprocess.Popen(
        [sys.executable, "o2sac.py", *flags], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    folders = [tmp_path / f"{NAME[:-1]}{seed}" for seed in (0, 1)]
    while not all((folder / "finetune.pt").exists() for folder in folders):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and "the same command continues" in err and "Traceback" not in err
    assert all("continues from there" in (folder / "output.txt").read_text() for folder in folders)


@pytest.mark.parametrize(
    "flags",
    [
        ["--no-reevaluate", "--no-align", "--no-constrain"],
        ["--buffer", "all"],
        ["--buffer", "part"],
        ["--buffer", "none"],
        ["--reference", "interval", "--reference-interval", "30"],
    ],
)
def test_variants(finished, run_script, flags):
    code, out, err = run_script(
        o2sac, *SMALL, *TINY, "--run-dir", finished[0], "--exp-name", "v" + "".join(flags), *flags
    )
    assert code == 0, err
    assert "last online" in out and ("aligned" in out) == ("--no-align" not in flags)


def test_fine_tuned_policy_can_be_fine_tuned_again(finished, run_script):
    best = finished[0] / NAME / "best.pt"
    code, out, err = run_script(o2sac, *SMALL, *TINY, "--run-dir", finished[0], "--offline", best)
    assert code == 0, err
    assert "offline (o2sac" in out


# ----------------------------------------------------------------------------------------------- replay


def test_replay_stores_the_executed_action_and_no_truncation(data):
    buffer = ReplayBuffer(data, 5, "none")
    obs, action, next_obs = torch.randn(11).numpy(), torch.rand(3).numpy(), torch.randn(11).numpy()
    buffer.add(obs, action, 2.5, next_obs, False)
    got = buffer.sample(4)
    for tensor, want in zip(got, (obs, action, 2.5, next_obs, 0.0), strict=True):
        torch.testing.assert_close(tensor, torch.as_tensor(want, dtype=torch.float32).expand_as(tensor))
    buffer.add(obs, action, 2.5, next_obs, True)
    assert buffer.table[1, -1] == 1.0


def test_truncation_is_no_termination():
    """Hopper's 1,000th step ends an episode without being an end: the target must go on bootstrapping there."""
    import gymnasium
    import numpy as np

    from common.envs import Episodes

    env = gymnasium.make("Hopper-v4", max_episode_steps=3)
    episodes = Episodes(env, 0)
    first = episodes.obs
    ends = [episodes.step(np.zeros(3, np.float32)) for _ in range(6)]
    assert [end[2] for end in ends] == [False] * 6
    assert [end[3] is not None for end in ends] == [False, False, True] * 2
    assert not np.array_equal(first, episodes.obs)  # another start state
    assert not np.array_equal(ends[5][0], episodes.obs)  # next_obs is the last state, not the next episode's first


def test_an_episode_is_a_success_that_had_one(monkeypatch):
    """Also where it goes on in another process behind the step that was one; without a word of the environment's no
    episode is called anything."""
    import gymnasium
    import numpy as np

    from common import envs

    class Task(gymnasium.Env):
        action_space = observation_space = gymnasium.spaces.Box(-1, 1, (1,))

        def reset(self, seed=None, options=None):
            self.steps = 0
            return np.zeros(1), {}

        def step(self, action):
            self.steps += 1
            info = {} if action[0] < 0 else {"success": bool(action[0] > 0.5)}
            return np.zeros(1), 2.0, False, self.steps == 3, info

    def play(episodes, *actions):
        for action in actions:
            episodes.step(np.array([action]))
        return episodes.outcome

    first, second = envs.Episodes(Task(), 0), envs.Episodes(Task(), 0)
    assert play(first, 0, 1) == {}
    second.load_state_dict(first.state_dict())
    outcome = {"charts/episodic_return": 6, "charts/episodic_length": 3}
    assert play(first, 0) == play(second, 0) == outcome | {"charts/episodic_success": 1}
    assert play(first, 0, 0, 0)["charts/episodic_success"] == 0
    assert play(first, -1, -1, -1) == outcome
    monkeypatch.setattr(envs, "make_env", lambda *_: Task())
    side_by_side = envs.VectorEpisodes(None, None, None, 2, 0)
    for _ in range(3):
        side_by_side.step(np.array([[1.0], [0.0]]))
    assert side_by_side.outcomes() == outcome | {"charts/episodic_success": 0.5, "charts/episodes": 2}
    assert side_by_side.outcomes() == {}
    for order, rate in ((1, 1.0), (-1, 0.0)):  # where one alone says whether it succeeded
        for _ in range(3):
            side_by_side.step(np.array([[-1.0], [rate]])[::order])
        assert side_by_side.outcomes() == outcome | {"charts/episodic_success": rate, "charts/episodes": 2}


@pytest.mark.parametrize(("mode", "start"), [("half", 0), ("all", 1_999), ("none", 0)])
def test_buffer_modes(data, mode, start):
    buffer = ReplayBuffer(data, 50, mode)
    assert buffer.length <= len(data) and (buffer.length == 0) == (start == 0)
    marked = torch.full((11,), 77.0)
    for _ in range(50):
        buffer.add(marked, torch.zeros(3), 0.0, marked, False)
    share = (buffer.sample(2_000)[0] == 77.0).all(1).float().mean().item()
    assert share == pytest.approx({"half": 0.5, "all": 50 / (50 + len(data)), "none": 1.0}[mode], abs=0.03)


@pytest.mark.parametrize(
    "make",
    [
        lambda data: ReplayBuffer(data, 20_000_000, "all"),
        lambda data: PrioritisedBuffer(data, 20_000_000, 1.0),
        lambda data: collect.Memory(20_000_000, 11, 3, data.obs.device),
    ],
)
def test_room_for_a_long_run_takes_memory_as_it_fills_up(data, make):
    """Gigabytes that nothing was written to: a machine that lacks them ended without a word in the first step."""
    page = os.sysconf("SC_PAGE_SIZE")
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * page  # noqa: E731
    before = resident()
    buffer = make(data)
    assert buffer.table.nbytes > 2e9 and resident() - before < 1e8
    holds = data.table if isinstance(buffer, ReplayBuffer) else buffer.table[:0]  # what it begins with
    assert torch.equal(buffer.table[: buffer.length], holds)


def test_too_little_memory_is_said_in_a_sentence(run_script, tmp_path):
    flags = ["--run-dir", tmp_path, "--online-steps", 10**12]
    code, _, err = run_script(o2sac, *SMALL, *TINY, *flags)
    assert code == 2 and "this machine has too little memory" in err and len(err.strip().splitlines()) == 1


def test_what_pytorch_cannot_allocate_is_said_and_no_other_error_hidden(capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: torch.empty(10**15))
    assert end.value.code == 2 and "this machine has too little memory" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="size"):
        cli.run(lambda: torch.ones(2) + torch.ones(3))


def test_part_keeps_the_best_episodes(data):
    buffer = ReplayBuffer(data, 10, "part")
    best = sorted(range(len(data.returns)), key=lambda i: -data.returns[i])[:50]
    expected = [i for i, episode in enumerate(data.episode.tolist()) if episode in best]
    assert torch.equal(buffer.table[: buffer.length], data.table[expected])


# ----------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--env-id", "hoper-medium-v2"], "the nearest names are: hopper-medium-"),
        (["--device", "cuda:7"], "this machine has: cpu"),
        (["--device", "gpu"], "this machine has: cpu"),
        (["--online-steps", "0"], "--online-steps is 0"),
        (["--reevaluate-steps", "-5"], "--reevaluate-steps is -5"),
        (["--offline-steps", "0"], "--offline-steps is 0"),
        (["--batch-size", "33"], "has to be an even number"),
        (["--offline", "nowhere.pt"], "there is no checkpoint nowhere.pt"),
        (["--normalize-from", "none"], "leave --normalize-from out"),
        (["--run-dir", "/dev/null/runs"], "choose --run-dir"),
        (["--align-steps", "99"], "holds a run with other arguments"),
        (["--track"], "pip install wandb"),
        (["--capture-video"], "pip install moviepy"),
    ],
)
def test_refused_with_one_sentence(finished, run_script, monkeypatch, flags, words):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as on a machine that has neither of the two
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, find=importlib.util.find_spec: name != "moviepy" and find(name) or None,
    )
    code, _, err = run_script(o2sac, *SMALL, *TINY, "--run-dir", finished[0], *flags)
    assert code == 2 and words in err
    assert err.strip().count("\n") == 0 and "Traceback" not in err


@pytest.mark.parametrize("kind", ["other environment", "pickle", "text", "tensors", "cut"])
def test_wrong_checkpoints(finished, run_script, tmp_path, kind):
    path = tmp_path / "policy.pt"
    good = finished[0] / NAME / "best.pt"
    if kind == "other environment":
        torch.save(torch.load(good) | {"simulator": "HalfCheetah-v4", "obs_dim": 17}, path)
    elif kind == "pickle":
        torch.save({"actor": Path("x")}, path)
    elif kind == "text":
        path.write_text("hello")
    elif kind == "tensors":
        torch.save({"actor": torch.zeros(3)}, path)
    else:
        path.write_bytes(good.read_bytes()[:-3_000])
    code, _, err = run_script(o2sac, *SMALL, *TINY, "--run-dir", tmp_path / "runs", "--offline", path)
    assert code == 2 and str(path) in err and "Traceback" not in err and err.strip().count("\n") == 0


def test_a_damaged_stage_checkpoint(finished, run_script, tmp_path):
    flags = [*SMALL, *TINY, "--run-dir", str(tmp_path), "--offline", str(finished[0] / NAME / "best.pt")]
    folder = tmp_path / run_name(cli.parse(o2sac.Args, o2sac.PRESETS, o2sac.FAMILIES, flags))
    folder.mkdir()
    (folder / "reevaluate.pt").write_text("no checkpoint")
    code, _, err = run_script(o2sac, *flags)
    assert code == 2 and "is not a checkpoint of this run" in err


def test_nan_stops_the_run_with_the_last_checkpoint(finished, run_script, tmp_path):
    flags = ["--offline", finished[0] / NAME / "best.pt", "--critic-lr", "1e18"]
    code, _, err = run_script(o2sac, *SMALL, *TINY, "--run-dir", tmp_path, *flags)
    assert code == 2 and "in stage 'reevaluate' before step" in err and "checkpoint" in err
    assert not list(tmp_path.rglob("reevaluate.pt"))  # what is no good is not saved


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "stage.pt"
    checkpoint.save_tensors(path, {"step": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        checkpoint.save_tensors(path, {"step": 2})
    assert torch.load(path)["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["stage.pt"]


def test_long_runs_say_so(run_script, monkeypatch, tmp_path):
    monkeypatch.setattr(o2sac.offline, "policy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    flags = ["--env-id", "hopper-medium-demo", "--device", "cpu", "--run-dir", tmp_path, "--online-steps", 100_000_000]
    code, out, _ = run_script(o2sac, *flags)
    assert code == 130 and "--preset quick" in out and "days" in out


def test_presets_are_defaults_that_the_command_line_overrides():
    from common import cli

    args = cli.parse(o2sac.Args, o2sac.PRESETS, o2sac.FAMILIES, ["--preset", "demo", "--utd", "7"])
    assert args.env_id == "hopper-medium-demo" and args.utd == 7
    assert args.online_steps == o2sac.PRESETS["demo"]["online_steps"]
