"""What happens when in fine-tuning: the three scripts' own loops, with stand-ins for all that they drive."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import o2ppo
import o2sac
import o2td3
from common import cli

S, A, STEPS = 4, 2, 10
ENDS = {4: False, 8: True, 9: False}  # steps that end an episode, and whether really
THRESHOLDS = {o2sac: "kl_threshold", o2td3: "mse_threshold"}


@pytest.fixture(params=[o2sac, o2td3], ids=lambda script: script.__name__)
def play(request, monkeypatch):
    """Takes ten steps of a script's `finetune` with these arguments: everything that it did, by kind, in order."""
    script = request.param

    def run(improves=(), outplays=(), **given):
        args = cli.complete(script.Args(online_steps=STEPS, learning_starts=3, eval_every=4, **given))
        did = SimpleNamespace(added=[], updated=[], changed=[], evaluated=[], moved=[], finished=[], acted=[])
        now = SimpleNamespace(step=0)

        class Environment:
            outcome = {}

            @property
            def obs(self):
                return np.full(S, now.step, np.float32)

            def step(self, action):
                ended = now.step in ENDS
                return self.obs + 0.5, 7.0, ENDS.get(now.step, False), 100.0 + now.step if ended else None

        class Stages:
            start = 0

            def __init__(self, run, stage, total, state, *_):
                did.state = state

            def __iter__(self):
                for now.step in range(1, STEPS + 1):
                    yield now.step

            def evaluate(self, evaluator, more):
                did.evaluated.append((now.step, more[f"charts/{THRESHOLDS[script]}"]))
                return now.step in improves

        class Stepper:
            def __init__(self, *_, **kwargs):
                did.stepper = kwargs

            def change(self, step):
                did.changed.append((now.step, step))

            def run(self, n):
                did.updated.append((now.step, n, len(did.added)))

        class Outplayed:
            def __init__(self, window, margin):
                did.rule = window, margin

            def add(self, value):
                did.finished.append(value)
                return now.step in outplays

        def network(name):
            def act(obs):
                did.acted.append((now.step, name))
                out = torch.zeros(len(obs), A)
                return (out, out - 20) if script is o2sac else out

            return act

        replay = SimpleNamespace(add=lambda *row: did.added.append(row), action_dim=A)
        agent = SimpleNamespace(
            actor=network("π"), actor_offline=network("π_off"), move_reference=lambda: did.moved.append(now.step)
        )
        monkeypatch.setattr(script.envs, "training", lambda *_: Environment())
        monkeypatch.setattr(script, "experience", lambda *_: replay)
        monkeypatch.setattr(script, "Loop", Stages)
        monkeypatch.setattr(script.steps, "Stepper", Stepper)
        monkeypatch.setattr(script, "Outplayed", Outplayed)
        monkeypatch.setattr(script, "finetuning_step", lambda *args: args[-1])  # whether it is warming up
        data = SimpleNamespace(obs=torch.zeros(1, S), task=None)
        log = SimpleNamespace(log=lambda *_: None)
        script.finetune(args, log, data, agent, {"actor_optimizer": 1}, None, None, None)
        return did

    run.script = script
    return run


def test_updates_and_evaluations_have_their_steps_and_time_outs_are_no_ends(play):
    did = play(reference="best")
    # from the step after --learning-starts on, before the step's own transition is there
    assert did.updated == [(step, 1, step - 1) for step in range(4, STEPS + 1)]
    assert [step for step, _ in did.evaluated] == [4, 8, STEPS]
    assert [row[4] for row in did.added] == [step == 8 for step in range(1, STEPS + 1)]
    for step, (obs, action, reward, next_obs, _) in enumerate(did.added, 1):
        assert obs.tolist() == [step] * S and next_obs.tolist() == [step + 0.5] * S and reward == 7
        assert action.shape == (A,) and np.abs(action).max() < 0.6
    assert did.finished == [104, 108, 109] and did.rule == (10, 1.0)
    names = {"agent", "actor_optimizer", "replay", "env", "best", "outplayed", "stepper"}
    assert did.state.keys() == names  # what a resumed run goes on with
    assert play.script is o2sac or did.stepper["phases"] == 2  # the actor's updates and those without it


def test_the_threshold_follows_the_environment_steps(play):
    name = THRESHOLDS[play.script]
    did = play(**{f"{name}_start": 1.0, f"{name}_end": 3.0, f"{name}_steps": 8})
    assert [value for _, value in did.evaluated] == pytest.approx([2.0, 3.0, 3.0])


@pytest.mark.parametrize(("reference", "moved"), [("best", [4, 10]), ("adaptive", [8]), ("interval", [3, 6, 9])])
def test_the_reference_moves_by_its_own_rule_alone(play, reference, moved):
    interval = dict(reference_interval=3) if reference == "interval" else {}
    assert play(improves=(4, 10), outplays=(8,), reference=reference, **interval).moved == moved


def test_the_offline_policy_plays_the_warm_up(play):
    """And its episodes say nothing about the policy that is fine-tuned."""
    did = play(reference="adaptive", warmup_steps=4, outplays=(4, 9))
    assert did.acted == [(step, "π_off" if step <= 4 else "π") for step in range(1, STEPS + 1)]
    assert did.changed == [(1, True), (5, False)]
    assert did.finished == [108, 109] and did.moved == [9]
    assert play(warmup_steps=0).changed == [(1, False)]


def test_o2td3_explores_with_noise_of_its_own_size(play, monkeypatch):
    if play.script is o2sac:
        pytest.skip("whose policy is random itself")
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.tensor([1.0, 100.0]))
    for _, action, *_ in play(exploration_noise=0.07).added:
        assert action.tolist() == pytest.approx([0.07, 1.0])  # within the actions' bounds


# ----------------------------------------------------------------------------------------------- O2PPO


@pytest.fixture
def roll(monkeypatch):
    """Three rollouts of 64 steps of O2PPO's `finetune`; in the first two episodes end, of returns 1, 2 and 3."""

    def run(improves=(), outplays=(), **given):
        args = o2ppo.Args(online_steps=250, rollout_steps=64, minibatch_size=16, update_epochs=3, eval_every=100,
                          num_envs=4, beta_steps=128, **given)  # fmt: skip
        args, returns = cli.complete(args), [[1.0, 2.0], [3.0], []]
        did = SimpleNamespace(played=[], filled=[], epochs=[], evaluated=[], moved=[], finished=[])
        now, actor = SimpleNamespace(step=0), torch.nn.Linear(1, 1)
        actor.weight.data.zero_()

        class Stages:
            start = 0

            def __init__(self, run, stage, total, state, *_):
                did.state, did.total = state, total

            def blocks(self, size):
                for now.step in range(size, did.total + 1, size):
                    yield now.step, size

            def evaluate(self, evaluator, more):
                did.evaluated.append(now.step)
                return now.step in improves

        class Stepper:
            def __init__(self, *_, **__):
                pass

            def run(self, n):
                did.epochs.append(n)
                actor.weight.data += 1

        class Outplayed:
            def __init__(self, *_):
                pass

            def add(self, value):
                did.finished.append(value)
                return value in outplays

        def rollout(player, env, steps_each):
            did.played.append((player.weight.item(), steps_each))
            return {"rewards": 3.0, "ended": "ended"}, returns[len(did.played) - 1]

        def fill(args, batch, collected, agent, beta):
            did.filled.append((collected["rewards"], beta.item()))
            return torch.tensor(0.0)

        agent = SimpleNamespace(actor=actor, move_reference=lambda: did.moved.append(now.step))
        monkeypatch.setattr(o2ppo.envs, "side_by_side", lambda *_: SimpleNamespace(outcomes=dict))
        for name, stand_in in dict(Loop=Stages, Outplayed=Outplayed, rollout=rollout, fill=fill,
                                   update_epoch=lambda *_: None).items():  # fmt: skip
            monkeypatch.setattr(o2ppo, name, stand_in)
        monkeypatch.setattr(o2ppo.steps, "Stepper", Stepper)
        data = SimpleNamespace(obs=torch.zeros(1, S), actions=torch.zeros(1, A), task=None)
        log = SimpleNamespace(log=lambda *_: None)
        o2ppo.finetune(args, log, data, agent, {"actor_optimizer": 1}, None, dict, None, lambda r, ended: r / 2)
        return did

    return run


def test_rollouts_are_played_by_the_policy_as_it_is_and_learned_from_in_epochs(roll):
    did = roll(scale_rewards=True)
    assert did.total == 192 and did.epochs == [3, 3, 3]
    assert did.played == [(0, 16), (1, 16), (2, 16)]
    assert did.filled == [(1.5, 1.0), (1.5, 0.5), (1.5, 0.0)]  # β is that of the rollout's first step
    assert did.evaluated == [128, 192]  # when 100 and 200 are passed, and at the end
    assert did.state.keys() == {"agent", "actor_optimizer", "env", "best", "outplayed", "scale", "stepper"}
    assert roll(scale_rewards=False).filled[0] == (3.0, 1.0)


@pytest.mark.parametrize(("reference", "moved"), [("best", [192]), ("adaptive", [64]), ("interval", [128])])
def test_o2ppos_reference_moves_by_its_own_rule_alone(roll, reference, moved):
    interval = dict(reference_interval=100) if reference == "interval" else {}
    did = roll(improves=(192,), outplays=(1.0,), reference=reference, **interval)
    assert did.moved == moved and did.finished == [1, 2, 3]  # every episode counts, also behind one that decides
