"""Whether a measured curve has come to rest."""

import torch

LOOKS = 100  # values within a stage's limit
SHORTEST = 5  # values in a quarter, at least
CHANGE = 0.03  # from a quarter to the next, at most, as a share of the curve's value


class Plateau:
    """Whether a curve has come to rest, by its own scatter and scale. `scalar` names it, `reached` says whether it did.

    The mean x̄₂ of the last quarter of its values, w of them, is set against the mean x̄₁ of the quarter before. It rests
    where what can be seen of a change, and the standard error that the scatter of the values leaves to it, are small:

        |x̄₂ - x̄₁| + √((s₁² + s₂²) / w) ≤ CHANGE |x̄₂|

    So scatter counts against rest, and a noisy curve has to be watched for longer; a slow climb is no rest because it
    cannot be told from noise. Quarters grow with the curve, so a climb at any pace stays one: a straight line changes
    by 29% from quarter to quarter, a square root by 15%, and twice as many steps would add some 6% to one that rests. A
    curve that stays near 0 never does.
    """

    def __init__(self, scalar: str):
        self.scalar, self.reached = scalar, False
        self.values: list[float] = []

    def add(self, value: float) -> bool:
        """Take the curve's next value in; whether it is at rest."""
        self.values.append(value)
        w = len(self.values) // 4
        if w >= SHORTEST:
            before, last = torch.tensor(self.values[-2 * w :]).double().split(w)
            error = ((before.var() + last.var()) / w).sqrt()
            self.reached = bool((last.mean() - before.mean()).abs() + error <= CHANGE * last.mean().abs())
        return self.reached

    def state_dict(self) -> dict:
        return {"values": self.values, "reached": self.reached}

    def load_state_dict(self, state: dict) -> None:
        self.values, self.reached = list(state["values"]), state["reached"]
