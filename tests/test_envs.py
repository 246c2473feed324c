"""Evaluation side by side equals episodes played one after another; scores; averages of a stage's metrics."""

import numpy as np
import pytest
import torch

from common import envs, steps


def test_evaluation_equals_single_episodes():
    torch.manual_seed(1)
    weights = torch.randn(11, 3) * 0.5
    mean, std = torch.full((11,), 0.1), torch.full((11,), 0.7)
    evaluator = envs.Evaluator("Hopper-v4", mean, std, episodes=4)

    def policy(obs):
        return torch.tanh(obs @ weights)

    expected, lengths = [], []
    for i in range(4):  # episodes of different lengths: those that end early are not played on into their next one
        env = envs.make_env("Hopper-v4")
        obs, _ = env.reset(seed=evaluator.seed + i)
        total, done, n = 0.0, False, 0
        while not done:
            standardised = torch.as_tensor(((obs - 0.1) / 0.7).astype(np.float32))
            obs, reward, terminated, truncated, _ = env.step(policy(standardised).numpy())
            total, done, n = total + reward, terminated or truncated, n + 1
        expected.append(total)
        lengths.append(n)
    assert len(set(lengths)) > 1
    np.testing.assert_allclose(evaluator.returns(policy, "cpu"), expected, rtol=1e-3)
    np.testing.assert_array_equal(evaluator.returns(policy, "cpu"), evaluator.returns(policy, "cpu"))


def test_score_is_d4rls():
    evaluator = envs.Evaluator("Hopper-v4", torch.zeros(11), torch.ones(11), episodes=1)
    assert evaluator.score(np.array([-20.272305])) == pytest.approx(0)
    assert evaluator.score(np.array([3234.3, 3234.3])) == pytest.approx(100)
    evaluator.reference = None  # an environment that D4RL does not know
    assert evaluator.score(np.array([1.0, 2.0])) == 1.5


def test_stepper_averages_all_steps_since_the_last_reading():
    count = torch.zeros(())

    def step():
        count.add_(1)
        return {"n": count.clone(), "twice": 2 * count}

    stepper = steps.Stepper(step, torch.device("cpu"))
    stepper.run(3)
    half = steps.Stepper(step, torch.device("cpu"))
    half.load_state_dict(stepper.state_dict())  # as after an interruption
    half.run(1)
    assert half.means() == {"n": 2.5, "twice": 5.0}
    half.run(2)
    assert half.means() == {"n": 5.5, "twice": 11.0}
