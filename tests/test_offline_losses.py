"""Losses and targets of IQL, TD3+BC, BC, AWAC and ReBRAC against float64 versions, written from the papers."""

import copy
import math

import pytest
import torch
from torch.distributions import Normal

from common import cli
from offline import awac, bc, iql, rebrac, td3_bc
from tests.reference import A, B, Recorder, S, check_trained_alike, critic64, fixed_rows, mlp64, noises, same


def make(script, **changes):
    torch.manual_seed(3)
    args = script.Args(compile=False, batch_size=B, **changes)
    agent = script.Agent(args, S, A)
    with torch.no_grad():  # everything different from everything else
        for parameter in agent.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return args, agent, Recorder()


def policy64(actor, obs):
    return Normal(torch.tanh(mlp64(actor.net, obs)), actor.log_std.double().exp())


def act64(actor, obs):
    return torch.tanh(mlp64(actor.net, obs))


def smoothed64(actions, noise):
    return (actions + (0.2 * noise).clamp(-0.5, 0.5)).clamp(-1, 1)


def critic_loss64(agent, obs, actions, y):
    return sum(((q - y.detach()) ** 2).mean() for q in critic64(agent.critic, obs, actions))


def moved(target, before, source, tau=0.005):
    for new, old, other in zip(target.parameters(), before.parameters(), source.parameters(), strict=True):
        torch.testing.assert_close(new, (1 - tau) * old + tau * other, rtol=1e-5, atol=1e-6)


def test_iql(data, monkeypatch):
    args, agent, optimizers = make(iql, steps=1_000)
    obs, actions, rewards, next_obs, terminations, _ = fixed_rows(monkeypatch, iql, data)
    before = copy.deepcopy(agent)
    optimizers["actor_optimizer"].steps[0].fill_(250)
    iql.training_step(args, data, agent, optimizers)()
    v = mlp64(agent.value.net, obs)[:, 0]
    u = critic64(before.critic_target, obs, actions).min(0).values.detach() - v
    assert (u > 0).any() and (u < 0).any()
    value_loss = (torch.where(u < 0, 0.3, 0.7) * u**2).mean()
    same(optimizers["value_optimizer"].calls[0], value_loss, list(agent.value.parameters()))
    y = rewards.double() + 0.99 * (1 - terminations.double()) * mlp64(agent.value.net, next_obs)[:, 0]
    same(
        optimizers["critic_optimizer"].calls[0], critic_loss64(agent, obs, actions, y), list(agent.critic.parameters())
    )
    weight = torch.exp(3 * u.detach()).clamp(max=100)
    actor_loss = -(weight * policy64(agent.actor, obs).log_prob(actions.double()).sum(1)).mean()
    same(optimizers["actor_optimizer"].calls[0], actor_loss, list(agent.actor.parameters()))
    moved(agent.critic_target, before.critic_target, agent.critic)
    want = 0.5 * 3e-4 * (1 + math.cos(math.pi * 0.25))  # a cosine over the run
    assert optimizers["actor_optimizer"].lr.item() == pytest.approx(want)


def test_iqls_actor_is_trained_with_dropout_alone(data, monkeypatch):
    """Half of the hidden units are left out, the others count double; what is played leaves none out."""
    args, agent, optimizers = make(iql, actor_dropout=0.5, hidden=(6, 4))
    obs, actions, *_ = fixed_rows(monkeypatch, iql, data)
    kept = {width: (torch.arange(B * width).reshape(B, width) % 3 > 0) for width in (6, 4)}
    monkeypatch.setattr(iql.F, "dropout", lambda x, share: x * kept[x.shape[1]] / (1 - share))
    before = copy.deepcopy(agent)
    iql.training_step(args, data, agent, optimizers)()
    u = critic64(before.critic_target, obs, actions).min(0).values - mlp64(agent.value.net, obs)[:, 0]
    x = obs.double()
    for layer in (agent.actor.net[0], agent.actor.net[2]):
        x = torch.relu(x @ layer.weight.double().T + layer.bias.double())
        x = torch.where(kept[x.shape[1]], 2 * x, torch.zeros_like(x))
    mean = torch.tanh(x @ agent.actor.net[4].weight.double().T + agent.actor.net[4].bias.double())
    log_prob = Normal(mean, agent.actor.log_std.double().exp()).log_prob(actions.double()).sum(1)
    loss = -(torch.exp(3 * u.detach()).clamp(max=100) * log_prob).mean()
    same(optimizers["actor_optimizer"].calls[0], loss, list(agent.actor.parameters()))
    torch.testing.assert_close(agent.act(obs), act64(agent.actor, obs).float())


def test_advantage_weights_are_clipped(data):
    args, agent, optimizers = make(iql, beta=1e4)
    assert iql.training_step(args, data, agent, optimizers)()["advantage_weight"] <= 100


@pytest.mark.parametrize("script", [td3_bc, rebrac])
def test_td3_bc_and_rebrac(data, monkeypatch, script):
    changes = {} if script is td3_bc else dict(actor_bc_coef=0.3, critic_bc_coef=0.7)
    args, agent, optimizers = make(script, **changes)
    obs, actions, rewards, next_obs, terminations, rows = fixed_rows(monkeypatch, script, data)
    noise = noises(monkeypatch, (B, A), (B, A))
    before = copy.deepcopy(agent)
    step = script.training_step(args, data, agent, optimizers)
    step()
    assert "actor_optimizer" not in optimizers  # every second update only
    for a, b in zip(agent.critic_target.parameters(), before.critic_target.parameters(), strict=True):
        assert torch.equal(a, b)
    step()
    for update in range(2):
        next_actions = smoothed64(act64(before.actor_target, next_obs), noise[update])
        q_next = critic64(before.critic_target, next_obs, next_actions).min(0).values
        if script is rebrac:
            q_next = q_next - 0.7 * ((next_actions - data.next_actions[rows].double()) ** 2).sum(1)
        y = rewards.double() + 0.99 * (1 - terminations.double()) * q_next
        loss = critic_loss64(agent, obs, actions, y)
        same(optimizers["critic_optimizer"].calls[update], loss, list(agent.critic.parameters()))
    new_actions = act64(agent.actor, obs)
    error = (new_actions - actions.double()) ** 2
    if script is td3_bc:
        q = critic64(agent.critic, obs, new_actions)[0]
        actor_loss = -2.5 / q.abs().mean().detach() * q.mean() + error.mean()
    else:
        q = critic64(agent.critic, obs, new_actions).min(0).values
        actor_loss = -q.mean() / q.abs().mean().detach() + 0.3 * error.sum(1).mean()
    same(optimizers["actor_optimizer"].calls[0], actor_loss, list(agent.actor.parameters()))
    moved(agent.critic_target, before.critic_target, agent.critic)
    moved(agent.actor_target, before.actor_target, agent.actor)


def test_an_unknown_next_action_costs_rebrac_nothing(data):
    data.next_actions = torch.full_like(data.next_actions, torch.nan)
    found = []
    for coefficient in (0.0, 0.7):
        args, agent, optimizers = make(rebrac, critic_bc_coef=coefficient)
        torch.manual_seed(0)
        found.append(rebrac.training_step(args, data, agent, optimizers)()["critic_loss"])
    assert found[0] == found[1]


def test_bc_imitates_the_best_episodes_alone(data, monkeypatch):
    args, agent, optimizers = make(bc, top_fraction=0.1)
    drawn, sample = [], bc.sample
    monkeypatch.setattr(bc, "sample", lambda data, n: drawn.append(data) or sample(data, n))
    bc.training_step(args, data, agent, optimizers)()
    assert torch.equal(drawn[0].table, data.best_episodes(0.1).table) and len(drawn[0]) < len(data)


def test_bc(data, monkeypatch):
    args, agent, optimizers = make(bc)
    obs, actions, *_ = fixed_rows(monkeypatch, bc, data)
    bc.training_step(args, data, agent, optimizers)()
    loss = -policy64(agent.actor, obs).log_prob(actions.double()).sum(1).mean()
    same(optimizers["actor_optimizer"].calls[0], loss, list(agent.actor.parameters()))


def test_the_best_episodes_are_those_of_highest_return(data):
    best = data.best_episodes(0.1)
    chosen = set(best.episode.tolist())
    n = round(0.1 * len(data.returns))
    expected = set(sorted(range(len(data.returns)), key=lambda i: -data.returns[i])[:n])
    assert chosen <= expected and 0 < len(best) < len(data)
    assert len(best) == sum(episode in expected for episode in data.episode.tolist())
    assert len(best.table) == len(best)


@pytest.mark.parametrize("weights", ["exp", "softmax"])
def test_awac(data, monkeypatch, weights):
    args, agent, optimizers = make(awac, temperature=0.5, weights=weights)
    obs, actions, rewards, next_obs, terminations, _ = fixed_rows(monkeypatch, awac, data)
    noise = noises(monkeypatch, (B, A), (B, A))
    before, record = copy.deepcopy(agent), optimizers["critic_optimizer"].step

    def step(grads):  # the actor has to learn from the critics after it
        record(grads)
        for parameter in agent.critic.parameters():
            parameter.data.add_(0.1 * torch.rand_like(parameter))

    optimizers["critic_optimizer"].step = step
    awac.training_step(args, data, agent, optimizers)()

    def execute(states, eps):
        policy = policy64(agent.actor, states)
        return (policy.mean + policy.stddev * eps).clamp(-1, 1).detach()

    q_next = critic64(before.critic_target, next_obs, execute(next_obs, noise[0])).min(0).values
    y = rewards.double() + 0.99 * (1 - terminations.double()) * q_next
    loss, critic_params = critic_loss64(before, obs, actions, y), list(before.critic.parameters())
    same(optimizers["critic_optimizer"].calls[0], loss, critic_params)
    advantage = critic64(agent.critic, obs, actions).min(0).values
    advantage = advantage - critic64(agent.critic, obs, execute(obs, noise[1])).min(0).values
    weight = torch.exp(advantage / 0.5).detach()
    weight = B * weight / weight.sum() if weights == "softmax" else weight.clamp(max=100)
    loss = -(weight * policy64(agent.actor, obs).log_prob(actions.double()).sum(1)).mean()
    same(optimizers["actor_optimizer"].calls[0], loss, list(agent.actor.parameters()))
    moved(agent.critic_target, before.critic_target, agent.critic)


@pytest.mark.parametrize("script", [iql, td3_bc, bc, awac, rebrac])
def test_compiled_steps_equal_eager_ones(data, script):
    def trained(compile):
        torch.manual_seed(0)
        args = cli.complete(script.Args(compile=compile, batch_size=32))
        agent = script.Agent(args, S, A)
        step = script.training_step(args, data, agent, script.Optimizers(args, agent))
        for _ in range(5):
            step()
        return agent.state_dict()

    check_trained_alike(trained(True), trained(False))
