"""Every loss and target of O2SAC and CQL against an independent float64 version, written from the equations."""

import copy
import dataclasses
import math

import pytest
import torch

import o2sac
from common import cli, replay
from offline import cql
from tests.reference import A, B, Recorder, S, actor64, critic64, fixed_rows, log_prob64, noises, same, squashed


@pytest.fixture
def agent():
    torch.manual_seed(3)
    args = cli.complete(o2sac.Args())
    actor = o2sac.Actor(S, A).state_dict()
    agent = o2sac.Agent(args, dict(obs_dim=S, action_dim=A, hidden_layers=3, actor=actor))
    with torch.no_grad():  # everything different from everything else
        for module in (agent.actor, agent.actor_reference, agent.critic_target, agent.critic):
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        agent.log_lagrange.fill_(0.3)
        agent.log_alpha.fill_(-1.1)
    return agent


# ----------------------------------------------------------------------------------------------- networks


def test_log_prob_is_that_of_torch_distributions():
    mean, log_std, u = torch.randn(3, 200, A).double() * 1.5
    expected = log_prob64(squashed(mean, log_std.exp()), torch.tanh(u))
    torch.testing.assert_close(o2sac.log_prob_of(u, mean, log_std), expected, rtol=1e-6, atol=1e-6)


def test_log_prob_is_finite_where_tanh_saturates():
    u = torch.tensor([[40.0, -40.0, 12.0]])
    assert o2sac.log_prob_of(u, u, torch.zeros_like(u)).isfinite().all()


def test_critic_is_two_networks(agent):
    obs, actions = torch.randn(B, S), torch.rand(B, A)
    torch.testing.assert_close(
        agent.critic(obs, actions).double(), critic64(agent.critic, obs, actions), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(agent.critic.net[0].weight[0], agent.critic.net[0].weight[1])


def test_weights_are_orthogonal():
    weight = o2sac.Critic(S, A).net[3].weight[1]
    torch.testing.assert_close(weight @ weight.T, torch.eye(256), rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------- the three stages


def test_reevaluation(agent, data, monkeypatch):
    args = cli.complete(o2sac.Args(compile=False, batch_size=B, reevaluate_tau=0.02))
    optimizers = Recorder()
    obs, actions, rewards, next_obs, terminations, _ = fixed_rows(monkeypatch, o2sac, data)
    (noise,) = noises(monkeypatch, (B, A))
    before = copy.deepcopy(agent.critic_target)
    metrics = o2sac.reevaluation_step(args, data, agent, optimizers)()

    mean, std = actor64(agent.actor_offline, next_obs)  # the frozen offline policy, not the online actor
    distribution = squashed(mean, std)
    next_actions = torch.tanh(mean + std * noise)
    q_next = critic64(before, next_obs, next_actions).min(0).values
    y = rewards.double() + 0.99 * (1 - terminations.double()) * (q_next - 0.2 * log_prob64(distribution, next_actions))
    loss = sum(((q - y.detach()) ** 2).mean() for q in critic64(agent.critic, obs, actions))
    torch.testing.assert_close(metrics["critic_loss"].double(), loss.detach(), rtol=1e-4, atol=1e-4)
    same(optimizers["critic_optimizer"].calls[0], loss, list(agent.critic.parameters()))
    assert set(optimizers) == {"critic_optimizer"}  # nothing else is trained
    for old, new, source in zip(
        before.parameters(), agent.critic_target.parameters(), agent.critic.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.98 * old + 0.02 * source, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("constrain", [False, True])
def test_alignment(agent, data, monkeypatch, constrain):
    args = cli.complete(o2sac.Args(compile=False, batch_size=B, align_constrain=constrain, lagrange_init=1.7))
    optimizers = Recorder()
    obs, *_ = fixed_rows(monkeypatch, o2sac, data)
    (noise,) = noises(monkeypatch, (B, A))
    frozen = copy.deepcopy((agent.critic_target, agent.actor_offline))
    metrics = o2sac.alignment_step(args, data, agent, optimizers)()

    mean, std = actor64(agent.actor, obs)
    actions = torch.tanh(mean + std * noise)
    log_prob = log_prob64(squashed(mean, std), actions)
    offline_mean, offline_std = actor64(agent.actor_offline, obs)
    offline = squashed(offline_mean, offline_std)
    anchor = torch.tanh(offline_mean)
    q_bar_anchor = critic64(agent.critic_target, obs, anchor).min(0).values
    q_bar = critic64(agent.critic_target, obs, actions).min(0).values
    ceiling = q_bar_anchor - 0.2 * (log_prob64(offline, anchor) - log_prob64(offline, actions))
    assert (ceiling < q_bar).any() and (ceiling > q_bar).any()  # both sides of the minimum are tested
    q_aligned = torch.min(ceiling, q_bar).detach()
    critic_loss = 0
    for q, q_anchor in zip(
        critic64(agent.critic, obs, actions.detach()), critic64(agent.critic, obs, anchor), strict=True
    ):
        critic_loss = critic_loss + ((q - q_aligned) ** 2).mean() + ((q_anchor - q_bar_anchor.detach()) ** 2).mean()
    actor_loss = (0.2 * log_prob - critic64(agent.critic, obs, actions).min(0).values).mean()
    if constrain:  # λ [log π(a|s) - log π_off(a|s)], λ where it starts
        actor_loss = actor_loss + 1.7 * (log_prob - log_prob64(offline, actions)).mean()
    torch.testing.assert_close(metrics["actor_loss"].double(), actor_loss.detach(), rtol=1e-4, atol=1e-4)
    same(optimizers["critic_optimizer"].calls[0], critic_loss, list(agent.critic.parameters()))
    same(optimizers["actor_optimizer"].calls[0], actor_loss, list(agent.actor.parameters()))
    assert set(optimizers) == {"critic_optimizer", "actor_optimizer"}
    for module, copied in zip((agent.critic_target, agent.actor_offline), frozen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), copied.parameters(), strict=True))


@pytest.mark.parametrize(("constrain", "per_dimension"), [(True, False), (False, False), (True, True)])
def test_finetuning(agent, data, monkeypatch, constrain, per_dimension):
    args = o2sac.Args(compile=False, batch_size=B, utd=2, tau=0.01, constrain=constrain, per_dimension=per_dimension)
    args, optimizers = cli.complete(args), Recorder()
    buffer = replay.ReplayBuffer(data, 10, "half")
    rows = torch.randint(len(data), (2, B))
    batches = [replay.split(data.table[r], S, A) for r in rows]
    fed = iter(batches)
    monkeypatch.setattr(buffer, "sample", lambda _: next(fed))
    noise = noises(monkeypatch, *[(B, A)] * 4)
    frozen = copy.deepcopy((agent.actor_reference, agent.actor_offline))
    before = copy.deepcopy(agent.critic_target)
    threshold = torch.tensor(0.4)
    metrics = o2sac.finetuning_step(args, buffer, agent, optimizers, {"kl_threshold": threshold})()

    alpha = math.exp(-1.1)
    lagrange = math.exp(0.3) if constrain else 0.0
    target = before
    for update, (obs, actions, rewards, next_obs, terminations) in enumerate(batches):

        def draw(states, eps):
            mean, std = actor64(agent.actor, states)
            chosen = torch.tanh(mean + std * eps)
            log_prob = log_prob64(squashed(mean, std), chosen)
            reference = log_prob64(squashed(*actor64(agent.actor_reference, states)), chosen)
            return chosen, log_prob, log_prob - reference.clamp(min=-50)

        next_actions, next_log_prob, next_f = draw(next_obs, noise[2 * update])
        q_next = critic64(target, next_obs, next_actions).min(0).values
        not_done = 1 - terminations.double()
        y = rewards.double() + 0.99 * not_done * (q_next - alpha * next_log_prob - lagrange * next_f)
        critic_loss = sum(((q - y.detach()) ** 2).mean() for q in critic64(agent.critic, obs, actions))
        new_actions, log_prob, f = draw(obs, noise[2 * update + 1])
        q_new = critic64(agent.critic, obs, new_actions).min(0).values
        actor_loss = (alpha * log_prob - q_new + lagrange * f).mean()
        same(optimizers["critic_optimizer"].calls[update], critic_loss, list(agent.critic.parameters()))
        same(optimizers["actor_optimizer"].calls[update], actor_loss, list(agent.actor.parameters()))
        # d/d log α of -log α (log π + H_target), H_target = -A
        want = -(log_prob.detach() - A).mean()
        torch.testing.assert_close(optimizers["alpha_optimizer"].calls[update][0].double(), want, rtol=1e-4, atol=1e-5)
        if update == 0 and constrain:
            u = 0.4 * (A / 6 if per_dimension else 1) - f.detach()
            want = lagrange * ((0.7 - (u > 0).double()).abs() * u).mean()
            got = optimizers["lagrange_optimizer"].calls[0][0].double()
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        target = copy.deepcopy(target)
        for a, b in zip(target.parameters(), agent.critic.parameters(), strict=True):
            a.data.lerp_(b.data, 0.01)
    assert len(optimizers["lagrange_optimizer"].calls) == (1 if constrain else 0)  # on the first update only
    torch.testing.assert_close(metrics["kl"].double(), f.mean().detach(), rtol=1e-4, atol=1e-4)
    for module, copied in zip((agent.actor_reference, agent.actor_offline), frozen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), copied.parameters(), strict=True))


def test_reference_log_prob_is_floored(agent, data, monkeypatch):
    """A reference that finds the actions all but impossible costs 50 nats, not thousands."""
    with torch.no_grad():
        agent.actor_reference.net[-1].bias[A:] = -15.0
        agent.actor_reference.net[-1].bias[:A] = 3.0
    args = cli.complete(o2sac.Args(compile=False, batch_size=B, utd=1))
    buffer = replay.ReplayBuffer(data, 10, "all")
    metrics = o2sac.finetuning_step(args, buffer, agent, Recorder(), {"kl_threshold": torch.tensor(1.0)})()
    assert 40 < metrics["kl"] < 60
    batch, buffer.action_dim = buffer.sample(B), 6  # as if there were three more
    monkeypatch.setattr(buffer, "sample", lambda _: batch)
    args = dataclasses.replace(args, per_dimension=True)
    metrics = o2sac.finetuning_step(args, buffer, agent, Recorder(), {"kl_threshold": torch.tensor(1.0)})()
    assert 90 < metrics["kl"] < 110


def test_the_gradient_of_the_actor_alone_is_clipped(agent, data):
    def gradients(norm):
        args, optimizers = cli.complete(o2sac.Args(compile=False, batch_size=B, actor_grad_norm=norm)), Recorder()
        torch.manual_seed(1)
        buffer, fresh = replay.ReplayBuffer(data, 10, "all"), copy.deepcopy(agent)
        step = o2sac.finetuning_step(args, buffer, fresh, optimizers, {"kl_threshold": torch.tensor(0.1)})
        for _ in range(2):
            step()
        flat = [torch.cat([grad.flatten() for grad in slot.calls[0]]) for slot in optimizers.values()]
        return dict(zip(optimizers, flat, strict=True))

    free, clipped = gradients(None), gradients(0.01)
    length = free["actor_optimizer"].norm()
    assert length > 0.02
    torch.testing.assert_close(clipped.pop("actor_optimizer"), free.pop("actor_optimizer") * (0.01 / length))
    assert free.keys() == clipped.keys() and all(torch.equal(free[name], clipped[name]) for name in free)


def test_a_temperature_of_zero_stays_zero(data):
    """SAC without its entropy term: every stage takes it, and nothing is infinite but its logarithm."""
    args = cli.complete(o2sac.Args(compile=False, batch_size=B, utd=2, alpha=0.0))
    policy = dict(obs_dim=S, action_dim=A, hidden_layers=3, actor=o2sac.Actor(S, A).state_dict())
    agent = o2sac.Agent(args, policy)
    optimizers, buffer = o2sac.Optimizers(args, agent), replay.ReplayBuffer(data, 10, "all")
    for step in (
        o2sac.reevaluation_step(args, data, agent, optimizers),
        o2sac.alignment_step(args, data, agent, optimizers),
        o2sac.finetuning_step(args, buffer, agent, optimizers, {"kl_threshold": torch.tensor(0.1)}),
    ):
        metrics = [step() for _ in range(3)][-1]
        assert all(value.isfinite() for value in metrics.values())
    assert metrics["alpha"] == 0 and agent.log_alpha == -torch.inf
    assert all(value.isfinite().all() for name, value in agent.state_dict().items() if name != "log_alpha")


# ----------------------------------------------------------------------------------------------- the constraint


@pytest.mark.parametrize(("slack", "direction"), [(-0.5, 1), (0.5, -1)])
def test_multiplier_rises_when_violated_and_falls_when_met(slack, direction):
    log_lagrange = torch.nn.Parameter(torch.zeros(()))
    optimizer = o2sac.Adam([log_lagrange], 1e-3)
    loss = o2sac.lagrange_loss(log_lagrange, torch.full((8,), slack), 0.7)
    optimizer.step(torch.autograd.grad(loss, [log_lagrange]))
    assert torch.sign(log_lagrange) == direction


def test_a_violation_weighs_more_than_its_opposite():
    log_lagrange = torch.zeros((), requires_grad=True)
    assert o2sac.lagrange_loss(log_lagrange, torch.tensor([1.0, -1.0]), 0.7).item() == pytest.approx(-0.2)


def test_threshold_schedule():
    threshold = o2sac.schedules(cli.complete(o2sac.Args()))["kl_threshold"]
    assert threshold(0) == 0.125 and threshold(50_000) == pytest.approx((0.125 + 2.0) / 2)
    assert threshold(100_000) == threshold(300_000) == 2.0
    given = cli.complete(o2sac.Args(kl_threshold_start=1.0, kl_threshold_end=3.0))
    assert o2sac.schedules(given)["kl_threshold"](50_000) == 2.0


# ----------------------------------------------------------------------------------------------- CQL


@pytest.mark.parametrize("maze", [False, True])
def test_cql(data, monkeypatch, maze):
    """With AntMaze's constants it is another one: Lagrange's weight, clipped differences, the best of some actions."""
    least, best_of = (4.1, 3) if maze else (-math.inf, 1)
    changes = dict(cql.FAMILIES["antmaze"], best_of=best_of, min_gap=least) if maze else {}
    args, optimizers = cql.Args(compile=False, batch_size=B, n_actions=4, **changes), Recorder()
    torch.manual_seed(5)
    agent = cql.Agent(args, S, A)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    obs, actions, rewards, next_obs, terminations, _ = fixed_rows(monkeypatch, cql, data)
    noise = noises(monkeypatch, (best_of, B, A), (4, B, A), (4, B, A), (B, A))
    torch.manual_seed(6)
    uniform = torch.empty(4, B, A).uniform_(-1, 1).double()
    torch.manual_seed(6)
    before = copy.deepcopy(agent.critic_target)
    cql.training_step(args, data, agent, optimizers)()

    mean, std = actor64(agent.actor, obs)
    next_mean, next_std = actor64(agent.actor, next_obs)
    candidates = [torch.tanh(next_mean + next_std * eps) for eps in noise[0]]
    q_next = torch.stack([critic64(before, next_obs, a).min(0).values for a in candidates]).max(0).values
    y = (rewards.double() + 0.99 * (1 - terminations.double()) * q_next).detach()
    loss, gaps, weight = 0, [], 5 * agent.log_multiplier.exp().item() if maze else 10
    for k in range(2):
        q = critic64(agent.critic, obs, actions)[k]
        weighted = []  # exp Q(s, a) / density(a), in logs
        for j in range(4):
            weighted.append(critic64(agent.critic, obs, uniform[j])[k] + A * math.log(2))
            for m, s, eps in ((mean, std, noise[1][j]), (next_mean, next_std, noise[2][j])):
                a = torch.tanh(m + s * eps).detach()
                log_density = log_prob64(squashed(m, s), torch.tanh(m + s * eps)).detach()
                weighted.append(critic64(agent.critic, obs, a)[k] - log_density)
        difference = torch.logsumexp(torch.stack(weighted), 0) - q
        assert not maze or 0 < (difference < least).double().mean() < 1
        gaps.append(torch.where(difference < least, least, difference).mean())
        loss = loss + ((q - y) ** 2).mean() + weight * gaps[-1]
    same(optimizers["critic_optimizer"].calls[0], loss, list(agent.critic.parameters()))
    new_actions = torch.tanh(mean + std * noise[3])
    log_prob = log_prob64(squashed(mean, std), new_actions)
    temperature = agent.log_temperature.exp().item()
    actor_loss = (temperature * log_prob - critic64(agent.critic, obs, new_actions).min(0).values).mean()
    same(optimizers["actor_optimizer"].calls[0], actor_loss, list(agent.actor.parameters()))
    want = -(log_prob.detach() - A).mean()
    torch.testing.assert_close(optimizers["temperature_optimizer"].calls[0][0].double(), want, rtol=1e-4, atol=1e-5)
    if maze:  # the multiplier rises where the gap is above 0.8
        want = -weight * (sum(gaps).detach() / 2 - 0.8)
        torch.testing.assert_close(optimizers["multiplier_optimizer"].calls[0][0].double(), want, rtol=1e-4, atol=1e-5)
    assert ("multiplier_optimizer" in optimizers) == maze


def test_one_critic_of_five_layers_in_a_maze(data):
    args = cli.parse(o2sac.Args, {}, o2sac.FAMILIES, ["--env-id", "antmaze-umaze-v2", "--no-compile"])
    policy = dict(obs_dim=S, action_dim=A, hidden_layers=3, actor=o2sac.Actor(S, A).state_dict())
    agent = o2sac.Agent(args, policy)
    q = agent.critic(data.obs[:7], data.actions[:7])
    assert q.shape == (1, 7) and sum(isinstance(layer, torch.nn.ReLU) for layer in agent.critic.net) == 5
    for step in (o2sac.reevaluation_step, o2sac.alignment_step):
        assert all(value.isfinite() for value in step(args, data, agent, o2sac.Optimizers(args, agent))().values())


# ----------------------------------------------------------------------------------------------- optimiser


def test_adam_is_pytorchs():
    mine = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(3))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    ours, reference = o2sac.Adam(mine, 3e-4), torch.optim.Adam(theirs, 3e-4)
    for _ in range(20):
        grads = [torch.randn_like(p) for p in mine]
        ours.step(grads)
        for p, grad in zip(theirs, grads, strict=True):
            p.grad = grad
        reference.step()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
