"""How much constraint? The threshold τ of O2SAC and O2TD3 over a factor of 100 each way, and O2PPO's β from 0 to 1:
speed (area under the curve) against stability (largest drop below the offline score).

    python experiments/constraint.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

import o2sac
import o2td3
from common import cli
from experiments import analysis, harness
from experiments.harness import OFFLINE, Args, Spec

FACTORS = (0.01, 0.1, 1, 10, 100)
BETAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def threshold_flags(args: Args, script, prefix: str, factor: float) -> list[str]:
    """Both ends of the script's threshold, times `factor`."""
    preset = harness.parsed(args, Spec(script.__name__, OFFLINE[script.__name__], 0))
    at = script.threshold_at
    start, end = at(preset, 0), at(preset, getattr(preset, f"{prefix}_threshold_steps"))
    prefix = f"--{prefix}-threshold"
    return [f"{prefix}-start", str(start * factor), f"{prefix}-end", str(end * factor)]


def draw(panel, groups: dict[str, list[Path]]) -> None:
    """Speed and stability over the settings; every run is a dot, their means a line."""
    for i, (key, label) in enumerate(
        (("area", "area under the curve (speed)"), ("drop", "largest drop (instability)"))
    ):
        runs = [[analysis.summary(path)[key] for path in paths] for paths in groups.values()]
        panel.plot([sum(r) / len(r) if r else float("nan") for r in runs], color=f"C{i}", label=label)
        for x, values in enumerate(runs):
            panel.scatter([x] * len(values), values, color=f"C{i}", s=12, alpha=0.6)
    panel.set_xticks(range(len(groups)), groups)
    panel.set_ylabel(analysis.measure([path for paths in groups.values() for path in paths]))


def main() -> None:
    args = cli.read(Args, __doc__)

    def settings(name: str, seed: int) -> dict[str, Spec]:
        base = Spec(name, OFFLINE[name], seed)
        if name == "o2ppo":
            return {f"β {beta:g}": base.variant(f"beta{beta:g}", "--beta-start", str(beta)) for beta in BETAS}
        script, prefix = (o2sac, "kl") if name == "o2sac" else (o2td3, "mse")
        runs = {}
        for factor in FACTORS:
            flags = threshold_flags(args, script, prefix, factor)
            runs[f"τ × {factor:g}"] = base if factor == 1 else base.variant(f"tau{factor:g}", *flags)
        return runs

    caption = "Dots: runs; lines: their means. The aligned policy counts as an evaluation, for the drop too."
    analysis.comparison(args, "constraint", "How much constraint?", settings, draw=draw, caption=caption)


if __name__ == "__main__":
    cli.run(main)
