"""D4RL's Q-learning view against a literal loop, and flags that the arrays contradict."""

import time

import numpy as np
import pytest
import torch

from common import datasets, replay, tasks
from common.cli import UserError
from common.views import qlearning_view


def literal_view(raw, max_steps):
    """The view as a loop, one row at a time: (columns, returns of the episodes that have a transition)."""
    known, n = "next_observations" in raw, len(raw["rewards"])
    rows, returns, total, step, number, used = [], [], 0.0, 0, 0, False
    for i in range(n):
        last, terminal = i == n - 1, bool(raw["terminals"][i])
        timeout = bool(raw["timeouts"][i]) if "timeouts" in raw else False
        following = raw["next_observations"][i] if known else None if last else raw["observations"][i + 1]
        jump = known and not last and not np.allclose(following, raw["observations"][i + 1], 1e-5, 1e-5)
        step, total = step + 1, total + float(raw["rewards"][i])
        if step < max_steps and terminal:  # `timeouts` may mean that an episode is over
            timeout = timeout and bool((raw["terminals"] & ~raw["timeouts"]).any())
        elif terminal and not timeout:
            terminal, timeout = False, True
        if step == max_steps and not (terminal or timeout or jump or last):
            timeout = True
        end = terminal or timeout or jump
        if not timeout and following is not None:
            next_action = np.full(3, np.nan) if end or last else raw["actions"][i + 1]
            rows.append((raw["observations"][i], raw["actions"][i], next_action, raw["rewards"][i], following, terminal,
                         number))  # fmt: skip
            used = True
        if end or last:
            if used:
                returns.append(total)
                number += 1
            total, step, used = 0.0, 0, False
    return [np.array(column) for column in zip(*rows, strict=True)], returns


@pytest.mark.parametrize("timeouts", [True, False])
@pytest.mark.parametrize("next_observations", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_view_equals_a_literal_loop(random_raw, timeouts, next_observations, seed):
    raw = random_raw(3_000, seed, next_observations, timeouts)
    jumps = np.random.default_rng(seed).integers(0, 3_000, 20)
    if next_observations:
        raw["next_observations"][jumps] += 1
    view, _ = qlearning_view(raw, 40)
    columns, returns = literal_view(raw, 40)
    names = ("obs", "actions", "next_actions", "rewards", "next_obs", "terminations", "episode")
    for name, column in zip(names, columns, strict=True):
        np.testing.assert_array_equal(view[name], column, err_msg=name)
    np.testing.assert_allclose(view["returns"], returns, rtol=1e-5, atol=1e-5)
    assert view["ordered"]


@pytest.mark.parametrize("next_observations", [True, False])
def test_a_million_transitions_in_a_second(random_raw, next_observations):
    raw = random_raw(1_000_000, next_observations=next_observations)
    start = time.process_time()
    qlearning_view(raw, 1_000)
    assert time.process_time() - start < 1


def walk(lengths, seed=0, **changes):
    """Episodes in which observations count steps up from 100 times the episode's number; flags false, rewards 1."""
    obs = np.concatenate([100.0 * i + np.arange(length) for i, length in enumerate(lengths)])
    n = len(obs)
    actions = np.random.default_rng(seed).uniform(-1, 1, (n, 3))
    none = np.zeros(n, bool)
    return {"observations": np.tile(obs[:, None], 2), "actions": actions, "rewards": np.ones(n), "terminals": none,
            "timeouts": none.copy(), **changes}  # fmt: skip


def step_sizes(view):
    return (view["next_obs"] - view["obs"])[view["terminations"] == 0]


def test_unmarked_time_limits_are_cut():
    raw = walk([10, 10, 10])
    for rows in (raw, {key: value for key, value in raw.items() if key != "timeouts"}):
        view, notes = qlearning_view(rows, 10)
        assert view["episode"].tolist() == [0] * 9 + [1] * 9 + [2] * 9 and (step_sizes(view) == 1).all()
        assert view["returns"].tolist() == [10, 10, 10]  # of whole episodes, with the steps that are dropped
        assert notes == ["episodes cut at the time limit of 10 steps, though nothing marks it: 2"]


def test_a_last_time_out_alone_does_not_hide_the_others():
    raw = walk([10, 10, 10])
    raw["timeouts"][-1] = True
    view, _ = qlearning_view(raw, 10)
    assert (step_sizes(view) == 1).all() and len(view["returns"]) == 3


def test_terminals_at_the_time_limit_are_time_outs():
    raw = walk([10, 4, 10, 10])
    raw["terminals"][[9, 13, 23]] = True
    raw["timeouts"][23] = True  # rightly marked: both ended it
    view, notes = qlearning_view(raw, 10)
    assert view["terminations"].sum() == 1 and view["obs"][view["terminations"] == 1, 0] == 103
    assert "terminals at the time limit of 10 steps, taken for time-outs: 1" in notes
    assert (step_sizes(view) == 1).all()


def test_time_outs_that_mark_every_end_hide_no_death():
    raw = walk([10, 4, 10, 7])
    raw["terminals"][[13, 30]] = True
    raw["timeouts"][[9, 13, 23, 30]] = True
    view, notes = qlearning_view(raw, 10)
    assert view["obs"][view["terminations"] == 1, 0].tolist() == [103]  # nothing follows the file's last row
    assert (step_sizes(view) == 1).all() and len(view["obs"]) == 31 - 3
    assert notes == ["terminals before the time limit of 10 steps that `timeouts` marks, too, taken for real ends: 2"]


def test_ends_that_both_flags_mark_under_a_limit_of_the_datas_own_are_time_outs():
    raw = walk([5, 3, 5, 5])
    raw["terminals"][[4, 7, 12, 17]] = raw["timeouts"][[4, 12, 17]] = True
    view, notes = qlearning_view(raw, 10)
    assert view["obs"][view["terminations"] == 1, 0].tolist() == [102] and len(view["obs"]) == 18 - 3 and not notes


@pytest.mark.parametrize(("lengths", "real"), [
    ([5, 5, 5, 5, 5, 2], []),  # the recording stopped in the last one
    ([5] * 6 + [7] * 6, []),  # two limits
    ([5, 3, 5, 5], [1]),  # a real end that is no time-out says what `timeouts` means
    ([9, 2, 7, 4, 3], [0, 1, 2, 3]),
])  # fmt: skip
def test_what_both_flags_mean_is_seen_from_all_of_them(lengths, real):
    raw, ends = walk(lengths), np.cumsum(lengths) - 1
    raw["terminals"][ends] = raw["timeouts"][ends] = True
    if len(real) == 1:
        raw["timeouts"][ends[real]] = False
    view, _ = qlearning_view(raw, 10)
    assert view["obs"][view["terminations"] == 1, 0].tolist() == [100 * i + lengths[i] - 1 for i in real]


def test_a_time_out_that_is_no_terminal_shows_that_terminals_are_real():
    """Though most of them come after equally many steps, and though one at the limit is no real one."""
    raw, ends = walk([5, 5, 5, 10, 10, 5]), np.cumsum([5, 5, 5, 10, 10, 5]) - 1
    raw["terminals"][ends] = raw["timeouts"][ends] = True
    raw["terminals"][ends[3]] = False
    view, notes = qlearning_view(raw, 10)
    assert view["obs"][view["terminations"] == 1, 0].tolist() == [4, 104, 204]  # nothing follows the file's last row
    assert notes == ["terminals before the time limit of 10 steps that `timeouts` marks, too, taken for real ends: 4"]


def drifting(lengths, next_observations):
    """Episodes that begin somewhere and go by small steps, each of which really ends."""
    rng, ends = np.random.default_rng(0), np.cumsum(lengths) - 1
    moves = np.concatenate([np.cumsum(rng.normal(size=(length + 1, 2)), 0) * 0.1 + rng.normal(size=2) * 5
                            for length in lengths])  # fmt: skip
    rows = np.delete(np.arange(len(moves)), ends + 1 + np.arange(len(lengths)))
    raw = {"observations": moves[rows], "actions": np.zeros((len(rows), 3)), "rewards": np.ones(len(rows)),
           "terminals": np.isin(np.arange(len(rows)), ends)}  # fmt: skip
    return raw | ({"next_observations": moves[rows + 1]} if next_observations else {})


@pytest.mark.parametrize("environments", [1, 4])
@pytest.mark.parametrize("next_observations", [True, False])
def test_terminals_that_the_arrays_contradict_are_refused(next_observations, environments):
    raw = drifting([30, 10, 15, 25] * 10, next_observations)
    ends = raw["terminals"]
    assert qlearning_view(raw, 1_000)[0]["terminations"].sum() == 40 - (not next_observations)
    timeouts, every, none = np.arange(800) % 80 == 79, np.ones(800, bool), np.zeros(800, bool)
    for name, wrong in (
        ("terminals", {"terminals": ~ends}),
        ("terminals", {"terminals": every}),
        ("terminals", {"terminals": np.append(False, ends[:-1])}),
        ("terminals", {"terminals": every, "timeouts": timeouts}),
        ("terminals", {"terminals": np.append(False, (ends & ~timeouts)[:-1]), "timeouts": timeouts}),
        ("timeouts", {"terminals": none, "timeouts": ~ends}),
        ("timeouts", {"terminals": none, "timeouts": every}),
        ("timeouts", {"terminals": none, "timeouts": np.append(False, ends[:-1])}),
    ):
        rows = raw | wrong
        if environments > 1 and next_observations:
            rows = interleaved(rows, 800, environments)
        with pytest.raises(UserError, match=f"`{name}` .* a row late, or masks"):
            qlearning_view(rows, 1_000)


def test_wrong_terminals_are_refused_where_no_leap_betrays_them(random_raw):
    """Observations without an order, which next observations alone show."""
    raw = random_raw(2_000, next_observations=True, timeouts=False)
    ends = raw["terminals"]
    for wrong in (
        {"terminals": ~ends},
        {"terminals": np.ones(2_000), "timeouts": ends},
        {"terminals": np.append(False, ends[:-1])},
    ):
        with pytest.raises(UserError, match="a row late, or masks"):
            qlearning_view(raw | wrong, 1_000)


def test_ends_in_most_rows_are_no_masks():
    for lengths in ([1] * 100, [1, 1, 1, 2] * 30):
        for next_observations in (True, False):
            raw = drifting(lengths, next_observations)
            n = len(raw["rewards"])
            view, notes = qlearning_view(raw, 1_000)
            assert len(view["obs"]) == n - (not next_observations) and len(view["returns"]) >= len(lengths) - 1
            first = np.insert(raw["terminals"][:-1], 0, True)  # the same with one beginning for all, nearly or just so
            for noise in (0.0, 0.01):
                raw["observations"][first] = noise * np.random.default_rng(1).normal(size=(first.sum(), 2))
                assert len(qlearning_view(raw, 1_000)[0]["obs"]) == len(view["obs"]) and not notes


@pytest.mark.parametrize("next_observations", [True, False])
def test_episodes_of_one_step_whose_observations_are_sorted_say_what_to_do(next_observations):
    raw = walk([1] * 200)
    raw["observations"] = np.repeat(np.arange(20.0), 10)[:, None]  # tried ten times each
    raw["terminals"][:] = True
    if next_observations:
        raw["next_observations"] = raw["observations"]
    with pytest.raises(UserError, match="if each row is an episode of its own, shuffle the rows"):
        qlearning_view(raw, 1_000)
    order = np.random.default_rng(0).permutation(200)
    view, notes = qlearning_view({key: value[order] for key, value in raw.items()}, 1_000)
    assert len(view["returns"]) == 200 - (not next_observations) and not notes


def test_a_few_terminals_after_which_the_episode_goes_on_are_no_ends():
    raw = drifting([30, 10, 15, 25] * 10, True)
    raw["terminals"][[3, 50, 120]] = True
    view, notes = qlearning_view(raw, 1_000)
    assert view["terminations"].sum() == len(view["returns"]) == 40
    assert notes == ["terminals after which the episode goes on, not taken for ends: 3"]


def test_an_end_where_all_episodes_begin_is_an_end():
    raw = walk([4, 3, 5], rewards=np.ones(12))
    raw["observations"] %= 100
    raw["next_observations"] = raw["observations"] + 1
    raw["terminals"][[3, 6, 11]], raw["next_observations"][6] = True, 0  # came home
    view, notes = qlearning_view(raw, 1_000)
    assert view["terminations"].sum() == 3 and not notes
    lengths = range(3, 23)  # one of so many that leads to the next row would be no end, if they began differently
    raw, ends = walk(lengths), np.cumsum(lengths) - 1
    raw["observations"] %= 100
    raw["next_observations"] = raw["observations"] + 1
    raw["terminals"][ends], raw["next_observations"][ends[7]] = True, 0
    view, notes = qlearning_view(raw, 1_000)
    assert view["terminations"].sum() == 20 and not notes


def test_jumps_end_an_episode_and_keep_their_transition():
    raw = walk([4, 3, 5])
    raw["next_observations"] = raw["observations"] + 1
    view, notes = qlearning_view(raw, 1_000)
    assert len(view["obs"]) == 12 and (step_sizes(view) == 1).all() and view["returns"].tolist() == [4, 3, 5]
    assert np.flatnonzero(np.isnan(view["next_actions"]).all(1)).tolist() == [3, 6, 11]
    assert notes == ["episodes cut where the next row does not follow, though nothing marks an end: 2"]
    rounded = raw | {"next_observations": (raw["next_observations"] * (1 + 1e-7)).astype(np.float32)}
    assert qlearning_view(rounded, 1_000)[0]["returns"].tolist() == [4, 3, 5]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8])
@pytest.mark.parametrize("next_observations", [True, False])
def test_observations_that_are_no_fractions(dtype, next_observations):
    raw = drifting([5, 3, 4] * 20, next_observations)
    rounded = {key: np.clip(8 * raw[key], *(0, 255) if dtype == np.uint8 else (-128, 127)).astype(dtype)
               for key in raw if "observations" in key}  # fmt: skip
    view, _ = qlearning_view(raw | rounded, 1_000)
    expected, _ = qlearning_view(raw | {key: value.astype(float) for key, value in rounded.items()}, 1_000)
    assert view["obs"].dtype == np.float32
    for name in expected:
        np.testing.assert_array_equal(view[name], expected[name], err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_jumps_far_from_zero_are_seen(dtype):
    raw = drifting([30, 10, 15, 25] * 10, True)
    raw["terminals"][:] = False
    far = {key: (raw[key] + [1e6, 0]).astype(dtype) * [1, 0] for key in raw if "observations" in key}
    assert len(qlearning_view(raw | far, 1_000)[0]["returns"]) in (38, 39, 40)  # some begin where another one ended
    rounded = far | {"next_observations": far["next_observations"].astype(np.float32)}
    assert qlearning_view(raw | rounded, 1_000)[0]["ordered"]


def test_what_float32_rounds_far_from_zero_is_no_jump():
    """By 3% of a column's spread, which it may as far as `datasets.check` is concerned."""
    raw = drifting([30, 10, 15, 25] * 10, True)
    raw |= {key: raw[key] / raw[key].std(0) + 1e6 for key in raw if "observations" in key}
    raw["next_observations"] = raw["next_observations"].astype(np.float32)
    view, notes = qlearning_view(raw, 1_000)
    assert len(view["returns"]) == 40 and not notes


def test_jumps_are_seen_everywhere_in_a_long_file():
    raw = walk([400] * 100)
    raw["next_observations"] = raw["observations"] + 1
    assert qlearning_view(raw, 1_000)[0]["returns"].tolist() == [400] * 100


@pytest.mark.parametrize("wrong", ["own", "none", "late"])
def test_next_observations_that_are_none_are_refused(wrong):
    raw = drifting([30, 10, 15, 25] * 10, True)
    own, following = raw["observations"], raw["next_observations"]
    raw["next_observations"] = {"own": own, "none": 0 * own, "late": np.roll(following, 1, 0)}[wrong]
    with pytest.raises(UserError, match="are the rows' own observations, or the same in all rows"):
        qlearning_view(raw, 1_000)
    still = raw | {"observations": 0 * own, "next_observations": 0 * own}  # nothing moves: that is no fault
    assert len(qlearning_view(still, 1_000)[0]["obs"]) == 800
    single = raw | {"terminals": np.ones(800, bool)}  # episodes of one step, after which nothing is learned of
    assert len(qlearning_view(single, 1_000)[0]["obs"]) == 800


def with_resets(raw, ends):
    """Recorded from a vector environment: after each of `ends` a row more, which leads to the next episode."""
    rows = np.sort(np.concatenate([np.arange(len(raw["rewards"])), ends]))
    again = np.flatnonzero(np.diff(rows, prepend=-1) == 0)
    recorded = {key: value[rows] for key, value in raw.items()}
    recorded["observations"][again] = raw["observations"][ends] + 1
    recorded["rewards"][again] = 0
    recorded["terminals"][again] = recorded["timeouts"][again] = False
    return recorded, again


@pytest.mark.parametrize("next_observations", [True, False])
def test_rows_that_only_reset_the_environment_are_left_out(next_observations):
    raw = walk([4, 3, 5, 6])
    raw["terminals"][[3, 11]] = raw["timeouts"][6] = True
    recorded, again = with_resets(raw, [3, 6, 11])
    if next_observations:
        recorded["next_observations"] = np.concatenate([recorded["observations"][1:], [[306, 306]]])
    view, notes = qlearning_view(recorded, 1_000)
    assert (step_sizes(view) == 1).all() and view["returns"].tolist() == [4, 3, 5, 6]
    assert len(view["obs"]) == 18 - 1 - (not next_observations)  # the time-out, and a last row without a successor
    assert notes == ["rows that only reset the environment, left out: 3"] and len(again) == 3


def test_a_row_that_only_resets_is_no_step_of_an_episode():
    """Which has as many as the time limit allows, and is not cut a row before its last one."""
    raw = walk([4, 10, 5])
    raw["terminals"][3] = raw["timeouts"][13] = True
    recorded, _ = with_resets(raw, [3, 13])
    view, notes = qlearning_view(recorded, 10)
    assert view["returns"].tolist() == [4, 10, 5] and view["episode"].tolist() == [0] * 4 + [1] * 9 + [2] * 4
    assert notes == ["rows that only reset the environment, left out: 2"]


@pytest.mark.parametrize("next_observations", [True, False])
def test_rewards_of_zero_alone_make_no_reset(next_observations):
    raw = walk([4, 3, 5], rewards=np.zeros(12))
    raw["terminals"][[3, 6]] = True
    if next_observations:
        raw["next_observations"] = raw["observations"] + 1
    view, notes = qlearning_view(raw, 1_000)
    assert len(view["obs"]) == 11 + next_observations and not notes


def interleaved(raw, n, environments):
    """Rows as `environments` that are stepped in turn fill a buffer; `raw` has them one after another."""
    order = np.arange(n).reshape(environments, -1).T.reshape(-1)
    return {key: value[order] for key, value in raw.items()}


@pytest.mark.parametrize("lengths", [[50, 30, 20, 60, 40], [5] * 10 + [4] * 25 + [2] * 25])
def test_interleaved_rows_are_put_in_order(lengths):
    """Of short episodes, too, so that many a row is an end that nothing follows."""
    raw, ends = walk(lengths), np.cumsum(lengths) - 1
    raw["terminals"][ends[[0, 1, *range(3, len(ends) - 1)]]] = raw["timeouts"][ends[2]] = True
    raw["next_observations"] = raw["observations"] + 1
    view, notes = qlearning_view(interleaved(raw, 200, 4), 1_000)
    expected, _ = qlearning_view(raw | {"timeouts": raw["timeouts"]}, 1_000)
    assert "4 environments are interleaved" in notes[0] and view["ordered"]
    for name in expected:
        np.testing.assert_array_equal(view[name], expected[name], err_msg=name)


@pytest.fixture
def shuffled(random_raw):
    raw = random_raw(2_000, next_observations=True)
    order = np.random.default_rng(0).permutation(2_000)
    view, notes = qlearning_view({key: value[order] for key, value in raw.items()}, 1_000)
    assert "do not follow one another" in notes[0] and not view.pop("ordered")
    tensors = {key: torch.as_tensor(value) for key, value in view.items()}
    return datasets.Dataset(**tensors, task=tasks.resolve(tasks.DEMO), source="shuffled", ordered=False)


def test_shuffled_rows_are_refused_where_their_order_matters(shuffled):
    from offline import rebrac

    assert shuffled.next_actions.isnan().float().mean() > 0.99  # two rows may stand in order by chance
    assert len(shuffled.returns) > 0.99 * len(shuffled)
    assert len(shuffled.best_episodes(1.0)) == len(shuffled)
    for use in (
        lambda: shuffled.best_episodes(0.5),
        lambda: replay.ReplayBuffer(shuffled, 10, "part"),
        lambda: rebrac.train(rebrac.Args(), shuffled),
    ):
        with pytest.raises(UserError, match="needs whole episodes"):
            use()


def test_whole_episodes_lose_nothing():
    """As Minari has them: every next observation is the episode's own, after a time-out too."""
    raw = walk([1, 3, 1])
    raw["next_observations"] = raw["observations"] + 1
    raw["timeouts"][[0, 3, 4]] = True
    view, notes = qlearning_view(raw, 3, whole=True)
    assert (step_sizes(view) == 1).all() and len(view["obs"]) == 5 and view["returns"].tolist() == [1, 3, 1]
    assert np.flatnonzero(np.isnan(view["next_actions"]).all(1)).tolist() == [0, 3, 4] and not notes
    raw["terminals"] |= raw["timeouts"]  # terminated, too, and at the limit: an end is an end
    assert qlearning_view(raw, 3, whole=True)[0]["terminations"].tolist() == [1, 0, 0, 1, 1]
    view, notes = qlearning_view(raw, 2, whole=True)  # longer than the limit of its environment
    assert view["returns"].tolist() == [1, 3, 1] and not notes
