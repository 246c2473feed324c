"""How much constraint? The threshold τ of O2SAC and O2TD3 over a factor of 100 each way, their multiplier λ at rest and
ten times as fast, and O2PPO's β from 0 to 1: speed (area under the curve) against stability (largest drop below the
offline score).

    python experiments/constraint.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli
from common.usage import flag_of
from experiments import analysis, arms, harness
from experiments.arms import Args
from experiments.harness import Spec, full, scripts

FACTORS = (0.01, 0.1, 1, 10, 100)
RATES = (0, 10)  # of the multiplier λ; with 0 it stays what it was at the start
BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def threshold_flags(args: Args, spec: Spec, factor: float) -> list[str]:
    """Both ends of the script's threshold, times `factor`. Raises UserError where it has none."""
    chosen = harness.parsed(args, spec)
    ends = [name for name in vars(chosen) if name.endswith(("_threshold_start", "_threshold_end"))]
    if len(ends) != 2:
        raise cli.UserError(f"{spec.script} has no arguments …_threshold_start and …_threshold_end, nor --beta-start")
    values = [(flag_of(name), str(getattr(chosen, name) * factor)) for name in ends]
    return [word for flag in values for word in flag]


def draw(panel, groups: dict[str, list[Path]]) -> None:
    """Speed and stability of each setting; runs are dots, their interquartile means, as in the table, diamonds."""
    for i, (key, label) in enumerate({"area": "area (speed)", "drop": "largest drop"}.items()):
        runs = [[analysis.summary(path)[key] for path in paths] for paths in groups.values()]
        means = [analysis.middle(r) if r else float("nan") for r in runs]
        panel.plot(means, color=f"C{i}", label=label, marker="D", linestyle="none")
        for x, values in enumerate(runs):
            panel.scatter([x] * len(values), values, color=f"C{i}", s=12, alpha=0.6)
    panel.set_xticks(range(len(groups)), [name.replace(" ×", "\n×") for name in groups], fontsize=7)
    measure = analysis.measure([path for paths in groups.values() for path in paths])
    panel.set_ylabel(f"{measure} (higher is better), and\npoints of it lost (less is better)")


def settings(args: Args, script: str, seed: int) -> dict[str, Spec]:
    harness.check_own(args, "--beta-start", "--no-constrain")
    base = full(args, script, seed)
    if hasattr(scripts.online(script).Args, "beta_start"):
        own = harness.parsed(args, base).beta_start
        return {f"β {beta:g}": base if beta == own else base.variant(f"beta{beta:g}", "--beta-start", str(beta))
                for beta in BETAS}  # fmt: skip
    runs = {}
    for factor in FACTORS:
        flags = threshold_flags(args, base, factor)
        runs[f"τ × {factor:g}"] = base if factor == 1 else base.variant(f"tau{factor:g}", *flags)
    rate = getattr(harness.parsed(args, base), "lagrange_lr", None)
    for factor in RATES if rate is not None else ():  # a script of one's own may have no such multiplier
        runs[f"λ's rate × {factor:g}"] = base.variant(f"lambda{factor:g}", "--lagrange-lr", str(rate * factor))
    return runs


if __name__ == "__main__":
    title = "How much constraint?"
    caption = "Dots: runs; diamonds: their interquartile means. What alignment loses counts from the start on."
    cli.run(lambda: arms.comparison(cli.read(Args, __doc__), "constraint", title, settings, draw=draw, caption=caption))
