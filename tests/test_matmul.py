"""--matmul bfloat16: what is rounded, what is not, and who says so."""

import json

import pytest
import torch

import o2td3
from common import nn, steps, tasks
from common.log import read_rows
from tests.conftest import TINY
from tests.test_pipeline import SMALL


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().double()


@pytest.mark.parametrize("make", [lambda: nn.mlp(11, (64, 64), 6), lambda: nn.ensemble_mlp(2, 14, (64, 64), 1)])
def test_products_between_hidden_layers_are_rounded_and_no_others(make):
    """Beside the same in double precision, with what goes into the one product rounded by hand."""
    net = make().requires_grad_(True)
    first, middle, last = (layer for layer in net if isinstance(layer, torch.nn.Linear | nn.EnsembleLinear))
    several = isinstance(first, nn.EnsembleLinear)
    x = torch.randn(2, 32, 14) if several else torch.randn(32, 11)
    with nn.products_of(torch.bfloat16):
        found = net(x)
        gradients = torch.autograd.grad(found.sum(), list(net.parameters()))
    assert found.dtype == torch.float32 and all(gradient.dtype == torch.float32 for gradient in gradients)

    def weights(layer):
        weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
        return (weight if several else weight.T), bias

    hidden = torch.relu(x.double() @ weights(first)[0] + weights(first)[1])
    exact = rounded(hidden) @ rounded(weights(middle)[0])
    want = torch.relu(rounded(exact) + weights(middle)[1]) @ weights(last)[0] + weights(last)[1]
    plain = net.double()(x.double())
    error, rounding = (found.double() - want).norm(), (plain - want).norm()
    # A float32 sum that lies between two of bfloat16's numbers may be rounded to the other one than the exact sum
    assert error < rounding / 10 and rounding > 1e-3 * want.norm()


def test_a_compiled_gradient_is_the_eager_one(monkeypatch):
    """GCC 12 spoils gradients that are transposed on their way, on processors that it does not know."""
    monkeypatch.setattr(steps, "products", torch.bfloat16)
    net, x = nn.mlp(11, (256, 256, 256), 6), torch.randn(256, 11)
    parameters = list(net.parameters())

    def gradients():
        return torch.autograd.grad(net(x).square().sum(), parameters)

    for found, want in zip(steps.compiled(gradients, True)(), steps.compiled(gradients, False)(), strict=True):
        assert (found - want).norm() < 0.01 * want.norm()


def test_float32_is_what_it_was_and_comes_back():
    net, x = nn.mlp(11, 2, 6), torch.randn(32, 11)
    before = net(x)
    with nn.products_of(torch.bfloat16):
        assert not torch.equal(net(x), before)
    assert torch.equal(net(x), before)
    with pytest.raises(ZeroDivisionError), nn.products_of(torch.bfloat16):
        raise ZeroDivisionError
    assert nn.products == torch.float32


def test_it_ends_where_the_step_does(monkeypatch):
    """What a policy does elsewhere, and its file is checked by, is float32's."""
    seen = []
    monkeypatch.setattr(steps, "products", torch.bfloat16)
    step = steps.compiled(lambda: seen.append(nn.products), enabled=False)
    monkeypatch.setattr(steps, "products", torch.float32)
    step()
    assert seen == [torch.bfloat16] and nn.products == torch.float32


def test_a_run_takes_it_from_its_offline_policy_to_its_end(run_script, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "products", torch.float32)
    flags = [*SMALL, *TINY, "--offline", "td3_bc"]
    losses = {}
    for matmul in ("float32", "bfloat16"):
        code, _, err = run_script(o2td3, *flags, "--run-dir", tmp_path / matmul, "--matmul", matmul)
        assert code == 0, err
        folders = sorted((tmp_path / matmul).iterdir())
        assert len(folders) == 2  # the offline policy's, and this one's
        for folder in folders:
            assert json.loads((folder / "args.json").read_text())["matmul"] == matmul
            rows = read_rows(folder / "progress.csv")
            found = [value for row in rows for name, value in row.items() if "loss" in name]
            losses[folder.name, matmul] = torch.tensor(found, dtype=torch.float64)
    for name in {name for name, _ in losses}:
        exact, fast = losses[name, "float32"], losses[name, "bfloat16"]
        assert len(exact) == len(fast) and 0 < (fast - exact).norm() < 0.1 * exact.norm(), name


def test_a_policy_of_float32_goes_on_in_bfloat16(run_script, tmp_path, monkeypatch):
    """It is checked, when it is read, by how it acted when it was written."""
    monkeypatch.setattr(steps, "products", torch.float32)
    path = tasks.SHIPPED / "policies" / "hopper-medium-demo__td3_bc.pt"
    flags = [*SMALL, *TINY, "--offline", path, "--no-reevaluate", "--no-align", "--online-steps", "70"]
    code, _, err = run_script(o2td3, *flags, "--run-dir", tmp_path, "--matmul", "bfloat16")
    assert code == 0, err


def test_a_processor_that_is_slower_with_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(steps, "products", torch.float32)
    for ratio, said in ((2.5, ""), (0.4, "note: --matmul bfloat16 is slower on this processor, 0.4 times as fast")):
        monkeypatch.setattr(steps, "speed_of", lambda _, ratio=ratio: ratio)
        steps.setup(torch.device("cpu"), 0, matmul="bfloat16")
        assert steps.products == torch.bfloat16
        assert capsys.readouterr().out.startswith(said)
        steps.setup(torch.device("cpu"), 0)
        assert steps.products == torch.float32


def test_its_speed_is_measured():
    assert 0 < steps.speed_of(torch.int64) < 1  # no library has a product of these
