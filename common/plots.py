"""The pictures of a run and of several seeds of it. What cannot be drawn costs the picture, not the run."""

import csv
import json
import os
from pathlib import Path

import numpy as np

from common.checkpoint import aside
from common.log import read_rows, score_of
from common.run import script_name
from common.stages import declared, stages_of
from common.tasks import DEMO, SHIPPED

UNITS = {"finetune": "environment", "kl": "nats", "mse": "action²"}  # of steps, else gradient steps; of constraints


def draw(path: Path, paint, *args, height: float = 8.4) -> None:
    """Save what `paint(figure, *args)` draws to `path`, with one legend beneath it."""
    os.environ["MPLBACKEND"] = "agg"  # what a notebook leaves there may not exist here
    try:
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context({"axes.grid": True, "grid.alpha": 0.2, "font.size": 9}):
            figure = Figure(figsize=(10, height), layout="constrained")
            paint(figure, *args)
            figure.align_ylabels()
            shown = [panel.get_legend_handles_labels() for panel in figure.axes]
            legend = {label: handle for handles, labels in shown for handle, label in zip(handles, labels, strict=True)}
            figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3, frameon=False)
            with aside(path) as temporary:
                figure.savefig(temporary, dpi=120, format="png")
    except Exception as error:  # a font, the disk, a log that someone edited: whatever it is, the run itself is done
        print(f"{path.name} could not be drawn ({error})")


def naive_switch(args) -> list[np.ndarray]:
    """Steps and scores (2, N) of the naive switch, a seed each: the demos show it beside their own, of the same budget.

    They ship as datasets/demo_naive_<script>.csv with the columns seed, step, score and, for data other than the first
    demo's, env_id.
    """
    path = SHIPPED / f"demo_naive_{script_name(args)}.csv"
    usual = declared(args).PRESETS.get("demo", {}).get("offline", type(args).offline)
    if args.preset != "demo" or args.dataset_path or args.offline != usual or not path.exists():
        return []
    seeds = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if row.get("env_id", DEMO) == args.env_id:
                seeds.setdefault(row["seed"], []).append((float(row["step"]), float(row["score"])))
    found = [np.array(points).T for points in seeds.values()]
    return [points for points in found if 0.9 * args.online_steps < points[0, -1] <= args.online_steps]


def write_title(figure, seeds: str, result: dict, args) -> None:
    played = f", played in {result['simulator']}" if "simulator" in result else ""
    episodes = f"{args.eval_episodes} episodes" if args.eval_episodes > 1 else "1 episode"
    actions = " of the most likely actions" if result.get("best_alone", True) else ""  # PEX's are partly drawn
    figure.suptitle(
        f"{args.exp_name} from {result['offline_algorithm']} on {result['dataset']}{played}\n{seeds}, "
        f"{args.online_steps:,} environment steps of fine-tuning\nan evaluation: {episodes}{actions}, always from "
        "the same start states",
        fontsize=10, x=0.01, ha="left", parse_math=False,  # a name between two dollar signs is no formula
    )  # fmt: skip


def plot(panel, x, y, *style, **more) -> None:
    """A curve, and its name in the legend if it has any points; one alone is a dot."""
    if len(x):
        dot = {"marker": "."} if len(x) == 1 and "." not in style else {}
        panel.plot(x, y, *style, **dot | dict(linewidth=1.2, markersize=3) | more)


def draw_mean(panel, seeds: list[np.ndarray], name: str, colour: str, at=lambda step: step) -> None:
    """Mean over seeds, (2, N) each, as a line and a standard deviation either way as a band, as far as all go."""
    n = min(points.shape[1] for points in seeds)
    x, scores = [at(step) for step in seeds[0][0, :n]], np.stack([points[1, :n] for points in seeds])
    mean, std = scores.mean(0), scores.std(0)
    of = f"mean ± std of {len(seeds)} seeds" if len(seeds) > 1 else "1 seed"
    plot(panel, x, mean, color=colour, label=f"{name} ({of})")
    panel.fill_between(x, mean - std, mean + std, color=colour, alpha=0.12, linewidth=0)


def round_numbers(last: float) -> np.ndarray:
    """Some five round numbers from 0 to `last`."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5, integer=True).tick_values(0, last)


def score_label(result: dict) -> str:
    scale = "score (random policy 0, expert 100)" if result["references"] else "return of an episode"
    return f"{scale}\nhigher is better"


# ----------------------------------------------------------------------------------------------- a run


class Line:
    """A run's scalars from left to right: its stages side by side, fine-tuning as wide as three others."""

    def __init__(self, rows: list[dict]):
        self.rows, self.stages = rows, list(dict.fromkeys(row["stage"] for row in rows))
        self.last = {stage: max(1, *(row["step"] for row in rows if row["stage"] == stage)) for stage in self.stages}
        self.width = {stage: 3.0 if stage == "finetune" else 1.0 for stage in self.stages}
        ends = np.cumsum([0.0, *self.width.values()])
        self.left, self.end = dict(zip(self.stages, ends[:-1], strict=True)), ends[-1]

    def at(self, step: float, stage: str = "finetune") -> float:
        """The place of a stage's step."""
        return self.left[stage] + self.width[stage] * min(1.0, step / self.last[stage])

    def points(self, name: str, stage: str = "") -> np.ndarray:
        """Places and values (2, N) of a scalar, in one stage or in all."""
        found = [(self.at(row["step"], row["stage"]), row[name]) for row in self.rows
                 if name in row and stage in ("", row["stage"])]  # fmt: skip
        return np.array(found, float).reshape(-1, 2).T

    def label(self, panels) -> None:
        """Names and budgets of the stages below, environment steps in fine-tuning, a line between two stages."""
        for panel in panels:
            panel.grid(axis="x", visible=False)
            panel.tick_params(axis="x", which="both", length=0)
            for stage in self.stages[1:]:
                panel.axvline(self.left[stage], color="0.6", linewidth=0.8)
        names = [f"{stage}\n{self.last[stage]:,}\n{UNITS.get(stage, 'gradient')} steps" for stage in self.stages]
        steps = [int(step) for step in round_numbers(self.last["finetune"]) if 0 < step < self.last["finetune"]]
        panels[-1].set_xticks([self.left[stage] + self.width[stage] / 2 for stage in self.stages], names)
        panels[-1].xaxis.remove_overlapping_locs = False  # a number of steps may stand above a name
        panels[-1].set_xticks([self.at(step) for step in steps], [f"{step:,}" for step in steps], minor=True)
        panels[-1].tick_params(axis="x", which="major", pad=18)
        panels[-1].set_xlim(0, self.end)


def curve(figure, rows: list[dict], result: dict, args) -> None:
    """Scores, what the critic believes, and the constraint, over the whole run. `result` is what result.json holds."""
    line = Line(rows)
    constraints = [name.removeprefix("charts/").removesuffix("_threshold") for row in rows for name in row
                   if name.endswith("_threshold")][:1]  # fmt: skip
    weight = "losses/lagrange" if constraints else "charts/beta"
    third = line.points(weight)[1].any()
    panels = figure.subplots(3 if third else 2, 1, sharex=True, height_ratios=[2.8, 2, 2][: 3 if third else 2])
    write_title(figure, f"1 seed ({args.seed})", result, args)
    draw_scores(panels[0], line, result, args)
    draw_values(panels[1], line, {stage.name for stage in stages_of(args)})
    if third:
        draw_constraint(panels[2], line, constraints, weight)
    if waiting := getattr(args, "learning_starts", 0):
        for panel in panels:
            panel.axvspan(line.left["finetune"], line.at(waiting), color="0.93", zorder=0, label="no update yet")
    line.label(panels)


def draw_scores(panel, line: Line, result: dict, args) -> None:
    low, high = result["references"] or (0, 100)
    x, returns = line.points("charts/episodic_return")
    plot(panel, x, 100 * (returns - low) / (high - low), ".", color="0.7", label="training episode")
    if naive := naive_switch(args):
        draw_mean(panel, naive, "naive switch, same budget", "C3", line.at)
    for stage in line.stages:
        x, y = line.points(score_of(stage), stage)
        if stage == "finetune":
            x, y = np.append(line.left[stage], x), np.append(result["start"], y)
        plot(panel, x, y, color="C0", marker="o" if len(x) < 40 else None, label="evaluation")
    plot(panel, [0, line.end], [result["offline"]] * 2, "k--", label=f"offline policy: {result['offline']:.1f}")
    for name in result["evaluated"][1:]:
        ends = [line.left["finetune"], line.end]
        plot(panel, ends, [result[name]] * 2, "k:", label=f"{name} policy: {result[name]:.1f}")
    panel.set_ylabel(score_label(result))


def draw_values(panel, line: Line, own: set[str]) -> None:
    """Q or V at states that no stage trains on, and before the script's `own` on the offline algorithm's batches."""
    names = {"q_data": ("C2", "-", "Q of the data's actions"), "q_policy": ("C1", "--", "Q of the policy's"),
             "v": ("C1", "-", "V")}  # fmt: skip
    for name, (colour, style, label) in names.items():
        x, mean = line.points(f"probe/{name}")
        plot(panel, x, mean, style, color=colour, label=f"{label} (held-out states: mean, 10 to 90%)")
        low, high = (line.points(f"probe/{name}_{end}")[1] for end in ("low", "high"))
        panel.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    if line.stages[0] not in own:
        for name, colour in (("q", "C2"), ("v", "C1")):
            label = f"{name.upper()} of the offline algorithm"
            plot(panel, *line.points(f"{line.stages[0]}/{name}"), ":", color=colour, label=label)
    panel.set_ylabel("discounted return ahead,\nas the critic sees it\n(it should not jump)")


def draw_constraint(panel, line: Line, constraints: list[str], weight: str) -> None:
    """The constrained quantity with its threshold τ, or the divergence of an update; on the right λ or β."""
    for name in constraints:
        plot(panel, *line.points(f"losses/{name}"), color="C4", label="f: divergence from π_ref")
        plot(panel, *line.points(f"charts/{name}_threshold"), "k-.", label="τ: its threshold")
        panel.set_ylabel(f"divergence from π_ref\n({UNITS[name]}); λ grows while\nits upper expectile is > τ")
    if not constraints:
        plot(panel, *line.points("losses/approx_kl"), color="C4", label="divergence of an update")
        panel.set_ylabel("how far an update\nmoves the policy (nats)")
    right, label = panel.twinx(), "λ: weight of f" if constraints else "β: weight of π_ref"
    right.grid(visible=False)
    plot(right, *line.points(weight), color="C5", label=label)
    right.set_ylabel(label, color="C5")
    right.tick_params(axis="y", colors="C5")
    right.set_ylim(0, 1.1 * line.points(weight)[1].max())


# ----------------------------------------------------------------------------------------------- mazes


def paths(figure, ways: dict[str, list[tuple[np.ndarray, bool]]], maze: str) -> None:
    """A panel for each policy: the ways of `Evaluator.paths` through the walls, with a dot where each ended."""
    from common import antmaze  # a simulator, which no other picture needs
    from matplotlib.patches import Rectangle

    goal = np.array(antmaze.cells(maze, "g"))[0]
    walls = antmaze.cells(maze, "#")
    for panel, (name, found) in zip(np.atleast_1d(figure.subplots(1, len(ways))), ways.items(), strict=True):
        for x, y in walls:
            corner = x - antmaze.CELL / 2, y - antmaze.CELL / 2
            panel.add_patch(Rectangle(corner, antmaze.CELL, antmaze.CELL, color="0.75", linewidth=0))
        panel.add_patch(Rectangle(goal, 1.5, 1.5, fill=False, color="C2", linewidth=2, label="where goals are drawn"))
        for way, there in found:
            colour = "C0" if there else "C3"
            panel.plot(*way.T, color=colour, linewidth=0.8, alpha=0.7, label="came to its goal" if there else "did not")
            panel.plot(*way[-1], "o", color=colour, markersize=4)
        panel.set_title(
            f"{name}: {sum(there for _, there in found)} of {len(found)} episodes came to their goal", fontsize=10
        )
        panel.set_aspect("equal")
        panel.set_xlabel("x (m)")
        panel.set_ylabel("y (m)")
        panel.grid(visible=False)
        panel.autoscale_view()


# ----------------------------------------------------------------------------------------------- several seeds


def seeds(figure, folders: list[Path], args) -> None:
    """Scores while fine-tuning, of each seed and their mean: the statistic of the table."""
    panel, curves = figure.subplots(), []
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    write_title(figure, f"seeds {', '.join(str(result['seed']) for result in results)}", results[0], args)
    for folder, result in zip(folders, results, strict=True):
        rows = [row for row in read_rows(folder / "progress.csv") if "charts/score" in row]
        curves.append(np.array([(0, result["start"]), *((row["step"], row["charts/score"]) for row in rows)], float).T)
        plot(panel, *curves[-1], color="C0", alpha=0.3, label="a seed")
    draw_mean(panel, curves, args.exp_name, "C0")
    if naive := naive_switch(args):
        draw_mean(panel, naive, "naive switch, same budget", "C3")
    offline = float(np.mean([result["offline"] for result in results]))
    panel.axhline(offline, color="k", linestyle="--", linewidth=1.2, label=f"offline policies: mean {offline:.1f}")
    if waiting := getattr(args, "learning_starts", 0):
        panel.axvspan(0, min(waiting, curves[0][0, -1]), color="0.93", zorder=0, label="no update yet")
    panel.set_xlim(0, curves[0][0, -1])
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.set_xlabel("environment steps of fine-tuning")
    panel.set_ylabel(score_label(results[0]))
