"""Draw docs/method.png: the three stages as a sketch. The curves are drawn by hand, no run is behind them.

python docs/method.py
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

GREY, BLUE, ORANGE = "0.55", "C0", "C1"
STAGES = {
    "1. Re-evaluate the critic": r"$y = r + \gamma\,\bar Q(s', a'),\quad a' \sim \pi_{\mathrm{off}}$",
    "2. Align it with the policy": r"$Q(s, a) \leq Q(s, \dot a),\quad \dot a$: most likely under $\pi_{\mathrm{off}}$",
    "3. Fine-tune under a constraint": r"$J(\pi) \to \max$,  but  $D(\pi, \pi_{\mathrm{ref}}) < \tau$",
}


def bump(x: np.ndarray, centre: float, width: float) -> np.ndarray:
    return np.exp(-(((x - centre) / width) ** 2))


def draw() -> Figure:
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    panels = figure.subplots(1, 3)
    a = np.linspace(-1, 1, 200)
    true = 0.62 + 0.16 * bump(a, 0.1, 0.55)
    fitted = true + 0.1 * bump(a, -0.72, 0.2) - 0.03 * bump(a, 0.15, 0.2)

    panels[0].plot(a, true, color=GREY, linestyle=":", label="what the policy really gets")
    panels[0].plot(a, 0.08 + 0.5 * bump(a, 0.15, 0.3), color=ORANGE, label="offline algorithm's Q: low where data end")
    panels[0].plot(a, fitted, color=BLUE, label="new Q, by fitted Q evaluation")

    panels[1].plot(a, fitted, color=GREY, linestyle=":", label="re-evaluated: its best action is another")
    panels[1].plot(a, 0.76 - 0.28 * (a - 0.15) ** 2, color=BLUE, label="aligned: ranks actions as the policy does")
    panels[1].axvline(0.15, color="0.8", linewidth=1, zorder=0)
    panels[1].annotate("ȧ", (0.15, 0.03), (0.19, 0.03), color="0.4", fontsize=12)

    t = np.linspace(0, 1, 300)
    naive = 0.5 - 0.44 * (1 - np.exp(-t / 0.05)) + 0.42 * t + 0.1 * np.sin(26 * t) * t
    better = 0.5 + 0.4 * (1 - np.exp(-(t**1.5) / 0.25))
    panels[2].plot(t, naive, color=ORANGE, label="the naive switch")
    panels[2].plot(t, better, color=BLUE, label="near the best policy so far, ever more freely")
    panels[2].fill_between(t, better - 0.02 - 0.1 * t, better + 0.02 + 0.1 * t, color=BLUE, alpha=0.12, linewidth=0)
    panels[2].axhline(0.5, color=GREY, linestyle=":", label="the offline policy")

    axes = [("actions at a state", "Q")] * 2 + [("environment steps", "score")]
    for panel, (name, equation), (x, y) in zip(panels, STAGES.items(), axes, strict=True):
        panel.set_title(f"{name}\n{equation}", fontsize=12)
        panel.set(xlabel=x, ylabel=y, xticks=[], yticks=[], ylim=(0, 1.02))
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_suffix(".png"), dpi=110)
