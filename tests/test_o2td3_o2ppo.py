"""The whole of O2TD3 and of O2PPO at tiny budgets: what they write, how they resume, what they refuse."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import o2ppo
import o2td3
from common import policies
from common.evaluation import Evaluator
from common.replay import ReplayBuffer
from tests.conftest import DEMO, TINY, kill_at
from tests.reference import check_trained_alike

ROOT = Path(o2td3.__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
COMMON = [*DEMO, "--offline-steps", "4", "--reevaluate-steps", "12", "--log-every", "5"]
SMALL = {
    "o2td3": [*COMMON, *TINY, "--align-steps", "12", "--online-steps", "120", "--learning-starts", "60",
              "--eval-every", "40", "--align-eval-every", "6"],
    "o2ppo": [*COMMON, "--device", "cpu", "--no-compile", "--eval-episodes", "2",
              "--regime-episodes", "2", "--online-steps", "192", "--rollout-steps", "64", "--minibatch-size", "16",
              "--num-envs", "4", "--update-epochs", "2", "--eval-every", "64",
              "--reevaluate-batch-size", "32", "--scale-rewards", "True"],
}  # fmt: skip
NAMES = {"o2td3": "hopper-medium-demo__o2td3__td3_bc__0", "o2ppo": "hopper-medium-demo__o2ppo__iql__0"}
SCRIPTS = {"o2td3": o2td3, "o2ppo": o2ppo}


def execute(command):
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Runs a script once, in a process of its own: gives its folder and what it printed."""
    done = {}

    def run(script):
        if script not in done:
            folder = tmp_path_factory.mktemp(script)
            result = execute([f"{script}.py", *SMALL[script], "--run-dir", str(folder)])
            assert result.returncode == 0, result.stderr
            done[script] = (folder, result.stdout, result.stderr)
        return done[script]

    return run


def weights(run):
    state = torch.load(run / "finetune.pt", weights_only=True)
    flat = dict(state["state"]["agent"]) | {"rng": state["rng"]["torch"]}
    for name, optimizer in state["state"].items():
        if name.endswith("optimizer"):
            for moment in ("exp_avg", "exp_avg_sq"):
                flat |= {f"{name}.{moment}.{i}": tensor for i, tensor in enumerate(optimizer[moment])}
    return flat


def progress(run):
    with open(run / "progress.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "charts/SPS"} for row in csv.DictReader(file)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_run_leaves(script, finished):
    folder, out, err = finished(script)
    run = folder / NAMES[script]
    left = {path.name for path in run.iterdir()}
    assert {"reevaluate.pt", "finetune.pt", "policy.pt", "best.pt", "args.json", "result.json", "curve.png"} <= left
    assert ("align.pt" in left) == (script == "o2td3") and not list(folder.rglob("*.part"))
    result = json.loads((run / "result.json").read_text())
    assert result["best"] >= result["offline"] and "not D4RL" in result["source"]
    for word in ("simulator check", "estimated time", "best online", "last online", "not D4RL's data"):
        assert word in out
    assert "finetune  : 100%" in err and "step/s" in err
    names = {name for row in progress(run) for name, value in row.items() if value}
    assert {"charts/score", "charts/best_score", "charts/episodic_return", "losses/actor_loss"} <= names
    assert names >= ({"losses/mse", "losses/lagrange"} if script == "o2td3" else {"losses/approx_kl", "charts/beta"})
    docs = (ROOT / "docs" / "scalars.md").read_text()
    assert not [name for name in names - {"stage", "step"} if name not in docs]  # every one is explained


def test_o2td3_stores_the_action_that_was_executed(finished):
    folder, *_ = finished("o2td3")
    state = torch.load(folder / NAMES["o2td3"] / "finetune.pt", weights_only=True)["state"]
    executed = state["env"]["actions"]  # of the episode that was running at the end
    table = state["replay"]["table"][-len(executed) :]
    assert len(executed) > 1 and torch.equal(table[:, 11:14], executed)
    actor = o2td3.Actor(11, 3)
    actor.load_state_dict({k[6:]: v for k, v in state["agent"].items() if k.startswith("actor.")})
    noise = executed[-1] - actor(table[-1:, :11])[0].detach()
    assert 1e-3 < noise.abs().max() < 0.6  # with its exploration noise


@pytest.mark.parametrize("reference", ["best", "adaptive"])
def test_best_pt_scores_what_it_says(reference, data, finished, run_script):
    """Also where alignment spoils the policy (here by a huge learning rate) and π_ref starts from it all the same."""
    folder, *_ = finished("o2td3")
    flags = ["--align-steps", "30", "--actor-lr", "0.1", "--learning-starts", "1000", "--reference", reference]
    name = f"spoilt-{reference}"
    code, _, err = run_script(o2td3, *SMALL["o2td3"], "--run-dir", folder, "--exp-name", name, *flags)
    assert code == 0, err
    run = folder / f"hopper-medium-demo__{name}__td3_bc__0"
    result = json.loads((run / "result.json").read_text())
    assert result["aligned"] < result["offline"]
    best = torch.load(run / "best.pt", weights_only=True)
    evaluator = Evaluator(data.task, best["state_mean"], best["state_std"], episodes=2)
    assert evaluator(policies.module(best).mode, "cpu") == pytest.approx(best["score"])
    assert best["score"] == pytest.approx(result["offline"])
    fresh = evaluator.score(evaluator.fresh_returns(policies.module(best).mode, "cpu"))
    assert result["best_fresh"] == pytest.approx(fresh) and result["fresh_episodes"] == 20
    moved = torch.load(run / "align.pt", weights_only=True)["state"]["agent"]["actor.net.0.weight"]
    reference_weight = torch.load(run / "finetune.pt", weights_only=True)["state"]["agent"][
        "actor_reference.net.0.weight"
    ]
    assert torch.equal(moved, reference_weight) == (reference == "adaptive")


@pytest.mark.parametrize(
    ("script", "stage", "step", "every"),
    [("o2td3", "reevaluate", 11, 10), ("o2td3", "align", 11, 10), ("o2td3", "finetune", 96, 5),
     ("o2ppo", "reevaluate", 11, 10), ("o2ppo", "finetune", 192, 64)],
)  # fmt: skip
def test_a_killed_run_ends_with_the_same_weights(script, stage, step, every, finished, tmp_path):
    folder, *_ = finished(script)
    killed = execute(["-c", kill_at(script, stage, step, every), *SMALL[script], "--run-dir", str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = execute([f"{script}.py", *SMALL[script], "--run-dir", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert f"{stage}: continuing at step" in done.stdout
    want, got = weights(folder / NAMES[script]), weights(tmp_path / NAMES[script])
    assert want.keys() == got.keys()
    for name in want:
        assert torch.equal(want[name], got[name]), name
    assert progress(folder / NAMES[script]) == progress(tmp_path / NAMES[script])


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("o2td3", ["--no-reevaluate", "--no-align", "--no-constrain"]),
        ("o2td3", ["--buffer", "part", "--utd", "3"]),
        ("o2td3", ["--reference", "interval", "--reference-interval", "30", "--no-critic-layer-norm"]),
        ("o2ppo", ["--no-reevaluate", "--no-constrain"]),
        ("o2ppo", ["--value-init", "fqe", "--reference", "interval", "--reference-interval", "64"]),
        ("o2ppo", ["--num-envs", "1", "--max-std-start", "0.1", "--scale-rewards", "False"]),
    ],
)
def test_variants(script, flags, finished, run_script):
    folder, *_ = finished(script)
    name = "v" + "".join(flags)
    code, out, err = run_script(SCRIPTS[script], *SMALL[script], "--run-dir", folder, "--exp-name", name, *flags)
    assert code == 0, err
    assert "last online" in out


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("o2td3", ["--policy-freq", "0"], "--policy-freq is 0"),
        ("o2td3", ["--batch-size", "33"], "has to be an even number"),
        ("o2td3", ["--offline", "nowhere.zip"], "there is no checkpoint nowhere.zip"),
        ("o2td3", ["--offline", "bc", "--no-reevaluate"], "needs; leave that flag out, or add --critic-init random"),
        ("o2ppo", ["--num-envs", "5"], "has to be a multiple of --num-envs (5)"),
        ("o2ppo", ["--online-steps", "63"], "has to be at least --rollout-steps"),
        ("o2ppo", ["--update-epochs", "-1"], "--update-epochs is -1"),
        ("o2ppo", ["--env-id", "hoper-medium-v2"], "the nearest names are"),
    ],
)
def test_refused_with_one_sentence(script, flags, words, finished, run_script):
    folder, *_ = finished(script)
    name = "r" + "".join(flags).replace("/", "")
    code, _, err = run_script(SCRIPTS[script], *SMALL[script], "--run-dir", folder, "--exp-name", name, *flags)
    last = err.strip().splitlines()[-1]
    assert code == 2 and words in last and "Traceback" not in err


@pytest.mark.parametrize("script", SCRIPTS)
def test_compiled_steps_equal_eager_ones(script, data):
    def td3(compile):
        args = o2td3.Args(compile=compile, batch_size=32, utd=2)
        actor = o2td3.Actor(11, 3).state_dict()
        agent = o2td3.Agent(args, dict(obs_dim=11, action_dim=3, hidden_layers=2, actor=actor))
        optimizers = o2td3.Optimizers(args, agent)
        buffer = ReplayBuffer(data, 100, "half")
        buffer.size.fill_(100)
        return agent, [
            o2td3.reevaluation_step(args, data, agent, optimizers),
            o2td3.alignment_step(args, data, agent, optimizers),
            o2td3.finetuning_step(args, buffer, agent, optimizers, {"mse_threshold": torch.tensor(0.1)}),
        ]

    def ppo(compile):
        args = o2ppo.Args(compile=compile, reevaluate_batch_size=32, rollout_steps=64, minibatch_size=16)
        actor = o2ppo.Actor(11, 3).state_dict()
        agent = o2ppo.Agent(args, dict(obs_dim=11, action_dim=3, hidden_layers=2, actor=actor))
        optimizers = o2ppo.Optimizers(args, agent)
        batch = {name: torch.randn_like(tensor) for name, tensor in o2ppo.empty_batch(args, data).items()}
        rates = {"actor_lr": torch.tensor(3e-5), "critic_lr": torch.tensor(2e-4)}
        fits = [
            o2ppo.reevaluation_step(dataclasses.replace(args, value_init=init), data, agent, optimizers)
            for init in ("fqe", "returns")
        ]
        return agent, [*fits, o2ppo.update_epoch(args, batch, agent, optimizers, rates)]

    def trained(compile):
        torch.manual_seed(0)
        agent, makers = {"o2td3": td3, "o2ppo": ppo}[script](compile)
        torch.manual_seed(1)
        for step in makers:
            for _ in range(5):
                step()
        return agent.state_dict()

    check_trained_alike(trained(True), trained(False))
