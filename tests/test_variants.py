"""Options of O2SAC and O2TD3 that depart from the paper: each does what it says, and nothing else."""

import json
import os
import re
import signal
from itertools import starmap
from types import SimpleNamespace
from typing import Annotated

import pytest
import torch

import offline
import o2sac
import o2td3
from baselines import rlpd
from common import bounds, cli, policies, report, stages
from common.replay import ReplayBuffer
from tests.conftest import TINY
from tests.reference import A, Recorder, S
from tests.test_transfer import checkpoint

SCRIPTS = {"o2sac": o2sac, "o2td3": o2td3}
HIDDEN = [16, "ReLU", 16, "ReLU"]
THRESHOLDS = {"o2sac": "kl_threshold", "o2td3": "mse_threshold"}
SMALL = [*TINY, "--env-id", "hopper-medium-demo", "--regime-episodes", "0", "--eval-episodes", "1", "--log-every", "9",
         "--reevaluate-steps", "6", "--align-steps", "6", "--align-eval-every", "6", "--online-steps", "24",
         "--learning-starts", "5", "--utd", "2", "--eval-every", "24", "--actor-lr", "0.01",
         "--critic-hidden", "16"]  # fmt: skip


@pytest.fixture
def start(hdf5, tmp_path, run_script, monkeypatch):
    """Runs a script on a few random rows, from a policy without a critic: its checkpoints of each stage."""
    path = hdf5()
    for slow, quick in {"plots.draw": None, "agreement.report_simulator_check": None, "run.code_of": {}}.items():
        monkeypatch.setattr(f"common.{slow}", lambda *_, found=quick, **__: found)

    def run(script, *flags, folder="runs", code=0):
        policy = tmp_path / f"{script}.pt"
        if not policy.exists():
            policies.save_policy(policy, **checkpoint(SCRIPTS[script].KIND, HIDDEN))
        argv = [*SMALL, "--dataset-path", path, "--run-dir", tmp_path / folder, "--offline", policy, *flags]
        found, _, err = run_script(SCRIPTS[script], *argv)
        assert found == code, err
        [run_dir] = (tmp_path / folder).iterdir()
        stages = [name for name in ("reevaluate", "align", "finetune") if (run_dir / f"{name}.pt").exists()]
        return {name: torch.load(run_dir / f"{name}.pt", weights_only=True) for name in stages}

    return run


def part(saved, name):
    """The tensors of a stage's checkpoint that belong to a network, a number or an optimiser of this name."""
    state = saved["state"]
    if name.endswith("optimizer"):
        return [*state[name]["exp_avg"], *state[name]["exp_avg_sq"], *state[name]["steps"]]
    return [value for key, value in state["agent"].items() if f"{key}.".startswith(f"{name}.")]


def same(a, b, *names):
    """Which of these are the same in two checkpoints, bit for bit."""
    return [name for name in names if all(starmap(torch.equal, zip(part(a, name), part(b, name), strict=True)))]


# ----------------------------------------------------------------------------------------------- warm-up

STAND_STILL = {
    "o2sac": ("actor", "actor_optimizer", "log_alpha", "alpha_optimizer", "log_lagrange", "lagrange_optimizer"),
    "o2td3": ("actor", "actor_optimizer", "log_lagrange", "lagrange_optimizer"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_while_warming_up_the_offline_policy_plays_and_the_critic_learns(script, start, monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # so that what is played is the most likely action
    left = start(script, "--warmup-steps", "24")
    aligned, ended = left["align"], left["finetune"]
    assert same(aligned, ended, *STAND_STILL[script]) == list(STAND_STILL[script])
    assert same(aligned, ended, "critic", "critic_target", "critic_optimizer") == []
    table = ended["state"]["replay"]["table"]
    obs, actions = table[:, :S], table[:, S : S + A]
    names = ("actor_offline", "actor")
    off, pi = (SCRIPTS[script].Actor(S, A, HIDDEN) for _ in names)
    for net, name in zip((off, pi), names, strict=True):
        net.load_state_dict({key[len(name) + 1 :]: value for key, value in ended["state"]["agent"].items()
                             if key.startswith(f"{name}.")})  # fmt: skip
    off, pi = ((torch.tanh(net(obs)[0]) if script == "o2sac" else net(obs)) for net in (off, pi))
    torch.testing.assert_close(actions, off, rtol=1e-4, atol=1e-5)
    assert (actions - pi).abs().max() > 1e-2

    after = start(script, "--warmup-steps", "14", folder="longer")["finetune"]  # then all of them learn, and π plays
    assert same(ended, after, *STAND_STILL[script]) == []
    played = after["state"]["replay"]["table"]
    assert torch.equal(played[:14], table[:14]) and not torch.equal(played[14, S : S + A], table[14, S : S + A])


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_interrupted_warm_up_goes_on_bit_for_bit(script, start, monkeypatch):
    """Stopped within it, at its last step, and after it."""
    whole = start(script, "--warmup-steps", "12")["finetune"]
    stops, add = [9, 12, 18], ReplayBuffer.add

    def add_and_stop(self, *transition):
        add(self, *transition)
        if self.length in stops:
            stops.remove(self.length)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ReplayBuffer, "add", add_and_stop)
    while stops:
        start(script, "--warmup-steps", "12", folder="parts", code=130)
    ended = start(script, "--warmup-steps", "12", folder="parts")["finetune"]
    names = ["agent", *(name for name in whole["state"] if name.endswith("optimizer"))]
    assert torch.equal(whole["rng"]["torch"], ended["rng"]["torch"])
    assert torch.equal(whole["state"]["replay"]["table"], ended["state"]["replay"]["table"])
    assert whole["state"]["agent"].keys() == ended["state"]["agent"].keys()
    agents = zip(whole["state"]["agent"].values(), ended["state"]["agent"].values(), strict=True)
    assert all(torch.equal(a, b) for a, b in agents) and same(whole, ended, *names[1:]) == names[1:]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_critics_loss_is_the_same_while_warming_up(script, data):
    module, found = SCRIPTS[script], {}
    for warming_up in (False, True):
        torch.manual_seed(5)
        args, optimizers = cli.complete(module.Args(compile=False, batch_size=32, utd=2)), Recorder()
        policy = dict(obs_dim=S, action_dim=A, hidden_layers=2, actor=module.Actor(S, A, 2).state_dict())
        agent, buffer = module.Agent(args, policy), ReplayBuffer(data, 10, "all")
        scheduled = {THRESHOLDS[script]: torch.tensor(0.1)}
        step = module.finetuning_step(args, buffer, agent, optimizers, scheduled, warming_up=warming_up)
        step()
        found[warming_up] = optimizers
    assert found[True].keys() == {"critic_optimizer"} < found[False].keys()
    a, b = (found[warming_up]["critic_optimizer"].calls for warming_up in (False, True))
    assert len(a) == len(b) == 2
    assert all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


# ----------------------------------------------------------------------------------------------- a random critic


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_random_critic_is_the_one_that_re_evaluation_would_begin_with(script, start):
    flags = ["--no-align", "--learning-starts", "24"]
    random = start(script, *flags, "--no-reevaluate", "--critic-init", "random", folder="random")
    begun = start(script, *flags, "--critic-lr", "0", "--reevaluate-tau", "0", folder="begun")
    assert same(random["finetune"], begun["reevaluate"], "critic", "critic_target") == ["critic", "critic_target"]
    assert "reevaluate" not in random


# ----------------------------------------------------------------------------------------------- alignment

CRITICS = ("critic", "critic_optimizer")


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_actors_rate_in_alignment_is_its_own_there_alone(script, start):
    """Adam's first step is as long as its rate; in fine-tuning the rate is the usual one again, the moments go on."""
    step = ("--align-steps", "1", "--align-eval-every", "1", "--online-steps", "8", "--learning-starts", "7")
    left = {rate: start(script, *step, "--align-actor-lr", rate, folder=rate) for rate in ("1e-2", "1e-3", "0")}
    left["None"] = start(script, *step, folder="None")

    def moved(saved, before):
        return max((x - y).abs().max().item() for x, y in zip(part(saved, "actor"), before, strict=True))

    off = part(left["0"]["align"], "actor_offline")
    aligned = {rate: moved(saved["align"], off) for rate, saved in left.items()}
    assert aligned == {"1e-2": pytest.approx(1e-2, rel=1e-2), "1e-3": pytest.approx(1e-3, rel=1e-2), "0": 0,
                       "None": aligned["1e-2"]}  # fmt: skip
    assert same(left["None"]["finetune"], left["1e-2"]["finetune"], "actor", *CRITICS) == ["actor", *CRITICS]
    for rate in ("1e-3", "0"):
        on = moved(left[rate]["finetune"], part(left[rate]["align"], "actor"))
        assert 3e-3 < on < 3e-2  # two updates of 1e-2 (O2TD3: one), whatever alignment's was
        [*_, count] = part(left[rate]["align"], "actor_optimizer")
        assert count == (rate != "0")  # an actor that stands still leaves no moments


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_frozen_actor_leaves_an_aligned_critic(script, start):
    left = start(script, "--align-actor-lr", "0", "--online-steps", "3")
    frozen = left["align"]
    assert all(starmap(torch.equal, zip(part(frozen, "actor"), part(frozen, "actor_offline"), strict=True)))
    assert same(left["reevaluate"], frozen, "actor", "actor_optimizer", *CRITICS) == ["actor", "actor_optimizer"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_of_alignment_the_critics_alone_are_kept(script, start, tmp_path):
    """What it did is as ever; fine-tuning begins with π_off, without the moments of alignment's Adam."""
    short = ("--online-steps", "3")
    usual, restored = start(script, *short), start(script, *short, "--align-restore", folder="restored")
    names = ["actor", "actor_optimizer", *CRITICS]
    assert same(usual["align"], restored["align"], *names) == names
    assert same(usual["finetune"], restored["finetune"], *names) == list(CRITICS)  # no update came
    ended, off = restored["finetune"], part(restored["finetune"], "actor_offline")
    kinds = ["actor", "actor_reference", *(["actor_target"] if script == "o2td3" else [])]
    for kind in kinds:
        assert all(starmap(torch.equal, zip(part(ended, kind), off, strict=True)))
    assert not any(tensor.any() for tensor in part(ended, "actor_optimizer"))
    assert all(starmap(torch.equal, zip(part(ended, "critic"), part(ended, "critic_target"), strict=True)))
    result = json.loads(next((tmp_path / "restored").glob("*/result.json")).read_text())
    assert result["start"] == result["offline"] != result["aligned"] and result["best"] >= result["offline"]
    result = json.loads(next((tmp_path / "runs").glob("*/result.json")).read_text())
    assert result["start"] == result["aligned"]


# ----------------------------------------------------------------------------------------------- contradictions


def parsed(script, flags):
    module = stages.online(script)
    return cli.parse(module.Args, module.PRESETS, module.FAMILIES, flags.split())


@pytest.mark.parametrize("script", SCRIPTS)
def test_arguments_that_exclude_each_other_are_refused(script):
    for flags, words in {
        "--critic-init random": "add --no-reevaluate",
        "--align-constrain --align-actor-lr 0": "leave one out",
        "--online-steps 20 --warmup-steps 21": "at most --online-steps (20)",
    }.items():
        with pytest.raises(cli.UserError, match=re.escape(words)):
            parsed(script, flags)
    parsed(script, "--critic-init random --no-reevaluate --online-steps 20 --warmup-steps 20")


def idle(script, flags):
    return stages.idle(parsed(script, flags))


def test_a_script_declares_whether_its_naive_switch_takes_the_offline_critic(monkeypatch):
    naive = {script: offline.takes_critic(parsed(script, "--no-reevaluate")) for script in (*SCRIPTS, "o2ppo")}
    assert naive == {"o2sac": True, "o2td3": True, "o2ppo": False}
    monkeypatch.delattr(stages.online("o2ppo"), "TAKES_CRITIC")  # whatever the kind of its policy is
    assert offline.takes_critic(parsed("o2ppo", "--no-reevaluate"))


def test_what_changes_nothing_is_said(monkeypatch):
    silent = ["--preset demo --no-reevaluate --no-align --no-constrain", "--env-id antmaze-umaze-v2 --no-align",
              "--align-steps 9", "--critic-hidden 8 --no-reevaluate --critic-init random",
              "--buffer part --part-episodes 3 --reference adaptive --reference-window 5",
              "--lagrange-init 9 --no-constrain --align-constrain"]  # fmt: skip
    assert not any(idle(script, flags) for script in SCRIPTS for flags in silent)
    assert idle("o2td3", "--online-steps 1000 --warmup-steps 1000") == [
        "--learning-starts 1000 leaves nothing of --online-steps 1000: the policy stays as it is",
        "--warmup-steps 1000 leaves nothing of --online-steps 1000: the policy stays as it is",
    ]
    assert idle("o2sac", "--preset demo --warmup-steps 2000") == [
        "--warmup-steps 2000 ends before the first update, after --learning-starts 2000: at no step the critics alone "
        "learn"
    ]
    assert not idle("o2sac", "--preset demo --warmup-steps 2001")
    assert idle("o2sac", "--no-align --align-restore --align-actor-lr 0 --no-reevaluate --gamma 0") == [
        "--align-actor-lr, --align-restore change nothing with --no-align"
    ]
    logs = "--log-every changes nothing without --reevaluate or --align"
    assert logs in idle("o2sac", "--no-align --no-reevaluate --log-every 7")
    assert not idle("o2sac", "--no-align --log-every 7")
    assert idle("o2td3", "--no-reevaluate --no-critic-layer-norm") == [
        "--no-critic-layer-norm changes nothing without --reevaluate or --critic-init random"
    ]
    found = idle("o2td3", "--no-reevaluate --reevaluate-steps auto --preset demo")
    assert found == ["--reevaluate-steps changes nothing with --no-reevaluate"]
    assert idle("o2sac", "--no-reevaluate --critics 3 --part-episodes 3 --reference-window 5 --no-constrain "
                "--lagrange-init 9 --per-dimension --wandb-entity me") == [
        "--wandb-entity changes nothing without --track",
        "--critics changes nothing without --reevaluate or --critic-init random",
        "--lagrange-init changes nothing without --constrain or --align-constrain",
        "--part-episodes changes nothing without --buffer part",
        "--per-dimension changes nothing without --constrain",
        "--reference-window changes nothing without --reference adaptive",
    ]  # fmt: skip
    # of what it needs one is enough, whichever
    either = Annotated[float, bounds.only_with(align_constrain=True, constrain=True)]
    monkeypatch.setitem(stages.online("o2sac").Args.__annotations__, "lagrange_init", either)
    align = "--align-constrain changes nothing with --no-align"
    assert idle("o2sac", "--lagrange-init 9 --align-constrain --no-align") == [align]
    # nor does what needs an argument that changes nothing
    assert idle("o2ppo", "--no-reevaluate --value-init fqe --critic-hidden 8") == [
        "--value-init, --critic-hidden change nothing without --reevaluate"
    ]
    assert idle("o2sac", "--no-align --align-constrain --no-constrain --lagrange-init 9 --reference adaptive "
                "--reference-window 5") == [
        "--lagrange-init, --align-constrain change nothing with --no-align",
        "--reference, --reference-window change nothing without --constrain",
    ]  # fmt: skip
    path = "datasets/policies/hopper-medium-demo__iql.pt"
    for flags, found in {
        f"--offline {path} --offline-steps 9 --trust-checkpoint --normalize-from 1": [
            f"--offline-steps changes nothing, for --offline {path} is a policy"
        ],
        "--offline iql --offline-steps 9 --trust-checkpoint": [
            "--trust-checkpoint changes nothing, for --offline iql is an algorithm"
        ],
    }.items():
        assert offline.idle(parsed("o2sac", flags)) == found
    args = cli.parse(rlpd.Args, {}, {}, ["--offline-steps", "9", "--normalize-from", "1"])
    assert offline.idle(args) == ["--offline-steps, --normalize-from change nothing, for rlpd starts from nothing"]
    # a constant of the data is no one's own
    monkeypatch.setattr(o2td3.Args, "constants", lambda *_: dict(align_actor_lr=0.5))
    assert not idle("o2td3", "--no-align")


def test_it_is_said_at_the_start_of_a_run(run_script, monkeypatch, capsys):
    def end(*_):
        raise cli.UserError("here")

    monkeypatch.setattr("common.datasets.load", end)
    for seeds in "12":
        _, out, _ = run_script(o2td3, "--no-align", "--align-steps", "auto", "--num-seeds", seeds, "--device", "cpu")
        assert out == "note: --align-steps changes nothing with --no-align\n"
    for flags, most in {"--no-align --align-steps auto": False, "--align-steps auto": True}.items():
        report.estimate(SimpleNamespace(args=parsed("o2td3", flags), dir="runs"), {"finetune": 9.0})
        assert ("at most" in capsys.readouterr().out) is most
