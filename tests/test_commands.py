"""The commands on policies and on finished runs: play, export, compare."""

import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import export
import play
from common import policies, tasks
from common.datasets import load
from common.evaluation import FRESH, Evaluator
from common.foreign import load_policy
from common.foreign.programs import check_layers

SHIPPED = tasks.SHIPPED / "policies"


def test_play_gives_the_score_of_fresh_starts_with_its_error(run_script):
    path = SHIPPED / "hopper-medium-demo__iql.pt"
    code, out, err = run_script(play, path, "--episodes", "3")
    assert code == 0, err
    policy = policies.read(path)
    evaluator = Evaluator(tasks.resolve(tasks.DEMO), policy["state_mean"], policy["state_std"], 3)
    returns = evaluator.returns(policies.module(policy).mode, "cpu", range(FRESH, FRESH + 3))
    scores = [evaluator.score(r) for r in returns]
    error = np.std(scores, ddof=1) / 3**0.5
    assert f"score {np.mean(scores):.1f} ± {error:.1f}" in out
    assert "iql (gaussian, 100,000 steps) in D4RL's hopper" in out


def test_play_says_what_it_needs(run_script, tmp_path):
    code, _, err = run_script(play, tmp_path / "none.pt")
    assert code == 2 and "there is no file" in err
    (tmp_path / "policy.onnx").touch()
    code, _, err = run_script(play, tmp_path / "policy.onnx")
    assert code == 2 and "does not say where it is played" in err and "--env-id" in err


LAYERS = [[8, "ReLU", 8, "Tanh"], [8, "LayerNorm", "ELU", "Clip"], [8, "LeakyReLU", 8, "SiLU", 8, "GELU"]]


@pytest.mark.parametrize("hidden", LAYERS, ids=str)
@pytest.mark.parametrize("kind", policies.KINDS)
def test_an_exported_policy_acts_as_it_did(kind, hidden):
    policy = policies.Policy(kind, 11, 3, hidden)
    policy.state_mean, policy.state_std = torch.randn(11), torch.rand(11) + 0.5
    for buffer in policy.net.buffers():  # the bounds of Clip
        buffer.fill_(0.3 if buffer[0] > 0 else -0.3)
    model = export.to_onnx(policy.requires_grad_(False), 11, 3)
    check_layers(Path("policy.onnx"), model)  # `--offline policy.onnx` takes it back without --trust-checkpoint
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for n in (1, 7):
        obs = torch.randn(n, 11)
        [actions] = session.run(None, {"obs": obs.numpy()})
        np.testing.assert_allclose(actions, policy.act(obs).numpy(), atol=1e-5)


def test_an_exported_policy_is_taken_back(run_script, tmp_path):
    path = SHIPPED / "hopper-medium-demo__td3_bc.pt"
    code, out, err = run_script(export, path, "--out", tmp_path / "policy.onnx")
    assert code == 0 and "obs (batch, 11) → actions (batch, 3)" in out, err
    data = load(tasks.DEMO).head(500)
    policy = load_policy(tmp_path / "policy.onnx", data)
    actions = policies.player(policy).mode((data.obs - policy["state_mean"]) / policy["state_std"])
    torch.testing.assert_close(actions, policies.load(path).act(data.obs), atol=1e-4, rtol=0)
    code, _, err = run_script(export, tmp_path / "policy.onnx")
    assert code == 2 and "Traceback" not in err and re.search("policy.onnx", err)
