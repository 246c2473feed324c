"""The truth probe: returns that are those of a plain loop, and statistics on numbers made up so that they are known."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import o2ppo
import o2sac
import o2td3
from common import agreement, cli, datasets, envs, policies
from common.cli import UserError
from experiments import alignment, budget, harness, q_stability, rollouts, truth
from tests.conftest import TINY
from tests.reference import A, B, S, actor64, density64, mlp64
from tests.test_transfer import checkpoint

BUDGET = ("--reevaluate-steps", "4", "--align-steps", "3", "--online-steps", "6", "--learning-starts", "5",
          "--eval-every", "6", "--eval-episodes", "1", "--final-episodes", "1", "--regime-episodes", "0",
          "--log-every", "9", "--utd", "1")  # fmt: skip
PLAIN = dict(gamma=0.97, reward_scale=2.0, reward_shift=-0.5)


@pytest.fixture(scope="module")
def held_out():
    return datasets.load("hopper-medium-demo").hold_out(0.01, 40)[1]


@pytest.fixture(scope="module")
def td3_bc():
    path = harness.ROOT / "datasets" / "policies" / "hopper-medium-demo__td3_bc.pt"
    return policies.load(path)


# ----------------------------------------------------------------------------------------------- rollouts


def test_returns_are_those_of_one_episode_after_the_other(held_out, td3_bc):
    rows, args = rollouts.rebuilt(held_out)[[0, 7, 7]], SimpleNamespace(**PLAIN)
    first = torch.rand(3, A) * 2 - 1
    found = rollouts.returns_ahead([], held_out, rows, td3_bc, args, first, noisy=False)
    for row, action, value in zip(rows, first, found, strict=True):
        env, returned = envs.make_env(held_out.task), 0.0
        env.reset(seed=0)
        assert agreement.set_state(env, held_out.task, held_out.obs[row].numpy())
        action = action.numpy()
        for t in range(1_000):
            obs, reward, terminated, *_ = env.step(action)
            returned += 0.97**t * (2 * reward - 0.5)
            action = td3_bc.act(obs)
            if terminated:
                break
        assert value == pytest.approx(returned, abs=1e-3)
    assert abs(found[1] - found[2]) > 1e-3


def test_a_scene_that_stands_in_another_row_is_not_rebuilt(held_out):
    """The Adroit hand's: truth.py says so of all its rows, and does not stumble over one."""
    hand = SimpleNamespace(unwrapped=SimpleNamespace(place=None))
    assert not rollouts.place(hand, held_out, 0)


def test_what_comes_with_a_reward_is_discounted_like_it(held_out):
    """O2SAC's entropy, from the second action on."""
    net, first = policies.module(checkpoint("squashed_gaussian")), torch.full((1, A), 0.5)
    row, args = rollouts.rebuilt(held_out)[:1], SimpleNamespace(**PLAIN, alpha=0.3)
    torch.manual_seed(9)
    [found] = rollouts.returns_ahead([], held_out, row, net, args, first)
    torch.manual_seed(9)
    env, returned, action, bonus = envs.make_env(held_out.task), 0.0, first, torch.zeros(1)
    obs, _ = env.reset(seed=0)
    agreement.set_state(env, held_out.task, held_out.obs[row[0]].numpy())
    for t in range(1_000):
        noise = torch.randn(1, A)
        if t:
            action, bonus = rollouts.acts(net, torch.as_tensor(obs, dtype=torch.float32)[None], noise, args)
        obs, reward, terminated, *_ = env.step(action[0].numpy())
        returned += 0.97**t * (2 * reward - 0.5 + bonus.item())
        if terminated:
            break
    assert t > 3 and found == pytest.approx(returned, abs=1e-4)


def test_luck_is_what_episodes_have_in_common(held_out, td3_bc):
    rows = np.repeat(rollouts.rebuilt(held_out)[0], 4)
    args = SimpleNamespace(**PLAIN, policy_noise=0.2, noise_clip=0.5)
    first = torch.full((4, A), 0.3)
    a, b, c, d = rollouts.returns_ahead([], held_out, rows, td3_bc, args, first, np.array([0, 1, 0, 1]))
    assert (a, b) == pytest.approx((c, d), abs=1e-9) and abs(a - b) > 1e-6


def test_what_is_played_is_the_bellman_equations(td3_bc):
    """Against float64: O2SAC's entropy is in the reward, O2TD3's noise is clipped, O2PPO's Gaussian is drawn."""
    torch.manual_seed(1)
    obs, noise = torch.randn(B, S), 2 * torch.randn(B, A)
    net = policies.Policy("squashed_gaussian", S, A, (8,)).requires_grad_(False)
    actions, bonus = rollouts.acts(net, obs, noise, SimpleNamespace(alpha=0.3))
    mean, std = actor64(net, obs)
    u = mean + std * noise
    torch.testing.assert_close(actions.double(), torch.tanh(u), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bonus.double(), -0.3 * density64(u, mean, std), rtol=1e-3, atol=1e-3)

    actions, bonus = rollouts.acts(td3_bc, obs, noise, SimpleNamespace(policy_noise=0.2, noise_clip=0.5))
    want = (torch.tanh(mlp64(td3_bc.net, obs)) + (0.2 * noise).clamp(-0.5, 0.5)).clamp(-1, 1)
    torch.testing.assert_close(actions.double(), want, rtol=1e-5, atol=1e-5)
    assert (bonus == 0).all() and ((0.2 * noise).abs() > 0.5).any()

    net = policies.Policy("gaussian", S, A, (8,)).requires_grad_(False)
    actions, _ = rollouts.acts(net, obs, noise, SimpleNamespace())
    mode = torch.tanh(mlp64(net.net, obs))
    torch.testing.assert_close(actions.double(), (mode + noise).clamp(-1, 1))
    actions, _ = rollouts.acts(net, obs, noise, SimpleNamespace(max_std_start=0.05))
    torch.testing.assert_close(actions.double(), (mode + 0.05 * noise).clamp(-1, 1))
    for kind in policies.KINDS:  # without noise all of them play their most likely actions
        net = policies.Policy(kind, S, A, (8,)).requires_grad_(False)
        actions, bonus = rollouts.acts(net, obs, None, SimpleNamespace(alpha=0.3))
        assert torch.equal(actions, net.mode(obs)) and (bonus == 0).all()


def test_states_that_cannot_be_rebuilt(held_out, monkeypatch):
    assert 0 < len(rollouts.rebuilt(held_out)) < 40  # joint speeds of 10 and more are shown as 10
    monkeypatch.setattr(agreement, "set_state", lambda *_: False)
    with pytest.raises(UserError, match="cannot be put into states of these data.*--env-id"):
        rollouts.rebuilt(held_out)


@pytest.mark.parametrize("experiment", [truth, budget, q_stability])
def test_what_no_simulator_can_answer_is_refused_before_the_first_run(experiment, monkeypatch, run_script):
    monkeypatch.setattr(agreement, "set_state", lambda *_: False)
    monkeypatch.setattr(harness, "run_all", lambda *_: pytest.fail("it has begun"))
    code, _, err = run_script(experiment)
    assert code == 2 and "cannot be put into states of these data" in err


def test_no_return_is_compared_with_a_v_of_divided_rewards():
    args = cli.complete(o2ppo.Args(env_id="halfcheetah-medium-v2"))
    with pytest.raises(UserError, match="--no-scale-rewards"):
        rollouts.check(args)


def test_monte_carlo_of_q_stability(monkeypatch):
    monkeypatch.setattr(rollouts, "STATES", 4)
    found = q_stability.true_values(harness.Args(), "o2td3", 0)
    assert 2 <= len(found) <= 4 and (found > 0).all() and 200 < found.max() < 400
    # the first action is one of ±1, as rollouts play them, in whatever range the environment takes it
    wide, read = torch.tensor([[-9.0], [9.0]]).repeat(1, A), q_stability.load_policy
    monkeypatch.setattr(q_stability, "load_policy", lambda *where: read(*where) | {"action_range": wide})
    monkeypatch.setattr(rollouts, "returns_ahead", lambda *given: given[-1])
    assert q_stability.true_values(harness.Args(), "o2td3", 0).abs().max() <= 1


# ----------------------------------------------------------------------------------------------- statistics


@pytest.fixture
def made_up():
    """Returns of 200 states and 1 + 12 actions, which differ by 50 between states and by 2 within."""
    torch.manual_seed(4)
    return 200 + 50 * torch.randn(200, 1).double() + 2 * torch.randn(200, 13).double()


def test_level_and_ranking_are_two_things(made_up):
    within = made_up - made_up.mean(1, keepdim=True)
    q = made_up.mean(1, keepdim=True) - 7 - within  # right about states but for 7, and wrong about actions
    found, ranks = truth.level([q], [made_up]), truth.ranking([q], [made_up])
    assert found["bias"][0] == pytest.approx(-7, abs=0.6) and found["correlation"][0] > 0.99
    assert found["bias"][1] == pytest.approx(2 * 2 / 200**0.5, rel=0.3)
    assert found["Q"][0] - found["return"][0] == pytest.approx(found["bias"][0])
    assert ranks["Spearman's ρ"][0] == ranks["correlation"][0] == pytest.approx(-1)
    q[:, 0] = 1e6  # the most likely action is none of those that are ranked
    assert truth.ranking([q], [made_up]) == ranks and truth.spread([q], [q]) < 3
    q = made_up[torch.randperm(200)].mean(1, keepdim=True) + within  # the other way round
    found, ranks = truth.level([q], [made_up]), truth.ranking([q], [made_up])
    assert abs(found["correlation"][0]) < 0.25 and 0.04 < found["correlation"][1] < 0.1
    assert ranks["Spearman's ρ"][0] == ranks["correlation"][0] == pytest.approx(1)


def test_chance_lies_within_the_standard_errors(made_up):
    [(mean, error), _] = truth.ranking([torch.randn_like(made_up)], [made_up]).values()
    assert error == pytest.approx(1 / math.sqrt(11 * 200), rel=0.2) and abs(mean) < 3 * error
    again = truth.ranking([torch.randn_like(made_up)] * 5, [made_up] * 5)["correlation"]
    assert again[1] == pytest.approx(error, rel=0.3)  # the same run five times makes no error smaller
    assert truth.ranking([torch.ones_like(made_up)], [made_up])["correlation"] == (0, 0)


def test_a_perfect_q_comes_to_what_the_halves_tell(made_up):
    returns = made_up + 4 * torch.randn(8, 200, 13).double()
    a, b = (half.mean(0) for half in returns.chunk(2))
    of_halves = truth.ranking([a], [b])["correlation"][0]
    found = truth.ranking([made_up], [returns.mean(0)])["correlation"][0]
    assert truth.perfect(of_halves) == pytest.approx(found, abs=0.05) and of_halves < found - 0.2
    assert truth.spread([a], [b]) == pytest.approx(2, rel=0.1)  # without the noise that is in both
    assert truth.spread([3 * made_up], [3 * made_up]) == pytest.approx(6, rel=0.1)
    assert truth.spread([made_up], [-made_up]) == 0  # halves that contradict each other tell of none
    assert truth.perfect(-0.1) == 0 and truth.perfect(1) == 1


# ----------------------------------------------------------------------------------------------- the experiment


def test_of_finished_runs(tmp_path, run_script, monkeypatch, hdf5):
    """Both algorithms, from runs that are there: every stage is compared, and nothing is trained."""
    for slow in ("plots.draw", "agreement.report_simulator_check"):
        monkeypatch.setattr(f"common.{slow}", lambda *_, **__: None)
    monkeypatch.setattr(rollouts, "returns_ahead", lambda pool, data, rows, *_: rows + torch.randn(len(rows)).numpy())
    flags = " ".join([*TINY, *BUDGET, "--offline-steps", "4"])
    args = truth.Args(run_dir=str(tmp_path / "runs"), run_flags=flags, seeds=1, dataset_path=str(hdf5()),
                      scale="paper")  # fmt: skip
    for script in (o2sac, o2td3):
        spec = harness.full(args, script.__name__, 0)
        code, _, err = run_script(script, *harness.command_line(args, spec))
        assert code == 0, err
    typed = [f"--run-flags={flags}", "--run-dir", tmp_path / "runs", "--out", tmp_path, "--seeds", "1"]
    typed += ["--dataset-path", args.dataset_path, "--scale", "paper"]
    code, out, err = run_script(truth, *typed, "--states", "7", "--actions", "4", "--rollouts", "2")
    assert code == 0, err
    page = (tmp_path / "truth_data.md").read_text()
    for script in ("o2sac", "o2td3"):
        for word in ("re-evaluated", "aligned", "fine-tuned", truth.HALVES):
            assert page.count(f"| {script} | {word} |") == 2
        assert f"| {script} | re-evaluated | 1 | 7 |" in page
    assert (
        page.count(truth.PREFERENCE) == 3 and page.count(truth.PERFECT) == 2 and (tmp_path / "truth_data.png").exists()
    )
    q, _, returns = truth.measured(truth.Args(**vars(args) | dict(noise=False, states=7)), spec, {})
    assert returns.shape == (1, 7, 17) and q.keys() == {"re-evaluated", "aligned", "fine-tuned"}
    assert not torch.equal(q["re-evaluated"], q["aligned"])


def test_refused(run_script, tmp_path):
    code, _, err = run_script(truth, "--algorithms", "o2ppo", "--out", tmp_path)
    assert code == 2 and "o2ppo: without a critic_probe there is no Q to be asked; see --algorithms" in err
    for experiment, part in ((truth, "reevaluate"), (alignment, "align"), (budget, "align")):
        code, _, err = run_script(experiment, f"--run-flags=--no-{part}", "--out", tmp_path)
        assert code == 2 and err == f"error: this asks what {part} does; leave --no-{part} out of --run-flags\n"
    code, _, err = run_script(truth, "--rollouts", "3")
    assert code == 2 and "--rollouts is 3, but has to be an even number" in err
