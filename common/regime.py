"""Which is better when a run goes online, the policy that it starts from or the data? That decides what kind of method
helps (Li, Ni, Sun & Bacon, "The Three Regimes of Offline-to-Online Reinforcement Learning", arXiv 2510.01460)."""

import math

import numpy as np

MARGIN = 5.0  # points of normalised score; where returns are on no scale, so many percent of the data's

WORDS = {
    "superior": "the policy is better than the data, so methods that keep to the policy should help most",
    "inferior": "the data are better than the policy, so methods that replay the data should help most",
    "comparable": "neither the policy nor the data are clearly better",
}


def announce(run, data, evaluator, act) -> None:
    """Print the regime of a run that starts from the policy `act` on `data`, as they were loaded; keep it in `run`.

    The policy plays `--regime-episodes` episodes from starts that no evaluation has.
    """
    n, what = run.args.regime_episodes, data.task.measure
    if n is None:
        n = min(5 * run.args.eval_episodes, 50)
    if n < 2 or not data.ordered or len(data.returns) < 3:
        return
    of_policy = np.array([evaluator.score(r) for r in evaluator.fresh_returns(act, data.obs.device, n)])
    returns = data.returns.double().cpu().numpy()[:-1]  # the file may end in the middle of the last episode
    if data.task.goes_on:  # a maze's episode has a success once, but goes on being rewarded in the data
        returns = np.minimum(returns, data.task.references[1])
    of_data = np.array([evaluator.score(r) for r in returns])
    margin = MARGIN if data.task.references else MARGIN / 100 * abs(of_data.mean())
    found = compare(of_policy, of_data, margin)
    sides = {"policy": of_policy, "data": of_data}
    errors = {side: float(scores.std(ddof=1) / len(scores) ** 0.5) for side, scores in sides.items()}
    run.regime = {"regime": found, "margin": margin, "episodes": n}
    run.regime |= {side: float(scores.mean()) for side, scores in sides.items()}
    run.regime |= {f"{side}_error": error for side, error in errors.items()}
    policy, its_data = (f"{scores.mean():.1f} ± {errors[side]:.1f}" for side, scores in sides.items())
    print(
        f"regime: {found}; mean {what} of the policy {policy} ({n} episodes), of the data {its_data} "
        f"({len(of_data):,}): {WORDS[found]} (by more than {margin:.3g}, arXiv 2510.01460)"
    )


def compare(policy: np.ndarray, data: np.ndarray, margin: float) -> str:
    """superior, inferior or comparable: whether the mean of `policy` (n,) is above or below that of `data` (m,) by more
    than `margin`, in Welch's t-test at 5%."""
    variances = policy.var(ddof=1) / len(policy), data.var(ddof=1) / len(data)
    gap, error = policy.mean() - data.mean(), math.sqrt(sum(variances))
    if error:
        freedom = error**4 / (variances[0] ** 2 / (len(policy) - 1) + variances[1] ** 2 / (len(data) - 1))
        z = 1.6449
        t = z + (z**3 + z) / (4 * freedom)  # Student's 95% quantile, to 1% from 10 degrees of freedom on
        margin += t * error
    return "superior" if gap > margin else "inferior" if gap < -margin else "comparable"
