"""Tables of runs that are kept in docs/evidence are what these give, made again by the command beside them."""

import re
import runpy

import pytest

import compare
from common.identity import ROOT
from experiments import harness
from tests.test_docs import commands

TEXT = (ROOT / "docs" / "experiments.md").read_text()
KEPT = [words for words in commands(TEXT) if "docs/evidence" in words]


def test_there_is_such_a_table():
    assert KEPT


@pytest.mark.parametrize("words", KEPT)
def test_a_table_is_made_again_from_its_runs(words, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "schedule", lambda *_: pytest.fail("a run is missing"))
    monkeypatch.setattr("sys.argv", [*words, "--out", str(tmp_path)])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    assert stop.value.code == 0
    [page] = tmp_path.glob("*.md")
    rows = [line for line in page.read_text().splitlines() if line.startswith("| ") and not line.startswith("|  |")]
    assert len(rows) >= 4 and not [line for line in rows if line not in TEXT]


def test_the_kept_runs_that_the_readme_compares_with_are_seeds_of_one_setting():
    [names] = re.findall(r"--against docs/evidence/(\S+)`", (ROOT / "README.md").read_text())
    kept = compare.by_dataset(compare.finished(tuple(map(str, (ROOT / "docs" / "evidence").glob(names)))))
    assert len(kept) == 3
    for paths in kept.values():
        compare.check_alike(paths, "those that are kept")
        assert len(paths) >= 3
