"""When the reference policy moves, if nothing but the training episodes may say so."""

import torch


class Outplayed:
    """Whether the policy has left its reference behind, judged by the returns of its training episodes alone.

    The reference itself never plays. The policy's last `window` episodes are set against its first since the reference
    moved, when it was near it still. It moves where their mean is higher by `margin` standard errors of the difference
    of the two means (Welch's statistic), so not before twice as many episodes have been played.
    """

    def __init__(self, window: int, margin: float):
        self.window, self.margin = window, margin
        self.reference: list[float] = []  # returns of the first episodes since the reference moved
        self.recent: list[float] = []  # of the last ones since then, at most `window`

    def add(self, episodic_return: float) -> bool:
        """Take an episode's return in; whether the policy should become the reference now."""
        if len(self.reference) < self.window:
            self.reference.append(episodic_return)
            return False
        self.recent = [*self.recent, episodic_return][-self.window :]
        if len(self.recent) < self.window:
            return False
        new, old = torch.tensor(self.recent).double(), torch.tensor(self.reference).double()
        error = ((new.var() + old.var()) / self.window).sqrt()
        if new.mean() - old.mean() <= self.margin * error:
            return False
        self.reference, self.recent = self.recent, []
        return True

    def state_dict(self) -> dict:
        return {"reference": self.reference, "recent": self.recent}

    def load_state_dict(self, state: dict) -> None:
        self.reference, self.recent = list(state["reference"]), list(state["recent"])
