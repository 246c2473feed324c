"""What the pages say is there: links, commands with their flags, and Python that runs as it is printed."""

import dataclasses
import functools
import json
import re
import shlex

import pytest

import export
from common import policies, stages
from common.identity import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
         ROOT / "docs" / "walkthrough.ipynb",
         *sorted((ROOT / "datasets").glob("**/README.md"))]  # fmt: skip
# What stands in a block, or in a line, which may be broken
BLOCKS = re.compile(r"```(?:bash|sh)\n(.*?)```|`((?:\w+=\S+ )?python\s[^`]+)`", re.S)


def text_of(page) -> str:
    """A page's text; of a notebook that between its cells of code."""
    if page.suffix == ".md":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def commands(text: str) -> list[list[str]]:
    """The words of every `python FILE.py …` that is printed."""
    blocks = [(block.replace("\\\n", " "), " ".join(command.split())) for block, command in BLOCKS.findall(text)]
    lines = [re.sub(r"^(\w+=\S+ )+", "", line) for block, command in blocks for line in [*block.splitlines(), command]]
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"python \S+\.py", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.S)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    lost = [t for t in targets if t and not t.startswith(("http", "mailto:")) and not (page.parent / t).exists()]
    assert not lost


def anchors(page) -> set[str]:
    """What GitHub lets a link name of a page: its headings, without all but letters, numbers and hyphens."""
    titles = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text_of(page), flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_headings_that_are_there(page):
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.S)
    links = re.findall(r"\]\(((?!http)[^)\s#]*)#([^)\s]+)\)", text)
    assert not [f"{file}#{name}" for file, name in links if name not in anchors(page.parent / file if file else page)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_of_scripts_and_flags_that_exist(page):
    for file, *words in commands(text_of(page)):
        if file.startswith("mymethod"):
            file = "o2sac.py"
        script = stages.load(ROOT / file, ("Args",), "")
        names = {field.name for field in dataclasses.fields(script.Args)} | {"help", "continue"}
        flags = [word[2:].split("=")[0].replace("-", "_") for word in words if re.match(r"--[a-z]", word)]
        unknown = [flag for flag in flags if flag not in names and flag.removeprefix("no_") not in names]
        assert not unknown, f"{file}: {unknown}"


def test_the_python_of_a_page_runs_as_it_is_printed(tmp_path, monkeypatch, run_script):
    """docs/policies.md, from the project's folder; its export is made first, at another place."""
    text = (ROOT / "docs" / "policies.md").read_text()
    code, _, err = run_script(
        export, ROOT / "datasets/policies/hopper-medium-demo__iql.pt", "--out", tmp_path / "iql.onnx"
    )
    assert code == 0, err
    monkeypatch.chdir(ROOT)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block.replace('"iql.onnx"', repr(str(tmp_path / "iql.onnx"))), names)
    assert names["actions"][0] == pytest.approx(names["action"], abs=1e-4)


SCRIPTS = [path for folder in (".", "offline", "baselines", "experiments", "benchmarks", "datasets")
           for path in sorted((ROOT / folder).glob("[a-z]*.py")) if path.name != "setup.py"]  # fmt: skip


@functools.cache
def flags() -> set[str]:
    """The arguments of all scripts, as they are typed."""
    scripts = [stages.load(path, (), "") for path in SCRIPTS]
    names = {field.name for script in scripts if hasattr(script, "Args") for field in dataclasses.fields(script.Args)}
    names = {name.replace("_", "-") for name in names}
    return names | {f"no-{name}" for name in names} | {"help", "continue", "logdir"}  # the last is TensorBoard's


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags_and_files_that_are_named_are_there(page):
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text_of(page), flags=re.S))
    named = {word for span in spans for word in re.findall(r"(?<![\w-])--([a-z][a-z-]*[a-z])(?!…|-…)", span)}
    files = {
        name for span in spans for name in re.findall(r"(?<![\w/.<>$~])[a-z_]+/[\w/]+\.(?:py|md|csv|hdf5)\b", span)
    }
    lost = [name for name in files if not (ROOT / name).exists() and "/my" not in name]  # the reader's own
    assert named - flags() == set() and lost == []


def test_the_readme_names_every_algorithm():
    text = (ROOT / "README.md").read_text()
    lost = [path for path in SCRIPTS if path.parent.name in ("offline", "baselines") and f"`{path.name}`" not in text]
    assert not lost


def test_the_policies_that_ship_are_what_their_page_says():
    folder = ROOT / "datasets" / "policies"
    rows = re.findall(r"^\| `(\S+\.pt)` \| (\S+) ± \S+ \| `([^`]+)` \|", (folder / "README.md").read_text(), re.M)
    assert [name for name, *_ in rows] == sorted((path.name for path in folder.glob("*.pt")), key=str)
    for name, score, command in rows:
        policy = policies.read(folder / name)
        assert policy["made_with"]["command"] == command and command.endswith(f"--steps {policy['steps']}")
        assert f"{policy['score']:.1f}" == score and policy["made_with"]["score"] == "mean of 100 episodes"
        assert "learner" not in policy and (folder / name).stat().st_size < 3e6
