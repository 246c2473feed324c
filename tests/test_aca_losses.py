"""Every loss and target of ACA and of its offline part against float64 versions and against worked examples."""

import copy

import pytest
import torch

from baselines import aca
from common import cli, replay
from offline import sac_ml
from tests.reference import (
    A, B, Outputs, Recorder, S, actor64, critic64, density64, ensemble64, fixed_rows, noises, same,
)  # fmt: skip


def column(values):
    return torch.as_tensor(values, dtype=torch.float64)


def close(found, want):
    torch.testing.assert_close(column(found), column(want), rtol=1e-7, atol=1e-7)  # some factors are float32


def shaken(module):
    """Every parameter of `module`, moved a little."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module


def offline_agent():
    torch.manual_seed(3)
    args = sac_ml.Args(compile=False, batch_size=B)
    agent = shaken(sac_ml.Agent(args, S, A))
    agent.log_alpha.data.fill_(-0.7)
    return args, agent


def online_agent(**changes):
    """Arguments and an agent that goes on from an untrained offline one."""
    chosen, left = offline_agent()
    args = cli.complete(aca.Args(compile=False, batch_size=B, **changes))
    learner = {"args": vars(chosen), "agent": left.state_dict()}
    return args, left, aca.Agent(args, dict(obs_dim=S, action_dim=A, learner=learner))


def batch_of(data):
    return replay.split(data.table[torch.randint(len(data), (B,))], S, A)


class Buffer:
    """Stands in for the buffer: gives one known batch."""

    def __init__(self, batch, action_dim=A):
        self.batch, self.action_dim = batch, action_dim

    def sample(self, _):
        return self.batch


# ----------------------------------------------------------------------------------------------- SAC-ML


def test_sac_ml(data, monkeypatch):
    args, agent = offline_agent()
    data.actions[::2, 0] = 1.0  # at the very edge, where u is infinite
    obs, actions, rewards, next_obs, terminations, rows = fixed_rows(monkeypatch, sac_ml, data)
    noise, optimizers, before = noises(monkeypatch, (B, A), (B, A)), Recorder(), copy.deepcopy(agent)
    metrics = sac_ml.training_step(args, data, agent, optimizers)()
    alpha, live = agent.log_alpha.double().exp().item(), 0.99 * (1 - terminations.double())
    u_data = torch.atanh(data.actions[rows].clamp(-0.999999, 0.999999).double())

    mean, std = actor64(agent.actor, next_obs)
    next_u = mean + std * noise[0]
    log_prob = density64(next_u, mean, std)
    q_next = critic64(before.critic_target, next_obs, torch.tanh(next_u)).min(0).values
    y = (rewards.double() + live * (q_next - alpha * log_prob)).detach()
    loss = sum(((q - y) ** 2).mean() for q in critic64(agent.critic, obs, actions))
    same(optimizers["critic_optimizer"].calls[0], loss, list(agent.critic.parameters()))

    z_next = ensemble64(before.baseline.net, next_obs).min(0).values
    y = (rewards.double() + live * (log_prob + z_next - alpha * log_prob)).detach()
    mean, std = actor64(agent.actor, obs)
    log_prob_data = density64(u_data, mean, std)
    loss = sum(((log_prob_data.detach() + z - y) ** 2).mean() for z in ensemble64(agent.baseline.net, obs))
    same(optimizers["baseline_optimizer"].calls[0], loss, list(agent.baseline.parameters()))

    u = mean + std * noise[1]
    log_prob = density64(u, mean, std)
    q = critic64(agent.critic, obs, torch.tanh(u)).min(0).values
    loss = 30 / q.abs().mean().detach() * (alpha * log_prob - q).mean() - log_prob_data.mean()
    same(optimizers["actor_optimizer"].calls[0], loss, list(agent.actor.parameters()))
    assert metrics["actor_loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    loss = -agent.log_alpha.double() * (log_prob - A).mean().detach()
    same(optimizers["alpha_optimizer"].calls[0], loss, [agent.log_alpha])
    for new, old, source in zip(agent.critic_target.parameters(), before.critic_target.parameters(),
                                agent.critic.parameters(), strict=True):  # fmt: skip
        torch.testing.assert_close(new, 0.995 * old + 0.005 * source, rtol=1e-5, atol=1e-6)


# what BASELINES' worked examples of both share
R, D, LOG_PROB = column([1, 0.5]), column([0, 1]), column([-0.5, 1.3])


def stand_in(script, monkeypatch, mean, alpha, **modules):
    """An agent whose networks give known values, and whose actions have the log-densities of the examples."""
    agent = torch.nn.Module()
    agent.actor = Outputs(mean)
    agent.actor.outputs, agent.actor.forward = [mean], lambda _: (mean, mean)
    agent.log_alpha = torch.nn.Parameter(column(alpha).log())
    for name, module in modules.items():
        setattr(agent, name, module)
    monkeypatch.setattr(script, "polyak", lambda *_: None)
    return agent


def test_sac_ml_worked_example(data, monkeypatch):
    args = sac_ml.Args(compile=False, batch_size=2)
    mean, obs = torch.zeros(2, A, dtype=torch.float64).requires_grad_(), torch.zeros(2, 1)
    agent = stand_in(
        sac_ml, monkeypatch, mean, 0.3, critic=Outputs([[4, 1], [4.5, 0.5]], [[12, -7], [13, -8]]),
        critic_target=Outputs([[5, 2], [4.8, 2.5]]), baseline=Outputs([[3, 1], [3.5, 0.8]], [[2, 1.5], [2.2, 1.1]]),
    )  # fmt: skip
    monkeypatch.setattr(sac_ml, "sample", lambda *_: (obs, None, R, obs, D, torch.arange(2)))
    monkeypatch.setattr(sac_ml, "sample_actions", lambda *_: (mean, LOG_PROB + mean.sum(1)))
    monkeypatch.setattr(sac_ml, "log_prob_of", lambda *_: column([0.9, -1.4]) + mean.sum(1))
    optimizers = Recorder()
    metrics = sac_ml.training_step(args, data, agent, optimizers)()
    close(metrics["baseline_loss"], 3.37227225)
    close(metrics["actor_loss"], -5.39)
    close(optimizers["alpha_optimizer"].calls[0][0], -(0.4 - A))
    y = column([1 + 0.99 * (4.8 + 0.3 * 0.5), 0.5])
    close(metrics["critic_loss"], ((column([[4, 1], [4.5, 0.5]]) - y) ** 2).mean(1).sum())


# ----------------------------------------------------------------------------------------------- ACA


def ell64(u, mean, std, width, weight):
    c = torch.minimum(density64(mean + width * std, mean, std), density64(mean - width * std, mean, std)).detach()
    return weight * (torch.log1p(torch.exp(density64(u, mean, std) - c)) + c)


@pytest.mark.parametrize("target_entropy", [-1.0, -0.5])
def test_aca(data, monkeypatch, target_entropy):
    args, _, agent = online_agent(width=2.0, target_entropy=target_entropy)
    for module in (agent.actor, agent.critic, agent.critic_target):
        shaken(module)
    agent.log_alpha.data.fill_(-0.3)
    batch, optimizers, before = batch_of(data), Recorder(), copy.deepcopy(agent)
    obs, actions, rewards, next_obs, terminations = batch
    noise = noises(monkeypatch, (B, A), (B, A))
    metrics = aca.finetuning_step(args, Buffer(batch), agent, optimizers, {"prior": torch.tensor(0.75)})()
    alpha = agent.log_alpha.double().exp().item()

    prior, (mean, std) = actor64(agent.actor_offline, next_obs), actor64(agent.actor, next_obs)
    u = mean + std * noise[0]
    next_q = critic64(before.critic_target, next_obs, torch.tanh(u)).min(0).values + ell64(u, *prior, 2, 0.75)
    next_v = next_q - alpha * density64(u, mean, std)
    y = (rewards.double() + 0.99 * (1 - terminations.double()) * next_v).detach()
    prior, (mean, std) = actor64(agent.actor_offline, obs), actor64(agent.actor, obs)
    ell = ell64(torch.atanh(actions.double()), *prior, 2, 0.75).detach()
    loss = sum(((r + ell - y) ** 2).mean() for r in critic64(agent.critic, obs, actions))
    same(optimizers["critic_optimizer"].calls[0], loss, list(agent.critic.parameters()))
    assert metrics["q_target"].item() == pytest.approx(y.mean().item(), abs=1e-4)

    u = mean + std * noise[1]
    log_prob, ell = density64(u, mean, std), ell64(u, *prior, 2, 0.75)
    loss = (alpha * log_prob - critic64(agent.critic, obs, torch.tanh(u)).min(0).values - ell).mean()
    grads = torch.autograd.grad(loss, list(agent.actor.parameters()), retain_graph=True)
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    assert norm > 0.25  # so that it is clipped
    same(optimizers["actor_optimizer"].calls[0], loss * (0.25 / norm.item()), list(agent.actor.parameters()))
    loss = -agent.log_alpha.double() * (log_prob + target_entropy * A).mean().detach()
    same(optimizers["alpha_optimizer"].calls[0], loss, [agent.log_alpha])
    for new, old, source in zip(agent.critic_target.parameters(), before.critic_target.parameters(),
                                agent.critic.parameters(), strict=True):  # fmt: skip
        torch.testing.assert_close(new, 0.995 * old + 0.005 * source, rtol=1e-5, atol=1e-6)


def test_aca_worked_example(monkeypatch):
    mean, log_std = column([[0.3, -0.2], [0, 1]]), column([[-1, -0.5], [-2, -1.5]])
    u, want = column([[0.5, -0.1], [1.6, -0.9]]), column([-0.118442351738, -1.48002123936])
    close(aca.log_prob_of(u, mean, log_std), [-0.24903720597, -101.86463009])
    close(0.75 * aca.clipped_log_prob(u, mean, log_std, 2.0), want)

    mean = torch.zeros(2, 2, dtype=torch.float64).requires_grad_()
    agent = stand_in(
        aca, monkeypatch, mean, 0.8, critic=Outputs([[4, 1], [4.5, 0.5]]),
        critic_target=Outputs([[5, 2], [4.8, 2.5]]), actor_offline=lambda _: (mean, mean),
    )  # fmt: skip
    ells = iter([column([-1, -3]), want, want + mean.sum(1)])
    monkeypatch.setattr(aca, "clipped_log_prob", lambda *_: next(ells))
    monkeypatch.setattr(aca, "sample_actions", lambda *_: (mean, mean, LOG_PROB + mean.sum(1)))
    args = cli.complete(aca.Args(compile=False, batch_size=2))
    batch = torch.zeros(2, 1), mean.detach(), R, torch.zeros(2, 1), D
    optimizers = Recorder()
    metrics = aca.finetuning_step(args, Buffer(batch, 2), agent, optimizers, {"prior": column(1)})()
    close(metrics["q_target"], (5.158 + 0.5) / 2)
    close(metrics["critic_loss"], 2.69153615071)
    close(metrics["actor_loss"], -1.13076820445)
    close(agent.log_alpha.detach() * optimizers["alpha_optimizer"].calls[0][0], -0.357029682103)


def test_critics_start_as_the_baseline_and_rank_as_the_policy(data):
    args, left, agent = online_agent()
    obs, actions = data.obs[:B], data.actions[:B]
    for critic in (agent.critic, agent.critic_target):
        torch.testing.assert_close(critic(obs, actions), left.baseline(obs))
    for mine, theirs in ((agent.actor, left.actor), (agent.actor_offline, left.actor)):
        torch.testing.assert_close(mine(obs), theirs(obs))
    assert agent.log_alpha == 0
    prior = torch.tensor(1.0)
    probe = aca.critic_probe(args, agent, data.head(B), prior)
    assert probe()["probe/rank_correlation"] > 0.999
    prior.fill_(0.0)
    assert probe()["probe/rank_correlation"] < 0.5


@pytest.mark.parametrize(
    ("env_id", "weights", "width", "buffer"),
    [
        ("hopper-medium-v2", [1, 0.75, 0.5, 0.5], 7, "none"),
        ("hopper-medium-replay-v2", [1, 0.75, 0.5, 0.5], 7, "part"),
        ("hopper-random-v2", [1, 0, 0, 0], 7, "none"),
        ("hopper-medium-expert-v2", [1, 1, 1, 1], 15, "part"),
        ("antmaze-umaze-v2", [1, 0.95, 0.9, 0.8], 3, "none"),
    ],
)
def test_constants_and_schedule(env_id, weights, width, buffer):
    args = cli.parse(aca.Args, aca.PRESETS, aca.FAMILIES, ["--env-id", env_id])
    prior = aca.schedules(args)["prior"]
    close([prior(n + args.learning_starts + 1) for n in (0, 10_000, 20_000, 40_000)], weights)
    assert prior(0) == prior(args.learning_starts) == 1
    assert (args.width, args.buffer, args.learning_starts) == (width, buffer, 256 if buffer == "none" else 1)
    offline_args = cli.parse(sac_ml.Args, sac_ml.PRESETS, sac_ml.FAMILIES, ["--env-id", env_id])
    assert args.target_entropy == offline_args.target_entropy == (-0.5 if "antmaze" in env_id else -1.0)


def test_updates_begin_at_once_where_the_buffer_has_rows_of_the_data():
    assert cli.complete(aca.Args(env_id="hopper-medium-v2", buffer="half")).learning_starts == 1
    assert cli.complete(aca.Args(env_id="hopper-expert-v2", buffer="none")).learning_starts == 256
