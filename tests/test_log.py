"""TensorBoard, started as the README says, is asked for what its page shows."""

import json
import re
import urllib.parse
import urllib.request

import o2sac
from common.log import Log
from tensorboard.program import TensorBoard

from offline import cql


def served(folder) -> dict:
    """Of each run in `folder` and each tag the (step, value) that TensorBoard serves its page."""
    board = TensorBoard()
    board.configure(argv=["tensorboard", "--logdir", str(folder), "--port", "0"])
    url = board.launch()

    def ask(path, **query):
        with urllib.request.urlopen(f"{url}data/plugin/scalars/{path}?{urllib.parse.urlencode(query)}") as reply:
            return json.load(reply)

    return {
        run: {tag: [(step, value) for _, step, value in ask("scalars", run=run, tag=tag)] for tag in tags}
        for run, tags in ask("tags").items()
    }


def natural(tag: str) -> list:
    """Sorts as the page does: numbers by their value and before letters."""
    return [(not part.isdigit(), int(part) if part.isdigit() else part) for part in re.findall(r"\d+|\D", tag)]


def test_a_log_holds_the_stages_that_the_run_has(tmp_path):
    log = Log(tmp_path, o2sac.Args())
    for stage in ("reevaluate", "align"):
        log.add(stage, 10, {f"{stage}/q": 1.0})
    log.save()
    (tmp_path / "reevaluate.pt").touch()  # taken over from another run, whose log is here; its alignment is not
    assert [row["stage"] for row in Log(tmp_path, o2sac.Args()).rows] == ["reevaluate"]


def test_tensorboard_shows_every_point_of_every_stage_in_the_runs_order(tmp_path):
    log = Log(tmp_path / "run", o2sac.Args())
    for stage, steps in (("reevaluate", 13), ("align", 5), ("finetune", 10)):
        for step in range(0, 10 * steps, 10):
            log.add(stage, step, {"probe/q_data": step / 2})
            log.add(stage, step, {"charts/score" if stage == "finetune" else f"{stage}/q": step / 4})
    log.save()
    offline = Log(tmp_path / "offline", cql.Args())
    offline.add("cql", 500, {"cql/q": 1.0})
    offline.save()

    curves = served(tmp_path)
    assert curves["offline"] == {"0_cql/q": [(500, 1.0)]}
    order = sorted(curves["run"], key=natural)
    assert order == ["1_reevaluate/probe/q_data", "1_reevaluate/q", "2_align/probe/q_data", "2_align/q", "charts/score",
                     "probe/q_data"]  # fmt: skip
    for name, tags in (("probe/q_data", order[::2][:2] + order[-1:]), ("charts/score", ["charts/score"])):
        logged = [(row["step"], row[name]) for row in log.rows if name in row]
        assert [point for tag in tags for point in curves["run"][tag]] == logged
    assert curves["run"]["1_reevaluate/q"] == [(10 * i, 2.5 * i) for i in range(13)]
