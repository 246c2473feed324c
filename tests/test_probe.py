"""What is measured of the critic, and the rule that moves the reference, against plain versions."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import probe
from common.datasets import load
from common.reference import Outplayed


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 32)), rng.normal(size=(5, 32))
    y[0], y[1] = x[0] ** 3, -x[1]
    expected = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    found = probe.rank_correlation(torch.tensor(x), torch.tensor(y))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found[0] == pytest.approx(1) and found[1] == pytest.approx(-1)
    x, y = rng.integers(0, 4, (5, 32)), rng.integers(0, 4, (5, 32))  # with ties
    expected = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(probe.rank_correlation(torch.tensor(x), torch.tensor(y)), expected, atol=1e-12)
    assert probe.rank_correlation(torch.zeros(4), torch.zeros(4)) == 0  # as in a maze where no episode succeeds


def test_probe_of_a_known_critic():
    """Q(s, a) = -‖a - 0.1‖² and an anchor at zero: every number can be worked out by hand."""
    torch.manual_seed(0)
    held_out = load("hopper-medium-demo").hold_out(0.01, 8)[1]
    anchor = torch.zeros(8, 3)
    sampled = 0.3 * probe.fixed_noise(anchor)
    preference = -sampled.square().sum(-1)
    found = probe.Probe(
        held_out, lambda obs, a: -(a - 0.1).square().sum(-1), lambda obs: anchor + 0.1, anchor, sampled, preference
    )()
    q = -(sampled - 0.1).square().sum(-1).numpy()
    assert found["probe/q_policy"] == 0 and found["probe/drift"] == pytest.approx(0.1)
    assert found["probe/beats_anchor"] == pytest.approx((q > -0.03).mean())
    best = sampled.numpy()[q.argmax(0), np.arange(8)]
    assert found["probe/argmax_gap"] == pytest.approx(np.sqrt((best**2).mean(1)).mean(), rel=1e-5)
    rho = [scipy.stats.spearmanr(preference.numpy()[:, i], q[:, i]).statistic for i in range(8)]
    assert found["probe/rank_correlation"] == pytest.approx(np.mean(rho), abs=1e-9)
    q_data = -(held_out.actions - 0.1).square().sum(-1).numpy()
    assert found["probe/q_data"] == pytest.approx(q_data.mean(), rel=1e-5)
    assert found["probe/q_data_low"] == pytest.approx(np.quantile(q_data, 0.1), rel=1e-5)
    assert found["probe/q_data_high"] == pytest.approx(np.quantile(q_data, 0.9), rel=1e-5)


def test_noise_is_always_the_same_and_draws_nothing_from_a_run():
    before = torch.get_rng_state()
    first, again = (probe.fixed_noise(torch.zeros(4, 3)) for _ in range(2))
    assert first.shape == (32, 4, 3) and torch.equal(first, again) and torch.equal(torch.get_rng_state(), before)


def test_drift_is_a_root_mean_square_over_states_and_dimensions():
    held_out, acts = SimpleNamespace(obs=torch.zeros(2, 1), actions=None), torch.tensor([[0.3, 0, 0], [0, 0, 0.9]])
    anchor = torch.full((2, 3), 0.1)
    found = probe.Probe(held_out, lambda *_: torch.zeros(2), lambda _: acts + 0.1, anchor, acts[None], acts.T[:1])()
    assert found["probe/drift"] == pytest.approx(((0.3**2 + 0.9**2) / 6) ** 0.5)


def test_what_is_worth_as_much_does_not_beat_the_anchor():
    held_out, anchor = SimpleNamespace(obs=torch.randn(4, 2), actions=torch.zeros(4, 3)), torch.zeros(4, 3)
    sampled = probe.fixed_noise(anchor)
    found = probe.Probe(held_out, lambda obs, a: torch.ones(4), lambda obs: anchor, anchor, sampled, sampled[..., 0])()
    assert found["probe/beats_anchor"] == found["probe/rank_correlation"] == 0


def test_held_out_episodes_are_whole_and_not_trained_on():
    data = load("hopper-medium-demo")
    rest, held_out = data.hold_out(0.01, 256)
    assert len(held_out) == 256 and 0.985 * len(data) < len(rest) < len(data)
    assert not torch.isin(rest.episode, held_out.episode).any()
    assert len(rest) + torch.isin(data.episode, held_out.episode.unique()).sum() == len(data)
    assert rest.returns.isneginf().sum() == len(held_out.episode.unique())
    assert torch.equal(data.hold_out(0.01, 256)[1].table, held_out.table)  # always the same
    assert data.hold_out(0, 256)[0] is data


def test_of_few_episodes_one_is_held_out_and_of_one_none(data):
    few, one = data.rows(data.episode < 5), data.rows(data.episode == 0)
    rest, held_out = few.hold_out(0.001, 30)
    assert len(rest.episode.unique()) == 4 and len(held_out.episode.unique()) == 1 and len(held_out) == 30
    assert data.returns.isfinite().all()  # what is left has returns of its own
    rest, held_out = one.hold_out(0.3, 7)
    assert rest is one and len(held_out) == 7
    assert few.best_episodes(0.001).episode.unique().tolist() == [int(data.returns[:5].argmax())]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(-1000, 3000), min_size=8, max_size=8), st.sampled_from([0.0, 0.5, 1.0, 3.0]))
def test_margin_is_welchs_statistic(returns, margin):
    rule = Outplayed(window=4, margin=margin)
    moved = [rule.add(value) for value in returns]
    old, new = np.array(returns[:4]), np.array(returns[4:])
    error = np.sqrt((old.var(ddof=1) + new.var(ddof=1)) / 4)
    assert not any(moved[:7])  # the first window is the reference's own; the second has to fill
    assert moved[7] == (new.mean() - old.mean() > margin * error)


def test_margin_starts_over_after_a_move():
    rule = Outplayed(window=2, margin=1.0)
    moved = [rule.add(value) for value in (10, 12, 50, 52, 51, 50, 90, 92)]
    assert [i for i, move in enumerate(moved) if move] == [3, 7]
    again = Outplayed(2, 1.0)
    again.load_state_dict(rule.state_dict())
    assert again.reference == [90, 92] and again.recent == []
    for value in (40, 93, 120):  # saved within a window, it goes on with what it holds of it
        assert rule.add(value) == again.add(value) == (value == 120)
        again = Outplayed(2, 1.0)
        again.load_state_dict(rule.state_dict())
