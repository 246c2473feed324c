"""What stands around every script's losses: rates of learning, Polyak factors, starts, bounds, how its Q is asked."""

import copy
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal

import o2ppo
import o2sac
import o2td3
from baselines import aca, awac, cal_ql, iql, off2on, pex, rlpd, wsrl
from common import cli, owner, replay
from common.probe import fixed_noise
from offline import awac as offline_awac
from offline import bc, cql, dt, rebrac, sac_ml, td3_bc
from offline import cal_ql as offline_cal_ql
from offline import iql as offline_iql
from tests.reference import A, B, S, critic64, density64
from tests.test_baselines_losses import BUFFERS, agent_of
from tests.test_checkpoint import HOLD

# of everything that learns: the argument that holds its rate, and what of the agent moves with it
LEARN = {
    o2sac: dict(actor=("actor_lr", "actor"), critic=("critic_lr", "critic"), alpha=("alpha_lr", "log_alpha"),
                lagrange=("lagrange_lr", "log_lagrange")),
    o2td3: dict(actor=("actor_lr", "actor"), critic=("critic_lr", "critic"), lagrange=("lagrange_lr", "log_lagrange")),
    o2ppo: dict(actor=("actor_lr", "actor"), value=("critic_lr", "value"), reevaluate=("value_lr", "value"),
                critic=("fqe_lr", "critic")),
    cql: dict(actor=("actor_lr", "actor"), critic=("critic_lr", "critic"), temperature=("actor_lr", "log_temperature"),
              multiplier=("critic_lr", "log_multiplier")),
    td3_bc: dict(actor=("lr", "actor"), critic=("lr", "critic")),
    offline_iql: dict(actor=("lr", "actor"), critic=("lr", "critic"), value=("lr", "value")),
    offline_awac: dict(actor=("lr", "actor"), critic=("lr", "critic")),
    rebrac: dict(actor=("actor_lr", "actor"), critic=("critic_lr", "critic")),
    sac_ml: dict(actor=("lr", "actor"), critic=("lr", "critic"), baseline=("lr", "baseline"),
                 alpha=("lr", "log_alpha")),
    dt: dict(transformer=("lr", "transformer"), actor=("distil_lr", "actor")),
    bc: dict(actor=("lr", "actor")),
    aca: dict(actor=("lr", "actor"), critic=("lr", "critic"), alpha=("lr", "log_alpha")),
    pex: dict(actor=("lr", "actor.new"), critic=("lr", "critic"), value=("lr", "value")),
    off2on: dict(actor=("actor_lr", "actor"), critic=("critic_lr", "critic"), alpha=("actor_lr", "log_alpha"),
                 ratio=("ratio_lr", "ratio")),
    rlpd: dict(actor=("lr", "actor"), critic=("lr", "critic"), alpha=("lr", "log_alpha")),
    wsrl: dict(actor=("actor_lr", "actor"), critic=("critic_lr", "critic"), alpha=("actor_lr", "alpha_parameter")),
}  # fmt: skip
LEARN |= {offline_cal_ql: LEARN[cql], cal_ql: LEARN[cql], iql: LEARN[offline_iql], awac: LEARN[offline_awac]}
GO_ON = {awac: offline_awac, iql: offline_iql, pex: offline_iql, off2on: cql, cal_ql: offline_cal_ql, aca: sac_ml,
         wsrl: offline_cal_ql}  # fmt: skip


def learner(script, **changes):
    """Arguments and an agent of any script."""
    if script in GO_ON or script is rlpd:
        return agent_of(script, GO_ON.get(script), **changes)
    args = cli.complete(script.Args(compile=False, **changes))
    if not hasattr(script, "KIND"):
        return args, script.Agent(args, S, A)
    actor = script.Actor(S, A, 2).state_dict()
    return args, script.Agent(args, dict(obs_dim=S, action_dim=A, hidden_layers=2, actor=actor))


@pytest.mark.parametrize("script", LEARN, ids=lambda script: script.__name__)
def test_everything_learns_at_the_rate_of_its_argument(script):
    rates = {name: 2.0**-i for i, name in enumerate(sorted({name for name, _ in LEARN[script].values()}))}
    args, agent = learner(script, **rates)
    optimizers = script.Optimizers(args, agent)
    assert {name.removesuffix("_optimizer") for name in optimizers} == LEARN[script].keys()
    for name, (argument, moved) in LEARN[script].items():
        optimizer = optimizers[f"{name}_optimizer"]
        own = [
            value for key, value in agent.named_parameters(remove_duplicate=False) if f"{key}.".startswith(f"{moved}.")
        ]
        assert own and optimizer.lr == rates[argument], name
        assert all(a is b for a, b in zip(optimizer.params, own, strict=True)), name
        fine_tuned = script is o2ppo and name in ("actor", "value")
        assert optimizer.eps == (1e-5 if fine_tuned else 1e-8)


def squashes(agent):
    """Whether a script's policies are squashed Gaussians, whose spread depends on the state."""
    return not hasattr(getattr(agent.actor, "new", agent.actor), "log_std")


STOCHASTIC = [script for script in LEARN if script not in (o2td3, td3_bc, rebrac, dt)]


@pytest.mark.parametrize("script", STOCHASTIC, ids=lambda script: script.__name__)
def test_log_std_lies_between_its_bounds(script):
    """A squashed Gaussian's is one less than what its network gives, so that it starts small; PEX's is at least -5."""
    _, agent = learner(script)
    actor = getattr(agent.actor, "new", agent.actor)
    given = torch.tensor([-30.0, 30.0, 0.5])
    with torch.no_grad():
        if squashes(agent):
            actor.net[-1].weight.zero_()
            actor.net[-1].bias.zero_()
            actor.net[-1].bias[..., A:] = given
        else:
            actor.log_std.copy_(given)
        log_std = actor(torch.randn(B, S))[1].expand(B, A)
    lowest = -5.0 if script is pex else -20.0
    want = torch.tensor([lowest, 2.0, -0.5 if squashes(agent) else 0.5])
    torch.testing.assert_close(log_std, want.expand(B, A))


@pytest.mark.parametrize("script", [o2sac, o2td3], ids=lambda script: script.__name__)
def test_multiplier_and_temperature_start_from_their_arguments(script):
    _, agent = learner(script, lagrange_init=1.7, **(dict(alpha=0.3) if script is o2sac else {}))
    assert agent.log_lagrange.exp().item() == pytest.approx(1.7)
    assert script is o2td3 or agent.log_alpha.exp().item() == pytest.approx(0.3)


def step_of(script, args, data, agent, optimizers):
    """The step of a script's last stage, of O2PPO's re-evaluation, on rows of the data."""
    if script is o2ppo:
        return o2ppo.reevaluation_step(args, data, agent, optimizers)
    if not hasattr(script, "KIND"):
        return script.training_step(args, data, agent, optimizers)
    buffer = BUFFERS.get(script, lambda data: replay.ReplayBuffer(data, 1, "all"))(data)
    numbers = {o2sac: {"kl_threshold": 0.1}, o2td3: {"mse_threshold": 0.1}, aca: {"prior": 0.7}}.get(script)
    scheduled = [{name: torch.tensor(number) for name, number in numbers.items()}] if numbers else []
    return script.finetuning_step(args, buffer, agent, optimizers, *scheduled)


UPDATES = {o2sac: dict(utd=1), rlpd: dict(utd=1), wsrl: dict(utd=1), o2ppo: dict(value_init="fqe"),
           **{script: dict(policy_freq=1) for script in (o2td3, td3_bc, rebrac)}}  # fmt: skip


@pytest.mark.parametrize("script", [script for script in LEARN if script not in (bc, dt)], ids=lambda x: x.__name__)
def test_targets_follow_by_tau_once_an_update_and_behind_it(script, data):
    args, agent = learner(script, tau=0.3, **UPDATES.get(script, {}))
    before, optimizers = copy.deepcopy(agent), script.Optimizers(args, agent)
    step_of(script, args, data, agent, optimizers)()
    targets = [name for name, _ in agent.named_children() if name.endswith("_target")]
    assert len(targets) == (2 if script in (o2td3, td3_bc, rebrac) else 1)
    for name in targets:
        was, now, source = (list(getattr(x, y).parameters()) for x, y in
                            ((before, name), (agent, name), (agent, name.removesuffix("_target"))))  # fmt: skip
        for old, new, followed in zip(was, now, source, strict=True):
            torch.testing.assert_close(new, 0.7 * old + 0.3 * followed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("script", [cql, offline_cal_ql, cal_ql], ids=lambda script: script.__name__)
@pytest.mark.parametrize(("log", "multiplier"), [(None, 2.7182818), (20.0, 1e6)])
def test_cqls_multiplier_starts_at_e_and_ends_at_a_million(script, log, multiplier, data):
    args, agent = learner(script, lagrange=True, n_actions=2, best_of=2)
    if script is cal_ql:  # which goes on with what the offline run left
        agent.log_multiplier.data.fill_(1.0)
    if log:
        agent.log_multiplier.data.fill_(log)
    metrics = step_of(script, args, data, agent, script.Optimizers(args, agent))()
    assert metrics["multiplier"].item() == pytest.approx(multiplier)


@pytest.mark.parametrize("script", [o2td3, td3_bc, rebrac], ids=lambda script: script.__name__)
@pytest.mark.parametrize("before", [2, 3])
def test_a_resumed_run_goes_on_in_turn(script, before, data):
    """With --policy-freq 3 the actor moves at updates 3, 6, 9, …, whenever the step was made anew."""
    args, agent = learner(script, policy_freq=3, batch_size=B)
    optimizers = script.Optimizers(args, agent)
    taken = []
    for part in (before, 7 - before):
        step = step_of(script, args, data, agent, optimizers)
        taken += ["actor_loss" in step() for _ in range(part)]
    assert taken == [n % 3 == 0 for n in range(1, 8)]


@pytest.mark.parametrize("script", [o2sac, o2td3, awac, iql, pex, off2on, cal_ql, rlpd, wsrl],
                         ids=lambda script: script.__name__)  # fmt: skip
def test_a_probe_asks_for_the_lowest_q_at_the_policys_own_actions(script):
    """Off2On: for the mean over members of each one's lower twin. Preference is log π, of O2TD3 minus the distance."""
    args, agent = learner(script, **(dict(members=3) if script is off2on else {}))
    held_out = SimpleNamespace(obs=torch.randn(B, S), actions=torch.rand(B, A) * 2 - 1)
    probe = script.critic_probe(*([args] if script in (o2sac, o2td3) else []), agent, held_out)
    deterministic = script is o2td3
    policy = agent.actor.offline if script is pex else agent.actor
    out = policy(held_out.obs)
    mean, std = (out, torch.tensor(0.2)) if deterministic else (out[0], out[1].exp())
    u = mean + (std * fixed_noise(mean)).clamp(*((-0.5, 0.5) if deterministic else (-torch.inf, torch.inf)))
    if not deterministic and squashes(agent):
        anchor, sampled = torch.tanh(mean), torch.tanh(u)
        preference = density64(u.double(), mean.double(), std.double())
    else:
        anchor, sampled = mean, u.clamp(-1, 1)
        preference = Normal(mean.double(), std.double()).log_prob(sampled.double()).sum(-1)
    if deterministic:
        preference = -((sampled - anchor).double() ** 2).sum(-1).sqrt()
    torch.testing.assert_close(probe.anchor, anchor)
    torch.testing.assert_close(probe.sampled, sampled)
    torch.testing.assert_close(probe.preference.double(), preference, rtol=1e-4, atol=1e-4)
    q = critic64(agent.critic, held_out.obs, held_out.actions)
    lowest = q.view(3, 2, B).min(1).values.mean(0) if script is off2on else q.min(0).values
    torch.testing.assert_close(probe.q(held_out.obs, held_out.actions).double(), lowest, rtol=1e-4, atol=1e-4)


def test_an_offline_policy_depends_on_its_seed_alone_and_has_its_last_score(tmp_path, data, monkeypatch):
    """Whatever was drawn before; that score is the evaluation's of --final-episodes."""
    examples, asked = data.obs[:: len(data) // 16][:16].clone(), []

    def scalars(self, policy, device, final=False):
        asked.append(final)
        return {"score": float(len(asked))}

    monkeypatch.setattr("common.evaluation.Evaluator.scalars", scalars)
    policies = []
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.rand(len(policies))
        flags = dict(steps=4, eval_every=2, batch_size=8, hidden=(8,), seed=seed, compile=False, device="cpu")
        args = cli.complete(bc.Args(**flags, run_dir=str(tmp_path / folder), env_id="hopper-medium-demo"))
        policies.append(torch.load(bc.train(args, copy.copy(data)), weights_only=True))
    first, again, other = (policy["actor"]["net.0.weight"] for policy in policies)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert [policy["score"] for policy in policies] == [2, 4, 6] and asked == [False, True] * 3
    assert torch.equal(policies[0]["examples"]["obs"], examples)  # as the environment shows them
    again = bc.train(args, fresh := copy.copy(data))  # a finished run trains nothing, and standardises the data
    assert asked == [False, True] * 3 and torch.load(again, weights_only=True)["seed"] == 4
    torch.testing.assert_close(fresh.obs, (data.obs - policies[2]["state_mean"]) / policies[2]["state_std"])


@pytest.mark.parametrize("standardise", [True, False])
def test_data_are_what_an_offline_algorithms_arguments_make_of_them(standardise, tmp_path, data, monkeypatch):
    """And the policy's file says how it saw them. The same for a run that was finished before."""
    monkeypatch.setattr("common.evaluation.Evaluator.scalars", lambda *_: {"score": 0.0})
    flags = dict(steps=1, batch_size=8, hidden=(8,), compile=False, device="cpu", standardise=standardise)
    flags |= dict(clip_observations=0.5, reward_scale=2.0, reward_shift=1.0, env_id="hopper-medium-demo")
    mean, std = data.obs.mean(0), data.obs.std(0, correction=0) + 1e-3
    obs = ((data.obs - mean) / std).clamp(-0.5, 0.5) if standardise else data.obs
    for _ in range(2):
        path = bc.train(cli.complete(bc.Args(**flags, run_dir=str(tmp_path))), found := copy.copy(data))
        torch.testing.assert_close(found.obs, obs)
        torch.testing.assert_close(found.rewards, 2 * data.rewards + 1)
        assert found.task.clip == (0.5 if standardise else math.inf)
    policy = torch.load(path, weights_only=True)
    assert policy.get("clip", math.inf) == found.task.clip
    torch.testing.assert_close(policy["state_mean"], mean if standardise else torch.zeros(S))
    torch.testing.assert_close(policy["state_std"], std if standardise else torch.ones(S))


def test_who_needs_a_policy_that_another_process_trains_waits_for_it(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr("common.evaluation.Evaluator.scalars", lambda *_: {"score": 0.0})
    flags = dict(steps=1, batch_size=8, hidden=(8,), compile=False, device="cpu", env_id="hopper-medium-demo")
    args = cli.complete(bc.Args(**flags, run_dir=str(tmp_path)))
    lock, said = bc.train(args, copy.copy(data)).parent / ".lock", []
    with subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        monkeypatch.setattr(owner, "print", lambda *words, **_: said.extend(words) or other.kill(), raising=False)
        bc.train(args, copy.copy(data))
    assert said == [f"another process is at work in {lock.parent}: waiting for it"]
    assert "is finished already" in capsys.readouterr().out
