"""Policies handed on from one kind to another."""

import dataclasses
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import o2ppo
import o2sac
import o2td3
import offline
from common import cli, evaluation, policies, pretrain, tasks
from common.foreign.build import Function, wrap
from common.run import Run
from common.transfer import transfer
from offline import awac, bc, cql, iql, rebrac, td3_bc
from tests.conftest import TINY, kill_at

S, A = 11, 3
ACTORS = {"squashed_gaussian": o2sac.Actor, "deterministic": o2td3.Actor, "gaussian": o2ppo.Actor}
LAYERS = [256, "ReLU", 256, "ReLU"]


def checkpoint(kind, hidden_layers=LAYERS, obs_dim=S):
    torch.manual_seed(5)
    net = policies.Policy(kind, obs_dim, A, hidden_layers)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
        if kind == "gaussian":
            net.log_std.copy_(torch.tensor([-1.0, -1.5, -0.5]))
    return dict(
        kind=kind, obs_dim=obs_dim, action_dim=A, hidden_layers=hidden_layers, state_mean=torch.zeros(obs_dim),
        algorithm="test", state_std=torch.ones(obs_dim), env_id="x", simulator=tasks.resolve(tasks.DEMO).simulator,
        seed=0, steps=1, score=1.0, examples={"obs": torch.randn(4, obs_dim)}, data={}, made_with={},
        actor=net.state_dict(),
    )  # fmt: skip


@pytest.fixture
def evaluator():
    return evaluation.Evaluator(tasks.resolve(tasks.DEMO), torch.zeros(S), torch.ones(S), 2, final=3)


@pytest.fixture
def run(tmp_path):
    return Run(pretrain.PretrainArgs(run_dir=str(tmp_path)), "run", None)


@pytest.mark.parametrize("script", [cql, iql, td3_bc, bc, awac, rebrac, o2sac, o2td3, o2ppo])
def test_every_actor_of_a_kind_has_one_layout(script, data):
    if hasattr(script, "training_step"):
        agent = script.Agent(script.Args(hidden=(256, 256)), S, A)
        kind, actor = agent.kind, agent.actor
    else:
        kind, actor = next((k, v(S, A, 2)) for k, v in ACTORS.items() if v is script.Actor)
        agent = script.Agent(cli.complete(script.Args()), checkpoint(kind))
        actor = agent.actor
    net = policies.Policy(kind, S, A, 2)
    net.load_state_dict(actor.state_dict())
    obs = torch.randn(20, S)
    torch.testing.assert_close(net.mode(obs), agent.act(obs))
    if kind != "deterministic":
        for a, b in zip(net.spread(obs), actor(obs), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("source", policies.KINDS)
@pytest.mark.parametrize("kind", policies.KINDS)
def test_every_kind_becomes_every_other_with_the_same_mode(source, kind, data, evaluator, run, capsys):
    policy = checkpoint(source)
    policy["score"] = evaluator(policies.module(policy).mode, "cpu", final=True)
    new = transfer(policy, kind, data, evaluator, run)
    before, after = policies.module(policy), policies.module(new)
    torch.testing.assert_close(after.mode(data.obs), before.mode(data.obs), rtol=0, atol=1e-6)
    ACTORS[kind](S, A, 2).load_state_dict(new["actor"])
    if source == kind:
        assert new is policy and not capsys.readouterr().out
        return
    out = capsys.readouterr().out
    assert "mean action error" in out and out.split("score ")[1].split(" → ")[0] in out.split(" → ")[-1]
    if kind == "deterministic":
        return
    torch.manual_seed(0)
    obs = data.obs[:100].repeat(200, 1)
    theirs = before.sample(obs)
    if theirs is None:  # taken as TD3 plays it
        theirs = (before.mode(obs) + 0.1 * torch.randn(len(obs), A)).clamp(-1, 1)
    spread = (theirs - before.mode(obs)).pow(2).mean(0).sqrt()
    mine = (after.sample(obs) - after.mode(obs)).pow(2).mean(0).sqrt()
    torch.testing.assert_close(mine, spread, rtol=0.35, atol=0.02)


@pytest.mark.parametrize("kind", policies.KINDS)
def test_a_network_of_other_layers_is_handed_on_exactly(kind, data, evaluator, run):
    """Its layers are copied, whatever they are, and the online algorithm's actor is made of them."""
    policy = checkpoint("deterministic", ["Clip", 64, "LayerNorm", "Tanh", 32, "ELU"])
    policy["actor"] |= {"net.0.low": torch.full((S,), -1.0), "net.0.high": torch.full((S,), 1.0)}
    new = transfer(policy, kind, data, evaluator, run, steps=50)
    before, after = policies.module(policy), ACTORS[kind](S, A, new["hidden_layers"])
    after.load_state_dict(new["actor"])
    out = after(data.obs)
    got = {"deterministic": lambda: out, "gaussian": lambda: out[0], "squashed_gaussian": lambda: out[0].tanh()}[kind]()
    torch.testing.assert_close(got, before.mode(data.obs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", policies.KINDS)
def test_a_function_is_distilled(kind, data, evaluator, run, capsys):
    torch.manual_seed(4)
    net = torch.nn.Sequential(torch.nn.Linear(S, 32), torch.nn.Tanh(), torch.nn.Linear(32, A), torch.nn.Tanh())
    policy = wrap(data, Function(net), "test") | {"score": math.pi}
    new = transfer(policy, kind, data, evaluator, run, steps=1_500)
    assert new["transfer_error"] < 0.05
    with torch.no_grad():
        assert (policies.module(new).mode(data.obs) - net(data.obs)).abs().mean() < 0.05
    out = capsys.readouterr().out
    assert f"mean action error {new['transfer_error']:.2g}, score 3.1 → {new['score']:.1f}" in out
    assert (
        new["score"] == evaluator(policies.module(new).mode, "cpu", final=True)
        and run.logged.rows[-1]["stage"] == "transfer"
    )


def test_it_does_not_depend_on_what_was_drawn_or_scored_before(data, evaluator, tmp_path):
    policy, new = checkpoint("deterministic"), []
    for name, score in ("a", math.nan), ("b", 7.0):
        run = Run(pretrain.PretrainArgs(run_dir=str(tmp_path)), name, None)
        run.last_score = score  # of whatever stage came before
        new.append(transfer(policy, "gaussian", data, evaluator, run, steps=100)["actor"])
        torch.randn(len(name))
        saved = torch.load(run.dir / "transfer.pt", weights_only=True)
        assert saved["last_score"] == policy["score"]
    assert all(torch.equal(new[0][key], new[1][key]) for key in new[0])


# ----------------------------------------------------------------------------------------------- the matrix

SMALL = {
    o2sac: ["--align-steps", "4", "--align-eval-every", "4", "--online-steps", "90", "--learning-starts", "60",
            "--utd", "2", "--eval-every", "90", "--batch-size", "32"],
    o2td3: ["--align-steps", "4", "--align-eval-every", "4", "--online-steps", "90", "--learning-starts", "60",
            "--eval-every", "90", "--batch-size", "32"],
    o2ppo: ["--online-steps", "64", "--rollout-steps", "32", "--minibatch-size", "16", "--num-envs", "4",
            "--update-epochs", "1", "--eval-every", "64", "--reevaluate-batch-size", "32"],
}  # fmt: skip


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    return tmp_path_factory.mktemp("matrix")


@pytest.mark.parametrize("algorithm", ["cql", "iql", "td3_bc", "bc", "awac", "rebrac"])
@pytest.mark.parametrize("script", [o2sac, o2td3, o2ppo])
def test_every_offline_policy_into_every_online_algorithm(script, algorithm, shared_runs, run_script, monkeypatch):
    monkeypatch.setattr(transfer, "__defaults__", (50, 0.1))
    flags = [flag for flag in TINY if flag not in ("--batch-size", "32")]
    code, out, err = run_script(
        script, *flags, *SMALL[script], "--env-id", "hopper-medium-demo", "--offline", algorithm,
        "--offline-steps", "4", "--reevaluate-steps", "4", "--log-every", "4", "--run-dir", shared_runs,
    )  # fmt: skip
    assert code == 0, err
    run = shared_runs / f"hopper-medium-demo__{script.__name__}__{algorithm}__0"
    result = json.loads((run / "result.json").read_text())
    assert result["offline_algorithm"] == algorithm and result["best"] >= result["offline"]
    handed_on = torch.load(run / "policy.pt", weights_only=True)
    ACTORS[handed_on["kind"]](S, A, handed_on["hidden_layers"]).load_state_dict(handed_on["actor"])
    exact = {"cql": "squashed_gaussian", "td3_bc": "deterministic", "rebrac": "deterministic"}.get(
        algorithm, "gaussian"
    )
    assert ("transfer:" in out) == (handed_on["kind"] != exact) == (run / "offline.pt").exists()
    stored, measured = (out.split("offline policy: ")[1].split("score ")[1].split()[i] for i in (0, 2))
    assert measured == stored
    if "transfer:" in out:
        before, after = out.split("transfer:")[1].split("score ")[1].split("\n")[0].split(" → ")
        assert before == after  # the mode is exact


def test_a_policy_of_another_kind_is_handed_on_once(shared_runs, run_script, monkeypatch):
    """Started again, a run takes the policy that it distilled before."""
    monkeypatch.setattr(transfer, "__defaults__", (50, 0.1))
    flags = [flag for flag in TINY if flag not in ("--batch-size", "32")]
    command = [
        *flags, *SMALL[o2td3], "--env-id", "hopper-medium-demo", "--offline", "iql", "--offline-steps", "4",
        "--reevaluate-steps", "4", "--log-every", "4", "--run-dir", shared_runs, "--exp-name", "twice",
    ]  # fmt: skip
    assert "transfer:" in run_script(o2td3, *command)[1]
    code, out, _ = run_script(o2td3, *command)
    assert code == 0 and "transfer:" not in out


def execute(*command):
    return subprocess.run([sys.executable, *map(str, command)], cwd=Path(__file__).parents[1], capture_output=True)


def test_a_run_that_is_killed_while_it_hands_on_ends_with_the_same_policy(tmp_path):
    """Killed between two checkpoints, after the offline policy was trained."""
    flags = [flag for flag in TINY if flag not in ("--batch-size", "32")]
    command = [*flags, *SMALL[o2ppo], "--env-id", "hopper-medium-demo", "--offline", "td3_bc", "--offline-steps", "4",
               "--reevaluate-steps", "4", "--log-every", "4"]  # fmt: skip
    short = "import common.transfer as t; t.transfer.__defaults__ = (250, 0.1)"  # 50 steps, as the mode is exact
    whole = execute("-c", f"{short}\n{kill_at('o2ppo', 'none', 0, 20)}", *command, "--run-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    cut = [*command, "--run-dir", tmp_path / "cut"]
    killed = execute("-c", f"{short}\n{kill_at('o2ppo', 'transfer', 35, 20)}", *cut)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = execute("-c", f"{short}\n{kill_at('o2ppo', 'none', 0, 20)}", *cut)
    assert done.returncode == 0 and b"transfer: continuing at step 20" in done.stdout, done.stderr
    for name in ("offline.pt", "policy.pt"):
        a, b = (policies.read(next((tmp_path / run).glob("*o2ppo*")) / name)["actor"] for run in ("whole", "cut"))
        assert all(torch.equal(a[key], b[key]) for key in a)
    result = next((tmp_path / "cut").glob("*o2ppo*")) / "result.json"
    first = json.loads(result.read_text())["seconds"]
    result.unlink()
    assert execute("-c", f"{short}\n{kill_at('o2ppo', 'none', 0, 20)}", *cut).returncode == 0
    assert json.loads(result.read_text())["seconds"] == first and first["transfer"] > 0  # started again, it knows it


def test_a_policy_that_ships_stands_in_for_training(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "SHIPPED", tmp_path)
    args = o2td3.Args(env_id=tasks.DEMO, offline="td3_bc")
    assert offline.shipped(args) is None
    path = tmp_path / "policies" / f"{tasks.DEMO}__td3_bc.pt"
    path.parent.mkdir()
    path.touch()
    assert offline.shipped(args) == path
    for own in (dict(offline_steps=4), dict(dataset_path="own.hdf5"), dict(offline="iql"), dict(offline=str(path)),
                dict(env_id="hopper-medium-v2")):  # fmt: skip
        assert offline.shipped(dataclasses.replace(args, **own)) is None
    assert offline.seconds(args, None) == {}
