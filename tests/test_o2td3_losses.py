"""Every loss and target of O2TD3 against an independent float64 version, written from the equations."""

import copy
import math

import pytest
import torch

import o2td3
from common import cli, replay
from tests.reference import A, B, Recorder, S, critic64, fixed_rows, mlp64, noises, same


@pytest.fixture
def agent():
    torch.manual_seed(3)
    actor = o2td3.Actor(S, A).state_dict()
    agent = o2td3.Agent(o2td3.Args(), dict(obs_dim=S, action_dim=A, hidden_layers=2, actor=actor))
    with torch.no_grad():  # everything different from everything else
        for module in (agent.actor, agent.actor_reference, agent.actor_target, agent.critic_target, agent.critic):
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        agent.log_lagrange.fill_(0.3)
    return agent


def act64(actor, obs):
    return torch.tanh(mlp64(actor.net, obs))


def smoothed64(actions, noise):
    return (actions + (0.2 * noise).clamp(-0.5, 0.5)).clamp(-1, 1)


def test_reevaluation(agent, data, monkeypatch):
    args, optimizers = o2td3.Args(compile=False, batch_size=B, reevaluate_tau=0.02), Recorder()
    obs, actions, rewards, next_obs, terminations, _ = fixed_rows(monkeypatch, o2td3, data)
    (noise,) = noises(monkeypatch, (B, A))
    before = copy.deepcopy(agent.critic_target)
    o2td3.reevaluation_step(args, data, agent, optimizers)()

    next_actions = smoothed64(act64(agent.actor_offline, next_obs), noise)  # the frozen offline policy
    q_next = critic64(before, next_obs, next_actions).min(0).values
    y = rewards.double() + 0.99 * (1 - terminations.double()) * q_next
    loss = sum(((q - y.detach()) ** 2).mean() for q in critic64(agent.critic, obs, actions))
    same(optimizers["critic_optimizer"].calls[0], loss, list(agent.critic.parameters()))
    assert set(optimizers) == {"critic_optimizer"}
    for old, new, source in zip(
        before.parameters(), agent.critic_target.parameters(), agent.critic.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.98 * old + 0.02 * source, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("sign", "radius", "constrain"), [(1, "fixed", False), (-1, "fixed", True), (1, "uniform", False)]
)
def test_alignment(agent, data, monkeypatch, sign, radius, constrain):
    with torch.no_grad():  # once with positive Q, once with negative
        agent.critic_target.net[0].weight[:, S:] *= 20  # and either side of the minimum by the action
        for q, bias in zip(agent.critic_target(data.obs, data.actions), agent.critic_target.net[-1].bias, strict=True):
            bias += sign * 8.0 - q.mean()
    args = o2td3.Args(
        compile=False, batch_size=B, align_distance=0.5, align_radius=radius, align_constrain=constrain,
        lagrange_init=1.7,
    )  # fmt: skip
    optimizers = Recorder()
    obs, *_ = fixed_rows(monkeypatch, o2td3, data)
    (noise,) = noises(monkeypatch, (B, A))
    u = torch.rand(B, 1)
    monkeypatch.setattr(torch, "rand_like", lambda x: u if x.shape == u.shape else None)
    frozen = copy.deepcopy((agent.critic_target, agent.actor_offline))
    o2td3.alignment_step(args, data, agent, optimizers)()

    anchor = act64(agent.actor_offline, obs)
    noisy = smoothed64(act64(agent.actor, obs), noise).detach()
    if radius == "uniform":
        noisy = act64(agent.actor, obs).detach() + 1.5 * u.double() * (0.2 * noise).clamp(-0.5, 0.5)
        noisy = noisy.clamp(-1, 1)
    q_anchor = critic64(agent.critic_target, obs, anchor).min(0).values.detach()
    q_noisy = critic64(agent.critic_target, obs, noisy).detach()
    distance = torch.sqrt(((noisy - anchor) ** 2).sum(1)) / math.sqrt(A)
    assert (distance > 0.2).any() and (distance < 0.2).any()
    k = 1 + 0.5 * torch.min(distance, torch.tensor(0.2)).detach() ** 2
    assert (sign * q_anchor > 0).all()
    ceiling = q_anchor / k if sign > 0 else q_anchor * k
    assert (ceiling < q_anchor).all()  # never above the anchor's own value
    below = q_noisy < ceiling
    assert (below.any(1) & ~below.all(1)).all() and (below[0] & (q_noisy[1] < q_noisy[0])).any()
    loss = 0
    for i in range(2):
        target = torch.min(ceiling, q_noisy[i])
        loss = loss + ((critic64(agent.critic, obs, noisy)[i] - target) ** 2).mean()
        loss = loss + ((critic64(agent.critic, obs, anchor.detach())[i] - q_anchor) ** 2).mean()
    same(optimizers["critic_optimizer"].calls[0], loss, list(agent.critic.parameters()))
    q = critic64(agent.critic, obs, act64(agent.actor, obs))[0]
    actor_loss = -q.mean()
    if constrain:  # fine-tuning's, with π_off for π_ref and λ where it starts
        f = ((act64(agent.actor, obs) - anchor.detach()) ** 2).mean(1)
        actor_loss = actor_loss / q.abs().mean().detach() + 1.7 * f.mean()
    same(optimizers["actor_optimizer"].calls[0], actor_loss, list(agent.actor.parameters()))
    assert set(optimizers) == {"critic_optimizer", "actor_optimizer"}
    for module, copied in zip((agent.critic_target, agent.actor_offline), frozen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), copied.parameters(), strict=True))


@pytest.mark.parametrize("constrain", [True, False])
def test_finetuning(agent, data, monkeypatch, constrain):
    args = o2td3.Args(compile=False, batch_size=B, utd=2, tau=0.01, constrain=constrain)
    optimizers = Recorder()
    buffer = replay.ReplayBuffer(data, 10, "half")
    batches = [replay.split(data.table[torch.randint(len(data), (B,))], S, A) for _ in range(2)]
    fed = iter(batches)
    monkeypatch.setattr(buffer, "sample", lambda _: next(fed))
    noise = noises(monkeypatch, (B, A), (B, A))
    before = copy.deepcopy(agent)
    metrics = o2td3.finetuning_step(args, buffer, agent, optimizers, {"mse_threshold": torch.tensor(0.1)})()

    lagrange = math.exp(0.3) if constrain else 0.0
    for update, (obs, actions, rewards, next_obs, terminations) in enumerate(batches):
        next_actions = smoothed64(act64(before.actor_target, next_obs), noise[update])
        f_next = ((act64(agent.actor, next_obs) - act64(agent.actor_reference, next_obs)) ** 2).mean(1)
        q_next = critic64(before.critic_target, next_obs, next_actions).min(0).values - lagrange * f_next
        y = rewards.double() + 0.99 * (1 - terminations.double()) * q_next
        loss = sum(((q - y.detach()) ** 2).mean() for q in critic64(agent.critic, obs, actions))
        same(optimizers["critic_optimizer"].calls[update], loss, list(agent.critic.parameters()))
    # the actor, λ and the targets move at the second update only, on its batch
    assert len(optimizers["actor_optimizer"].calls) == 1
    new_actions = act64(agent.actor, obs)
    f = ((new_actions - act64(agent.actor_reference, obs).detach()) ** 2).mean(1)
    q = critic64(agent.critic, obs, new_actions)[0]
    actor_loss = -q.mean() / q.abs().mean().detach() + lagrange * f.mean()
    same(optimizers["actor_optimizer"].calls[0], actor_loss, list(agent.actor.parameters()))
    torch.testing.assert_close(metrics["mse"].double(), f.mean().detach(), rtol=1e-4, atol=1e-6)
    assert len(optimizers["lagrange_optimizer"].calls) == int(constrain)
    if constrain:
        u = 0.1 - f.detach()
        assert (u > 0).any() and (u < 0).any()
        want = lagrange * ((0.7 - (u > 0).double()).abs() * u).mean()
        got = optimizers["lagrange_optimizer"].calls[0][0].double()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    for name in ("critic", "actor"):
        target, old = getattr(agent, f"{name}_target"), getattr(before, f"{name}_target")
        for new, was, source in zip(
            target.parameters(), old.parameters(), getattr(agent, name).parameters(), strict=True
        ):
            torch.testing.assert_close(new, 0.99 * was + 0.01 * source, rtol=1e-5, atol=1e-6)
    for name in ("actor_reference", "actor_offline"):
        for a, b in zip(getattr(agent, name).parameters(), getattr(before, name).parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_gradient_of_the_actor_alone_is_clipped(agent, data):
    def gradients(norm):
        args, optimizers = cli.complete(o2td3.Args(compile=False, batch_size=B, actor_grad_norm=norm)), Recorder()
        torch.manual_seed(1)
        buffer, fresh = replay.ReplayBuffer(data, 10, "all"), copy.deepcopy(agent)
        step = o2td3.finetuning_step(args, buffer, fresh, optimizers, {"mse_threshold": torch.tensor(0.1)})
        for _ in range(2):
            step()
        flat = [torch.cat([grad.flatten() for grad in slot.calls[0]]) for slot in optimizers.values()]
        return dict(zip(optimizers, flat, strict=True))

    free, clipped = gradients(None), gradients(0.01)
    length = free["actor_optimizer"].norm()
    assert length > 0.02
    torch.testing.assert_close(clipped.pop("actor_optimizer"), free.pop("actor_optimizer") * (0.01 / length))
    assert free.keys() == clipped.keys() and all(torch.equal(free[name], clipped[name]) for name in free)


@pytest.mark.parametrize(("slack", "direction"), [(-0.5, 1), (0.5, -1)])
def test_multiplier_rises_when_violated_and_falls_when_met(slack, direction):
    log_lagrange = torch.nn.Parameter(torch.zeros(()))
    optimizer = o2td3.Adam([log_lagrange], 1e-3)
    optimizer.step(torch.autograd.grad(o2td3.lagrange_loss(log_lagrange, torch.full((8,), slack), 0.7), [log_lagrange]))
    assert torch.sign(log_lagrange) == direction


def test_threshold_schedule():
    args = o2td3.Args(mse_threshold_start=0.0025, mse_threshold_end=0.04)
    threshold = o2td3.schedules(args)["mse_threshold"]
    assert threshold(0) == 0.0025 and threshold(50_000) == pytest.approx((0.0025 + 0.04) / 2)
    assert threshold(100_000) == threshold(300_000) == pytest.approx(0.04)


@pytest.mark.parametrize("dims", [3, 30])
def test_distances_spread_in_any_number_of_dimensions_with_a_uniform_radius(dims):
    """Of noise around the anchor itself: TD3's is 0.2 long in 30 dimensions, give or take a tenth."""
    anchor = torch.zeros(20_000, dims)
    args = o2td3.Args()
    fixed, uniform = (
        (o2td3.smoothed(anchor, args, radius).norm(dim=1) / dims**0.5) for radius in (1.0, 1.5 * torch.rand(20_000, 1))
    )
    assert fixed.std() == pytest.approx({3: 0.075, 30: 0.024}[dims], abs=0.003)
    assert uniform.mean() == pytest.approx(0.14, abs=0.01) and uniform.std() == pytest.approx(0.09, abs=0.015)
