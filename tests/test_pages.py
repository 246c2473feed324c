"""docs/o2sac.md, o2td3.md and o2ppo.md against the scripts that they describe."""

import dataclasses
import re

import numpy as np
import pytest

import o2ppo
import o2sac
import o2td3
from common import cli
from common.identity import ROOT
from common.log import read_rows

SCRIPTS = [o2sac, o2td3, o2ppo]
COLUMNS = {"ours": "hopper-medium-v2", "expert": "hopper-expert-v2", "AntMaze": "antmaze-umaze-v2"}


def page_of(script) -> str:
    return (ROOT / "docs" / f"{script.__name__}.md").read_text()


def section(page: str, title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page, re.M | re.S)[1]


def constants(page: str) -> dict[str, dict[str, str]]:
    """The cells of each argument, by column; an empty one is what stands under "ours", remarks are left out."""
    lines = [
        re.split(r" *\| *", line)[1:-1] for line in section(page, "Constants").splitlines() if line.startswith("|")
    ]
    names, _, *rows = lines
    table = {row[0].strip("`"): dict(zip(names, row, strict=True)) for row in rows}
    assert len(table) == len(rows)
    for cells in table.values():
        for name in ("expert", "AntMaze"):
            cells[name] = cells[name].split(";")[0] or cells["ours"]
    return table


def printed(value) -> str:
    """A value as the pages show it."""
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value)


def same(cell: str, value) -> bool:
    try:
        return float(cell.replace(",", "")) == value and not isinstance(value, bool)
    except ValueError:
        return cell == printed(value)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_constants_are_those_of_the_script(script, column):
    args = cli.parse(script.Args, {}, script.FAMILIES, ["--env-id", COLUMNS[column]])
    wrong = {name: (cells[column], getattr(args, name)) for name, cells in constants(page_of(script)).items()
             if not same(cells[column], getattr(args, name))}  # fmt: skip
    assert not wrong


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_argument_of_the_script_is_left_out(script):
    own = {field.name for field in dataclasses.fields(script.Args)} & script.Args.__annotations__.keys()
    assert own and own <= constants(page_of(script)).keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_not_the_papers_is_among_the_differences(script):
    page = page_of(script)
    differences = section(page, "Differences from the paper's code")
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", differences, re.M)]
    assert numbers == list(range(1, len(numbers) + 1))
    other = {name for name, cells in constants(page).items() if cells["the paper's"] not in ("–", cells["ours"])}
    other |= set(re.findall(r"^\| `(\w+)` .*; the paper's", page, re.M))
    assert {"holdout", "eval_episodes"} <= other
    assert not [name for name in other if f"(`{name}`)" not in differences]


@pytest.mark.parametrize("script", SCRIPTS)
def test_equations_are_where_the_page_says(script):
    text = section(page_of(script), "Equations")
    named = set(re.findall(r"`([a-z]\w+)`", re.sub(r"```.*?```", "", text, flags=re.S)))
    for stage in script.STAGES:
        assert stage.make_step.__name__ in named
    lost = [name for name in named if not hasattr(script, name) and not hasattr(script.Agent, name)]
    assert not lost
    of_page, of_source = (set(re.findall(r"\d+", " ".join(re.findall(r"Eq\. ([\d and]+)", where))))
                          for where in (text, (ROOT / f"{script.__name__}.py").read_text()))  # fmt: skip
    assert of_page and of_page == of_source


README, DEMOS = (ROOT / "README.md").read_text(), (ROOT / "docs" / "demos.md").read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_results_are_those_of_the_other_pages(script):
    pages = DEMOS + README
    figures = re.findall(r"\d+\.\d(?: ± \d+\.\d)?", section(page_of(script), "Results"))
    assert len(figures) >= 3 and all(re.search(rf"(?<![\d.]){re.escape(x)}(?![\d.])", pages) for x in figures)


def numbers(line: str) -> list[float]:
    return [float(x) for x in re.findall(r"\d+\.\d", line)]


def test_means_of_the_demos_are_those_of_their_seeds():
    tables = re.findall(r"\| seed \|.*\n\|[-|]+\|\n((?:\| \d .*\n)+)(\| mean .*)", DEMOS)
    assert len(tables) == 4
    for seeds, means in tables:
        rows = np.array([numbers(line.split("|", 2)[2]) for line in seeds.splitlines()])
        told = np.array(numbers(means)).reshape(-1, 2)  # of rows that are rounded themselves
        assert np.abs(told - np.stack([rows.mean(0), rows.std(0)], 1)).max() < 0.11


def test_the_readmes_table_of_the_demos_is_that_of_their_page():
    tables = re.findall(r"^`(python o2[^`]*)`.*\n(?:.*\n)*?\| mean ± std \| ([\d.]+).* (\S+ ± \S+) \|\n", DEMOS, re.M)
    tables += re.findall(
        r"^\*\*AntMaze\*\*.*?`(python [^`]*)`(?:.*\n)*?\| mean ± std \| (\S+ ± \S+) \| (\S+ ± \S+) \|\n", DEMOS, re.M
    )
    told = re.findall(r"^\| `(python \S+ --preset demo[^`]*)` \| .*? \| (.*?) \| (.*?) \|", README, re.M)
    assert len(told) == 4 and sorted(told) == sorted(tables)


NAIVE = {
    "o2sac": "falls to {first} within 1,000 steps of its first update, swings between {low} and {high}, and ends at "
             "{end}",
    "o2td3": "swings between {low} and {high} and ends at {end}",
    "o2ppo": "stays between {low} and {high} and ends at {end}",
}  # fmt: skip


@pytest.mark.parametrize("script", NAIVE)
def test_what_is_said_of_the_naive_switch_is_in_its_file(script):
    rows = read_rows(ROOT / "datasets" / f"demo_naive_{script}.csv")
    assert len({row["seed"] for row in rows}) == 1
    scores = [row["score"] for row in rows]
    changed = [score for score in scores if score != scores[0]]
    told = dict(first=changed[0], low=min(changed), high=max(changed), end=np.mean(scores[-3:]))
    text = " ".join(DEMOS.split())
    assert NAIVE[script].format(**{name: f"{value:.1f}" for name, value in told.items()}) in text
