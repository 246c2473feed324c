"""What the three scripts' `main` hands from stage to stage: their own agents, with stand-ins for all that trains, plays
and shows."""

from itertools import starmap
from types import SimpleNamespace

import pytest
import torch

import o2ppo
import o2sac
import o2td3
from common import cli
from common.probe import STATES
from tests.test_transfer import checkpoint

OFF, ALIGNED, ENDED = 50.0, 40.0, 45.0  # scores: the offline policy's, after alignment, after fine-tuning
HIDDEN = [16, "ReLU", 16, "ReLU"]
WITH_ALIGNMENT = [o2sac, o2td3]


@pytest.fixture
def begin(data, monkeypatch):
    """Runs a script's `main`: what each of its parts was given. Alignment moves the actor by 1, re-evaluation and
    alignment move the critics, and fine-tuning what is left of the score."""

    def start(script, aligned=ALIGNED, spread=1.0, **given):
        hidden = "value_hidden" if script is o2ppo else "critic_hidden"
        args = cli.complete(script.Args(**{hidden: (8,)} | dict(seed=3, holdout=0.1) | given))
        policy = checkpoint(script.KIND, HIDDEN) | {"score": OFF}
        did = SimpleNamespace(stages=[], policy=policy)
        run = SimpleNamespace(args=args, last_score=OFF, last_returns=[OFF - 1, OFF + 1])

        def probe_of(*given):
            did.probed = given[-1]
            return "probe"

        def train(_, stage, data, agent, optimizers, probe=None, evaluator=None):
            did.stages.append(SimpleNamespace(name=stage.name, data=data, probe=probe, evaluator=evaluator))
            with torch.no_grad():
                for p in [*(agent.value if script is o2ppo else agent.critic).parameters()]:
                    p.add_(torch.randn_like(p))
                for p in agent.actor.parameters() if stage.name == "align" else ():
                    p.add_(1.0)
            if stage.name == "align":
                run.last_score, run.last_returns = aligned, [aligned - spread, aligned + spread]

        def finetune(args, _, data, agent, optimizers, evaluator, probe, best, *scale):
            did.data, did.agent, did.optimizers, did.best, did.scale = data, agent, optimizers, best, scale
            did.given, did.start = (evaluator, probe), (best.score, best.origin, best.returns)
            did.reference = {name: tensor.clone() for name, tensor in agent.actor_reference.state_dict().items()}
            run.last_score = ENDED

        def finish(*found):
            did.finished = found

        torch.rand(len(given))  # whatever was drawn before
        monkeypatch.setattr(script.report, "start_run", lambda *_: (args, run, data))
        monkeypatch.setattr(script.offline, "policy", lambda *_: (policy, "evaluator"))
        monkeypatch.setattr(script.report, "finish", finish)
        stand_ins = dict(train=train, finetune=finetune)
        stand_ins["value_probe" if script is o2ppo else "critic_probe"] = probe_of
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(script, name, stand_in)
        script.main()
        return did

    return start


def same(a, b) -> bool:
    """Whether two networks, or their weights, are the same bit for bit."""
    a, b = (x if isinstance(x, dict) else x.state_dict() for x in (a, b))
    return all(starmap(torch.equal, zip(a.values(), b.values(), strict=True)))


@pytest.mark.parametrize("script", [o2sac, o2td3, o2ppo])
def test_no_stage_sees_the_episodes_that_are_measured(script, begin, data):
    """Of --holdout, and so much of them as a probe looks at."""
    did = begin(script, scale_rewards=False) if script is o2ppo else begin(script)
    assert len(did.data) == len(data.hold_out(0.1, STATES)[0]) < 0.95 * len(data) and len(did.probed) == STATES
    assert not torch.isin(did.probed.episode, did.data.episode).any()
    for stage in did.stages:
        assert stage.data is did.data and stage.probe == "probe"
    assert did.given == ("evaluator", "probe")
    assert [stage.evaluator for stage in did.stages if stage.name == "align"] == ["evaluator"] * (script is not o2ppo)


@pytest.mark.parametrize("script", [o2sac, o2td3, o2ppo])
def test_new_networks_depend_on_the_seed_alone(script, begin):
    """Not on whether the offline policy was trained by this start, which draws numbers, or by one before."""
    name = "value" if script is o2ppo else "critic"
    first, again, other = (getattr(begin(script, seed=s, **more).agent, name)
                           for s, more in ((3, {}), (3, {"eval_every": 7}), (4, {})))  # fmt: skip
    assert same(first, again) and not same(first, other)


@pytest.mark.parametrize("script", WITH_ALIGNMENT)
@pytest.mark.parametrize(("aligned", "reference", "moves"),
                         [(ALIGNED, "best", False), (ALIGNED, "adaptive", True), (60.0, "best", True)])  # fmt: skip
def test_fine_tuning_starts_from_what_alignment_left(script, aligned, reference, moves, begin):
    did = begin(script, aligned, reference=reference)
    off, agent = did.policy["actor"], did.agent
    assert [stage.name for stage in did.stages] == ["reevaluate", "align"]
    assert not same(agent.actor, off) and same(agent.actor_offline, off)
    assert same(agent.critic_target, agent.critic)
    assert script is o2sac or same(agent.actor_target, agent.actor)
    assert same(did.reference, agent.actor if moves else off)
    better = aligned > OFF
    assert did.start == ((60.0, "aligned policy", [59, 61]) if better else (OFF, "offline policy", [49, 51]))
    assert same(did.best.weights, agent.actor if better else off)
    assert did.finished[-1] == aligned and did.finished[1:4] == (did.policy, agent, did.best)


@pytest.mark.parametrize("script", WITH_ALIGNMENT)
def test_a_margin_holds_for_the_aligned_policy_too(script, begin):
    """Both of its episodes return 2 more than the offline policy's, or one 13 more and the other one 9 less."""
    for spread, margin, origin in (
        (1, 1.0, "aligned policy"),
        (12, 1.0, "offline policy"),
        (12, 0.0, "aligned policy"),
    ):
        assert begin(script, 52.0, spread, best_margin=margin).start[1] == origin


def test_o2ppo_starts_from_the_offline_policy(begin):
    did = begin(o2ppo, best_margin=2.0)
    assert [stage.name for stage in did.stages] == ["reevaluate"] and did.start == (OFF, "offline policy", [49, 51])
    assert same(did.reference, did.policy["actor"]) and did.best.margin == 2.0
    assert did.finished[1:4] == (did.policy, did.agent, did.best)


def test_o2ppo_learns_everything_of_rewards_on_one_scale(begin, data):
    """That of all data, and play goes on with it."""
    plain, did = (begin(o2ppo, gamma=0.9, scale_rewards=scale) for scale in (False, True))
    [scale] = did.scale
    assert scale.gamma == 0.9 and scale.count == len(data) and plain.scale[0].count == 0
    std = (scale.squares / scale.count) ** 0.5
    for seen in (did.data, did.stages[0].data):
        torch.testing.assert_close(seen.rewards, plain.data.rewards / std)


@pytest.mark.parametrize("script", [o2sac, o2td3, o2ppo])
def test_a_stage_that_is_left_out_leaves_all_as_it_was(script, begin):
    parts = [name for name in ("reevaluate", "align") if hasattr(script.Args, name)]
    did = begin(script, **dict.fromkeys(parts, False), **({} if script is o2ppo else {"critic_init": "random"}))
    assert did.stages == [] and same(did.agent.actor, did.policy["actor"]) and did.start[1] == "offline policy"
    assert script is o2ppo or did.finished[-1] == OFF
