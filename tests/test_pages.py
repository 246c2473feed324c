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


README, DEMOS, EXPERIMENTS = (
    (ROOT / name).read_text() for name in ("README.md", "docs/demos.md", "docs/experiments.md")
)
# The demos: what is said above the seeds, of how many that end above a bar, or without one above their own start
COMMANDS = {
    "python o2sac.py --preset demo --num-seeds 5": ("{end} at the end, above 90 on {above} of 5 seeds", 90),
    "python o2td3.py --preset demo --num-seeds 5":
        ("{end} at the end, above the offline policy on {above} of 5 seeds", None),
    "python o2ppo.py --preset demo --num-seeds 5": ("{end} at the end, above 89 on {above} of 5 seeds", 89),
    "python o2ppo.py --preset demo --env-id antmaze-umaze-demo --num-seeds 5":
        ("Better at the end than at the start on {above} of 5 seeds", None),
}  # fmt: skip


def flat(text: str) -> str:
    """A text as one line."""
    return " ".join(text.split())


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"\d+\.\d", text)]


def cells(text: str) -> list[list[str]]:
    """Those of every row of tables, but for the lines below their heads."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"^\| .*", text, re.M)]


def demo(command: str) -> tuple[str, list[list[str]], list[str]]:
    """Of docs/demos.md the words between a demo's command and its table, the cells of five seeds, and their means."""
    words, table = DEMOS.split(f"`{command}`")[1].split("| seed |")[:2]
    names, *seeds, means = cells(f"| seed |{table}")
    assert names[1].endswith("offline") and names[-1] in ("mean of the last 3", "at the end")
    assert [row[0] for row in (*seeds, means)] == ["0", "1", "2", "3", "4", "mean ± std"]
    return flat(words), [row[1:] for row in seeds], [mean.removesuffix(" ± 0.0") for mean in means[1:]]


def naive_scores(script: str) -> list[float]:
    """The evaluations of a demo's naive switch."""
    rows = read_rows(ROOT / "datasets" / f"demo_naive_{script}.csv")
    assert {row["seed"] for row in rows} == {0}
    return [row["score"] for row in rows]


def test_means_of_the_demos_are_those_of_their_seeds():
    assert DEMOS.count("| seed |") == len(COMMANDS)
    for command in COMMANDS:
        _, seeds, means = demo(command)
        rows = np.array(seeds, float)
        told = np.array([(*numbers(mean), 0.0)[:2] for mean in means])  # of rows that are rounded themselves
        assert np.abs(told - np.stack([rows.mean(0), rows.std(0)], 1)).max() < 0.11


def test_the_readmes_table_of_the_demos_is_that_of_their_page():
    """And of the presets, and of the naive switches' files."""
    expected = ["| | from | offline | at the end, five seeds | naive switch, seed 0 | minutes a seed |"]
    for command in COMMANDS:
        words, _, (offline, *_, end) = demo(command)
        _, file, *flags = command.split()
        name = file.removesuffix(".py")
        script = next(script for script in SCRIPTS if script.__name__ == name)
        args = cli.parse(script.Args, script.PRESETS, script.FAMILIES, flags)
        start = args.offline.upper().replace("_", "+")
        ships = (ROOT / "datasets" / "policies" / f"{args.env_id}__{args.offline}.pt").exists()
        assert (f"from the {start} policy" if ships else f"trains {start} for") in words
        naive = minutes = "–"
        if "--env-id" not in flags:
            naive = f"{np.mean(naive_scores(name)[-3:]):.1f}"
            took = re.search(rf"{name.upper()}'s (?:demo took )?(\d+) min (\d+) s", flat(DEMOS))
            minutes = f"{int(took[1]) + int(took[2]) / 60:.1f}"
        start += "" if ships else ", trained first"
        expected.append(f"| `{command}` | {start} | {offline} | {end} | {naive} | {minutes} |")
    head, _, *rows = re.findall(r"^\|.*", section(README, "The demos"), re.M)
    assert [head, *rows] == expected


@pytest.mark.parametrize(
    "words",
    [r"two seeds(?: of AntMaze)? side by side took (\d+)", r"a million(?: steps|, in bfloat16,) come to (\d+\.\d)"],
)
def test_what_the_readme_says_below_that_table_is_on_that_page(words):
    (told,), (found,) = (re.findall(words, flat(text), re.I) for text in (section(README, "The demos"), DEMOS))
    assert told == found


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_said_above_the_seeds_of_a_demo_is_of_them(command):
    (text, seeds, means), (words, bar) = demo(command), COMMANDS[command]
    above = sum(float(end) > (bar or float(start)) for start, *_, end in seeds)
    assert words.format(end=means[-1], above=above) in text


def final(heading: str, name: str) -> str:
    """A mean at the end, of the tables that say "final" in a section of docs/experiments.md."""
    part = re.split(r"\n##", EXPERIMENTS.split(f"\n{heading}\n")[1])[0]
    tables = map(cells, re.findall(r"(?:^\|.*\n)+", part, re.M))
    found = {row[0]: row[names.index("final")] for names, *rows in tables if "final" in names for row in rows}
    return found[name].split()[0]


NAIVE = {  # what the switch leaves out, and what is said of it
    "o2sac": ("--no-reevaluate --no-align --no-constrain", "falls to {first} within 1,000 steps of its first update, "
              "swings between {low} and {high}, and ends at {end} (mean of the last three)"),
    "o2td3": ("--no-reevaluate --no-align --no-constrain", "swings between {low} and {high} and ends at {end} (mean of "
              "the last three: {a}, {b} and {c})"),
    "o2ppo": ("--no-reevaluate --no-constrain", "stays between {low} and {high} and ends at {end} (mean of the "
              "last three)"),
}  # fmt: skip


@pytest.mark.parametrize("script", NAIVE)
def test_what_is_said_of_the_naive_switch_is_in_its_file(script):
    (left_out, words), scores = NAIVE[script], naive_scores(script)
    changed = [score for score in scores if score != scores[0]]
    told = {"first": changed[0], "low": min(changed), "high": max(changed), "end": np.mean(scores[-3:])}
    told |= dict(zip("abc", scores[-3:], strict=True))
    words = words.format(**{name: f"{value:.1f}" for name, value in told.items()})
    assert f"naive switch, `python {script}.py --preset demo {left_out}` (seed 0), {words}" in flat(DEMOS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_results_are_those_of_the_other_pages(script):
    """Each at the place that it is of, and no figure beside them."""
    name, text = script.__name__, flat(section(page_of(script), "Results"))
    command = f"python {name}.py --preset demo"
    _, _, (offline, *_, end) = demo(f"{command} --num-seeds 5")
    *_, a, b, c = naive_scores(name)
    said = [
        f"The policy to start from scores {offline}.",
        f"| `{command} --num-seeds 5` | {end}, five seeds",
        f"| `{command} {NAIVE[name][0]}` | {(a + b + c) / 3:.1f}, one seed",
    ]
    if script is o2sac:
        ours, acas = (final("## Beside AWAC, IQL, PEX and ACA", row) for row in ("O2SAC from ACA's", "ACA"))
        said += [f"comes to {ours} on hopper]", f"where ACA has {acas}."]
    if script is o2td3:
        said[-1] += f", of {a:.1f}, {b:.1f} and {c:.1f} |"
        hopper = final("## What is each step of the method worth?", "no constrain")
        walker = final("### On another robot", "no constrain")
        said += [f"-of-the-method-worth), to {hopper} on three seeds", f"#on-another-robot), to {walker}."]
    if script is o2ppo:
        *_, maze = demo("python o2ppo.py --preset demo --env-id antmaze-umaze-demo --num-seeds 5")
        said.append("come from {:.0f}% to {:.0f}% of the episodes".format(*(float(mean.split()[0]) for mean in maze)))
    assert not [words for words in said if words not in text]
    assert sorted(numbers(text)) == sorted(numbers(" ".join(said)))
