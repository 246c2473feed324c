"""The Decision Transformer: sequences, losses and memory against literal float64 versions, one sequence at a time."""

import copy

import pytest
import torch

import o2td3
from common import cli
from common.evaluation import make_evaluator
from common.nn import clip_grad_norm
from offline import dt
from tests.conftest import TINY
from tests.reference import A, Recorder, S, check_trained_alike, same
from tests.test_transfer import SMALL

K = 6


def make(data, **changes):
    torch.manual_seed(3)
    chosen = dict(compile=False, batch_size=24, context=K, width=16, heads=2, blocks=1, dropout=0.0, distil_sequences=9)
    args = cli.complete(dt.Args(env_id="hopper-medium-demo", **chosen | changes))
    agent = dt.Agent(args, S, A)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return args, agent


def literal_histories(args, data):
    """(N, 2) and (N,), row by row."""
    n, rewards, ends = len(data), data.rewards.double(), data.terminations
    returns, times = torch.zeros(n, 2, dtype=torch.float64), torch.zeros(n, dtype=torch.long)
    for row in range(n):
        came = 0.0
        for later in range(row, n):
            if data.episode[later] != data.episode[row]:
                break
            came += rewards[later]
            if ends[later]:
                break
        before = [r for r in range(row) if data.episode[r] == data.episode[row]]
        returns[row, 0], returns[row, 1] = came, args.target_return - rewards[before].sum()
        times[row] = len(before)
    return returns / args.return_scale, times


@pytest.mark.parametrize("deaths_end_episodes", [True, False])
def test_returns_to_go_and_what_is_left_of_the_one_that_is_asked_for(data, deaths_end_episodes):
    data = data.head(300)
    if not deaths_end_episodes:  # AntMaze: an episode goes on after a row that is terminal
        data.episode = data.episode // 3
    args, _ = make(data)
    returns, times = dt.histories(args, data)
    expected, steps = literal_histories(args, data)
    assert data.terminations.sum() > 3 and (steps > K).any() and (steps < K).any()
    torch.testing.assert_close(returns.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(times, steps)


def test_rows_in_no_order_are_refused(data):
    data.ordered = False
    with pytest.raises(cli.UserError, match="do not follow one another"):
        dt.histories(make(data)[0], data)


def alone(transformer, returns, obs, actions, times):
    """What a sequence of its own, without anything in front of it, gives: (steps, A), in float64."""
    valid = torch.ones(1, len(times), dtype=torch.bool)
    found = transformer.double()(returns[None].double(), obs[None].double(), actions[None].double(), times[None], valid)
    return found[0]


def test_losses(data, monkeypatch):
    data = data.head(300)
    args, agent = make(data)
    optimizers = Recorder()
    ends = torch.randint(len(data), (args.batch_size, 1))
    ends[:3, 0] = torch.tensor([0, 1, 2])  # sequences that have hardly begun, at the file's start
    monkeypatch.setattr(dt.torch, "randint", lambda *_, **__: ends)
    metrics = dt.training_step(args, data, agent, optimizers)()
    returns, times = literal_histories(args, data)
    transformer, actor = copy.deepcopy(agent.transformer).double(), copy.deepcopy(agent.actor).double()
    errors, distances = [], []
    for i, end in enumerate(ends[:, 0].tolist()):
        rows = [row for row in range(max(0, end - K + 1), end + 1) if data.episode[row] == data.episode[end]]
        obs, actions = data.obs[rows], data.actions[rows].double()
        errors.append((alone(transformer, returns[rows, 0], obs, actions, times[rows]) - actions) ** 2)
        if i < args.distil_sequences:
            asked = alone(transformer, returns[rows, 1], obs, actions, times[rows]).detach()
            distances.append(actor(obs.double()) - asked)
    assert len({len(error) for error in errors}) > 2
    loss, distance = torch.cat(errors).mean(), torch.cat(distances)
    grads = clip_grad_norm(torch.autograd.grad(loss, list(transformer.parameters()), retain_graph=True), 0.25)
    for mine, theirs in zip(optimizers["transformer_optimizer"].calls[0], grads, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-7)
    same(optimizers["actor_optimizer"].calls[0], (distance**2).mean(), list(actor.parameters()))
    assert metrics["distillation_error"].item() == pytest.approx(distance.abs().mean().item(), rel=1e-5)


def test_nothing_looks_ahead_and_no_padding_is_seen(data):
    args, agent = make(data)
    n = 5
    inputs = [torch.randn(n, K), torch.randn(n, K, S), torch.randn(n, K, A).tanh()]
    times, valid = torch.arange(K).expand(n, -1), torch.ones(n, K, dtype=torch.bool)
    before = agent.transformer(*inputs, times, valid)
    for x in inputs[:2]:
        x[:, -1] += 1.0
    inputs[2][:, -2:] *= -1  # the action of a step comes after what is predicted there
    after = agent.transformer(*inputs, times, valid)
    torch.testing.assert_close(after[:, :-1], before[:, :-1])
    assert (after[:, -1] - before[:, -1]).abs().min() > 1e-6
    valid[:, :2] = False
    once = agent.transformer(*inputs, times, valid)
    for x in inputs:
        x[:, :2] = 100.0
    torch.testing.assert_close(agent.transformer(*inputs, times, valid)[:, 2:], once[:, 2:])


def test_the_memory_in_play_is_the_data_s_kind_of_history(data):
    """Played steps, given as if they were data, make the transformer act as it did."""
    args, agent = make(data)
    history, n, steps = dt.History(agent, torch.device("cpu")), 3, 2 * K
    obs, rewards = torch.randn(steps, n, S), torch.rand(steps, n)
    actions = torch.zeros(steps, n, A)
    for t in range(steps):
        actions[t] = history.act(obs[t]).detach()
        history.observe(rewards[t].numpy())
    for t in range(steps):
        rows = slice(max(0, t - K + 1), t + 1)
        left = (args.target_return - (rewards.cumsum(0) - rewards)[rows]) / args.return_scale
        for i in range(n):
            times = torch.arange(steps)[rows]
            expected = alone(copy.deepcopy(agent.transformer), left[:, i], obs[rows, i], actions[rows, i], times)[-1]
            torch.testing.assert_close(actions[t, i].double(), expected, rtol=1e-4, atol=1e-5)


def test_the_memory_sees_the_rewards_of_its_own_episodes(data):
    args, agent = make(data)
    evaluator = make_evaluator(cli.RunArgs(eval_episodes=2), data, *data.statistics())
    history = dt.History(agent, torch.device("cpu"))
    returns = evaluator.returns(history.act, "cpu", observe=history.observe)
    assert returns.min() > 1
    left = (args.target_return - history.asked).numpy()
    assert left == pytest.approx(returns, rel=1e-4)


def test_compiled_steps_equal_eager_ones(data, monkeypatch):
    """As one graph, which is run as it is: generating its code takes ten times as long (see test_compile.py)."""
    compile = torch.compile
    traced = dict(backend="aot_eager", fullgraph=True, dynamic=False)
    monkeypatch.setattr(torch, "compile", lambda fn, **_: compile(fn, **traced))

    def trained(compile):
        args, agent = make(data, compile=compile, dropout=0.1)
        step = dt.training_step(args, data, agent, dt.Optimizers(args, agent))
        torch.manual_seed(0)
        for _ in range(3):
            step()
        return agent.state_dict()

    check_trained_alike(trained(True), trained(False))


def test_it_warms_up(data):
    args, agent = make(data, warmup=4)
    optimizers = dt.Optimizers(args, agent)
    step, rates = dt.training_step(args, data, agent, optimizers), []
    for _ in range(6):
        step()
        rates.append(optimizers["transformer_optimizer"].lr.item())
    assert rates == pytest.approx([args.lr * x for x in (0.25, 0.5, 0.75, 1, 1, 1)])


@pytest.mark.parametrize(("env_id", "asked"), [
    ("hopper-medium-v2", 3600), ("halfcheetah-medium-v2", 6000), ("walker2d-medium-v2", 5000), ("antmaze-umaze-v2", 1),
])  # fmt: skip
def test_the_return_that_is_asked_for(env_id, asked):
    assert cli.complete(dt.Args(env_id=env_id)).target_return == asked


def test_what_it_cannot_do_is_said(data):
    with pytest.raises(cli.UserError, match="--width 16 cannot be shared by 3 heads"):
        make(data, heads=3)


def test_fine_tuning_starts_from_the_policy_of_one_state(run_script, tmp_path):
    flags = [flag for flag in TINY if flag not in ("--batch-size", "32")]
    code, out, err = run_script(
        o2td3, *flags, *SMALL[o2td3], "--env-id", "hopper-medium-demo", "--run-dir", tmp_path, "--offline", "dt",
        "--offline-steps", "2", "--reevaluate-steps", "4", "--log-every", "4",
    )  # fmt: skip
    assert code == 0, err
    assert "offline policy: dt, 2 steps; score" in out and "transfer:" not in out
    assert "dt/score_with_history" in (tmp_path / "hopper-medium-demo__dt-2__0" / "progress.csv").read_text()


def test_rewards_on_another_scale_are_refused():
    with pytest.raises(cli.UserError, match="as the environment pays them"):
        cli.parse(dt.Args, dt.PRESETS, dt.FAMILIES, ["--reward-scale", "0.1"])
