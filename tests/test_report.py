"""What is shown of a run: its scores and where they come from, and its pictures."""

import importlib.util
import json
import warnings
import sys
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import o2ppo
import o2sac
import o2td3
import pytest
import torch
from common import cli, plots, report
from common.datasets import load
from common.evaluation import Evaluator
from common.log import Log
from common.run import run_name
from matplotlib.figure import Figure

from tests.conftest import TINY

SMALL = [
    "--env-id", "hopper-medium-demo", "--offline-steps", "2", "--reevaluate-steps", "2", "--align-steps", "2",
    "--align-eval-every", "2", "--log-every", "2", "--online-steps", "90", "--learning-starts", "80", "--eval-every",
    "30",
]  # fmt: skip


@pytest.fixture
def scripted(run_script, monkeypatch, tmp_path):
    """Runs O2SAC or O2TD3 with evaluations whose scores are given; its result, what it printed, its best.pt."""

    def run(script, scores, *flags):
        # the offline algorithm's own, the offline policy's, one after alignment
        offline, aligned, *online = scores
        given = iter([offline, offline, aligned, *online])

        def scalars(self, policy, device, final=False):
            self.count += 1
            return {"score": next(given)}

        monkeypatch.setattr(Evaluator, "scalars", scalars)
        code, out, err = run_script(script, *SMALL, *TINY, "--run-dir", tmp_path, *flags)
        assert code == 0, err
        [path] = tmp_path.glob(f"*{script.__name__}*/result.json")
        best = torch.load(path.with_name("best.pt"), weights_only=True)
        return json.loads(path.read_text()), out, err, best, path.parent

    return run


@pytest.mark.parametrize(("script", "flags"), [(o2sac, ["--reference", "adaptive"]), (o2td3, [])])
def test_what_is_best_online_may_not_be_what_best_pt_holds(scripted, script, flags):
    result, out, err, best, folder = scripted(script, [53.2, 11.0, 47.1, 20.0, 37.3], *flags)
    assert (result["best_online"], result["best_online_step"], result["last_online"]) == (47.1, 30, 37.3)
    assert (result["best"], result["best_from"], best["score"]) == (53.2, "offline policy", 53.2)
    rows = [[cell.strip() for cell in line.split("│")] for line in out.splitlines()]
    assert ["", "best online (step 30)", "47.1", "", ""] in rows
    assert ["", "best.pt (offline policy)", "53.2", "", ""] in rows
    assert "score 37.3 (best 53.2)" in err.replace("\r", "\n").split("finetune")[-1]
    offline = torch.load(next(folder.parent.glob("*-2__0/policy.pt")), weights_only=True)["actor"]
    assert all(torch.equal(best["actor"][name], offline[name]) for name in offline)


@pytest.mark.parametrize(
    ("scores", "origin"),
    [((20.0, 30.0, 10.0, 12.0, 14.0), "aligned policy"), ((20.0, 30.0, 40.0, 50.0, 45.0), "online, step 60")],
)
def test_where_best_pt_comes_from(scripted, scores, origin):
    result, out, _, best, _ = scripted(o2td3, scores)
    assert result["best_from"] == origin and f"best.pt ({origin})" in out
    assert result["best"] == best["score"] == max(scores) and result["best_online"] == max(scores[2:])


def test_records_name_what_was_used(run_script, tmp_path, monkeypatch):
    """A copy of a script and of an offline algorithm, on rows of one's own: nothing is called what it is not."""
    data, root = tmp_path / "my-rows.hdf5", Path(o2td3.__file__).parent
    with h5py.File(root / "datasets" / "hopper-medium-demo.hdf5") as whole, h5py.File(data, "w") as file:
        for name in ("observations", "actions", "rewards", "terminals", "timeouts"):
            file[name] = whole[name][:2_000]
    modules = {}
    for name, original in (("mymethod", root / "o2td3.py"), ("mybc", root / "offline" / "td3_bc.py")):
        path = tmp_path / f"{name}.py"
        path.write_text(original.read_text())
        spec = importlib.util.spec_from_file_location(name, path)
        modules[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, modules[name])
        spec.loader.exec_module(modules[name])
    flags = ["--dataset-path", data, "--run-dir", tmp_path]
    mybc = modules["mybc"]
    tiny = ["--device", "cpu", "--no-compile", "--batch-size", "32", "--eval-episodes", "2", "--steps", "2"]
    args = cli.parse(mybc.Args, mybc.PRESETS, mybc.FAMILIES, [*tiny, "--env-id", SMALL[1], *map(str, flags)])
    offline = mybc.train(args, load(args.env_id, args.dataset_path))
    saved = torch.load(offline, weights_only=True)
    assert (saved["algorithm"], saved["env_id"], saved["steps"]) == ("mybc", "my-rows", 2)
    elsewhere = saved | {"steps": 0, "algorithm": "theirs", "data": {}}  # what is not known of a policy from there
    torch.save(elsewhere, tmp_path / "theirs.pt")

    code, out, err = run_script(modules["mymethod"], *SMALL, *TINY, *flags, "--offline", tmp_path / "theirs.pt")
    assert code == 0, err
    [path] = tmp_path.glob("my-rows__*theirs*/result.json")
    result = json.loads(path.read_text())
    assert (result["script"], result["dataset"], result["data"]["file"]) == ("mymethod", "my-rows", "my-rows.hdf5")
    assert result["data"] == saved["data"] and len(saved["data"]["sha256"]) == 64
    assert result["offline_algorithm"] == "theirs" and "env_id" not in result
    assert result["offline_steps"] is result["offline_data"] is None
    assert "offline (theirs)" in out and "0 steps" not in out.replace("90 steps", "")
    policy = torch.load(path.with_name("policy.pt"), weights_only=True)
    assert (policy["algorithm"], policy["env_id"], policy["steps"]) == ("mymethod", "my-rows", 90)
    assert policy["origin"] == "online, step 90" and policy["data"] == result["data"]


@pytest.mark.parametrize(
    ("flags", "longest", "words"),
    [
        (
            "",
            "finetune",
            "--preset quick takes about an hour on 2 cores, --preset demo takes some minutes, fewer "
            "--online-steps take less",
        ),
        ("--preset quick", "align", "--preset demo takes some minutes, fewer --align-steps take less"),
        ("--preset quick", "offline", "--preset demo takes some minutes, fewer --offline-steps take less"),
        ("--preset demo", "finetune", "fewer --online-steps take less"),
    ],
)
def test_what_takes_less_than_days_is_what_this_run_can_do(flags, longest, words, capsys):
    args = cli.parse(o2td3.Args, o2td3.PRESETS, o2td3.FAMILIES, ["--env-id", "hopper-medium-v2", *flags.split()])
    run = SimpleNamespace(args=args, dir="runs/mine")
    report.estimate(run, {"offline": 60.0, "align": 60.0, "finetune": 60.0} | {longest: 2.0 * report.DAY})
    assert capsys.readouterr().out.endswith(f"WARNING: that is 2.0 days on this device. {words}.\n")


def test_no_preset_is_recommended_that_a_copy_has_not(monkeypatch):
    monkeypatch.setattr(o2td3, "PRESETS", {"demo": {}})
    args = cli.parse(o2td3.Args, o2td3.PRESETS, o2td3.FAMILIES, ["--env-id", "hopper-medium-v2"])
    assert report.shorter(args, {"align": 1.0}) == "--preset demo takes some minutes, fewer --align-steps take less"


@pytest.mark.parametrize("script", [o2sac, o2ppo])
def test_a_runs_name_tells_where_it_started(script, tmp_path):
    def name(path):
        return run_name(script.Args(offline=str(path), env_id="some-data", exp_name="mine"))

    policies = [tmp_path / folder / file for folder in ("some-data__iql__0", "CORL-x", "elsewhere/CORL-x")
                for file in ("policy.pt", "best.pt")]  # fmt: skip
    for i, path in enumerate(policies):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(i))
    names = [name(path) for path in policies]
    assert len(set(names)) == len(names)
    assert names[0].startswith("some-data__mine__iql-0-policy-") and names[2].startswith("some-data__mine__CORL-x-pol")
    assert all(len(found.split("__")) == 4 for found in names)
    policies[0].write_text("retrained")
    assert name(policies[0]) != names[0] and name(policies[1]) == names[1]
    assert name("cql") == "some-data__mine__cql__0"


# ----------------------------------------------------------------------------------------------- pictures


def made_up_run(args, prefix="kl"):
    """Rows and result of a run whose stages are all there."""
    spread = lambda q: {"probe/q_data": q, "probe/q_data_low": q - 1, "probe/q_data_high": q + 1}  # noqa: E731
    rows = [{"stage": "cql", "step": 500 * i, "cql/q": i, "cql/score": 10.0 * i} for i in (1, 2, 3)]
    rows += [{"stage": "reevaluate", "step": s, **spread(s / 10)} for s in (0, 50, 100)]
    rows += [{"stage": "align", "step": s, "align/score": s / 4, **spread(9.0)} for s in (80, 160)]
    rows += [{"stage": "finetune", "step": s, "charts/episodic_return": 50.0 * s} for s in (5, 15)]
    for s in (10, 20, 30, 40):
        row = {"stage": "finetune", "step": s, "charts/score": 30.0 + s, **spread(10.0)}
        if s > args.learning_starts:
            row |= {f"charts/{prefix}_threshold": 0.1, f"losses/{prefix}": 0.05, "losses/lagrange": 1.0 + s}
        rows.append(row)
    result = dict(
        offline=30.0, aligned=40.0, evaluated=["offline", "aligned"], start=40.0, references=(0, 1000),
        offline_algorithm="cql", dataset="some-data", seed=3, simulator="a robot",
    )  # fmt: skip
    return rows, result


def curves(panel):
    return {line.get_label(): line.get_xydata() for line in panel.get_lines()}


def test_the_picture_of_a_run_explains_itself():
    args = o2sac.Args(exp_name="mine", learning_starts=20, online_steps=40, seed=3)
    figure = Figure()
    plots.curve(figure, *made_up_run(args), args)
    scores, values, constraint, weight = figure.axes
    title = figure.get_suptitle()
    assert "mine from cql on some-data, played in a robot\n1 seed (3), 40 environment steps" in title
    assert "an evaluation: 10 episodes" in title
    stages = [label.get_text().split("\n") for label in constraint.get_xticklabels()]
    assert [stage[:2] for stage in stages] == [
        ["cql", "1,500"],
        ["reevaluate", "100"],
        ["align", "160"],
        ["finetune", "40"],
    ]
    assert [stage[2] for stage in stages] == 3 * ["gradient steps"] + ["environment steps"]
    assert "higher is better" in scores.get_ylabel() and "nats" in constraint.get_ylabel()
    assert weight.get_ylabel() == "λ: weight of f" and all(panel.get_ylabel() for panel in figure.axes)
    # stages are one unit wide, fine-tuning three, which begins with the aligned policy
    shown = curves(scores)
    assert shown["offline policy: 30.0"].tolist() == [[0, 30], [6, 30]]
    assert shown["aligned policy: 40.0"].tolist() == [[3, 40], [6, 40]]
    assert shown["training episode"][:, 1].tolist() == [25.0, 75.0]  # returns on the scale of the scores
    assert shown["evaluation"].tolist() == [
        [3, 40],
        [3.75, 40],
        [4.5, 50],
        [5.25, 60],
        [6, 70],
    ]  # the last of its stages
    q_data = curves(values)["Q of the data's actions (held-out states: mean, 10 to 90%)"]
    assert q_data[:3].tolist() == [[1, 0], [1.5, 5], [2, 10]]
    assert curves(constraint)["τ: its threshold"].tolist() == [[5.25, 0.1], [6, 0.1]]
    assert curves(weight)["λ: weight of f"].tolist() == [[5.25, 31], [6, 41]]
    for panel in (scores, values, constraint):
        [waiting] = [patch for patch in panel.patches if patch.get_label() == "no update yet"]
        assert waiting.get_bbox().intervalx.tolist() == [3, 4.5]


def test_one_point_is_a_dot_whatever_its_style():
    panel = Figure().subplots()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for style in ([], ["."], ["k--"]):
            plots.plot(panel, [1], [2], *style)
    assert [line.get_marker() for line in panel.get_lines()] == [".", ".", "."]


def test_one_legend_off_the_data(tmp_path, monkeypatch):
    args, seen = o2sac.Args(learning_starts=20), []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *_, **__: (figure.draw_without_rendering(), seen.append(figure))
    )
    plots.draw(tmp_path / "a.png", plots.curve, *made_up_run(args), args)
    [figure] = seen
    [legend] = figure.legends
    box = legend.get_window_extent()
    assert not any(panel.get_legend() or panel.get_tightbbox().overlaps(box) for panel in figure.axes)
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(labels) == len(set(labels)) and {"evaluation", "no update yet", "λ: weight of f"} <= set(labels)


@pytest.mark.parametrize("name", ["cost_$5_vs_$6", "half [bold] a {name} \\frac"])
def test_any_name_can_stand_in_a_picture(tmp_path, monkeypatch, name, capsys):
    monkeypatch.setenv("MPLBACKEND", "module://a_notebook_that_is_not_here")
    args = o2sac.Args(exp_name=name)
    plots.draw(tmp_path / "curve.png", plots.curve, *made_up_run(args), args)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG") and not capsys.readouterr().out


def test_what_cannot_be_drawn_costs_the_picture(tmp_path, capsys):
    args = o2sac.Args()
    rows, result = made_up_run(args)
    plots.draw(tmp_path / "curve.png", plots.curve, [row | {"step": "?"} for row in rows], result, args)
    assert "curve.png could not be drawn" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content", [b"time/fps,rollout/ep_rew_mean,stage,step\n1,2,3,4\n5,6", b"a,b\n1,2,3\n", b"\xff\xfe"]
)
def test_another_programs_progress_beside_the_policy_is_not_shown(content, tmp_path):
    """Stable-Baselines3's logger gives its file the same name, with as many columns as it likes."""
    path = tmp_path / "progress.csv"
    path.write_bytes(content)
    assert report.offline_rows(SimpleNamespace(dir=tmp_path / "run"), {"progress": path}) == []
    path.write_text("stage,step,cql/score\ncql,5,1.0\n")
    rows = report.offline_rows(SimpleNamespace(dir=tmp_path / "run"), {"progress": path})
    assert rows == [{"stage": "cql", "step": 5, "cql/score": 1.0}]


def test_the_demos_show_the_naive_switch_beside_their_own_curve(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "SHIPPED", tmp_path)
    lines = ["env_id,seed,step,score", "here,0,10,4", "here,0,20,2", "here,1,10,6", "here,1,20,0", "there,0,10,99"]
    (tmp_path / "demo_naive_o2td3.csv").write_text("\n".join(lines))
    demo = dict(preset="demo", env_id="here", learning_starts=20, online_steps=20)
    assert not plots.naive_switch(o2sac.Args(**demo))  # another script
    for other in (dict(preset="none"), dict(env_id="elsewhere"), dict(dataset_path="mine.hdf5"), dict(online_steps=30),
                  dict(offline="cql")):  # fmt: skip
        assert not plots.naive_switch(o2td3.Args(**demo | other))
    figure, args = Figure(), o2td3.Args(**demo)
    plots.curve(figure, *made_up_run(args, "mse"), args)
    shown = curves(figure.axes[0])["naive switch, same budget (mean ± std of 2 seeds)"]
    assert shown.tolist() == [[3.75, 5], [4.5, 1]]


@pytest.mark.parametrize(("script", "constraint"), [(o2sac, "kl"), (o2td3, "mse")])
def test_what_an_axis_says_is_no_longer_than_the_axis(script, constraint, tmp_path, monkeypatch):
    args, seen = script.Args(learning_starts=20), []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *_, **__: (figure.draw_without_rendering(), seen.append(figure))
    )
    plots.draw(tmp_path / "a.png", plots.curve, *made_up_run(args, constraint), args)
    heights = [(panel.yaxis.label.get_window_extent().height, panel.bbox.height) for panel in seen[0].axes[:3]]
    assert len(heights) == 3 and all(label <= axis for label, axis in heights), heights


def test_ways_through_a_maze_are_drawn_in_metres():
    figure, way = Figure(), np.array([[0.0, 0.0], [8.0, 0.0]])
    plots.paths(
        figure, {"before fine-tuning": [(way, True), (-way, False)], "after fine-tuning": [(way, True)]}, "umaze"
    )
    assert [(panel.get_xlabel(), panel.get_ylabel()) for panel in figure.axes] == [("x (m)", "y (m)")] * 2
    titles = [panel.get_title() for panel in figure.axes]
    assert "before fine-tuning: 1 of 2 episodes" in titles[0] and "after fine-tuning: 1 of 1 episodes" in titles[1]


def test_q_of_alignment_is_not_said_to_be_the_offline_algorithms(tmp_path):
    for first, names in (("align", []), ("td3_bc", ["Q of the offline algorithm"])):
        figure = Figure()
        panel = figure.subplots()
        plots.draw_values(panel, plots.Line([{"stage": first, "step": 10, f"{first}/q": 5.0}]), {"align", "finetune"})
        assert [name for name in curves(panel) if "offline" in name] == names


def test_the_picture_of_several_seeds_shows_the_tables_statistic(tmp_path):
    args, folders = o2sac.Args(learning_starts=20), []
    for seed, gain in ((0, 0.0), (1, 8.0)):
        rows, result = made_up_run(args)
        folders.append(tmp_path / str(seed))
        log = Log(folders[-1], args)
        for row in (row for row in rows if row["stage"] != "cql"):  # the offline run has a folder of its own
            scores = {"charts/score": row["charts/score"] + gain} if "charts/score" in row else {}
            log.add(row["stage"], row["step"], {k: v for k, v in row.items() if k not in ("stage", "step")} | scores)
        log.save()
        (folders[-1] / "result.json").write_text(json.dumps(result | {"seed": seed, "offline": 30.0 + gain}))
    figure = Figure()
    plots.seeds(figure, folders, args)
    [panel] = figure.axes
    assert "seeds 0, 1" in figure.get_suptitle() and "environment steps" in panel.get_xlabel()
    mean = curves(panel)["o2sac (mean ± std of 2 seeds)"]
    assert mean.tolist() == [[0, 40], [10, 44], [20, 54], [30, 64], [40, 74]]
    band = panel.collections[0].get_datalim(panel.transData).intervaly
    assert band.tolist() == [40, 78]  # 74 ± 4 at its end
    assert "offline policies: mean 34.0" in curves(panel)


@pytest.mark.parametrize("alone", [True, False])
def test_a_title_says_which_actions_are_evaluated(alone):
    result = dict(offline_algorithm="iql", dataset="some-data", best_alone=alone)  # PEX's play is no single network
    figure = Figure()
    plots.write_title(figure, "1 seed (0)", result, o2sac.Args(eval_episodes=10))
    assert ("10 episodes of the most likely actions, always" in figure.get_suptitle()) == alone
    assert "10 episodes" in figure.get_suptitle()
