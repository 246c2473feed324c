"""Every loss and target of the compared methods against float64 versions and against worked examples."""

import copy

import pytest
import torch
from torch.distributions import Normal

from baselines import awac, cal_ql, iql, off2on, pex
from common import cli, policies, replay
from offline import cal_ql as offline_cal_ql
from offline import awac as offline_awac
from offline import iql as offline_iql
from tests.reference import A, B, Outputs, Recorder, S, critic64, mlp64, noises, same


def agent_of(script, offline_script, **changes):
    """Arguments and an agent that goes on from an untrained offline one, everything in it different."""
    torch.manual_seed(3)
    chosen = offline_script.Args()
    networks = offline_script.Agent(chosen, S, A)
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    learner = {"args": vars(chosen), "agent": networks.state_dict()}
    args = cli.complete(script.Args(compile=False, batch_size=B, **changes))
    policy = dict(obs_dim=S, action_dim=A, hidden_layers=networks.actor.net, actor=networks.actor.state_dict())
    return args, script.Agent(args, policy | {"learner": learner})


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
    for old, new, source in zip(before.critic_target.parameters(), agent.critic_target.parameters(),
                                agent.critic.parameters(), strict=True):  # fmt: skip
        torch.testing.assert_close(new, 0.995 * old + 0.005 * source, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("beta", "weights"), [(3, [14.8797317249, 0.223130160148, 1.82211880039]),
                                               (10, [100, 0.00673794699909, 7.38905609893])])  # fmt: skip
def test_iql_worked_example(beta, weights, monkeypatch):
    args, agent = agent_of(iql, offline_iql, beta=beta)
    monkeypatch.setattr(iql, "polyak", lambda *_: None)
    mean, log_std = torch.tanh(column([[0.2, -1], [0, 0.5], [1.5, -0.3]])), column([-0.5, -1]).requires_grad_()
    actor = Outputs(log_std)
    actor.forward = lambda _: (mean, log_std)
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
    noise = noises(monkeypatch, (B, A), (B, A))
    awac.finetuning_step(args, Batches(*batch), agent, optimizers)()

    def execute(states, eps):
        policy = gaussian64(agent.actor, states)
        return (policy.mean + policy.stddev * eps).clamp(-1, 1).detach()

    q_next = critic64(before.critic_target, next_obs, execute(next_obs, noise[0])).min(0).values
    y = (rewards.double() + 0.99 * (1 - terminations.double()) * q_next).detach()
    loss = sum(((q - y) ** 2).mean() for q in critic64(agent.critic, obs, actions))
    same(optimizers["critic_optimizer"].calls[0], loss, list(agent.critic.parameters()))
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
    def follow(rewards, terminations, episode, failure=None, gamma=0.99):
        return replay.returns_to_go(column(rewards), column(terminations), gamma, torch.tensor(episode), failure)

    sparse = [-5, -5, -5, -5, -5, 5], [0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 1]
    close(follow(*sparse, failure=-5.0), [-500, -500, -500, -5.0495, -0.05, 5])
    close(follow(*sparse, failure=-1.0), [-14.8505, -9.95, -5, -5.0495, -0.05, 5])
    close(follow([1, 2, 3], [0, 0, 1], [0, 0, 0]), [5.9203, 4.97, 3])
    # cut off: what follows is unknown, which 1 / (1 - γ) = 2 rows feel
    close(follow([1, 2, 3, 7], [0, 0, 0, 1], [0, 0, 0, 1], gamma=0.5), [2.75, -torch.inf, -torch.inf, 7])


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


# ----------------------------------------------------------------------------------------------- PEX, Off2On


def test_pex_worked_example():
    first, second = column([1.2, 0.3, 2]), column([1.05, 0.55, 2])
    composition = pex.Composition(Outputs(first), Outputs(second), Outputs([[1.2, 0.3, 2]]), 10.0, 0.9)
    composition.critic.forward = lambda _, a: a[None]  # Q is the "action" itself here
    p = torch.sigmoid(composition.preference(None, first, second))
    close(p, [0.182425523806, 0.924141819979, 0.5])


def test_off2on_mixture_and_new_priorities():
    means = column([[[0.2, -0.4]], [[0.5, -0.1]], [[-0.1, 0.3]]])
    mean, log_std = off2on.mixture(means, column([[[0.3, 0.5]], [[0.2, 0.4]], [[0.6, 0.1]]]).log())
    close(mean[0], [0.2, -0.0666666666667])
    close(log_std.exp()[0], [0.472581562625, 0.471404520791])
    u = column([[0.7, -0.2]])
    close(off2on.gaussian_log_prob(u, mean, log_std) - off2on.tanh_log_det(u), [-0.441718330529])
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
    small = replay.PrioritisedBuffer(data.head(6), 0, 1.0)
    small.update(torch.arange(6), column([1, 0.5, 3, 0.001, 2, 1.499]))
    assert small.find((torch.arange(4) + column([0.1, 0.9, 0.5, 0.999])) * 2).tolist() == [0, 2, 4, 5]


# ----------------------------------------------------------------------------------------------- compiled


FLAGS = [(iql, offline_iql, {}), (awac, offline_awac, {}), (cal_ql, offline_cal_ql, dict(n_actions=2, best_of=2))]


@pytest.mark.parametrize(("script", "offline_script", "changes"), FLAGS, ids=lambda x: getattr(x, "__name__", ""))
def test_compiled_steps_equal_eager_ones(data, script, offline_script, changes):
    def trained(compile):
        args, agent = agent_of(script, offline_script, **changes)
        vars(args)["compile"] = compile
        torch.manual_seed(0)
        buffer = replay.ReplayBuffer(data, 10, "all")
        if script is cal_ql:
            buffer = replay.EpisodeBuffer(data, 10, "all", data.rewards)
        step = script.finetuning_step(args, buffer, agent, script.Optimizers(args, agent))
        for _ in range(4):
            step()
        return agent.state_dict()

    eager, fast = trained(False), trained(True)
    for name in eager:
        torch.testing.assert_close(fast[name], eager[name], rtol=1e-3, atol=2e-4, msg=lambda t, n=name: f"{n}: {t}")
