"""Every loss and target of O2PPO against an independent float64 version, written from the equations."""

import copy
import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import o2ppo
from common import steps, tasks
from common.envs import VectorEpisodes
from common.stages import Schedules
from tests.reference import A, B, Recorder, S, critic64, fixed_rows, mlp64, noises, same

RATES = {"actor_lr": torch.tensor(3e-5), "critic_lr": torch.tensor(2e-4)}


@pytest.fixture
def agent():
    torch.manual_seed(3)
    actor = o2ppo.Actor(S, A).state_dict()
    agent = o2ppo.Agent(o2ppo.Args(), dict(obs_dim=S, action_dim=A, hidden_layers=2, actor=actor))
    with torch.no_grad():  # everything different from everything else
        for parameter in agent.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        agent.actor.log_std.sub_(1.0)
        agent.actor_reference.log_std.sub_(0.7)
    return agent


def policy64(actor, obs):
    return Normal(torch.tanh(mlp64(actor.net, obs)), actor.log_std.double().exp())


def v64(value, obs):
    return mlp64(value.net, obs, torch.tanh)[:, 0]


# ----------------------------------------------------------------------------------------------- rewards


def discounted(episodes, gamma=0.99):
    """R ← γR + r, from zero in each episode: of all their steps in a row."""
    out = []
    for rewards in episodes:
        total = 0.0
        for reward in rewards:
            total = gamma * total + float(reward)
            out.append(total)
    return out


def episodes_of(data):
    rows = {}
    for episode, reward in zip(data.episode.tolist(), data.rewards.tolist(), strict=True):
        rows.setdefault(episode, []).append(reward)
    return list(rows.values())


def test_rewards_of_the_data_are_divided_by_the_std_of_their_discounted_return(data):
    scale = o2ppo.RewardScale(0.99)
    scaled = o2ppo.scaled(data, scale)
    std = np.std(discounted(episodes_of(data)))
    assert (data.terminations == 1).any() and std > 1.5  # of one reward it is 1
    torch.testing.assert_close(scaled.rewards, data.rewards / float(std))  # those of last steps, too
    torch.testing.assert_close(scaled.table[:, 2 * S + A], scaled.rewards)  # what batches are drawn from
    assert torch.equal(scaled.returns, data.returns)


def test_the_running_std_goes_on_online_and_through_a_checkpoint(data):
    scale = o2ppo.RewardScale(0.99)
    o2ppo.scaled(data, scale)
    rng = np.random.default_rng(0)
    rewards, ended = rng.normal(3.0, 2.0, (3, 50, 2)).astype(np.float32), rng.random((3, 50, 2)) < 0.1
    for rollout in range(3):
        got = scale(rewards[rollout], ended[rollout])
        so_far, ends = rewards[: rollout + 1].reshape(-1, 2), ended[: rollout + 1].reshape(-1, 2)
        online = [np.split(so_far[:, i], np.flatnonzero(ends[:, i]) + 1) for i in range(2)]
        everything = discounted(episodes_of(data)) + discounted(online[0]) + discounted(online[1])
        np.testing.assert_allclose(got, rewards[rollout] / np.std(everything), rtol=1e-5)
        saved = io.BytesIO()
        torch.save(scale.state_dict(), saved)
        scale = o2ppo.RewardScale(0.99)
        scale.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))


# ----------------------------------------------------------------------------------------------- re-evaluation


def test_tails_equal_a_loop_over_episodes(data):
    tails, coefficients, ends = o2ppo.discounted_tails(data, 0.9)
    rewards, terminations = data.rewards.double(), data.terminations
    for start in range(0, len(data), 37):
        total, discount, row = 0.0, 1.0, start
        while True:
            total += discount * rewards[row].item()
            discount *= 0.9
            if row + 1 == len(data) or data.episode[row + 1] != data.episode[row]:
                break
            row += 1
        assert tails[start].item() == pytest.approx(total, abs=1e-4) and ends[start].item() == row
        left = 0.0 if terminations[row] else discount  # a time-out's tail is bootstrapped, never the next episode's
        assert coefficients[start].item() == pytest.approx(left, rel=1e-5)
    assert (coefficients == 0).any() and (coefficients > 0).any()


def test_nothing_is_left_behind_a_real_end_even_where_rows_go_on(data):
    """As in D4RL's mazes, whose episodes go on at the goal."""
    part = data.head(4)
    part.episode, part.rewards = torch.zeros(4).long(), torch.tensor([0.0, 1.0, 1.0, 0.0])
    part.terminations = torch.tensor([0.0, 1.0, 1.0, 0.0])
    tails, coefficients, ends = o2ppo.discounted_tails(part, 0.5)
    assert tails.tolist() == [0.5, 1, 1, 0] and coefficients.tolist() == [0, 0, 0, 0.5]
    assert ends.tolist() == [1, 1, 2, 3]


def test_returns(agent, data, monkeypatch):
    args, optimizers = o2ppo.Args(compile=False, reevaluate_batch_size=B), Recorder()
    obs, *_, rows = fixed_rows(monkeypatch, o2ppo, data)
    o2ppo.reevaluation_step(args, data, agent, optimizers)()
    tails, coefficients, ends = o2ppo.discounted_tails(data, 0.99)
    y = tails[rows].double() + coefficients[rows].double() * v64(agent.value, data.next_obs[ends[rows]])
    loss = ((v64(agent.value, obs) - y.detach()) ** 2).mean()
    same(optimizers["reevaluate_optimizer"].calls[0], loss, list(agent.value.parameters()))
    assert set(optimizers) == {"reevaluate_optimizer"}


def test_fqe(agent, data, monkeypatch):
    args, optimizers = o2ppo.Args(compile=False, reevaluate_batch_size=B, value_init="fqe"), Recorder()
    obs, actions, rewards, next_obs, terminations, _ = fixed_rows(monkeypatch, o2ppo, data)
    noise = noises(monkeypatch, (B, A), (B, A))
    before = copy.deepcopy(agent.critic_target)
    o2ppo.reevaluation_step(args, data, agent, optimizers)()

    def execute(states, eps):
        policy = policy64(agent.actor_offline, states)
        return (policy.mean + policy.stddev * eps).clamp(-1, 1)

    y = rewards.double() + 0.99 * (1 - terminations.double()) * critic64(
        before, next_obs, execute(next_obs, noise[0])
    ).mean(0)
    loss = sum(((q - y.detach()) ** 2).mean() for q in critic64(agent.critic, obs, actions))
    same(optimizers["critic_optimizer"].calls[0], loss, list(agent.critic.parameters()))
    v_target = critic64(agent.critic, obs, execute(obs, noise[1])).mean(0).detach()
    loss = ((v64(agent.value, obs) - v_target) ** 2).mean()
    same(optimizers["reevaluate_optimizer"].calls[0], loss, list(agent.value.parameters()))
    moved = zip(agent.critic_target.parameters(), before.parameters(), agent.critic.parameters(), strict=True)
    for new, old, source in moved:
        torch.testing.assert_close(new, 0.995 * old + 0.005 * source, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------- advantages


def test_gae_equals_its_sum():
    """A_t = Σ_k (γλ)^k δ_{t+k}, up to the first step that ended its episode."""
    rng = np.random.default_rng(0)
    T, n = 40, 3
    rewards, values, next_values = rng.normal(size=(3, T, n))
    ended = rng.random((T, n)) < 0.15
    terminated = ended & (rng.random((T, n)) < 0.5)
    got = o2ppo.gae(rewards, values, next_values, terminated, ended, 0.99, 0.95)
    deltas = rewards + 0.99 * np.where(terminated, 0, next_values) - values
    for t in range(T):
        for i in range(n):
            total, weight = 0.0, 1.0
            for k in range(t, T):
                total += weight * deltas[k, i]
                weight *= 0.99 * 0.95
                if ended[k, i]:
                    break
            assert got[t, i] == pytest.approx(total)


def test_reference_advantage(agent):
    obs, actions = torch.randn(B, S), torch.rand(B, A) * 3 - 1.5
    got = o2ppo.reference_advantage(o2ppo.Args(), agent.actor_reference, obs, actions)
    policy = policy64(agent.actor_reference, obs)
    x = policy.log_prob(actions.double()).sum(1) + policy.entropy().sum(1) + 4 * A
    want = 2 * (torch.log1p(torch.exp(x)) - 4 * A) / A
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.6])
def test_mixed_advantage_is_normalised(agent, data, beta):
    args = o2ppo.Args(rollout_steps=B, num_envs=4)
    rng = np.random.default_rng(0)
    shape = (B // 4, 4)
    collected = {name: rng.normal(size=(*shape, size)).astype(np.float32) for name, size in
                 (("obs", S), ("next_obs", S), ("actions", A))}  # fmt: skip
    collected |= {"rewards": rng.normal(size=shape).astype(np.float32), "ended": rng.random(shape) < 0.1}
    collected["terminated"] = collected["ended"]
    batch = o2ppo.empty_batch(args, data)
    o2ppo.fill(args, batch, collected, agent, beta)
    obs, actions = (torch.as_tensor(collected[name]).flatten(0, 1) for name in ("obs", "actions"))
    v, v_next = (
        v64(agent.value, torch.as_tensor(collected[name]).flatten(0, 1)).view(shape) for name in ("obs", "next_obs")
    )
    a_gae = torch.as_tensor(
        o2ppo.gae(collected["rewards"], v.detach().numpy(), v_next.detach().numpy(), collected["terminated"],
                  collected["ended"], 0.99, 0.95)
    ).flatten()  # fmt: skip
    a_ref = o2ppo.reference_advantage(args, agent.actor_reference, obs, actions).double().detach() * a_gae.std()
    want = (a_gae + beta * a_ref) / (1 + beta)
    want = (want - want.mean()) / want.std()
    torch.testing.assert_close(batch["advantages"].double(), want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(batch["returns"].double(), a_gae + v.flatten().detach(), rtol=1e-3, atol=1e-3)
    log_prob = policy64(agent.actor, obs).log_prob(actions.double()).sum(1).detach()
    torch.testing.assert_close(batch["log_probs"].double(), log_prob, rtol=1e-4, atol=1e-4)


def test_the_first_ratio_is_one_in_bfloat16_too(agent, data, monkeypatch):
    monkeypatch.setattr(steps, "products", torch.bfloat16)
    args = o2ppo.Args(compile=False, rollout_steps=B, num_envs=4, minibatch_size=B, beta_steps=250_000)
    schedule, batch = Schedules(o2ppo.schedules(args), torch.device("cpu")), o2ppo.empty_batch(args, data)
    rng, shape = np.random.default_rng(0), (B // 4, 4)
    sizes = {"obs": (S,), "next_obs": (S,), "actions": (A,), "rewards": ()}
    collected = {name: rng.normal(size=shape + size).astype(np.float32) for name, size in sizes.items()}
    collected |= dict.fromkeys(("terminated", "ended"), np.zeros(shape, bool))
    o2ppo.fill(args, batch, collected, agent, schedule.tensors["beta"])
    metrics = o2ppo.update_epoch(args, batch, agent, o2ppo.Optimizers(args, agent), schedule.tensors)()
    assert abs(metrics["approx_kl"].item()) < 1e-6 and metrics["clipfrac"].item() == 0
    exact = policy64(agent.actor, batch["obs"]).log_prob(batch["actions"].double()).sum(1)
    assert (batch["log_probs"] - exact).abs().max() > 1e-3  # not for want of rounding


def test_beta_schedule():
    args = o2ppo.Args(beta_steps=250_000)
    beta = o2ppo.schedules(args)["beta"]
    assert [beta(step) for step in (0, 125_000, 250_000, 300_000)] == [1.0, 0.5, 0.0, 0.0]
    assert o2ppo.schedules(o2ppo.Args(constrain=False, beta_steps=250_000))["beta"](0) == 0.0


def test_learning_rates_fall_to_zero_over_whole_rollouts_and_reach_the_update(agent, data):
    args = o2ppo.Args(
        rollout_steps=B, num_envs=4, minibatch_size=B // 2, beta_steps=B, online_steps=4 * B + 3, actor_lr=1e-3
    )
    schedule = Schedules(o2ppo.schedules(args), torch.device("cpu"))
    batch, optimizers = o2ppo.empty_batch(args, data), o2ppo.Optimizers(args, agent)
    epoch = o2ppo.update_epoch(args, batch, agent, optimizers, schedule.tensors)
    for step, share in ((0, 1.0), (B, 0.75), (3 * B, 0.25), (4 * B, 0.0)):
        schedule.fill(step)
        epoch()
        rates = [optimizers[f"{name}_optimizer"].lr.item() for name in ("actor", "value")]
        assert rates == pytest.approx([1e-3 * share, 2e-4 * share])
    longer = o2ppo.schedules(dataclasses.replace(args, anneal_steps=8 * B))  # of which this run is the beginning
    assert [longer["actor_lr"](step) for step in (0, 2 * B, 9 * B)] == pytest.approx([1e-3, 7.5e-4, 0])


# ----------------------------------------------------------------------------------------------- fine-tuning


def test_update(agent, data):
    args, optimizers = o2ppo.Args(compile=False, rollout_steps=B, minibatch_size=B), Recorder()
    obs, actions = torch.randn(B, S), torch.randn(B, A) * 0.5
    log_probs = policy64(agent.actor, obs).log_prob(actions.double()).sum(1).detach().float() + 0.3 * torch.randn(B)
    batch = dict(obs=obs, actions=actions, advantages=torch.randn(B), returns=torch.randn(B), log_probs=log_probs)
    metrics = o2ppo.update_epoch(args, batch, agent, optimizers, RATES)()
    policy = policy64(agent.actor, obs)
    ratio = (policy.log_prob(actions.double()).sum(1) - log_probs.double()).exp()
    assert (ratio > 1.2).any() and (ratio < 0.8).any()
    advantages = batch["advantages"].double()
    actor_loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    actor_loss = actor_loss - 0.01 * policy.entropy().sum(1).mean()
    value_loss = ((v64(agent.value, obs) - batch["returns"].double()) ** 2).mean()
    for name, loss, module in (
        ("actor_optimizer", actor_loss, agent.actor),
        ("value_optimizer", value_loss, agent.value),
    ):
        params = list(module.parameters())
        grads = torch.autograd.grad(loss, params, retain_graph=True)
        norm = math.sqrt(sum((g**2).sum().item() for g in grads))
        same(optimizers[name].calls[0], loss * min(1.0, 0.5 / norm), params)
    torch.testing.assert_close(metrics["value_loss"].double(), value_loss.detach(), rtol=1e-4, atol=1e-5)
    assert metrics["clipfrac"].item() == pytest.approx(((ratio > 1.2) | (ratio < 0.8)).double().mean().item())
    kl = (ratio - 1 - ratio.log()).mean().item()  # Schulman's estimate, never negative
    assert metrics["approx_kl"].item() == pytest.approx(kl, rel=1e-3)


def test_every_row_is_used_once_an_epoch(agent):
    """With advantages of zero the value loss over an epoch sees each return exactly once."""
    args, optimizers = o2ppo.Args(compile=False, rollout_steps=64, minibatch_size=16), Recorder()
    seen = []
    batch = {name: torch.zeros(64) for name in ("advantages", "returns", "log_probs")}
    batch |= {"obs": torch.zeros(64, S), "actions": torch.zeros(64, A)}

    class Watched(dict):
        def __getitem__(self, name):
            tensor = super().__getitem__(name)
            if name != "returns":
                return tensor

            class Rows:
                def __getitem__(_, rows):
                    seen.append(rows)
                    return tensor[rows]

            return Rows()

    o2ppo.update_epoch(args, Watched(batch), agent, optimizers, RATES)()
    assert sorted(torch.cat(seen).tolist()) == list(range(64)) and len(seen) == 4


def test_rollout_keeps_unclipped_actions_and_true_next_states(agent):
    with torch.no_grad():
        agent.actor.log_std.fill_(0.5)  # so wide that many actions lie outside [-1, 1]
    env = VectorEpisodes(tasks.resolve(tasks.DEMO), np.zeros(S), np.ones(S), 3, seed=1)
    played = []
    step = env.step
    env.step = lambda actions: played.append(actions) or step(actions)
    collected, returns = o2ppo.rollout(agent.actor, env, 60)
    assert collected["obs"].shape == (60, 3, S) and np.abs(collected["actions"]).max() > 1.2
    assert np.abs(np.stack(played)).max() <= 1.0
    np.testing.assert_array_equal(np.stack(played), collected["actions"].clip(-1, 1))
    ended = collected["ended"]
    assert ended.any() and len(returns) == ended.sum()
    follows = (collected["next_obs"][:-1] == collected["obs"][1:]).all(-1)
    np.testing.assert_array_equal(follows, ~ended[:-1])  # after an end comes another episode, not its next state


def test_std_is_capped_at_the_start():
    policy = dict(obs_dim=S, action_dim=A, hidden_layers=2, actor=o2ppo.Actor(S, A).state_dict())
    agent = o2ppo.Agent(o2ppo.Args(max_std_start=0.05), policy)
    for actor in (agent.actor, agent.actor_reference):
        torch.testing.assert_close(actor(torch.zeros(1, S))[1].exp(), torch.full((A,), 0.05))
    assert (o2ppo.Agent(o2ppo.Args(), policy).actor(torch.zeros(1, S))[1].exp() == 1).all()
