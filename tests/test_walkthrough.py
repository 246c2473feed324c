"""docs/walkthrough.ipynb, from its first cell to its last, with tiny budgets."""

import functools
import json
import tempfile

import matplotlib
import pytest
from matplotlib import pyplot as plt

import o2sac
import offline
from common import datasets, envs
from common.identity import ROOT
import torch

BOOK = json.loads((ROOT / "docs" / "walkthrough.ipynb").read_text())
CELLS = [cell for cell in BOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs(monkeypatch, tmp_path, capsys):
    code = ["".join(cell["source"]) for cell in CELLS]
    assert code[0].count("\nSCALE = 1 ") == 1
    code[0] = code[0].replace("\nSCALE = 1 ", "\nSCALE = 0.005 ")
    load, transfer = datasets.load, offline.transfer
    monkeypatch.setattr(datasets, "load", lambda name: load(name).head(3_000))
    monkeypatch.setattr(offline, "transfer", functools.partial(transfer, steps=50))
    monkeypatch.setattr(tempfile, "mkdtemp", lambda: str(tmp_path))
    monkeypatch.setattr(plt, "show", lambda: None)
    monkeypatch.chdir(ROOT / "docs")  # where Jupyter starts
    matplotlib.use("agg")
    plt.close("all")  # what others left open
    names = {}
    for cell in code:
        exec(cell, names)
    pictures = [[len(panel.lines) for panel in plt.figure(number).axes] for number in plt.get_fignums()]
    plt.close("all")
    out = capsys.readouterr().out
    said = ["data and D4RL's hopper agree", "transfer: td3_bc", "mean action error", "correlation of Q", "argmax_gap"]
    assert [words for words in said if words not in out] == [] and pictures == [[3], [2, 2]]
    assert [row["step"] for row in names["rows"]] == list(range(2, 31, 2)) and "losses/kl" in names["rows"][-1]

    # Q(s_0, a_0) = Σ γ^t r_t - α Σ_{t > 0} γ^t log π(a_t|s_t), of the same draws
    torch.manual_seed(1)
    states, actions, returns = (x.flip(0) if torch.is_tensor(x) else x[::-1] for x in names["monte_carlo"](1))
    torch.manual_seed(1)
    env = envs.make_env(names["data"].task, names["evaluator"].mean, names["evaluator"].std)
    env.reset(seed=0)
    want = 0.0
    for t, (state, action) in enumerate(zip(states, actions, strict=True)):
        mean, log_std = names["agent"].actor_offline(state[None])
        u = mean + log_std.exp() * torch.randn_like(mean)
        torch.testing.assert_close(u.tanh()[0], action)
        _, reward, terminated, *_ = env.step(action.numpy())
        log_prob = o2sac.log_prob_of(u.double(), mean.double(), log_std.double()).item() if t else 0.0
        want += 0.99**t * (reward - 0.2 * log_prob)
    assert terminated and returns[0] == pytest.approx(want, rel=1e-3)


def test_the_notebook_holds_no_outputs():
    assert CELLS and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)
