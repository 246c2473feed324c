"""Settings beside each other, on one task and on several, on runs made up so that the answers are known."""

import dataclasses
import sys

import pytest

from common.cli import UserError
from experiments import ablations, analysis, arms, harness
from experiments.harness import Spec
from tests.test_comparison import made_up_run

POLICY = "datasets/policies/walker2d-medium-200k__td3_bc.pt"
FINALS = {  # by task and setting: the score at the end of each seed, from 50 offline
    "hopper-medium-demo": {"full": (60, 80), "naive": (20, 70)},
    "walker2d-medium-v2": {"full": (90, 90), "naive": (10, 90)},
}


def settings(args: arms.Args, script: str, seed: int) -> dict[str, Spec]:
    return {name: Spec(script, "td3_bc", seed, ("--exp-name", name)) for name in ("full", "naive")}


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Makes the page of made-up runs with an experiment's arguments: its text, and what was asked for."""

    def make(failing="", measure="score", without="", **words) -> tuple[str, list]:
        asked = []

        def missing(args, specs):
            if args.env_id == failing:
                raise UserError(f"{args.env_id} cannot be had")
            for spec in specs:
                if spec.script == without:
                    continue
                name = spec.flags[1]
                score = FINALS[args.env_id][name][spec.seed]
                path = tmp_path / args.env_id / f"{name}{spec.seed}"  # of one algorithm
                made_up_run(path, 50.0, {10: score, 20: score, 30: score}, measure=measure)
                asked.append((args.env_id, name, spec.seed))
            return {"failing": ()} if without else {}

        def finished(args, specs):
            return [tmp_path / args.env_id / f"{spec.flags[1]}{spec.seed}" for spec in specs if spec.script != without]

        monkeypatch.setattr(harness, "missing", missing)
        monkeypatch.setattr(harness, "schedule", lambda args, jobs: [f"{without} failed"])
        monkeypatch.setattr(harness, "finished", finished)
        monkeypatch.setattr(sys, "argv", ["ablations.py"])
        algorithms = ("o2td3", *filter(None, [without]))
        args = arms.Args(algorithms=algorithms, out=str(tmp_path / "out"), **{"seeds": 2} | words)
        with pytest.raises(SystemExit) as stop:
            arms.comparison(args, "ablations", "What?", settings, "full")
        assert stop.value.code == (2 if failing or without else 0)
        [text] = [path.read_text() for path in (tmp_path / "out").glob("*.md")]
        return text, asked

    return make


def rows(text: str) -> dict[str, list[list[str]]]:
    """The page's tables: the lines under each title."""
    tables, title = {}, ""
    for line in text.splitlines():
        title = line.strip("*") if line.startswith("**") else title
        if line.startswith("| ") and not line.startswith("|  |"):
            tables.setdefault(title, []).append([cell.strip() for cell in line.strip("|").split("|")])
    return tables


def test_several_tasks_have_a_table_each_and_one_over_all(page, tmp_path):
    text, asked = page(env_ids=tuple(FINALS))
    assert len(asked) == 8
    found = rows(text)
    assert list(found) == [
        "hopper-medium-demo: o2td3 from td3_bc", "walker2d-medium-v2: o2td3 from td3_bc",
        "o2td3: interquartile means over 2 tasks",
    ]  # fmt: skip
    full, naive = found["hopper-medium-demo: o2td3 from td3_bc"]
    assert full[:4] == ["full", "2", "50.0 [50.0, 50.0]", "70.0 [60.0, 80.0]"] and full[-1] == ""
    assert naive[3] == "45.0 [20.0, 70.0]" and naive[-2:] == ["15.0 [0.0, 30.0]", "0.25"]
    full, naive = found["o2td3: interquartile means over 2 tasks"]
    assert full[3].startswith("85.0 [")  # of 60, 80, 90, 90 the middle two
    assert naive[3].startswith("45.0 [")  # of 10, 20, 70, 90
    assert naive[-1] == "0.25"  # a quarter on one task; on the other never, and twice a tie, which counts half: 0.25
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"ablations_{'+'.join(FINALS)}.{kind}" for kind in ("md", "png")]
    assert "8 runs" in text


def test_one_task_has_no_table_over_all(page):
    text, _ = page(env_ids=("walker2d-medium-v2",))
    assert list(rows(text)) == ["o2td3 from td3_bc"]


def test_a_task_that_fails_behind_the_first_is_in_no_table(page):
    text, asked = page(failing="walker2d-medium-v2", env_ids=tuple(FINALS))
    assert len(asked) == 4 and list(rows(text)) == ["hopper-medium-demo: o2td3 from td3_bc"]
    assert "walker2d-medium-v2: walker2d-medium-v2 cannot be had" in text


def test_an_algorithm_whose_runs_all_failed_is_in_no_table(page):
    text, _ = page(without="o2sac", env_ids=tuple(FINALS))
    assert len(rows(text)) == 3 and "o2sac failed" in text and not any("o2sac" in title for title in rows(text))


def test_an_algorithm_with_runs_of_one_task_alone_has_no_table_over_all(tmp_path):
    run = made_up_run(tmp_path / "run", 50.0, {10: 60.0})
    report = analysis.Report(harness.Args(out=str(tmp_path)), "x", "What?")
    found = {("a", "o2sac"): {"full": [run]}, ("b", "o2sac"): {"full": []}, ("a", "o2td3"): {"full": [run]},
             ("b", "o2td3"): {"full": [run]}}  # fmt: skip
    arms.over_all(report, arms.Args(algorithms=("o2sac", "o2td3")), found, "full")
    text = "\n".join(report.text)
    assert "o2sac" not in text and "o2td3: interquartile means over 2 tasks" in text


def test_names_of_many_tasks_fit_into_a_files():
    tasks = [f"{robot}-{data}-v2" for robot in ("hopper", "walker2d") for data in ("medium", "medium-replay")]
    assert arms.together(tasks[:2]) == "hopper-medium-v2+hopper-medium-replay-v2"
    many = [arms.together([*tasks, *tasks, task]) for task in tasks[:2]]
    assert all(name.startswith("9-tasks-") and len(name) < 20 for name in many) and many[0] != many[1]


def test_returns_have_no_mean_over_tasks(page):
    text, _ = page(measure="return", env_ids=tuple(FINALS))
    assert len(rows(text)) == 2 and "no common scale" in text


def test_settings_that_are_chosen_are_run_alone(page):
    text, asked = page(env_id="hopper-medium-demo", settings=("naive",))
    assert asked == [("hopper-medium-demo", "naive", 0), ("hopper-medium-demo", "naive", 1)]
    [[line]] = rows(text).values()
    assert line[0] == "naive" and len(line) == 7 and "P(better" not in text  # than what was not run


def test_one_run_of_each_has_no_probability(page):
    text, _ = page(env_ids=tuple(FINALS), seeds=1)
    assert len(rows(text)) == 3 and "P(better" not in text


def test_each_task_starts_from_its_own_policy():
    ids = ("hopper-medium-demo", "walker2d-medium-v2")
    args = arms.Args(env_ids=ids, policies=("cql", POLICY), run_flags="--eval-every 500")
    hopper, walker = arms.on_tasks(args).values()
    assert (hopper.env_id, walker.env_id) == ids
    starts = [harness.parsed(here, ablations.settings(here, "o2td3", 0)["naive"]).offline for here in (hopper, walker)]
    assert starts == ["cql", str(harness.ROOT / POLICY)]
    assert harness.parsed(walker, harness.full(walker, "o2td3", 0)).eval_every == 500
    alone = arms.on_tasks(dataclasses.replace(args, env_ids=(), policies=()))
    assert list(alone) == ["hopper-medium-demo"] and alone["hopper-medium-demo"].run_flags == "--eval-every 500"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (dict(env_ids=("a", "b", "a")), "--env-ids names a dataset twice: a b a"),
        (dict(env_ids=("a",), dataset_path="x.hdf5"), "--dataset-path is the file of one dataset"),
        (dict(env_ids=("a", "b"), policies=("iql",)), "--policies has 1 for 2 datasets; give one for each"),
        (dict(policies=("iql",), run_flags="--offline cql"), "this experiment sets --offline itself"),
    ],
)
def test_tasks_that_cannot_be_are_refused(words, said):
    with pytest.raises(UserError, match=said):
        arms.on_tasks(arms.Args(**words))


def test_a_setting_that_is_none_is_named_with_those_that_are():
    args = arms.Args(settings=("full", "nave"))
    with pytest.raises(UserError, match="there is no setting 'nave' here; choose among 'full', 'no reevaluate', "):
        arms.comparison(args, "ablations", "What?", ablations.settings)
    args = dataclasses.replace(args, settings=("full", "no align"), algorithms=("o2td3", "o2ppo"))
    assert list(arms.chosen(args, ablations.settings, "o2ppo", 0)) == ["full"]  # PPO aligns nothing
    args = dataclasses.replace(args, settings=("no align",))
    with pytest.raises(UserError, match="o2ppo has none of --settings 'no align', but 'full', .*leave it out of --alg"):
        arms.comparison(args, "ablations", "What?", ablations.settings)
