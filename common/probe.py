"""What a critic believes, measured on the same states that no stage trains on, in every run."""

from collections.abc import Callable

import torch
from torch import Tensor

STATES, ACTIONS = 256, 32


def spread(name: str, values: Tensor) -> dict[str, float]:
    """Mean, and 10% and 90% quantiles, of (N,)."""
    low, high = values.quantile(values.new_tensor([0.1, 0.9])).tolist()
    return {f"probe/{name}": values.mean().item(), f"probe/{name}_low": low, f"probe/{name}_high": high}


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's ρ along the last dimension, (..., K) twice -> (...). Ties share a rank; what is constant has ρ 0."""
    columns = x.unsqueeze(-1), y.unsqueeze(-1)
    x, y = ((v > v.mT).double().sum(-1) - (v < v.mT).double().sum(-1) for v in columns)  # twice the centred ranks
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt().clamp(min=1)


def fixed_noise(anchor: Tensor) -> Tensor:
    """Standard normal noise (K, N, A) for K actions beside each anchor (N, A), always the same."""
    noise = torch.randn(ACTIONS, *anchor.shape, generator=torch.Generator().manual_seed(0))
    return noise.to(anchor)


class Probe:
    """How Q ranks actions at states (N, S), against how π_off does.

    `q(obs, actions)` is the critic's estimate (N,), `act(obs)` the policy's most likely action (N, A). π_off is frozen:
    `anchor` (N, A) is its most likely action, `sampled` (K, N, A) are actions near it, and `preference` (K, N) rises
    with how much it prefers them. Nothing is drawn at random here, so a run is the same with a probe and without.
    """

    def __init__(self, held_out, q: Callable, act: Callable, anchor: Tensor, sampled: Tensor, preference: Tensor):
        self.obs, self.actions, self.q, self.act = held_out.obs, held_out.actions, q, act
        self.anchor, self.sampled, self.preference = anchor, sampled, preference

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Scalars to be logged; docs/scalars.md explains them."""
        acts, q_anchor = self.act(self.obs), self.q(self.obs, self.anchor)
        q_sampled = torch.stack([self.q(self.obs, actions) for actions in self.sampled])
        best = self.sampled.gather(0, q_sampled.argmax(0)[None, :, None].expand(1, *self.anchor.shape))[0]
        correlation = rank_correlation(self.preference.T, q_sampled.T)
        return {
            **spread("q_data", self.q(self.obs, self.actions)),
            **spread("q_policy", self.q(self.obs, acts)),
            "probe/rank_correlation": correlation.mean().item(),
            "probe/beats_anchor": (q_sampled > q_anchor).double().mean().item(),
            "probe/argmax_gap": ((best - self.anchor).square().mean(1).sqrt()).mean().item(),
            "probe/drift": (acts - self.anchor).square().mean().sqrt().item(),
        }
