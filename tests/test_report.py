"""What is shown of a run: its scores and where they come from."""

import json

import o2sac
import o2td3
import pytest
import torch
from common.evaluation import Evaluator

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
        # the offline algorithm's own, the offline policy's, two after alignment (logged, and as the stage's result)
        offline, aligned, *online = scores
        given = iter([offline, offline, aligned, aligned, *online])

        def evaluate(self, policy, device):
            self.count += 1
            return next(given)

        monkeypatch.setattr(Evaluator, "__call__", evaluate)
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
