"""What the user sees of a run: the estimate at its start, the table and the picture at its end."""

import dataclasses
import json
import platform
import sys

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from common import agreement, cli, datasets, envs, seeds, steps
from common.checkpoint import aside, write_atomic
from common.log import read_rows
from common.policies import save_online
from common.run import Run, run_name

DAY = 24 * 3600


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' * (threads > 1)}"


def start(args_class, presets: dict, check) -> tuple:
    """Command line, device, run folder and dataset of a fine-tuning script: (args, run, data)."""
    args = cli.parse(args_class, presets)
    check(args)
    device = cli.resolve_device(args.device)
    if args.num_seeds > 1:
        datasets.load(args.env_id, args.dataset_path)  # downloaded once, and refused once
        sys.exit(seeds.train(args, device))
    steps.setup(device, args.seed, args.deterministic)
    args = dataclasses.replace(args, compile=args.compile and steps.can_compile(device))
    run = Run(args, run_name(args))
    data = datasets.load(args.env_id, args.dataset_path, device)
    print(f"data: {len(data):,} transitions, {data.source}")
    agreement.report_simulator_check(data)
    return args, run, data


def estimate(run: Run, seconds: dict[str, float]) -> None:
    """Print the time that each stage will take on this machine, and the way out where that is too long."""
    parts = ", ".join(f"{stage} {duration(s)}" for stage, s in seconds.items() if s)
    total = sum(seconds.values())
    print(f"run: {run.dir}\nestimated time: {duration(total)} ({parts}), less what is done already")
    if total > DAY:
        print(
            f"WARNING: that is {total / DAY:.1f} days on this device. --preset quick takes about an hour on 2 cores or "
            "minutes on a GPU; --preset demo takes ten minutes."
        )


def finish(run: Run, script: str, policy: dict, agent, best, offline: float, aligned: float | None, data, evaluator):
    """Save the policies, print the result's table, write result.json and curve.png, and film if asked to."""
    save_online(run, script, policy, agent.actor, best)
    scores = run.scores("finetune")
    last3 = float(np.mean(scores[-3:]))
    best_step, best_online = max(run.logged.evaluations("finetune"), key=lambda evaluation: evaluation[1])
    result = {
        "offline": offline, "aligned": aligned, "best_online": best_online, "best_online_step": best_step,
        "last_online": scores[-1], "mean_of_last_3": last3, "best": best.score, "best_from": best.origin,
        "env_id": run.args.env_id, "source": data.source, "offline_algorithm": policy["algorithm"],
        "offline_steps": policy["steps"], "seed": run.args.seed, "preset": run.args.preset,
        "eval_episodes": run.args.eval_episodes, "evaluations": len(scores), "seconds": run.seconds,
        "seconds_per_evaluation": evaluator.seconds / evaluator.count, "hardware": hardware(data.obs.device),
    }  # fmt: skip
    write_atomic(run.dir / "result.json", json.dumps(result, indent=2).encode())
    plot(run, offline, policy)

    table = Table(title=run.name, title_justify="left")
    for column in ("", "score", "time"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row(f"offline ({policy['algorithm']}, {policy['steps']:,} steps)", f"{offline:.1f}", "")
    if "reevaluate" in run.seconds:
        table.add_row("re-evaluated", "", duration(run.seconds["reevaluate"]))
    if aligned is not None:
        table.add_row("aligned", f"{aligned:.1f}", duration(run.seconds["align"]))
    table.add_row(f"best online (step {best_step:,})", f"{best_online:.1f}", "")
    table.add_row("last online", f"{scores[-1]:.1f}", duration(run.seconds["finetune"]))
    table.add_row("mean of the last 3", f"{last3:.1f}", "")
    table.add_row(f"best.pt ({best.origin})", f"{best.score:.1f}", "")
    Console().print(table)
    what = "D4RL score" if data.source.startswith("D4RL") else "score on D4RL's scale, but these are not D4RL's data"
    print(f"1 seed, {run.args.eval_episodes} episodes an evaluation; {what}.\n{run.dir}/curve.png shows the whole run.")
    if run.args.capture_video:
        device = data.obs.device
        envs.record_video(data.task, evaluator.mean, evaluator.std, agent.act, device, run.dir / "videos")


def plot(run: Run, offline: float, policy: dict) -> None:
    """curve.png: score and Q over the whole run, every stage as wide as every other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = list(run.logged.rows)
    if policy["progress"].exists() and policy["progress"].parent != run.dir:
        rows = read_rows(policy["progress"]) + rows
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    last = {stage: max(row["step"] for row in rows if row["stage"] == stage) for stage in stages}
    figure, axes = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    for panel, endings, label in ((axes[0], ["score"], "score"), (axes[1], ["q", "v"], "mean Q (or V) of a batch")):
        for i, stage in enumerate(stages):
            names = [f"{group}/{ending}" for ending in endings for group in (stage, "charts", "losses")]
            points = [
                (i + row["step"] / last[stage], row[name])
                for row in rows if row["stage"] == stage for name in [n for n in names if n in row][:1]
            ]  # fmt: skip
            if points:
                marker = "o" if len(points) < 30 else None
                panel.plot(*zip(*points, strict=True), color=f"C{i}", marker=marker, markersize=3)
            panel.axvline(i, color="0.7", linewidth=0.8)
        panel.set_ylabel(label)
        panel.grid(alpha=0.2)
    axes[0].axhline(offline, color="0.4", linestyle="--", linewidth=1, label=f"offline policy {offline:.1f}")
    axes[0].legend(loc="upper left", framealpha=0.6)
    axes[0].set_title(run.name, fontsize=10)
    axes[1].set_xticks([i + 0.5 for i in range(len(stages))])
    axes[1].set_xticklabels([f"{stage}\n{last[stage]:,} steps" for stage in stages])
    axes[1].set_xlim(0, len(stages))
    with aside(run.dir / "curve.png") as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
