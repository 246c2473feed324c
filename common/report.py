"""What the user sees of a run: the estimate at its start, the table and the picture at its end."""

import copy
import dataclasses
import json
import math
import platform
import sys

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from common import agreement, cli, datasets, envs, plots, seeds, steps, timing
from common.checkpoint import write_atomic
from common.log import read_rows
from common.policies import description_of, module, save_online
from common.run import Run, read_json, run_name, script_name
from common.stages import check, declared, idle, stages_of
from common.usage import flag_of

DAY = 24 * 3600


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def processor() -> str:
    """The CPU's name, or its architecture where that is not found."""
    named = steps.cpuinfo("model name")
    return named[0].partition(": ")[2] if named else f"{platform.processor() or platform.machine()} CPU"


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' * (threads > 1)}"


def start_run(args_class, offline) -> tuple:
    """Read the command line of a fine-tuning script, load its dataset, take its run folder: (args, run, data).

    `offline` is the package of that name: `offline.check(args, data)` refuses before anything is written what the run
    would only stumble over later. What it is and how long it will take is printed.
    """
    check(script := sys.modules[args_class.__module__])
    args = cli.parse(args_class, script.PRESETS, script.FAMILIES)
    device = cli.resolve_device(args.device)
    for words in [*idle(args), *offline.idle(args)]:
        print(f"note: {words}")
    if args.num_seeds > 1:
        # downloaded once, and refused once
        offline.check(args, datasets.load(args.env_id, args.dataset_path, "cpu", args.max_episode_steps))
        sys.exit(seeds.train(args, device))
    steps.setup(device, args.seed, args.deterministic, args.matmul)
    args = dataclasses.replace(args, compile=args.compile and steps.can_compile(device))
    data = datasets.load(args.env_id, args.dataset_path, device, args.max_episode_steps)
    found = offline.check(args, data)
    run = Run(args, run_name(args), data)
    run.data = description_of(data, args)
    if (run.dir / "result.json").exists():
        if (run.dir / f"{stages_of(args)[-1].name}.pt").exists():
            print(f"{run.dir} is finished already, nothing is trained: this is its result")
        else:
            print(f"{run.dir} holds a result without the checkpoint of its last stage, which is trained again")
    print(data.describe())
    agreement.report_simulator_check(data)
    learner = offline.learner(args, data, found)
    estimate(run, offline.seconds(args, data) | timing.seconds(args, data, offline.hidden_layers(args), learner))
    return args, run, data


def estimate(run: Run, seconds: dict[str, float]) -> None:
    """Print the time that each stage will take on this machine, and the way out where that is too long."""
    parts = ", ".join(f"{stage} {duration(s)}" for stage, s in seconds.items() if s)
    total = sum(seconds.values())
    most = "at most " * any(stage.auto(run.args) and stage.number(run.args) for stage in stages_of(run.args))
    print(f"run: {run.dir}\nestimated time: {most}{duration(total)} ({parts}), less what is done already")
    if total > DAY:
        print(f"WARNING: that is {total / DAY:.1f} days on this device. {shorter(run.args, seconds)}.")


def shorter(args, seconds: dict[str, float]) -> str:
    """What takes less time: presets shorter than the run's own, and fewer steps of its longest stage."""
    steps_of = {stage.name: stage.steps for stage in stages_of(args)} | {"offline": "offline_steps"}
    longest = max(steps_of.keys() & seconds.keys(), key=seconds.get)
    presets = {"none": None, "quick": "takes about an hour on 2 cores", "demo": "takes some minutes"}
    behind = list(presets)[list(presets).index(args.preset) + 1 :]
    known = [f"--preset {name} {presets[name]}" for name in behind if name in declared(args).PRESETS]
    return ", ".join([*known, f"fewer {flag_of(steps_of[longest])} take less"])


def finish(run: Run, policy: dict, agent, best, data, evaluator, start: float | None = None) -> None:
    """Save the policies, write result.json and curve.png, print the result's table, and film if asked to.

    `start` is the score that fine-tuning began with, None: the last one before it.
    """
    save_online(run, policy, agent.actor, best)
    path = run.dir / "result.json"
    result = read_json(path, "delete it, and the same command makes it again") if path.exists() else {}
    if run.trained or result.get("made_with", {}).get("code") != run.made_with["code"]:  # else it was finished already
        result = measured(run, policy, agent, best, data, evaluator, start)
        write_atomic(path, json.dumps(result, indent=2).encode())
    plots.draw(run.dir / "curve.png", plots.curve, offline_rows(run, policy) + run.logged.rows, result, run.args)
    if data.task.maze and not (run.dir / "paths.png").exists():
        draw_paths(run, policy, agent, data, evaluator)
    show(run, result)
    if run.args.capture_video:
        device = data.obs.device
        envs.record_video(data.task, evaluator.mean, evaluator.std, agent.act, device, run.dir / "videos")


def draw_paths(run: Run, policy: dict, agent, data, evaluator) -> None:
    """paths.png: the ways of the evaluation's episodes through the maze, before fine-tuning and after it."""
    ways = {"before fine-tuning": evaluator.paths(module(policy).cpu().mode, "cpu")}
    ways["after fine-tuning"] = evaluator.paths(copy.deepcopy(agent).cpu().act, "cpu")
    plots.draw(run.dir / "paths.png", plots.paths, ways, data.task.maze, height=5.5)


def measured(run: Run, policy: dict, agent, best, data, evaluator, start: float | None) -> dict:
    """What result.json holds: scores, budgets, and what they were made from and with.

    A stage before the last one that evaluates leaves its last score under its word, "aligned"; `start` is the score
    that fine-tuning began with.
    """
    before = {stage.done: run.scores(stage.name) for stage in stages_of(run.args)[:-1]}
    before = {"offline": policy["score"]} | {done: scores[-1] for done, scores in before.items() if scores}
    player = copy.deepcopy(agent)
    player.actor.load_state_dict(best.weights)
    fresh = [evaluator.score(r) for r in evaluator.fresh_returns(player.act, data.obs.device)]
    exported = agent.actor.exported() if hasattr(agent.actor, "exported") else {}  # of more than a network
    scores = run.scores("finetune")
    successes = [row["charts/success"] for row in run.logged.rows if "charts/success" in row]
    best_step, best_online = max(run.logged.evaluations("finetune"), key=lambda evaluation: evaluation[1])
    return {
        **before, "evaluated": list(before), "start": list(before.values())[-1] if start is None else start,
        "best_online": best_online, "best_online_step": best_step, "last_online": scores[-1],
        "mean_of_last_3": float(np.mean(scores[-3:])),
        "best": best.score, "best_from": best.origin, "best_alone": not math.isnan(exported.get("score", 0.0)),
         "best_fresh": float(np.mean(fresh)), "fresh_episodes": len(fresh),
        "best_fresh_error": float(np.std(fresh, ddof=1) / len(fresh) ** 0.5), "references": data.task.references,
        "measure": run.measure, "scale": data.scale(), "script": script_name(run.args), "dataset": data.task.data,
        "data": run.data, "simulator": data.task.simulator, "source": data.source,
        "offline_algorithm": policy["algorithm"], "offline_steps": policy["steps"] or None,
        "offline_data": policy["data"] or None, "seed": run.args.seed, "preset": run.args.preset,
        "eval_episodes": run.args.eval_episodes, "final_episodes": len(evaluator.final_seeds),
        "last_success": successes[-1] if successes else None,
        "auto": run.auto, "regime": run.regime, "evaluations": len(scores), "seconds": run.seconds,
        "seconds_per_evaluation": evaluator.seconds / evaluator.count, "hardware": hardware(data.obs.device),
        "made_with": run.made_with,
    }  # fmt: skip


def offline_rows(run: Run, policy: dict) -> list[dict]:
    """What was logged while the offline policy was trained, where that is known and was one stage."""
    try:
        rows = [row for row in read_rows(policy["progress"]) if {"stage", "step"} <= row.keys()]
    except Exception:  # others call a file so, too, and theirs fails in as many ways as there are bytes
        return []
    alone = policy["progress"].parent != run.dir and len({row["stage"] for row in rows}) == 1
    return rows if alone else []


def show(run: Run, result: dict) -> None:
    """Print the result's table."""
    table = Table(title=run.name, title_justify="left")
    for column in ("", result["measure"], "time"):
        table.add_column(column, justify="left" if not column else "right")
    seconds = {stage: duration(s) for stage, s in result["seconds"].items()}
    trained = f", {result['offline_steps']:,} steps" if result["offline_steps"] else ""
    table.add_row(f"offline ({result['offline_algorithm']}{trained})", f"{result['offline']:.1f}")
    for stage in stages_of(run.args)[:-1]:
        if stage.name in seconds:
            score, ended = f"{result[stage.done]:.1f}" if stage.done in result else "", result.get("auto", {})
            words = " ({steps:,} steps, {ended_by})".format(**ended[stage.name]) if stage.name in ended else ""
            table.add_row(stage.done + words, score, seconds[stage.name])
    if result["start"] != result[result["evaluated"][-1]]:  # as of PEX, which begins with a new policy beside it
        table.add_row("before the first step", f"{result['start']:.1f}")
    table.add_row(f"best online (step {result['best_online_step']:,})", f"{result['best_online']:.1f}")
    table.add_row("last online", f"{result['last_online']:.1f}", seconds["finetune"])
    table.add_row("mean of the last 3", f"{result['mean_of_last_3']:.1f}")
    alone = result.get("best_alone", True)
    best = "best.pt" if alone else "best"
    table.add_row(f"{best} ({result['best_from']})", f"{result['best']:.1f}")
    fresh = f"{result['best_fresh']:.1f} ± {result['best_fresh_error']:.1f}"
    table.add_row(f"{best} on {result['fresh_episodes']} fresh starts", fresh)
    Console(markup=False).print(table)
    episodes = f"{run.args.eval_episodes} episode{'s' * (run.args.eval_episodes > 1)} an evaluation"
    if result.get("final_episodes", 0) > run.args.eval_episodes:
        episodes += f", {result['final_episodes']} at the start and at the end"
    if run.args.best_margin:
        margin = f"{run.args.best_margin:g} standard errors"
        print(f"A policy counts as the best where its evaluation is more than {margin} above that of the best before.")
    if result.get("last_success") is not None:
        print(f"success in {result['last_success']:.0%} of the last evaluation's episodes.")
    if not alone:
        print("What is played is more than a network: best.pt holds its new policy alone, whose score nobody measured.")
    print(f"1 seed, {episodes}; {result['scale']}.\n{run.dir}/curve.png shows the whole run.")
    if (run.dir / "paths.png").exists():
        print(f"{run.dir}/paths.png shows the ways that the evaluation's episodes took.")
