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
_, *PARTS = re.split(r"^(?=`python o2|\*\*AntMaze)", DEMOS, flags=re.M)  # one a demo, each with one table
MINUTES = {
    name.lower(): f"{int(minutes) + int(seconds) / 60:.1f}"
    for name, minutes, seconds in re.findall(r"(O2\w+)'s\s(?:demo took )?(\d+) min (\d+) s", DEMOS)
}


def tables(text: str) -> list[list[dict[str, str]]]:
    """The rows of each table, a dictionary of their cells by column."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def demo_of(part: str) -> dict[str, str]:
    """What docs/demos.md says of one demo, as the README's table has it."""
    text = " ".join(part.split())
    command = re.search(r"`(python [^`]*)`", text)[1]
    ((*_, mean),) = tables(part)
    assert mean["seed"] == "mean ± std"
    (offline,) = (value for name, value in mean.items() if name.endswith("offline"))
    switches = re.findall(
        r"naive switch, `(python [^`]*)` \(seed 0\), .*?ends at (\d+\.\d) ?\(mean of the last three", text
    )
    assert [name.split(" --no-")[0] for name, _ in switches] in ([], [command.split(" --num-")[0]])
    trained = re.search(r"trains (\w+) for", text)
    return {
        "": f"`{command}`",
        "from": f"{trained[1]}, trained first" if trained else re.search(r"from the (\S+) policy", text)[1],
        "offline": offline.removesuffix(" ± 0.0"),
        "at the end, five seeds": [*mean.values()][-1],
        "naive switch, seed 0": switches[0][1] if switches else "–",
        "minutes a seed": "–" if "--env-id" in command else MINUTES[command.split()[1].removesuffix(".py")],
    }


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
    (told,) = tables(section(README, "The demos"))
    assert len(told) == 4 and sorted(told, key=str) == sorted(map(demo_of, PARTS), key=str)


def test_what_the_readme_says_below_that_table_is_on_that_page():
    for words in (
        r"two seeds(?: of AntMaze)? side by side took (\d+) minutes",
        r"a million(?: steps|, in bfloat16,) come to (\d+\.\d)",
    ):
        (told,), (found,) = (
            re.findall(words, " ".join(text.split()), re.I) for text in (section(README, "The demos"), DEMOS)
        )
        assert told == found


def test_what_the_demos_start_from_is_what_their_presets_do():
    for part in PARTS:
        demo = demo_of(part)
        script, *words = demo[""].strip("`").split()[1:]
        script = {f"{script.__name__}.py": script for script in SCRIPTS}[script]
        args = cli.parse(script.Args, script.PRESETS, script.FAMILIES, words)
        ships = (ROOT / "datasets" / "policies" / f"{args.env_id}__{args.offline}.pt").exists()
        assert demo["from"] == args.offline.upper().replace("_", "+") + ("" if ships else ", trained first")


def test_what_is_said_above_the_seeds_of_a_demo_is_of_them():
    """The mean at the end, and how many seeds end above what."""
    for part in PARTS:
        demo, rows = demo_of(part), [numbers(line.split("|", 2)[2]) for line in re.findall(r"^\| \d .*", part, re.M)]
        words = " ".join(part.split("| seed |")[0].split())
        end, offline = demo["at the end, five seeds"], float(demo["offline"].split()[0])
        bar, above = re.search(
            r"(?:above (\d+|the offline policy)|Better at the end than at the start) on (\d) of 5 seeds", words
        ).groups()
        bars = [row[0] if bar is None else offline if bar == "the offline policy" else float(bar) for row in rows]
        assert len(rows) == 5 and sum(row[-1] > bar for row, bar in zip(rows, bars, strict=True)) == int(above)
        assert f": {end} at the end" in words or bar is None


# Of the pages' figures that are no demo's: how they are told, and which row has them, of which section
OTHERS = {
    "o2sac": [("comes to {} on hopper]", "## Beside AWAC, IQL, PEX and ACA", "O2SAC from ACA's"),
              ("where ACA has {}.", "## Beside AWAC, IQL, PEX and ACA", "ACA")],
    "o2td3": [("to {} on three seeds", "## What is each step of the method worth?", "no constrain"),
              ("(experiments.md#on-another-robot), to {}.", "### On another robot", "no constrain")],
    "o2ppo": [],
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_results_are_those_of_the_other_pages(script):
    """Each at the place that it is of, and no figure beside them."""
    name, text = script.__name__, " ".join(section(page_of(script), "Results").split())
    demos = [demo_of(part) for part in PARTS]
    (demo,) = (demo for demo in demos if f"python {name}.py" in demo[""] and "--env-id" not in demo[""])
    naive = re.search(rf"naive switch, `(python {name}\.py [^`]*)`", " ".join(DEMOS.split()))[1]
    end, switched = demo["at the end, five seeds"], demo["naive switch, seed 0"]
    said = [f"The policy to start from scores {demo['offline']}.", f"| {demo['']} | {end}, five seeds"]
    said.append(f"| `{naive}` | {switched}, one seed")
    if name == "o2td3":
        said[-1] += f", of {re.search('mean of the last three: ([^)]*)', ' '.join(DEMOS.split()))[1]}"
    if name == "o2ppo":
        (maze,) = (demo for demo in demos if "antmaze" in demo[""])
        offline, last = (float(maze[key].split()[0]) for key in ("offline", "at the end, five seeds"))
        said.append(f"come from {offline:.0f}% to {last:.0f}% of the episodes")
    for words, heading, row in OTHERS[name]:
        part = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^##|\Z)", EXPERIMENTS, re.M | re.S)[1]
        (*_, found) = (cells for table in tables(part) for cells in table if next(iter(cells.values())) == row)
        said.append(words.format(found["final"].split()[0]))  # of the last table, which is O2TD3's
    assert not [words for words in said if words not in text]
    assert sorted(re.findall(r"\d+\.\d", text)) == sorted(re.findall(r"\d+\.\d", " ".join(said)))


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
