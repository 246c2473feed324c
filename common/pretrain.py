"""What every script in offline/ does around its algorithm: run folder, evaluation, policy file, command line."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from common import agreement, cli, datasets, loop, steps
from common.bounds import above, at_least, only_with
from common.checkpoint import seed_everything
from common.evaluation import make_evaluator
from common.nn import hidden_of, widths_of
from common.policies import description_of, examples_of, range_of, read, save_policy
from common.run import Run, dataset_label, plain, script_name
from common.stages import idle
from common.tasks import Task

import torch


@dataclass
class PretrainArgs(cli.RunArgs):
    # offline training
    log_every: Annotated[int, at_least(1)] = 1_000
    """steps between logged means"""
    eval_every: Annotated[int, at_least(1)] = 5_000
    """steps between evaluations"""
    standardise: bool = True
    """standardise observations with the dataset's mean and std, here and in all that starts from this policy"""
    clip_observations: Annotated[float | None, above(0), only_with(standardise=True)] = None
    """hold standardised observations within ± this, there as well; None: at 10 for the Adroit hand and for ids of
    Gymnasium, else nowhere"""

    def constants(self, task: Task) -> dict:
        """What a script's own has to hold as well."""
        return dict(clip_observations=task.usual_clip)


def run_name(args) -> str:
    """<env_id>__<algorithm>__<seed>, and the preset if there is one."""
    preset = "" if args.preset == "none" else f"__{args.preset}"
    return f"{dataset_label(args)}__{args.exp_name}__{args.seed}{preset}"


def train(args, data: datasets.Dataset, Agent, Optimizers, training_step) -> Path:
    """Train on `data`, which is standardised here, and return the policy's path. A finished run trains nothing.

    `Agent(args, obs_dim, action_dim)` has `kind`, `actor`, `act(obs)` (its most likely actions) and, where it learns
    one, `critic`; one that plays otherwise as well has `evaluate(evaluator, device, last)`, which
    gives the "score" of `act` and what stands beside it. `training_step(args, data, agent, optimizers)` gives the step.
    """
    run, algorithm = Run(args, run_name(args), data, wait=True), script_name(args)
    try:
        return trained(run, algorithm, data, Agent, Optimizers, training_step)
    finally:
        run.lock.release()


def trained(run: Run, algorithm: str, data: datasets.Dataset, Agent, Optimizers, training_step) -> Path:
    """The policy's path, once it is there."""
    args, path = run.args, run.dir / "policy.pt"
    mean, std = data.statistics()
    clip = args.clip_observations or math.inf
    about = {} if path.exists() else {"examples": examples_of(data), "data": description_of(data, args)}
    if not args.standardise:
        mean, std, clip = torch.zeros_like(mean), torch.ones_like(std), math.inf
    data.standardise(mean, std, clip)
    data.transform_rewards(args.reward_scale, args.reward_shift)
    if path.exists():
        print(f"{path} is finished already, nothing is trained")
        return path
    seed_everything(args.seed)
    obs_dim, action_dim = data.obs.shape[1], data.actions.shape[1]
    agent = Agent(args, obs_dim, action_dim).to(data.obs.device)
    optimizers = Optimizers(args, agent)
    evaluator = make_evaluator(args, data, mean, std)

    def evaluate(last: bool) -> dict[str, float]:
        if hasattr(agent, "evaluate"):
            return agent.evaluate(evaluator, data.obs.device, last)
        return evaluator.scalars(agent.act, data.obs.device, last)

    loop.train(
        run, algorithm, lambda: training_step(args, data, agent, optimizers), args.steps,
        {"agent": agent, **optimizers},
        device=data.obs.device, compile=args.compile, log_every=args.log_every, evaluate_every=args.eval_every,
        evaluate=evaluate,
        phases=getattr(args, "policy_freq", 1),
    )  # fmt: skip
    critics = {}
    if hasattr(agent, "critic") and getattr(agent.critic, "n", 2) == 2:  # twins, which others can take over
        critics = {"critic": {
            "layer_norm": agent.critic.layer_norm, "hidden_layers": widths_of(agent.critic.net),
            "critic": agent.critic.state_dict(),
        }}  # fmt: skip
    learner = {"args": plain(args), "agent": agent.state_dict()}
    learner |= {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    save_policy(
        path, kind=agent.kind, obs_dim=obs_dim, action_dim=action_dim, hidden_layers=hidden_of(agent.actor.net),
        state_mean=mean, state_std=std, algorithm=algorithm, env_id=data.task.data, simulator=data.task.simulator,
        seed=args.seed, steps=args.steps, score=run.scores(algorithm)[-1], actor=agent.actor.state_dict(),
        made_with=run.made_with, learner=learner, clip=clip, **range_of(data), **about, **critics,
    )  # fmt: skip
    return path


def main(Args, presets: dict, families: dict, train: Callable) -> None:
    """The command line of a script in offline/."""
    args = cli.parse(Args, presets, families)
    device = cli.resolve_device(args.device)
    for words in idle(args):
        print(f"note: {words}")
    steps.setup(device, args.seed, args.deterministic, args.matmul)
    args = replace(args, compile=args.compile and steps.can_compile(device))
    data = datasets.load(args.env_id, args.dataset_path, device, args.max_episode_steps)
    print(data.describe())
    agreement.report_simulator_check(data)
    path = train(args, data)
    print(f"policy: {path}, last score {read(path)['score']:.1f} ({data.scale()})")
