"""Superior, inferior or comparable: the policy that a run starts from against its data."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from common import datasets, regime, tasks


@pytest.mark.parametrize(
    ("shift", "spread", "want"),
    [(20, 5, "superior"), (-20, 5, "inferior"), (3, 1, "comparable"), (8, 60, "comparable"), (0, 0, "comparable"),
     (5.1, 0, "superior"), (-5.1, 0, "inferior")],
)  # fmt: skip
def test_compare(shift, spread, want):
    wave = np.resize([-1.0, 1.0], 50)
    assert regime.compare(50 + shift + spread * wave, 50 + 0 * wave, 5.0) == want


def test_compare_is_welchs_test():
    """It says so just where SciPy's p-value, for a policy that is worse by the margin, falls below 5%."""
    rng = np.random.default_rng(0)
    policy, data = rng.normal(0, 3, 12), rng.normal(0, 10, 40)
    found = {True: 0, False: 0}
    for shift in np.linspace(0, 30, 600):
        p = stats.ttest_ind(policy + shift - 5, data, equal_var=False, alternative="greater").pvalue
        if abs(p - 0.05) > 0.001:  # Student's quantile is a little off
            assert (regime.compare(policy + shift, data, 5.0) == "superior") == (p < 0.05)
            found[bool(p < 0.05)] += 1
    assert min(found.values()) > 50


@pytest.mark.parametrize(("n", "m", "spread"), [(8, 8, 3), (12, 40, 10)])
def test_students_quantile_is_that_of_few_episodes(n, m, spread):
    rng = np.random.default_rng(1)
    policy, data = (x - x.mean() for x in (rng.normal(0, 3, n), rng.normal(0, spread, m)))
    freedom = stats.ttest_ind(policy, data, equal_var=False).df
    assert freedom > 10
    bar = stats.t.ppf(0.95, freedom) * np.sqrt(policy.var(ddof=1) / n + data.var(ddof=1) / m)
    for share, words in ((1.01, ("superior", "inferior")), (0.99, ("comparable", "comparable"))):
        found = tuple(regime.compare(policy + sign * (5 + share * bar), data, 5.0) for sign in (1, -1))
        assert found == words


class Run:
    def __init__(self, episodes, eval_episodes=10):
        self.args, self.regime = SimpleNamespace(regime_episodes=episodes, eval_episodes=eval_episodes), None


class Evaluator:
    """An evaluator in whose episodes a policy has the returns that it is itself."""

    def __init__(self, low, high):
        self.low, self.high = low, high

    def fresh_returns(self, policy, device, n):
        return np.resize(policy, n)

    def score(self, returns):
        return 100 * (np.mean(returns) - self.low) / (self.high - self.low)


def test_announced(data, capsys):
    data.returns = torch.tensor([900.0, 1100, 1000, 7])  # the last episode may be cut off
    run = Run(50)
    regime.announce(run, data, Evaluator(0, 2000), [1400, 1600])
    assert run.regime["regime"] == "superior" and (run.regime["policy"], run.regime["data"]) == (75, 50)
    assert run.regime["data_error"] == pytest.approx(5 / 3**0.5) and run.regime["episodes"] == 50
    out = capsys.readouterr().out
    assert "regime: superior; mean score of the policy 75.0 ± 0.7 (50 episodes), of the data 50.0 ± 2.9 (3)" in out
    regime.announce(Run(50), data, Evaluator(0, 2000), [400, 600])
    assert "regime: inferior; " in (out := capsys.readouterr().out) and ": the data are better than the policy" in out


def test_where_nothing_can_be_told_nothing_is_said(data, capsys):
    """Of no episodes and of one, which has no standard error; of data whose episodes are lost, or too few."""
    alone, lost = copy.copy(data), dataclasses.replace(data, ordered=False)
    alone.returns = data.returns[:2]
    for episodes, of in ((0, data), (1, data), (50, alone), (50, lost)):
        regime.announce(run := Run(episodes), of, None, None)
        assert run.regime is None and capsys.readouterr().out == ""


@pytest.mark.parametrize(("evaluated", "played"), [(4, 20), (10, 50), (30, 50)])
def test_five_evaluations_episodes_are_played_and_50_at_most(data, evaluated, played):
    regime.announce(run := Run(None, evaluated), data, Evaluator(0, 2000), [400, 600])
    assert run.regime["episodes"] == played


def test_a_maze_counts_one_success_an_episode(data):
    data.task = tasks.resolve("antmaze-umaze-v2")
    data.returns = torch.tensor([0.0, 37, 0, 5, 1])
    run = Run(50)
    regime.announce(run, data, Evaluator(0, 1), [0, 1])
    assert (run.regime["data"], run.regime["regime"]) == (50, "comparable")


def test_where_returns_are_on_no_scale(data):
    data.task = datasets.replace(data.task, references=None)
    data.returns = torch.tensor([200.0, 200, 200, 200])
    evaluator, run = Evaluator(0, 100), Run(50)
    for sign, words in ((1, ("superior", "comparable", "inferior")), (-1, ("inferior", "comparable", "superior"))):
        for policy, want in zip((211, 209, 189), words, strict=True):
            regime.announce(run, data, evaluator, [sign * policy])
            assert run.regime["regime"] == want and run.regime["margin"] == 10
        data.returns = -data.returns  # as of tasks that cost
