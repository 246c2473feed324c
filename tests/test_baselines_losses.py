"""Every loss and target of the compared methods against float64 versions and against worked examples."""

import copy

import pytest
import torch
from torch.distributions import Normal

from baselines import aca, awac, cal_ql, iql, off2on, pex, rlpd, wsrl
from common import cli, policies, replay
from offline import cal_ql as offline_cal_ql
from offline import awac as offline_awac
from offline import cql as offline_cql
from offline import iql as offline_iql
from offline import sac_ml as offline_sac_ml
from tests.reference import (
    A, B, Outputs, Recorder, S, actor64, check_trained_alike, critic64, density64, mlp64, noises, same,
)  # fmt: skip


def shaken(module):
    """Every parameter of `module`, moved a little."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module


# of the offline scripts, where that is what an online one starts from
SHAPES = {wsrl: dict(critics=10, layer_norm=True), off2on: dict(hidden=(256, 256), critic_hidden=(256, 256))}


def agent_of(script, offline_script=None, members=1, **changes):
    """Arguments and an agent that goes on from untrained offline ones, everything in it different."""
    torch.manual_seed(3)
    args = cli.complete(script.Args(compile=False, batch_size=B, **changes))
    found = []
    for _ in range(members):
        policy = dict(obs_dim=S, action_dim=A)
        if offline_script:
            chosen = offline_script.Args(**SHAPES.get(script, {}))
            networks = shaken(offline_script.Agent(chosen, S, A))
            policy |= dict(hidden_layers=networks.actor.net, actor=networks.actor.state_dict(),
                           learner={"args": vars(chosen), "agent": networks.state_dict()})  # fmt: skip
        found.append(policy)
    return args, script.Agent(args, *found)


class Batches:
    """Stands in for the buffer: gives known batches, one after the other."""

    def __init__(self, *batches, action_dim=A):
        self.batches, self.action_dim = batches, action_dim
        self.fed = iter(batches)

    def sample(self, *_):
        return next(self.fed)


def batches_of(data, n=1):
    return [replay.split(data.table[torch.randint(len(data), (B,))], S, A) for _ in range(n)]


def gaussian64(actor, obs):
    return Normal(torch.tanh(mlp64(actor.net, obs)), actor.log_std.double().exp())


def follows(before, agent):
    """The target critics have moved by 0.005 towards the critics."""
    for old, new, source in zip(before.critic_target.parameters(), agent.critic_target.parameters(),
                                agent.critic.parameters(), strict=True):  # fmt: skip
        torch.testing.assert_close(new, 0.995 * old + 0.005 * source, rtol=1e-5, atol=1e-6)


def column(values):
    return torch.as_tensor(values, dtype=torch.float64)


# the batch of BASELINES' worked examples for AWAC and IQL
R, D = column([1, -0.5, 2]), column([0, 0, 1])
Q, Q_NEXT = [[10, 4, 7.5], [9.5, 4.4, 8]], [[11, 3, 50], [10.5, 3.2, 60]]


def close(found, want):
    torch.testing.assert_close(column(found), column(want), rtol=1e-7, atol=1e-7)  # some factors are float32


# ----------------------------------------------------------------------------------------------- IQL


def test_iql(data):
    args, agent = agent_of(iql, offline_iql)
    before, optimizers = copy.deepcopy(agent), Recorder()
    [(obs, actions, rewards, next_obs, terminations)] = batch = batches_of(data)
    metrics = iql.finetuning_step(args, Batches(*batch), agent, optimizers)()
    v = mlp64(agent.value.net, obs)[:, 0]
    u = critic64(before.critic_target, obs, actions).min(0).values.detach() - v
    assert (u > 0).any() and (u < 0).any()
    same(optimizers["value_optimizer"].calls[0], (torch.where(u < 0, 0.3, 0.7) * u**2).mean(),
         list(agent.value.parameters()))  # fmt: skip
    y = rewards.double() + 0.99 * (1 - terminations.double()) * mlp64(agent.value.net, next_obs)[:, 0].detach()
    assert metrics["q_target"].item() == pytest.approx(y.mean().item(), abs=1e-5)
    loss = sum(((q - y) ** 2).mean() for q in critic64(agent.critic, obs, actions))
    same(optimizers["critic_optimizer"].calls[0], loss, list(agent.critic.parameters()))
    weight = torch.exp(3 * u.detach()).clamp(max=100)
    loss = -(weight * gaussian64(agent.actor, obs).log_prob(actions.double()).sum(1)).mean()
    same(optimizers["actor_optimizer"].calls[0], loss, list(agent.actor.parameters()))
    follows(before, agent)


@pytest.mark.parametrize(("beta", "weights"), [(3, [14.8797317249, 0.223130160148, 1.82211880039]),
                                               (10, [100, 0.00673794699909, 7.38905609893])])  # fmt: skip
def test_iql_worked_example(beta, weights, monkeypatch):
    args, agent = agent_of(iql, offline_iql, beta=beta)
    monkeypatch.setattr(iql, "polyak", lambda *_: None)
    mean, log_std = torch.tanh(column([[0.2, -1], [0, 0.5], [1.5, -0.3]])), column([-0.5, -1]).requires_grad_()
    actor = Outputs(log_std)
    actor.forward = lambda *_: (mean, log_std)
    agent.actor, agent.critic = actor, Outputs(Q)
    agent.critic_target = Outputs([[10.2, 4.1, 7.2], [9.9, 4.2, 7.9]])
    agent.value = Outputs([9, 4.6, 7], [9.8, 3.1, 42])
    actions = column([[0.1, -0.9], [0.4, 0.2], [0.99999, -1]])
    metrics = iql.finetuning_step(args, Batches((None, actions, R, None, D)), agent, Recorder())()
    close(metrics["value_loss"], 0.223333333333)
    close(metrics["q_target"], (10.702 + 2.569 + 2) / 3)
    close(metrics["critic_loss"], 24.52931)
    close(metrics["advantage_weight"], sum(weights) / 3)
    if beta == 3:
        close(metrics["actor_loss"], 3.49061404711)


# ----------------------------------------------------------------------------------------------- AWAC


def test_awac(data, monkeypatch):
    args, agent = agent_of(awac, offline_awac, temperature=0.5)
    before, optimizers = copy.deepcopy(agent), Recorder()
    [(obs, actions, rewards, next_obs, terminations)] = batch = batches_of(data)
    noise, record = noises(monkeypatch, (B, A), (B, A)), optimizers["critic_optimizer"].step

    def step(grads):  # the actor has to learn from the critics after it
        record(grads)
        for parameter in agent.critic.parameters():
            parameter.data.add_(0.1 * torch.rand_like(parameter))

    optimizers["critic_optimizer"].step = step
    awac.finetuning_step(args, Batches(*batch), agent, optimizers)()

    def execute(states, eps):
        policy = gaussian64(agent.actor, states)
        return (policy.mean + policy.stddev * eps).clamp(-1, 1).detach()

    q_next = critic64(before.critic_target, next_obs, execute(next_obs, noise[0])).min(0).values
    y = (rewards.double() + 0.99 * (1 - terminations.double()) * q_next).detach()
    loss = sum(((q - y) ** 2).mean() for q in critic64(before.critic, obs, actions))
    same(optimizers["critic_optimizer"].calls[0], loss, list(before.critic.parameters()))
    advantage = critic64(agent.critic, obs, actions).min(0).values
    advantage = advantage - critic64(agent.critic, obs, execute(obs, noise[1])).min(0).values
    weight = torch.exp(advantage / 0.5).clamp(max=100).detach()
    loss = -(weight * gaussian64(agent.actor, obs).log_prob(actions.double()).sum(1)).mean()
    same(optimizers["actor_optimizer"].calls[0], loss, list(agent.actor.parameters()))


@pytest.mark.parametrize(
    ("weights", "temperature", "actor_loss"), [("exp", 0.3333, 85.0521983105), ("softmax", 2.0, 1.74327981415)]
)
def test_awac_worked_example(weights, temperature, actor_loss, monkeypatch):
    args, agent = agent_of(awac, offline_awac, weights=weights, temperature=temperature)
    monkeypatch.setattr(awac, "polyak", lambda *_: None)
    monkeypatch.setattr(awac, "gaussian_log_prob", lambda *_: log_prob)
    log_prob = column([-1.2, 0.3, -2.5]).requires_grad_()
    agent.actor = Outputs(log_prob)
    agent.actor.outputs, agent.actor.forward = [log_prob], lambda _: (log_prob, log_prob)
    agent.critic = Outputs(Q, Q, [[9, 4.1, 5], [9.2, 4.3, 5.5]])
    agent.critic_target = Outputs(Q_NEXT)
    metrics = awac.finetuning_step(args, Batches((None, None, R, None, D)), agent, Recorder())()
    close(metrics["q_target"], (11.395 + 2.47 + 2) / 3)
    close(metrics["critic_loss"], 25.95095)
    close(metrics["advantage"], (0.5 - 0.1 + 2.5) / 3)
    close(metrics["actor_loss"], actor_loss)


# ----------------------------------------------------------------------------------------------- Cal-QL


def test_returns_to_go():
    def follow(rewards, terminations, episode, failure=None, gamma=0.99, to_end=False):
        return replay.returns_to_go(
            column(rewards), column(terminations), gamma, torch.tensor(episode), failure, to_end
        )

    sparse = [-5, -5, -5, -5, -5, 5], [0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1]
    close(follow(*sparse, failure=-5.0), [-500, -500, -500, -5.0495, -0.05, 5])
    close(follow(*sparse, failure=-1.0), [-14.8505, -9.95, -5, -5.0495, -0.05, 5])
    close(follow([1, 2, 3], [0, 0, 1], [0, 0, 0]), [5.9203, 4.97, 3])
    close(follow([1, 2, 3], [0, 1, 1], [0, 0, 0]), [2.98, 2, 3])  # rows of a maze's episode go on behind its goal
    # cut off: what follows is unknown, which 1 / (1 - γ) = 2 rows feel
    close(follow([1, 2, 3, 7], [0, 0, 0, 1], [0, 0, 0, 1], gamma=0.5), [2.75, -torch.inf, -torch.inf, 7])
    close(follow([1, 2, 3, 7], [0, 0, 0, 1], [0, 0, 0, 1], gamma=0.5, to_end=True), [2.75, 3.5, 3, 7])
    # in an episode of fewer rows all of them feel it, and none of the episode before
    close(follow([1, 7], [0, 1], [0, 1], gamma=0.5), [-torch.inf, 7])
    close(follow([7, 1], [1, 0], [0, 1], gamma=0.5), [7, -torch.inf])
    # without discounting nothing is ever far enough, and going on to fail has no end
    close(follow([1, 2, 3, 7], [0, 0, 0, 1], [0, 0, 0, 1], gamma=1.0), [-torch.inf, -torch.inf, -torch.inf, 7])
    close(follow(*sparse, failure=-5.0, gamma=1.0), [-torch.inf, -torch.inf, -torch.inf, -5, 0, 5])


def test_the_hand_is_calibrated_in_all_of_its_short_episodes():
    """A pen's 100 steps are as many as 1 / (1 - γ)."""
    for family, calibrated in {"adroit": 100, "locomotion": 0}.items():
        for script in (cal_ql, offline_cal_ql):
            args = script.Args(**script.FAMILIES.get(family, {}))
            returns = replay.returns_to_go(
                torch.ones(100), torch.zeros(100), args.gamma, failure=args.failure_reward, to_end=args.calibrate_to_end
            )
            assert returns.isfinite().sum() == calibrated


def test_cal_ql_begins_with_its_authors_weights():
    agent = offline_cal_ql.Agent(offline_cal_ql.Args(hidden=(8, 8), critic_hidden=(8, 8), layer_norm=True), 9, 3)
    for net, (first, *_, last) in {
        net: [layer.weight for layer in net if hasattr(layer, "bias") and layer.weight.shape[-2] > 1]
        for net in (agent.actor.net, agent.critic.net)
    }.items():
        for weight in first.reshape(-1, *first.shape[-2:]):
            narrow = weight if weight.shape[0] <= weight.shape[1] else weight.T
            torch.testing.assert_close(narrow @ narrow.T, 2 * torch.eye(8), rtol=0, atol=1e-5)
        scale = torch.linalg.matrix_norm(last.reshape(-1, *last.shape[-2:]), 2)
        torch.testing.assert_close(scale, torch.full_like(scale, 0.01))
        assert all((layer.bias == 0).all() for layer in net if hasattr(layer, "bias"))


def test_what_was_added_last_is_drawn_too(data):
    buffer = replay.ReplayBuffer(data, 3, "none")
    for i in range(3):
        buffer.add(data.obs[i], data.actions[i], float(i), data.obs[i], False)
        assert set(buffer.sample(200)[2].tolist()) == set(range(i + 1))


def test_no_row_of_millions_is_left_out(data):
    """As single-precision numbers would: 2^24 of them lie between 0 and 1."""

    class Rows:
        device = torch.device("cpu")

        def __getitem__(self, rows):
            return rows

    buffer = replay.ReplayBuffer(data, 1, "none")
    buffer.table = Rows()
    buffer.size.fill_(1 << 26)
    assert set((buffer.rows(400) % 4).tolist()) == {0, 1, 2, 3}


def test_returns_stand_beside_rewards_in_both_halves_of_a_batch(data):
    buffer = replay.EpisodeBuffer(data, 3, "half", data.rewards)
    buffer.add(data.obs[0], data.actions[0], 7.0, data.obs[0], True)
    buffer.end_episode(lambda rewards, terminations: rewards)
    _, _, rewards, _, _, returns = buffer.sample(20)
    assert torch.equal(returns, rewards) and (returns[:10] == 7).all() and not (returns[10:] == 7).any()


def test_a_restored_buffer_draws_the_same(data):
    """Of Cal-QL's the rows of ended episodes alone; of Off2On's a new row still gets the highest priority so far."""
    makers = (lambda: replay.EpisodeBuffer(data, 9, "none", data.rewards), lambda: replay.PrioritisedBuffer(data, 9, 2))
    for make in makers:
        buffer, again = make(), make()
        for i in range(4):
            buffer.add(data.obs[i], data.actions[i], 5.0, data.obs[i], False)
            if i == 2 and isinstance(buffer, replay.EpisodeBuffer):
                buffer.end_episode(lambda rewards, terminations: rewards)
        if isinstance(buffer, replay.PrioritisedBuffer):
            buffer.update(torch.tensor([0]), torch.tensor([6.0]))
        again.load_state_dict(buffer.state_dict())
        assert again.size == buffer.size == (3 if isinstance(buffer, replay.EpisodeBuffer) else len(data) + 4)
        for one in (buffer, again):
            one.add(data.obs[5], data.actions[5], 5.0, data.obs[5], False)
        assert torch.equal(buffer.table, again.table)
        if isinstance(buffer, replay.PrioritisedBuffer):
            assert torch.equal(buffer.priorities, again.priorities) and torch.equal(buffer.sums, again.sums)
            assert again.priorities.view(-1)[len(data) + 3 : len(data) + 5].tolist() == [2, 6]
            data_rows, play = buffer.either(400)
            assert (play[2] == 5).all() and not (data_rows[2] == 5).any()


def test_rows_are_drawn_when_their_episode_has_ended(data):
    buffer = replay.EpisodeBuffer(data, 10, "none", data.rewards)
    for i in range(3):
        buffer.add(data.obs[i], data.actions[i], float(i), data.obs[i], i == 2)
        assert buffer.size == 0
    buffer.end_episode(lambda rewards, terminations: 10 * rewards + terminations)
    buffer.add(data.obs[0], data.actions[0], 5.0, data.obs[0], False)
    assert buffer.size == 3
    *_, rewards, _, terminations, returns = buffer.sample(100)
    assert set(rewards.tolist()) == {0, 1, 2} and torch.equal(returns, 10 * rewards + terminations)


UNIFORM = [[[0.5, -1], [-3, 2]], [[0, -0.5], [-2.5, 1]]]  # twin, row, action
CURRENT = [[[1.2, 0.4], [-4, -2.5]], [[0.9, 1.1], [-3, -3.5]]]
FOLLOWING = [[[0.8, 2], [-1, -6]], [[1, 0.2], [-2, -5]]]


@pytest.mark.parametrize(
    ("calibrate", "lagrange", "loss", "gaps"),
    [
        (True, False, 32.1016391508, [3.91029735516, 2.396810475]),
        (False, False, 31.8179995651, [3.90693713929, 2.34344277374]),
        (True, True, 64.5423283965, [3.91029735516, 2.396810475]),
    ],
)
@pytest.mark.parametrize("script", [cal_ql, offline_cal_ql])
def test_cal_ql_worked_example(script, calibrate, lagrange, loss, gaps, monkeypatch, data):
    online = script is cal_ql
    given = dict(n_actions=2, best_of=2, alpha=5.0, lagrange=lagrange, min_gap=-200.0, compile=False, batch_size=2)
    args = cli.complete(script.Args(**given, **{"calibrate_online" if online else "calibrate": calibrate}))
    q = column([[1, -2], [1.5, -1]])
    others = [column(x).permute(0, 2, 1) for x in (UNIFORM, CURRENT, FOLLOWING)]  # twin, action, row
    logs = [column(x) for x in ([[-0.3, 1.2], [0.5, -2]], [[0.1, -0.7], [1.5, 0.2]])]
    returns, rewards, d = column([0.7, -3.2]), column([0.2, -1]), column([0, 1])

    agent = torch.nn.Module()
    agent.critic = Outputs(torch.cat([q[:, None], *others], 1).flatten(1), q)
    agent.critic.n = 2
    agent.critic_target = Outputs(column([[[1, 1.6], [9, 9]], [[1.3, 0.9], [9, 9]]]).permute(0, 2, 1).flatten(1))
    mean = torch.zeros(2, 2, dtype=torch.float64).requires_grad_()
    agent.actor = Outputs(mean)
    agent.actor.outputs, agent.actor.forward = [mean], lambda _: (mean, mean)
    agent.log_temperature = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    agent.log_multiplier = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    drawn = iter([(torch.zeros(2, 2, 2), None), (torch.zeros(2, 2, 2), logs[0].T), (torch.zeros(2, 2, 2), logs[1].T),
                  (torch.zeros(2, 2), mean.sum(1))])  # fmt: skip
    monkeypatch.setattr(script, "sample_actions", lambda *_: next(drawn))
    monkeypatch.setattr(script, "polyak", lambda *_: None)
    obs, optimizers = torch.zeros(2, 1), Recorder()
    if online:
        batches = Batches((obs, torch.zeros(2, 2), rewards, obs, d, returns), action_dim=2)
        batches.table = obs
        metrics = script.finetuning_step(args, batches, agent, optimizers)()
    else:
        monkeypatch.setattr(script, "sample", lambda *_: (obs, torch.zeros(2, 2), rewards, obs, d, torch.arange(2)))
        monkeypatch.setattr(script, "returns_to_go", lambda *_: returns)
        data.actions, data.obs = torch.zeros(2, 2), obs
        data.rewards = returns.clone()
        metrics = script.training_step(args, data, agent, optimizers)()
    close(metrics["critic_loss"], 0.51805 + 0.04805)
    close(metrics["q_target"], 0.095)
    close(metrics["conservative_gap"], sum(gaps) / 2)
    want = torch.autograd.functional.jacobian(
        lambda x: cal_ql_loss64(x, q, logs, returns if calibrate else returns - torch.inf, rewards, d, lagrange),
        torch.cat([q[:, None], *others], 1),
    )
    value = cal_ql_loss64(torch.cat([q[:, None], *others], 1), q, logs,
                          returns if calibrate else returns - torch.inf, rewards, d, lagrange)  # fmt: skip
    close(value, loss)
    close(optimizers["critic_optimizer"].calls[0][0], want.flatten(1))
    close(optimizers["temperature_optimizer"].calls[0][0], 2.0)  # -(log π - A), of log π = 0 here
    if lagrange:
        close(optimizers["multiplier_optimizer"].calls[0][0], -31.9881141983)


def cal_ql_loss64(values, q, logs, returns, rewards, d, lagrange):
    """The whole critic loss from Q at (twin, action, row): the data's, 2 uniform, 2 of π(s), 2 of π(s')."""
    y = rewards + 0.99 * (1 - d) * column([1, 9])  # the best of the lower twins: 1.0 and 0.9
    loss = 0
    for twin in range(2):
        uniform = values[twin, 1:3] - 2 * torch.log(column(0.5))
        pushed = torch.maximum(values[twin, 3:], returns) - torch.cat([logs[0].T, logs[1].T])
        gap = (torch.cat([uniform, pushed]).exp().sum(0).log() - values[twin, 0]).clamp(min=-200).mean()
        weight = 5 * torch.exp(column(1)) * (gap - 0.8) if lagrange else 5 * gap
        loss = loss + ((values[twin, 0] - y) ** 2).mean() + weight
    return loss


def test_of_many_critics_two_are_drawn_and_may_be_one():
    """The lower of two of 0, 1, …, 9: Σ_k P(both ≥ k) = Σ (1 - k / 10)² = 2.85; were they never one, 2.67."""
    q = torch.arange(10.0)[:, None]
    found = torch.cat([offline_cal_ql.lowest(q) for _ in range(10_000)])
    assert found.mean().item() == pytest.approx(2.85, abs=0.1)
    assert offline_cal_ql.lowest(column([[3, 1], [2, 4]])).tolist() == [2, 1]


def test_the_gap_of_many_critics_is_that_of_one_of_them(data, monkeypatch):
    """Four alike have the gap and the Q of two alike, so that the multiplier moves alike."""
    monkeypatch.setattr(offline_cal_ql, "lowest", lambda q: q.amin(0))
    found = []
    for n in (2, 4):
        args = offline_cal_ql.Args(compile=False, batch_size=B, critics=n, n_actions=2, best_of=2, lagrange=True)
        agent, optimizers = offline_cal_ql.Agent(args, S, A), Recorder()
        torch.manual_seed(3)
        agent.actor.load_state_dict({name: 0.1 * torch.randn(x.shape)
                                             for name, x in agent.actor.state_dict().items()})  # fmt: skip
        for net in (agent.critic, agent.critic_target):
            for parameter in net.parameters():
                parameter.data[:] = 0.1 * torch.randn_like(parameter[:1])
        metrics = offline_cal_ql.training_step(args, data, agent, optimizers)()
        found.append((metrics["conservative_gap"], metrics["q"], optimizers["multiplier_optimizer"].calls[0][0]))
    for two, four in zip(*found, strict=True):
        torch.testing.assert_close(two, four)


# ----------------------------------------------------------------------------------------------- PEX


def test_pex(data, monkeypatch):
    args, agent = agent_of(pex, offline_iql, beta=2.0, inv_temperature=1.0)
    shaken(agent.critic_target), shaken(agent.value)
    before, optimizers, (batch,) = copy.deepcopy(agent), Recorder(), batches_of(data)
    obs, actions, rewards, next_obs, terminations = batch
    (noise,) = noises(monkeypatch, (B, A))
    draws = torch.rand(B)
    monkeypatch.setattr(torch, "rand_like", lambda _: draws)
    pex.finetuning_step(args, Batches(batch), agent, optimizers)()

    v = mlp64(agent.value.net, obs)[:, 0]
    u = critic64(before.critic_target, obs, actions).min(0).values.detach() - v
    same(optimizers["value_optimizer"].calls[0], (torch.where(u < 0, 0.3, 0.7) * u**2).mean(),
         list(agent.value.parameters()))  # fmt: skip
    y = rewards.double() + 0.99 * (1 - terminations.double()) * mlp64(agent.value.net, next_obs)[:, 0].detach()
    loss = sum(((q - y) ** 2).mean() for q in critic64(agent.critic, obs, actions))
    same(optimizers["critic_optimizer"].calls[0], loss, list(agent.critic.parameters()))
    follows(before, agent)

    # the composition: π_off's mean, or a sample of the new policy where its Q is preferred; the targets have moved
    composition = agent.actor
    first, policy = torch.tanh(mlp64(composition.offline.net, obs)), gaussian64(composition.new, obs)
    second = (policy.mean + policy.stddev * noise).clamp(-1, 1)
    q_first, q_second = (critic64(agent.critic, obs, a).min(0).values for a in (first, second))
    new = draws.double() < q_second.exp() / (q_first.exp() + q_second.exp())
    assert 4 < new.sum() < B - 4
    played = torch.where(new[:, None], second, first).detach()
    advantage = critic64(agent.critic_target, obs, played).min(0).values - v
    loss = -(torch.exp(2 * advantage).clamp(max=100).detach() * policy.log_prob(played).sum(1)).mean()
    same(optimizers["actor_optimizer"].calls[0], loss, list(composition.new.parameters()))
    assert not any(p.requires_grad for p in composition.offline.parameters())


def test_pex_worked_example(monkeypatch):
    first, second = column([1.2, 0.3, 2]), column([1.05, 0.55, 2])
    composition = pex.Composition(Outputs(first), Outputs(second), Outputs([[1.2, 0.3, 2]]), 10.0, 0.9)
    composition.critic.forward = lambda _, a: a[None]  # Q is the "action" itself here
    p = torch.sigmoid(composition.preference(None, first, second))
    close(p, [0.182425523806, 0.924141819979, 0.5])

    args, agent = agent_of(pex, offline_iql)
    monkeypatch.setattr(pex, "polyak", lambda *_: None)
    log_prob, zeros = column([0.4, -0.8, 1.1]).requires_grad_(), column([0, 0, 0])
    monkeypatch.setattr(pex, "gaussian_log_prob", lambda *_: log_prob)
    agent.actor.sample, agent.actor.new = lambda _: (None, zeros), Outputs(log_prob)
    agent.actor.new.outputs, agent.actor.new.forward = [log_prob], lambda _: (log_prob, log_prob)
    agent.critic, agent.value = Outputs(Q), Outputs([0, 0, 0], [0, 0, 0], [1, 0.2, 2])
    agent.critic_target = Outputs(Q, [[1.1, 0.7, 1.9]])
    metrics = pex.finetuning_step(args, Batches((zeros, zeros, R, zeros, D)), agent, Recorder())()
    close(metrics["actor_loss"], 26.1693399611)
    close(metrics["advantage_weight"], (torch.e + 100 + 1 / torch.e) / 3)


def test_pex_evaluates_as_its_authors_do():
    """Of 20,000 plays of each of three states so many are the new policy's, a tie going to π_off."""
    n, q_first, q_second = 20_000, column([1.2, 0.3, 2]), column([1.05, 0.55, 2])
    composition = pex.Composition(torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity(), 10.0, 0.9)
    composition.offline.forward = lambda obs: (torch.full((3 * n, 1), -0.5), None)
    composition.new.forward = lambda obs: (torch.full((3 * n, 1), 0.5), torch.tensor([-20.0]))
    composition.critic.forward = lambda obs, a: torch.where(
        a[:, 0] > 0, q_second.repeat_interleave(n), q_first.repeat_interleave(n)
    )[None]
    share = (composition.mode(torch.zeros(3 * n, 1))[:, 0] > 0).double().view(3, n).mean(1)
    assert share.tolist() == pytest.approx([0.0182425523806, 0.992414181998, 0.05], abs=0.006)


def test_pex_evaluates_nine_times_in_ten_by_the_new_policys_mean():
    """Else by a sample, another one in each step; here the new policy's action is always the better one."""
    composition = pex.Composition(torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity(), 10.0, 0.9)
    composition.offline.forward = lambda obs: (torch.full((20_000, 1), -0.5), None)
    composition.new.forward = lambda obs: (torch.full((20_000, 1), 0.5), torch.tensor([0.0]))
    composition.critic.forward = lambda obs, a: (100.0 * (a != -0.5).double().sum(1))[None]
    first, second = (composition.mode(torch.zeros(20_000, 1)) for _ in range(2))
    assert (first == 0.5).double().mean().item() == pytest.approx(0.9, abs=0.01)
    assert not torch.equal(first, second) and composition.played == 2


# ----------------------------------------------------------------------------------------------- RLPD, WSRL


def test_rlpds_first_policy_has_a_spread_of_one():
    mean, log_std = rlpd.Actor(S, A, (8,))(torch.zeros(2, S))
    assert not mean.any() and not log_std.any()


@pytest.mark.parametrize("entropy", [True, False])
def test_rlpd(data, monkeypatch, entropy):
    args, agent = agent_of(rlpd, utd=1, backup_entropy=entropy)
    for module in (agent.actor, agent.critic, agent.critic_target):
        shaken(module)
    agent.log_alpha.data.fill_(-0.6)
    before, optimizers, (batch,) = copy.deepcopy(agent), Recorder(), batches_of(data)
    obs, actions, rewards, next_obs, terminations = batch
    noise, order = noises(monkeypatch, (B, A), (B, A)), torch.rand(10)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: order)
    metrics = rlpd.finetuning_step(args, Batches(batch), agent, optimizers)()
    alpha = agent.log_alpha.double().exp()

    mean, std = actor64(agent.actor, next_obs)
    u = mean + std * noise[0]
    two = sorted(range(10), key=lambda i: order[i])[:2]
    next_v = critic64(before.critic_target, next_obs, torch.tanh(u))[two].min(0).values
    next_v = next_v - entropy * alpha * density64(u, mean, std)
    y = (rewards.double() + 0.99 * (1 - terminations.double()) * next_v).detach()
    loss = ((critic64(agent.critic, obs, actions) - y) ** 2).mean()
    same(optimizers["critic_optimizer"].calls[0], loss, list(agent.critic.parameters()))
    assert metrics["critic_loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    follows(before, agent)
    mean, std = actor64(agent.actor, obs)
    u = mean + std * noise[1]
    log_prob = density64(u, mean, std)
    loss = (alpha.detach() * log_prob - critic64(agent.critic, obs, torch.tanh(u)).mean(0)).mean()
    same(optimizers["actor_optimizer"].calls[0], loss, list(agent.actor.parameters()))
    loss = alpha * (-log_prob.mean().detach() + A / 2)
    same(optimizers["alpha_optimizer"].calls[0], loss, [agent.log_alpha])


@pytest.mark.parametrize("best_of", [1, 2])
def test_wsrl(data, monkeypatch, best_of):
    args, agent = agent_of(wsrl, offline_cal_ql, utd=1, best_of=best_of)
    shaken(agent.critic_target)
    before, optimizers, (batch,) = copy.deepcopy(agent), Recorder(), batches_of(data)
    obs, actions, rewards, next_obs, terminations = batch
    noise = noises(monkeypatch, (best_of, B, A), (B, A), (B, A))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([7, 2]))
    wsrl.finetuning_step(args, Batches(batch), agent, optimizers)()
    alpha = torch.log1p(agent.alpha_parameter.double().exp())

    next_mean, next_std = actor64(agent.actor, next_obs)
    drawn = [torch.tanh(next_mean + next_std * eps) for eps in noise[0]]
    values = torch.stack([critic64(before.critic_target, next_obs, a)[[7, 2]].min(0).values for a in drawn])
    y = (rewards.double() + 0.99 * (1 - terminations.double()) * values.max(0).values).detach()
    loss = ((critic64(agent.critic, obs, actions) - y) ** 2).mean()
    same(optimizers["critic_optimizer"].calls[0], loss, list(agent.critic.parameters()))
    follows(before, agent)
    mean, std = actor64(agent.actor, obs)
    u = mean + std * noise[1]
    lowest = critic64(agent.critic, obs, torch.tanh(u)).min(0).values
    loss = (alpha.detach() * density64(u, mean, std) - lowest).mean()
    same(optimizers["actor_optimizer"].calls[0], loss, list(agent.actor.parameters()))
    entropy = -density64(next_mean + next_std * noise[2], next_mean, next_std).mean().detach()
    loss = alpha * (entropy + A)
    same(optimizers["alpha_optimizer"].calls[0], loss, [agent.alpha_parameter])


def test_wsrl_goes_on_from_any_temperature_and_from_twins():
    twins = offline_cal_ql.Args(env_id="hopper-medium-v2")
    networks = offline_cal_ql.Agent(twins, S, A)
    for log_temperature in (-20.0, 0.0, 4.6):  # of the last e^α is no float32
        networks.log_temperature.data.fill_(log_temperature)
        learner = {"args": vars(twins), "agent": networks.state_dict()}
        agent = wsrl.Agent(cli.complete(wsrl.Args()), dict(obs_dim=S, action_dim=A, learner=learner))
        alpha = torch.nn.functional.softplus(agent.alpha_parameter)
        torch.testing.assert_close(alpha.log(), torch.tensor(log_temperature), rtol=1e-5, atol=1e-5)
    args = cli.complete(wsrl.Args(compile=False, batch_size=B, utd=1, gamma=1.0))
    batch = torch.zeros(B, S), torch.zeros(B, A), torch.zeros(B), torch.zeros(B, S), torch.zeros(B)
    agent.critic_target.forward = lambda obs, _: torch.tensor([[1.0], [5.0]]).expand(2, len(obs))
    for _ in range(8):  # of both twins, always
        assert wsrl.finetuning_step(args, Batches(batch), agent, Recorder())()["q_target"] == 1


@pytest.mark.parametrize(("script", "entropy"), [(rlpd, True), (rlpd, False), (wsrl, False)])
def test_rlpd_and_wsrl_worked_example(script, entropy, monkeypatch):
    changes = dict(critics=3, backup_entropy=entropy) if script is rlpd else {}
    args = cli.complete(script.Args(compile=False, batch_size=2, utd=1, **changes))
    mean = torch.zeros(2, 2, dtype=torch.float64).requires_grad_()
    agent, q, alpha = torch.nn.Module(), [[4.5, 0], [5.5, -0.5], [5, 1]], column(0.5)
    agent.actor = Outputs(mean)
    agent.actor.outputs, agent.actor.forward = [mean], lambda _: (mean, mean)
    agent.critic, agent.critic_target = Outputs(q, [[4, 1], [3, 2], [5, 0]]), Outputs([[5, 1], [4, 1.5], [6, 0.5]])
    agent.critic.n = 3
    agent.log_alpha, agent.alpha_parameter = (torch.nn.Parameter(x) for x in (alpha.log(), alpha.expm1().log()))
    densities = iter([column([-2, 0.4]), column([-1, 0.5]) + mean.sum(1), column([-2, 0.4])])
    monkeypatch.setattr(script, "sample_actions", lambda *_: (torch.zeros(1, 2, 2), next(densities)))
    monkeypatch.setattr(script, "polyak", lambda *_: None)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: column([0.1, 0.9, 0.2]))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor([0, 2]))
    obs = torch.zeros(2, 1)
    batch = obs, torch.zeros(2, 2), column([1, -1]), obs, column([0, 1])
    metrics = script.finetuning_step(args, Batches(batch, action_dim=2), agent, Recorder())()
    y = column([6.94 if entropy else 5.95, -1])
    close(metrics["q_target"], y.mean())
    close(metrics["critic_loss"], 2.84013333333 if entropy else ((column(q) - y) ** 2).mean())
    close(metrics["actor_loss"], -2.625 if script is rlpd else -1.625)
    close(metrics["alpha_loss"], 0.625 if script is rlpd else 0.5 * 2.8)  # that example's α is 1


# ----------------------------------------------------------------------------------------------- Off2On


class TwoSources(Batches):
    """Known batches in the place of Off2On's buffer: one of all rows, one of data and one of play."""

    def __init__(self, batch, rows, data, play, action_dim=A):
        super().__init__((batch, rows), action_dim=action_dim)
        self.start, self.both, self.written = 0, (data, play), []

    def either(self, _):
        return self.both

    def update(self, *written):
        self.written.append(written)


def test_off2on(data, monkeypatch):
    n = 3
    args, agent = agent_of(off2on, offline_cql, members=n)
    shaken(agent.critic_target)
    agent.log_alpha.data.fill_(-0.4)
    before, optimizers = copy.deepcopy(agent), Recorder()
    batch, rows_off, rows_on = batches_of(data, 3)
    obs, actions, rewards, next_obs, terminations = batch
    noise = noises(monkeypatch, (B, A), (B, A))
    source = TwoSources(batch, torch.arange(B), rows_off, rows_on)
    off2on.finetuning_step(args, source, agent, optimizers)()
    alpha = agent.log_alpha.double().exp().item()

    def policy64(states):
        out = [ensemble64_of(agent.actor.net, states, k) for k in range(n)]
        means, stds = (torch.stack(x) for x in zip(*out, strict=True))
        mean = means.mean(0)
        return mean, ((means**2 + stds**2).mean(0) - mean**2).sqrt()

    def members64(critic, states, a):
        return critic64(critic, states, a).view(n, 2, -1)  # member by member, twin by twin

    mean, std = policy64(next_obs)
    u = mean + std * noise[0]
    next_v = members64(before.critic_target, next_obs, torch.tanh(u)).min(1).values - alpha * density64(u, mean, std)
    y = (rewards.double() + 0.99 * (1 - terminations.double()) * next_v).detach()
    loss = ((members64(agent.critic, obs, actions) - y[:, None]) ** 2).mean(-1).sum()
    same(optimizers["critic_optimizer"].calls[0], loss, list(agent.critic.parameters()))
    follows(before, agent)
    mean, std = policy64(obs)
    u = mean + std * noise[1]
    log_prob = density64(u, mean, std)
    loss = (alpha * log_prob - members64(agent.critic, obs, torch.tanh(u)).min(1).values.mean(0)).mean()
    same(optimizers["actor_optimizer"].calls[0], loss, list(agent.actor.parameters()))
    loss = -agent.log_alpha.double() * (log_prob - A).mean().detach()
    same(optimizers["alpha_optimizer"].calls[0], loss, [agent.log_alpha])

    def ratio64(batch):
        return torch.relu(mlp64(agent.ratio.net, torch.cat(batch[:2], 1))[:, 0])

    w_off, w_on, w = (ratio64(x) for x in (rows_off, rows_on, batch))
    loss = (-torch.log(2 / (w_off + 1) + 1e-10) - torch.log(2 * w_on / (w_on + 1) + 1e-10)).mean()
    same(optimizers["ratio_optimizer"].calls[0], loss, list(agent.ratio.parameters()))
    [(rows, priorities)] = source.written
    want = (w**0.2 / ((w_off**0.2).mean() + 1e-10)).clamp(0.001, 1000)
    assert torch.equal(rows, torch.arange(B))
    torch.testing.assert_close(priorities.double(), want.detach(), rtol=1e-5, atol=1e-6)


def ensemble64_of(net, obs, k):
    """Mean and standard deviation of u that the k-th of the networks side by side gives."""
    x = obs.double()
    for layer in net:
        x = torch.relu(x) if isinstance(layer, torch.nn.ReLU) else x @ layer.weight[k].double() + layer.bias[k].double()
    return x[:, :A], torch.clamp(x[:, A:] - 1, -20, 2).exp()


def test_off2on_worked_example(monkeypatch):
    args = cli.complete(off2on.Args(compile=False, batch_size=2))
    q = column([[[1, 2], [1.2, 1.7]], [[0.8, 2.2], [0.9, 2.5]]]).transpose(0, 1)  # member, twin, row
    q_next = column([[[1.1, 2.1], [1.4, 1.6]], [[0.7, 2.4], [1, 2.9]]]).transpose(0, 1)
    mean = torch.zeros(2, 2, dtype=torch.float64).requires_grad_()
    agent = torch.nn.Module()
    agent.actor = Outputs(mean)
    agent.actor.outputs, agent.actor.forward = [mean], lambda _: (mean, mean)
    agent.critic, agent.critic_target = Outputs(q, q + 0.1), Outputs(q_next)
    agent.ratio = Outputs([0.5, 1.5, 0, 0.9], [2, 0.8, 3, 0], [1.7, 0, 400])  # behind their relu
    agent.log_alpha = torch.nn.Parameter(column(0.2).log())
    densities = iter([column([-1.5, 0.7]), column([-0.9, 0.4]) + mean.sum(1)])
    monkeypatch.setattr(off2on, "sample_actions", lambda *_: (mean, next(densities)))
    monkeypatch.setattr(off2on, "polyak", lambda *_: None)
    batch = (torch.zeros(2, 1), mean, column([0.5, -1]), torch.zeros(2, 1), column([0, 1]))
    source = TwoSources(batch, torch.arange(3), batch, batch, action_dim=2)
    metrics = off2on.finetuning_step(args, source, agent, Recorder())()
    close(metrics["q_target"], (1.49 - 1 + 1.787 - 1) / 4)
    close(metrics["critic_loss"], 20.313769)
    close(metrics["actor_loss"], -1.5)
    close(metrics["ratio_loss"], 5.41037694709)
    close(source.written[0][1], [1.51587852333, 0.001, 4.51842017295])


@pytest.mark.parametrize(("of_data", "of_batch", "bound"), [(0.0, 1.0, 1_000.0), (1.0, 0.0, 0.001)])
def test_off2ons_priorities_have_bounds(of_data, of_batch, bound, data):
    """Where the data look like no play at all, and where the batch does."""
    args, agent = agent_of(off2on, offline_cql)
    agent.ratio = Outputs(torch.full((B,), of_data), torch.ones(B), torch.full((B,), of_batch))
    batch, *both = batches_of(data, 3)
    source = TwoSources(batch, torch.arange(B), *both)
    off2on.finetuning_step(args, source, agent, Recorder())()
    close(source.written[0][1], torch.full((B,), bound))


def test_off2on_writes_priorities_back(data):
    args, agent = agent_of(off2on, offline_cql)
    buffer, n, drawn = replay.PrioritisedBuffer(data, 400, 7.0), len(data), {}
    for i in range(300):
        buffer.add(data.obs[i], data.actions[i], 0.0, data.obs[i], False)
    before = buffer.priorities.view(-1).clone()
    sample, either = buffer.sample, buffer.either
    buffer.sample = lambda size: drawn.setdefault("batch", sample(size))
    buffer.either = lambda size: drawn.setdefault("either", either(size))
    metrics = off2on.finetuning_step(args, buffer, agent, Recorder())()
    (batch, rows), (rows_off, _) = drawn["batch"], drawn["either"]
    w, w_off = (torch.relu(mlp64(agent.ratio.net, torch.cat(x[:2], 1))[:, 0]) for x in (batch, rows_off))
    want = before.clone()
    want[rows] = (w**0.2 / (w_off**0.2).mean()).clamp(0.001, 1000).detach()
    torch.testing.assert_close(buffer.priorities.view(-1), want, rtol=1e-5, atol=1e-6)
    close(buffer.sums, buffer.priorities.sum(1))
    assert buffer.highest == 7  # what a new row gets does not fall
    close(metrics["play_in_batch"], (rows >= n).double().mean())


def test_off2on_mixture_and_new_priorities():
    means = column([[[0.2, -0.4]], [[0.5, -0.1]], [[-0.1, 0.3]]])
    mean, log_std = off2on.mixture(means, column([[[0.3, 0.5]], [[0.2, 0.4]], [[0.6, 0.1]]]).log())
    close(mean[0], [0.2, -0.0666666666667])
    close(log_std.exp()[0], [0.472581562625, 0.471404520791])
    u = column([[0.7, -0.2]])
    close(off2on.gaussian_log_prob(u, mean, log_std) - off2on.tanh_log_det(u), [-0.441718330529])
    assert [args.seed for args in off2on.seeds(off2on.Args(seed=7, members=3))] == [7, 1_007, 2_007]
    for fraction, priority in ((0.5, 1_000.0), (0.75, 3_000.0)):
        assert off2on.new_priority(off2on.Args(new_fraction=fraction), 1_000_000) == pytest.approx(priority)


def test_off2on_exports_its_most_likely_action():
    actor = off2on.Actor(S, A, 2, 3)
    fields = actor.exported()
    net = policies.Policy(fields["kind"], S, A, fields["hidden_layers"])
    net.load_state_dict(fields["actor"])
    obs = torch.randn(B, S)
    torch.testing.assert_close(net.mode(obs), torch.tanh(actor(obs)[0]), rtol=1e-4, atol=1e-5)


def test_prioritised_rows_are_those_of_the_running_sum(data):
    buffer = replay.PrioritisedBuffer(data, 600, 7.0)
    n = len(data)
    for i in range(500):
        buffer.add(data.obs[i], data.actions[i], 0.0, data.obs[i], False)
    assert buffer.priorities.view(-1)[n : n + 500].eq(7).all() and buffer.sums.sum() == n + 3_500
    rows = torch.randint(n + 500, (300,)).unique()
    buffer.update(rows, torch.rand(len(rows)) * 9)
    buffer.update(torch.tensor([5, 5]), torch.tensor([0.25, 0.25]))
    flat = buffer.priorities.view(-1).clone()
    close(buffer.sums, buffer.priorities.sum(1))
    mass = torch.rand(2_000, dtype=torch.float64) * flat.sum()
    want = torch.searchsorted(flat.cumsum(0), mass, right=True)
    assert torch.equal(buffer.find(mass), want)
    (obs, *_), drawn = buffer.sample(256)
    assert (flat[drawn] > 0).all() and torch.equal(obs, buffer.table[drawn, :S])
    even = replay.PrioritisedBuffer(data, 0, 1.0)
    assert torch.equal(even.sample(n)[1], torch.arange(n))  # one of each n-th of the sum
    assert even.find(column([0, 1, 255, 256, 512])).tolist() == [0, 1, 255, 256, 512]  # what it reaches, it passes next
    both = replay.PrioritisedBuffer(data.head(6), 6, 1.0)
    for i in range(6):
        both.add(data.obs[i], data.actions[i], 0.0, data.obs[i], False)
    (of_data, *_), (of_play, *_) = both.either(99)
    assert not torch.equal(of_data, of_play)  # which are drawn apart
    small = replay.PrioritisedBuffer(data.head(6), 0, 1.0)
    small.update(torch.arange(6), column([1, 0.5, 3, 0.001, 2, 1.499]))
    assert buffer.find(buffer.sums.sum()[None]).item() == n + 499  # where rounding leaves nothing of the last row
    assert small.find((torch.arange(4) + column([0.1, 0.9, 0.5, 0.999])) * 2).tolist() == [0, 2, 4, 5]


# ----------------------------------------------------------------------------------------------- compiled


METHODS = {
    iql: (offline_iql, {}), awac: (offline_awac, {}), cal_ql: (offline_cal_ql, dict(n_actions=2, best_of=2)),
    aca: (offline_sac_ml, {}), pex: (offline_iql, {}), rlpd: (None, dict(utd=1)), wsrl: (offline_cal_ql, dict(utd=1)),
    off2on: (offline_cql, dict(members=2)),
}  # fmt: skip


@pytest.mark.parametrize("script", METHODS, ids=lambda script: script.__name__.split(".")[1])
def test_compiled_steps_equal_eager_ones(data, script, monkeypatch):
    """They are traced into one graph, backward passes included, which is then run as it is: the code that PyTorch
    generates from such graphs is tested in test_compile.py and test_offline_losses.py, and takes ten times as long."""
    compile, (offline_script, changes) = torch.compile, METHODS[script]
    traced = dict(backend="aot_eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(torch, "compile", lambda fn, **_: compile(fn, **traced))

    def trained(compile):
        args, agent = agent_of(script, offline_script, **changes)
        vars(args)["compile"] = compile
        torch.manual_seed(0)
        scheduled = [{"prior": torch.tensor(0.7)}] if script is aca else []
        buffer = BUFFERS.get(script, lambda data: replay.ReplayBuffer(data, 10, "all"))(data)
        step = script.finetuning_step(args, buffer, agent, script.Optimizers(args, agent), *scheduled)
        for _ in range(4):
            step()
        return agent.state_dict() | {f"buffer/{name}": x for name, x in buffer.state_dict().items() if name != "length"}

    check_trained_alike(trained(True), trained(False))


def played(data):
    """Off2On's buffer with some rows of play."""
    buffer = replay.PrioritisedBuffer(data, 10, 3.0)
    for i in range(5):
        buffer.add(data.obs[i], data.actions[i], 0.0, data.obs[i], False)
    return buffer


BUFFERS = {cal_ql: lambda data: replay.EpisodeBuffer(data, 10, "all", data.rewards), off2on: played}
