"""Hand a policy of one kind on to an online algorithm whose actor is of another kind."""

import torch

from common import policies
from common.datasets import Dataset
from common.nn import gaussian_log_prob


def transfer(policy: dict, kind: str, data: Dataset, evaluator, progress, steps: int = 10_000, noise: float = 0.1):
    """`policy` as one of `kind`: itself where it is one already, else a copy whose fidelity is measured and printed.

    Networks of ours share their layers up to the head, so the most likely action is copied exactly; a policy from
    elsewhere is distilled: its most likely actions are regressed on over the dataset's states. The spread around them
    is fitted by maximum likelihood to actions that the source samples. A deterministic source has none; it is taken as
    TD3 plays it, with Gaussian noise of `noise`. `data` is standardised; `progress(total)` gives a progress bar.
    """
    if policy["kind"] == kind:
        return policy
    device, exact = data.obs.device, policy["kind"] != "function"
    source = policies.module(policy) if exact else policy["actor"]
    net = policies.Policy(kind, policy["obs_dim"], policy["action_dim"], policy["hidden_layers"]).to(device)
    if exact:
        copy_mean(source, net, policy["action_dim"])
    if kind != "deterministic" or not exact:
        distil(source, net, data.obs, exact, steps // (5 if exact else 1), noise, progress)
    rows = torch.arange(0, len(data), max(1, len(data) // 10_000), device=device)
    with torch.no_grad():
        error = (net.mode(data.obs[rows]) - source.mode(data.obs[rows])).abs().mean().item()
    before, after = evaluator(source.mode, device), evaluator(net.mode, device)
    print(
        f"transfer: {policy['algorithm']} ({policy['kind'].replace('_', ' ')}) → {kind.replace('_', ' ')}: mean action "
        f"error {error:.2g}, score {before:.1f} → {after:.1f}"
    )
    return policy | {"kind": kind, "actor": net.state_dict(), "score": after, "transfer_error": error}


@torch.no_grad()
def copy_mean(source: policies.Policy, net: policies.Policy, action_dim: int) -> None:
    """Copy all layers; of the last one the rows of the mean, which both have. A new spread starts at exp(-2)."""
    for theirs, mine in zip(source.net.parameters(), net.net.parameters(), strict=True):
        mine[: min(len(mine), len(theirs))] = theirs[: len(mine)]
    if net.kind == "squashed_gaussian":
        net.net[-1].weight[action_dim:] = 0.0
        net.net[-1].bias[action_dim:] = -1.0
    elif net.kind == "gaussian":
        net.log_std.fill_(-2.0)


def distil(source, net: policies.Policy, obs: torch.Tensor, exact: bool, steps: int, noise: float, progress) -> None:
    """Fit `net` to `source` on batches of `obs`: (mode - mode_source)² - log π(a|s), a ~ source.

    The likelihood moves the spread alone; where the mode is `exact` already, nothing else moves at all.
    """
    params = list(net.parameters())
    if exact:
        params = [net.log_std] if net.kind == "gaussian" else [net.net[-1].weight, net.net[-1].bias]
    optimizer = torch.optim.Adam(params, 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with progress(steps) as bar:
        for _ in range(steps):
            s = obs[torch.randint(len(obs), (256,), device=obs.device)]
            with torch.no_grad():
                mode = source.mode(s)
                actions = source.sample(s)
                if actions is None:
                    actions = (mode + noise * torch.randn_like(mode)).clamp(-1, 1)
            loss = ((net.mode(s) - mode) ** 2).sum(1).mean()
            if net.kind != "deterministic":
                mean, log_std = net.spread(s)
                x = torch.atanh(actions.clamp(-0.999, 0.999)) if net.kind == "squashed_gaussian" else actions
                loss = loss - gaussian_log_prob(x, mean.detach(), log_std).mean()
            grads = torch.autograd.grad(loss, params)
            if exact and net.kind == "squashed_gaussian":
                for grad in grads:
                    grad[: len(grad) // 2] = 0.0  # the mean's rows
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            optimizer.step()
            schedule.step()
            bar.update(1)
