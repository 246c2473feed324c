"""Hand a policy of one kind on to an online algorithm whose actor is of another kind."""

import torch

from common import loop, policies
from common.checkpoint import seed_everything
from common.datasets import Dataset
from common.nn import gaussian_log_prob, in_chunks


def transfer(policy: dict, kind: str, data: Dataset, evaluator, run, steps: int = 10_000, noise: float = 0.1) -> dict:
    """`policy` as one of `kind`: itself where it is one already, else a copy whose fidelity is measured and printed.

    Networks of ours share their layers up to the head, so the most likely action is copied exactly; a policy from
    elsewhere is distilled: its most likely actions are regressed on over the dataset's states. The spread around them
    is fitted by maximum likelihood to actions that the source samples. A deterministic source has none; it is taken as
    TD3 plays it, with Gaussian noise of `noise`. `data` is standardised; the policy's `score` has been measured.

    It is a stage of `run`, "transfer", which begins with the run's seed and goes on where it was stopped: the same
    policy comes out whatever was trained before it.
    """
    if policy["kind"] == kind:
        return policy
    seed_everything(run.args.seed)
    run.last_score = policy["score"]  # part of the stage's checkpoints: a new start has seen no other score
    device, exact = data.obs.device, policy["kind"] != "function"
    source = policies.player(policy)
    net = policies.Policy(kind, policy["obs_dim"], policy["action_dim"], policy["hidden_layers"]).to(device)
    if exact:
        copy_mean(source, net, policy["action_dim"])
    if kind != "deterministic" or not exact:
        distil(source, net, data.obs, exact, steps // (5 if exact else 1), noise, run)
    rows = torch.arange(0, len(data), max(1, len(data) // 10_000), device=device)
    with torch.no_grad():
        error = (net.mode(data.obs[rows]) - source.mode(data.obs[rows])).abs().mean().item()
    score = evaluator(net.mode, device, final=True)
    print(
        f"transfer: {policy['algorithm']} ({policy['kind'].replace('_', ' ')}) → {kind.replace('_', ' ')}: mean action "
        f"error {error:.2g}, {data.task.measure} {policy['score']:.1f} → {score:.1f}"
    )
    return policy | {"kind": kind, "actor": net.state_dict(), "score": score, "transfer_error": error}


@torch.no_grad()
def copy_mean(source: policies.Policy, net: policies.Policy, action_dim: int) -> None:
    """Copy all layers; of the last one the rows of the mean, which both have. A new spread starts at exp(-2)."""
    theirs = source.net.state_dict()
    for name, mine in net.net.state_dict().items():
        n = min(len(mine), len(theirs[name]))
        mine[:n] = theirs[name][:n]
    if net.kind == "squashed_gaussian":
        net.net[-1].weight[action_dim:] = 0.0
        net.net[-1].bias[action_dim:] = -1.0
    elif net.kind == "gaussian":
        net.log_std.fill_(-2.0)


def distil(source, net: policies.Policy, obs: torch.Tensor, exact: bool, steps: int, noise: float, run) -> None:
    """Fit `net` to `source` on batches of `obs`: (mode - mode_source)² - log π(a|s), a ~ source.

    The likelihood moves the spread alone; where the mode is `exact` already, nothing else moves at all.
    """
    params = list(net.parameters())
    if exact:
        params = [net.log_std] if net.kind == "gaussian" else [net.net[-1].weight, net.net[-1].bias]
    optimizer = torch.optim.Adam(params, 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    modes = in_chunks(source.mode, obs)  # once: a program may take one observation at a time

    def step():
        rows = torch.randint(len(obs), (256,), device=obs.device)
        s, mode = obs[rows], modes[rows]
        with torch.no_grad():
            actions = source.sample(s)
            if actions is None:
                actions = (mode + noise * torch.randn_like(mode)).clamp(-1, 1)
        action_loss = ((net.mode(s) - mode) ** 2).sum(1).mean()
        metrics, loss = {"action_loss": action_loss}, action_loss
        if net.kind != "deterministic":
            mean, log_std = net.spread(s)
            x = torch.atanh(actions.clamp(-0.999, 0.999)) if net.kind == "squashed_gaussian" else actions
            metrics["log_prob"] = gaussian_log_prob(x, mean.detach(), log_std).mean()
            loss = loss - metrics["log_prob"]
        grads = torch.autograd.grad(loss, params)
        if exact and net.kind == "squashed_gaussian":
            for grad in grads:
                grad[: len(grad) // 2] = 0.0  # the mean's rows
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()
        schedule.step()
        return metrics

    state = {"net": net, "optimizer": optimizer, "schedule": schedule}
    loop.train(run, "transfer", lambda: step, steps, state, device=obs.device, log_every=1_000)
