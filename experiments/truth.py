"""Does any stage make Q right, and not merely agree with the policy? From held-out states one action near the offline
policy's most likely one, then the offline policy, in the simulator: the truth, beside Q after each stage. Whether Q
knows which states are good (its level) is one question, whether it knows which actions are good in a state another.

    python experiments/truth.py
    python experiments/truth.py --algorithms o2td3 --states 100 --actions 32
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the script runs from anywhere

from common import cli, datasets, policies
from common.bounds import between, even
from common.checkpoint import verify
from common.probe import ACTIONS, STATES, rank_correlation
from experiments import analysis, harness, rollouts
from experiments.harness import Spec, full, scripts

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

SIDE_BY_SIDE = 512  # environments, of about a megabyte each
PREFERENCE, HALVES, PERFECT = "π_off's preference", "two halves of the rollouts", "a perfect Q, about"
NOTE = """
Level: Q of the most likely action ȧ, over the states. Ranking: of a state's sampled actions, its mean over the states.
Behind ± are standard errors over states, whose values are means over the runs. Q is the critics' lowest. The truth is
the mean of the rollouts; how much of it is chance two halves of them show: from their agreement h follows what a
perfect Q would come to, (2 h / (1 + h))^½. π_off's preference: its log-probability, of O2TD3 minus the distance from ȧ.
Fine-tuned, Q is of another policy than the one that is played here, and has the constraint's penalty in it."""


@dataclass
class Args(harness.Args):
    algorithms: tuple[str, ...] = ("o2sac", "o2td3")
    """the online algorithms; O2PPO has no Q"""
    states: Annotated[int, between(3, STATES)] = 48
    """held-out states, as far as the simulator can be put into them"""
    actions: Annotated[int, between(3, ACTIONS)] = 16
    """sampled actions in each, those with which the probe measures; the most likely one comes on top"""
    rollouts: Annotated[int, even()] = 8
    """episodes of each action; noise is the same for all actions of a state"""
    noise: bool = True
    """then π_off plays as in the algorithm's Bellman equation: O2SAC's samples, whose entropy counts, O2TD3's target
    noise; without: its most likely actions, of which one episode is all there is to know"""


# With N states, K actions sampled in each, and R rollouts: Q and preference are (N, 1 + K), the most likely action ȧ
# before the sampled ones, and returns (R, N, 1 + K). Statistics take a list of each, one of every run.


def measured(args: Args, spec: Spec, known: dict) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Of a finished run Q after each stage, by its word for the result, π_off's preference, and the returns.

    The returns are `known` where another run has started from the same policy.
    """
    script, chosen, folder = scripts.online(spec.script), harness.parsed(args, spec), harness.folder(args, spec)
    policy = policies.read(folder / "policy.pt")
    data = rollouts.held_out(chosen, rollouts.dataset(chosen))
    data = data.rows(torch.linspace(0, len(data) - 1, min(args.states, len(data))).long())
    seen = copy.copy(data)
    seen.standardise(policy["state_mean"], policy["state_std"], policy.get("clip", math.inf))
    agent, q = script.Agent(chosen, policy), {}
    for stage in script.STAGES:
        if not stage.number(chosen):  # left out
            continue
        verify(path := folder / f"{stage.name}.pt")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        agent.load_state_dict(saved["state"]["agent"])
        probe = script.critic_probe(chosen, agent, seen)
        actions = torch.cat([probe.anchor[None], probe.sampled[: args.actions]])
        with torch.no_grad():
            q[stage.done] = torch.stack([probe.q(seen.obs, a) for a in actions], 1).double()
    net = policies.module(policy | {"actor": agent.actor_offline.state_dict()})
    key = b"".join(weights.numpy().tobytes() for weights in net.state_dict().values())
    if key not in known:
        known[key] = true_returns(args, data, actions, net, chosen)
    return q, F.pad(probe.preference[: args.actions].T.double(), (1, 0)), known[key]  # that of ȧ nobody asks for


def true_returns(args: Args, data: datasets.Dataset, actions: torch.Tensor, net, chosen) -> torch.Tensor:
    """Discounted returns of each of the actions (1 + K, N, A) and then π_off, (R, N, 1 + K)."""
    torch.manual_seed(0)
    k, n = actions.shape[:2]
    found = np.zeros((args.rollouts if args.noise else 1, k, n))
    pool = []
    with tqdm(total=found.size, desc="rollouts", unit="episode") as bar:
        for states in np.array_split(np.arange(n), -(-k * n // SIDE_BY_SIDE)):
            rows, first = np.tile(states, k), actions[:, states].flatten(0, 1)
            luck = np.tile(np.arange(len(states)), k)  # what differs between the actions of a state is not chance
            for rollout in found:
                returns = rollouts.returns_ahead(pool, data, rows, net, chosen, first, luck, args.noise)
                rollout[:, states] = returns.reshape(k, -1)
                bar.update(len(rows))
    return torch.as_tensor(found).transpose(1, 2)


# ----------------------------------------------------------------------------------------------- statistics


def correlation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Pearson's, along the last dimension, (..., K) twice -> (...); 0 where either is constant."""
    x, y = (values - values.mean(-1, keepdim=True) for values in (x, y))
    return ((x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()).nan_to_num(0.0)


def over_states(values: list[torch.Tensor]) -> tuple[float, float]:
    """The mean of what is (N,) in each run, and its standard error over the states, which all runs have in common."""
    mean = torch.stack(values).mean(0)
    return mean.mean().item(), (mean.std() / len(mean) ** 0.5).item()


def level(q: list[torch.Tensor], truth: list[torch.Tensor]) -> dict[str, tuple[float, float]]:
    """How right Q is about the returns of ȧ: means of both, the bias, and the correlation over the states."""
    pairs = [(x[:, 0], y[:, 0]) for x, y in zip(q, truth, strict=True)]
    n = len(pairs[0][0])
    drawn = torch.randint(n, (1_000, n), generator=torch.Generator().manual_seed(0))  # bootstrap
    over_runs, again = (torch.stack([correlation(x[rows], y[rows]) for x, y in pairs]).mean(0)
                        for rows in (torch.arange(n), drawn))  # fmt: skip
    x, y = zip(*pairs, strict=True)
    bias = [a - b for a, b in pairs]
    return {"Q": over_states(x), "return": over_states(y), "bias": over_states(bias),
            "correlation": (over_runs.item(), again.std().item())}  # fmt: skip


def ranking(values: list[torch.Tensor], truth: list[torch.Tensor]) -> dict[str, tuple[float, float]]:
    """How the values of a state's sampled actions go along with their returns: Spearman's ρ, and the correlation."""
    pairs = [(x[:, 1:], y[:, 1:]) for x, y in zip(values, truth, strict=True)]
    return {"Spearman's ρ": over_states([rank_correlation(*pair) for pair in pairs]),
            "correlation": over_states([correlation(*pair) for pair in pairs])}  # fmt: skip


def spread(values: list[torch.Tensor], again: list[torch.Tensor]) -> float:
    """How far apart the values of a state's sampled actions are: (mean covariance)^½ with the same, measured again.

    Of values that are exact that is their standard deviation; of two halves of the rollouts it is free of chance.
    """
    centred = [[v[:, 1:] - v[:, 1:].mean(1, keepdim=True) for v in pair] for pair in zip(values, again, strict=True)]
    return max(0.0, torch.stack([(x * y).mean() for x, y in centred]).mean().item()) ** 0.5


def perfect(agreement: float) -> float:
    """What a perfect Q correlates with the mean of all rollouts, if two halves of them correlate so much."""
    return (2 * max(agreement, 0.0) / (1 + max(agreement, 0.0))) ** 0.5


# ----------------------------------------------------------------------------------------------- the page


def pm(found: tuple[float, float], digits: int = 2) -> str:
    return f"{found[0]:.{digits}f} ± {found[1]:.{digits}f}"


def draw(panels, q: dict[str, list[torch.Tensor]], truth: list[torch.Tensor], ranks: dict) -> None:
    """On the left Q of ȧ over its return, a dot a state of the first run; on the right how well actions are ranked."""
    for label, values in q.items():
        panels[0].scatter(truth[0][:, 0], values[0][:, 0], s=10, alpha=0.7, label=label)
    panels[0].axline((truth[0][0, 0].item(),) * 2, slope=1, color="0.5", linestyle=":")
    panels[0].set_xlabel("return of the most likely action")
    panels[0].set_ylabel("Q of it (on the dotted line is right)")
    analysis.legend(panels[0])
    means, errors = zip(*ranks.values(), strict=True)
    panels[1].errorbar(range(len(ranks)), means, errors, fmt="o", capsize=3)
    panels[1].axhline(0, color="0.7", linewidth=0.8)
    if HALVES in ranks:
        panels[1].axhline(perfect(ranks[HALVES][0]), color="0.3", linestyle=":", label=PERFECT)
        analysis.legend(panels[1], below=85)
    panels[1].set_xticks(range(len(ranks)), ranks, rotation=30, ha="right", fontsize=8)
    panels[1].set_ylabel("ρ with the returns in a state\n(0 is chance)")


def main() -> None:
    args = cli.read(Args, __doc__)
    if lacking := [y for y in args.algorithms if not hasattr(scripts.online(y), "critic_probe")]:
        raise cli.UserError(f"{', '.join(lacking)}: without a critic_probe there is no Q to be asked; see --algorithms")
    specs = {y: [full(args, y, seed) for seed in range(args.seeds)] for y in args.algorithms}
    for runs in specs.values():  # a critic of the offline algorithm's is not in the policy.pt that a run leaves
        harness.check_stages(args, runs[0], "reevaluate")
        rollouts.check(harness.parsed(args, runs[0]))
    failures = harness.run_all(args, [spec for runs in specs.values() for spec in runs])
    done = {y: [spec for spec in runs if harness.finished(args, [spec])] for y, runs in specs.items()}
    done = {y: runs for y, runs in done.items() if runs}
    report = analysis.Report(args, "truth", "Does any stage make Q right, and not merely agree with the policy?")
    figure, panels = analysis.panels([f"{Path(y).stem}: {what}" for y in done for what in ("level", "ranking")], False)
    levels, rankings = [], []
    for i, (y, runs) in enumerate(done.items()):
        known = {}
        by_run, preference, returns = zip(*(measured(args, spec, known) for spec in runs), strict=True)
        q, truth = {word: [run[word] for run in by_run] for word in by_run[0]}, [r.mean(0) for r in returns]
        compared = {word: (values, truth) for word, values in q.items()} | {PREFERENCE: (preference, truth)}
        if args.noise:  # else one rollout is all, and exact
            compared[HALVES] = tuple(zip(*([half.mean(0) for half in r.chunk(2)] for r in returns), strict=True))
        ranks = {word: ranking(*pair) for word, pair in compared.items()}
        for word, (values, true) in compared.items():
            apart = "" if word == PREFERENCE else f"{spread(values, true if word == HALVES else values):.2f}"
            rankings.append([y, word, *map(pm, ranks[word].values()), apart])
            if word != PREFERENCE:
                cells = [pm(found, 2 if name == "correlation" else 1) for name, found in level(values, true).items()]
                levels.append([y, word, str(len(runs)), str(len(truth[0])), *cells])
        if HALVES in ranks:
            rankings.append([y, PERFECT, *(f"{perfect(found[0]):.2f}" for found in ranks[HALVES].values()), ""])
        draw(panels[2 * i : 2 * i + 2], q, truth, {word: found["Spearman's ρ"] for word, found in ranks.items()})
    report.table("Level: Q of π_off's most likely action beside its return",
                 ["", "", "runs", "states", "Q", "return", "bias", "correlation over states"], levels)  # fmt: skip
    report.table(f"Ranking: Q of {args.actions} sampled actions in a state beside their returns",
                 ["", "", "Spearman's ρ", "correlation", "spread in a state"], rankings)  # fmt: skip
    report.figure(figure)
    report.text.append(NOTE)
    specs = [spec for runs in done.values() for spec in runs]
    report.finish(analysis.results(harness.finished(args, specs)), failures)


if __name__ == "__main__":
    cli.run(main)
