"""D4RL's Q-learning view: a file's rows as transitions, its flags held against its arrays.

Row i is one step of an episode: an observation, the action taken, its reward, and whether the episode ended there,
really (`terminals`) or by a time limit (`timeouts`). What follows it is row i + 1, or `next_observations[i]` where the
file has them. Files that people write themselves have flags that are missing, false or of the wrong kind; a transition
that the arrays contradict is never kept, whatever the flags say.
"""

import numpy as np

from common.errors import UserError


def qlearning_view(
    raw: dict, max_steps: int, whole: bool = False, goes_on: bool = False, marked: bool = False
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The transitions of `raw`, as the columns of a `Dataset`, and a sentence on everything that was put right.

    A step that the time limit cut off is dropped, as D4RL does, for the row after it belongs to another episode; so is
    the file's last row where nothing says what follows it. With `whole` (Minari) the next observations are those of the
    episodes themselves and no row is dropped. `terminations` marks real ends alone. An episode ends at every flag,
    where the next row does not follow, and after `max_steps` steps. `next_actions` are NaN where the data hold none.
    `ordered` says whether rows follow each other at all: if not, every row is an episode of its own.

    With `goes_on` (AntMaze) an episode goes on after a row that is terminal, and nothing but a time-out ends it. With
    `marked` (Adroit) its time-outs, where there are any, are all of them: a demonstration may be longer than the limit.
    """
    notes: list[str] = []
    whole_numbers = {key: value for key, value in raw.items() if "observations" in key and value.dtype.kind in "biu"}
    raw = raw | {key: value.astype(np.float64) for key, value in whole_numbers.items()}  # whose differences are numbers
    raw, follows = in_order(raw, notes)
    n, index = len(raw["rewards"]), np.arange(len(raw["rewards"]))
    rewards = raw["rewards"].reshape(n).astype(np.float32)
    terminals, timeouts = flags(raw)
    false = np.zeros(n, bool) if goes_on else false_ends(raw, terminals, timeouts, follows)
    terminals &= ~false

    ended = timeouts if goes_on else terminals | timeouts
    jumps = ~(follows | ended)
    ordered = jumps.sum() <= n / 2
    if not ordered:
        check_next(raw, jumps)
    resets = np.zeros(n, bool) if whole or goes_on else only_resets(raw, rewards, ended, follows)

    # Steps since the episode's start, and the flags where the time limit ends it
    starts = np.concatenate([[True], (ended | jumps | resets)[:-1]])
    step = index - np.maximum.accumulate(np.where(starts, index, 0))
    marked = marked and bool(timeouts.any())
    at_limit = (step % max_steps == max_steps - 1) & (not (goes_on or marked))
    real = np.zeros(n, bool) if whole or goes_on else ended_early(terminals, timeouts, step, max_steps)
    timeouts &= ~real
    no_deaths = at_limit & terminals & ~timeouts
    unmarked = at_limit & ~(ended | jumps | resets) & (index < n - 1) & (not whole)
    terminals, timeouts = terminals & ~no_deaths, timeouts | no_deaths | unmarked

    ends = ended | timeouts | jumps | resets
    keep = ~resets & (whole | ~timeouts)
    keep[-1] &= "next_observations" in raw
    episode = np.concatenate([[0], np.cumsum(ends)[:-1]])
    counts = np.bincount(episode[keep], minlength=episode[-1] + 1)
    number = np.cumsum(counts > 0) - 1  # of those episodes that have a transition at all

    limit = f"time limit of {max_steps:,} steps"
    if not ordered:
        notes.append("the rows do not follow one another, as in a shuffled file: each counts as an episode of its own")
    elif jumps.any():
        notes.append(f"episodes cut where the next row does not follow, though nothing marks an end: {jumps.sum():,}")
    if unmarked.any():
        notes.append(f"episodes cut at the {limit}, though nothing marks it: {unmarked.sum():,}")
    if no_deaths.any():
        notes.append(f"terminals at the {limit}, taken for time-outs: {no_deaths.sum():,}")
    if false.any():
        notes.append(f"terminals after which the episode goes on, not taken for ends: {false.sum():,}")
    if real.any():
        notes.append(f"terminals before the {limit} that `timeouts` marks, too, taken for real ends: {real.sum():,}")
    if marked and (longest := int(step.max()) + 1) > max_steps:
        notes.append(f"episodes of up to {longest:,} steps, beyond the {limit}: their returns are out of reach in play")
    if resets.any():
        notes.append(f"rows that only reset the environment, left out: {resets.sum():,}")

    rows = np.flatnonzero(keep)
    following = np.minimum(rows + 1, n - 1)
    obs = raw["observations"].astype(np.float32, copy=False)
    actions = raw["actions"].astype(np.float32, copy=False).clip(-1, 1)
    next_obs = raw["next_observations"][rows] if "next_observations" in raw else obs[following]
    view = {
        "obs": obs[rows],
        "actions": actions[rows],
        "next_actions": np.where((ends | (index == n - 1))[rows, None], np.float32(np.nan), actions[following]),
        "rewards": rewards[rows],
        "next_obs": next_obs.astype(np.float32, copy=False),
        "terminations": terminals[rows].astype(np.float32),
        "episode": number[episode[rows]],
        "returns": np.bincount(episode, weights=rewards)[counts > 0],
        "ordered": bool(ordered),
    }
    if "qpos" in raw and "qvel" in raw:
        states = [raw[key] for key in ("qpos", "qvel", "scene") if key in raw]
        view["states"] = np.concatenate(states, axis=1)[rows]
    return view, notes


def false_ends(raw: dict, terminals: np.ndarray, timeouts: np.ndarray, follows: np.ndarray) -> np.ndarray:
    """Terminal rows that lead to the next row, where nine of ten terminal rows do not, (N,).

    Raises UserError where most do and episodes end elsewhere, by either flag. Leading to the next row alone proves
    nothing: a reset may be a row of its own, or what `next_observations` shows at every end.
    """
    ends = terminals & ~timeouts
    ends[-1] = False
    going = ends & follows
    late = (~follows & ~(terminals | timeouts)).sum() > ends.sum() / 2
    masks = ends.mean() > 0.5 and (~follows & (~terminals | timeouts)).any()
    going_on = going.sum() > 0.8 * ends.sum() and (late or masks)
    wrong = {
        "terminals": going_on or leaps_elsewhere(raw["observations"], ends, follows),
        "timeouts": leaps_elsewhere(raw["observations"], timeouts, follows),
    }
    if any(wrong.values()):
        name, ended = ("terminals", "really ended") if wrong["terminals"] else ("timeouts", "was cut off")
        alone = "; or, if each row is an episode of its own, shuffle the rows" if (terminals | timeouts).all() else ""
        raise UserError(
            f"`{name}` marks rows after which the episode goes on: these flags are a row late, or masks (1 = goes on); "
            f"write 1 in the last row of each episode that {ended}, and 0 in all others{alone}"
        )
    firsts = raw["observations"][np.roll(ends, 1)]
    if not going.any() or going.sum() > 0.1 * ends.sum() or len(np.unique(firsts, axis=0)) < len(firsts):
        return np.zeros(len(ends), bool)  # where all episodes begin alike, one may begin just where another one ended
    going[:-1] &= ends[1:] | (raw["rewards"].reshape(-1)[1:] != 0)  # not into a row that only resets
    return going


def leaps_elsewhere(obs: np.ndarray, ends: np.ndarray, follows: np.ndarray) -> bool:
    """Whether observations (N, S) leap, as they do from one episode to another, elsewhere than after most of `ends`.

    Elsewhere: a row before; or, where most rows are ends, after the others. In the latter case the observations after
    ends have to differ, too: episodes of one step may all begin alike. All rows are such episodes where next
    observations are not the next rows'.
    """
    scale = obs[:: max(1, len(obs) // 10_000)].std(0, dtype=np.float64) + 1e-3

    def leap(rows, others):
        some = slice(None, None, max(1, len(rows) // 10_000))
        return np.median(np.abs((obs[rows[some]].astype(np.float64) - obs[others[some]]) / scale).mean(1))

    rows, others = np.flatnonzero(ends[:-1]), np.flatnonzero(~ends[:-1])  # those that a row comes after
    if len(rows) < 10 or (not len(others) and follows.mean() < 0.5):
        return False
    after = leap(rows, rows + 1)
    if len(rows) > len(others):
        elsewhere = [leap(others, others + 1)] if len(others) else []
        return min([leap(rows + 1, np.roll(rows, len(rows) // 2) + 1), *elsewhere]) > 5 * after
    return leap(rows[rows > 0] - 1, rows[rows > 0]) > 5 * max(after, leap(others, others + 1))


def ended_early(terminals: np.ndarray, timeouts: np.ndarray, step: np.ndarray, max_steps: int) -> np.ndarray:
    """Rows that really ended, though both flags are set: `timeouts` of many a file means that the episode is over.

    At the time limit a row with both is a time-out. So are all of them where `timeouts` does not mean that, as an end
    without it shows; and where `terminals` does, every time-out being terminal, and most of them come after equally
    many steps, or after one of few numbers of steps: under such limits the data were collected.
    """
    both = terminals & timeouts & (step % max_steps != max_steps - 1)
    often = np.bincount(step[both], minlength=1)[step[both]] >= max(2, 0.2 * both.sum())
    own_limit = both.any() and often.mean() > 0.5 and not (timeouts & ~terminals).any()
    return both & (not own_limit) & (not (terminals & ~timeouts).any())


def timeouts_put_right(raw: dict) -> list[str]:
    """Take qpos and qvel out of `raw`, which are the state after each row, and move its time-outs to where the next row
    shows another one: a sentence where they stood elsewhere."""
    if "qpos" not in raw or "qvel" not in raw:
        return []
    states = np.concatenate([raw.pop("qpos"), raw.pop("qvel")], axis=1)
    if states.shape != raw["observations"].shape:
        return []
    ends = np.append(~successors(raw | {"next_observations": states}), True)
    marked = flags(raw)[1]
    moved = (ends & ~marked)[:-1].sum()
    if ends.mean() > 0.5 or (ends == marked)[:-1].all():
        return []
    raw["timeouts"] = ends
    return [f"time-outs in the wrong rows, moved to where the next row begins another episode: {moved:,}"]


def check_next(raw: dict, rows: np.ndarray) -> None:
    """Refuse next observations that are the rows' own ones, or the same in all `rows`. Raises UserError."""
    own, following = (raw[key][rows].astype(np.float32, copy=False) for key in ("observations", "next_observations"))
    if (following == own).all(1).mean() > 0.94 or (following == following[0]).all():
        raise UserError(
            "`next_observations` are the rows' own observations, or the same in all rows; write into each row what was "
            "observed after its action, or, if the rows are in order and ends marked, leave them out"
        )


def flags(raw: dict) -> tuple[np.ndarray, np.ndarray]:
    """(terminals, timeouts), boolean, (N,) each."""
    n = len(raw["rewards"])
    return tuple(
        raw[key].reshape(n).astype(bool) if key in raw else np.zeros(n, bool) for key in ("terminals", "timeouts")
    )


def successors(raw: dict, stride: int = 1) -> np.ndarray:
    """Whether each row leads to what the row `stride` later observes, up to rounding: (N - stride,).

    A hundredth of a column's spread is no rounding, however far from 0 it lies, unless float32 takes it for one.
    """
    n, size = len(raw["rewards"]) - stride, 1 << 14  # chunks that stay in the processor's cache
    spread = raw["observations"][:: max(1, n // 10_000)].std(0, dtype=np.float64).astype(np.float32)
    same = np.empty(max(n, 0), bool)
    for start in range(0, n, size):
        chunk = slice(start, min(start + size, n))
        later = raw["observations"][chunk.start + stride : chunk.stop + stride]
        far = np.abs(later)
        rounding = 1e-5 + np.minimum(1e-5 * far, np.maximum(1e-2 * spread, 2.5e-7 * far))
        same[chunk] = (np.abs(raw["next_observations"][chunk] - later) <= rounding).all(1)
    return same


def in_order(raw: dict, notes: list[str]) -> tuple[dict, np.ndarray]:
    """The arrays in the order of their episodes, and whether each row's next observation is the next row's, (N,).

    Where several environments were stepped in turn, the next row of each comes as many rows later as there are
    environments; these rows are put in order, one environment after another. The last row is followed by none; that is
    no jump, and so it counts as followed.
    """
    n = len(raw["rewards"])
    if "next_observations" not in raw:
        return raw, np.ones(n, bool)
    ended, follows = np.logical_or(*flags(raw)), np.append(successors(raw), True)
    ended &= ended.mean() <= 0.5  # flags in most rows may be masks, and hide an order
    if (follows | ended).mean() >= 0.5:
        return raw, follows
    for row in np.flatnonzero(~ended)[:10]:
        later = raw["observations"][row + 1 : row + 1_025]
        for stride in np.flatnonzero((np.abs(later - raw["next_observations"][row]) < 1e-5).all(1))[:3] + 1:
            if (successors(raw, stride) | ended[:-stride]).mean() > 0.9:
                notes.append(
                    f"the rows of {stride} environments are interleaved: they were put in order, one environment after "
                    "another"
                )
                order = np.argsort(np.arange(n) % stride, kind="stable")
                raw = {key: value[order] for key, value in raw.items()}
                return raw, np.append(successors(raw), True)
    return raw, follows


def only_resets(raw: dict, rewards: np.ndarray, ended: np.ndarray, follows: np.ndarray) -> np.ndarray:
    """Rows in which a vector environment did nothing but start again, (N,).

    Since Gymnasium 1.0 it does so in the step after an end: that row's action is ignored, its reward is exactly 0, and
    it leads from the last observation of the old episode to the first one of the new. Without `next_observations` such
    rows are known by rewards that are 0 after every end and hardly anywhere else.
    """
    after = np.concatenate([[False], ended[:-1]])
    if "next_observations" in raw:
        after &= np.concatenate([[False], follows[:-1]]) & (rewards == 0)
    elif not (after.any() and (rewards[after] == 0).all() and (rewards[~after] == 0).mean() < 0.01):
        after[:] = False
    return after & ~ended
