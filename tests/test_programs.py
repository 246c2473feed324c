"""Policies as programs: ONNX and TorchScript act as their own runtime lets them act."""

import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, save
from torch import nn

from common.foreign import load_policy
from tests.foreign import A, S, acts, close, network, refused


def onnx_nodes(net: nn.Sequential, real=np.float32):
    """Nodes and weights of linear layers with tanh, from "obs" to "act"."""
    nodes, weights, x = [], [], "obs"
    for i, layer in enumerate(net):
        y = "act" if i == len(net) - 1 else f"h{i}"
        if isinstance(layer, nn.Linear):
            for key, value in layer.state_dict().items():
                weights.append(numpy_helper.from_array(value.numpy().astype(real), f"{key}{i}"))
            nodes.append(helper.make_node("Gemm", [x, f"weight{i}", f"bias{i}"], [y], transB=1))
        else:
            nodes.append(helper.make_node("Tanh", [x], [y]))
        x = y
    return nodes, weights


def onnx_file(nodes, weights=(), path="policy.onnx", kind=TensorProto.FLOAT, shape=("n", S), outputs=("act",), **more):
    graph = helper.make_graph(
        nodes, "policy", [helper.make_tensor_value_info("obs", kind, shape)],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs], list(weights),
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=8, **more), path)
    return path


@pytest.fixture
def net():
    return network(S, 32, A, activation=nn.Tanh, end=[nn.Tanh()])


@pytest.mark.parametrize("batch", ["n", 1, 7])
@pytest.mark.parametrize("real", ["float32", "float64"])
def test_onnx_plays_its_own_actions(batch, real, net, raw_data):
    """Also in double precision, and with one observation at a time, as d3rlpy exports it, or any other fixed number."""
    kind = {"float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}[real]
    path = onnx_file(*onnx_nodes(net, real), shape=(batch, S), kind=kind)
    policy = load_policy(path, raw_data)
    close(acts(policy, raw_data), net(raw_data.obs[:60]))
    assert acts(policy, raw_data).dtype == torch.float32 and policy["kind"] == "function"
    mean, std = raw_data.statistics()
    policy = load_policy(path, raw_data, normalize_from="1")
    close(acts(policy, raw_data), net((raw_data.obs[:60] - mean) / std))


def test_programs_give_the_environments_own_actions(raw_data):
    """Which policies know within ±1; what lies beyond its range is clipped."""
    raw_data.task = replace(raw_data.task, action_range=((-2.0, 0.0, -1.6), (2.0, 1.0, 0.5)))
    net = network(S, 32, A, activation=nn.Tanh)
    low, high = torch.tensor(raw_data.task.action_range)
    own = net(raw_data.obs[:60]).clamp(low, high)
    assert 0.1 < ((own == low) | (own == high)).float().mean() < 0.9
    for path in (onnx_file(*onnx_nodes(net)), torchscript_file(net)):
        policy = load_policy(path, raw_data, trust=True)
        close(acts(policy, raw_data), 2 * (own - low) / (high - low) - 1)
        assert policy["action_range"].tolist() == [list(row) for row in raw_data.task.action_range]


class Coarse(nn.Module):
    """Answers several observations 0.01 further off than one."""

    def forward(self, x):
        return x[:, :3] + 0.01 * min(len(x) - 1, 1)


def test_what_a_program_may_be_off_by_depends_on_the_range(raw_data):
    refused(torchscript_file(Coarse()), raw_data, "neighbours", trust=True)
    raw_data.task = replace(raw_data.task, action_range=((-1000.0,) * A, (1000.0,) * A))
    assert load_policy("policy.pt", raw_data, trust=True)["kind"] == "function"


def test_onnx_with_its_weights_in_a_second_file(net, raw_data, tmp_path):
    import onnx

    onnx_file(*onnx_nodes(net))
    onnx.save(onnx.load("policy.onnx"), "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    close(acts(load_policy("big.onnx", raw_data), raw_data), net(raw_data.obs[:60]))
    (tmp_path / "big.data").rename(tmp_path / "moved.data")
    refused("big.onnx", raw_data, "big.data", "beside it")
    (tmp_path / "moved.data").rename(tmp_path.parent / "big.data")
    model = onnx.load("big.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = "../big.data"
    save(model, "outside.onnx")
    refused("outside.onnx", raw_data, "../big.data", "beside it")


def looped():
    """Adds one to a counter for as long as it is not negative."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Identity", ["x"], ["y"])], "body",
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in
         (("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("x", TensorProto.FLOAT, None))],
        [helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in
         (("on", TensorProto.BOOL, []), ("y", TensorProto.FLOAT, None))],
    )  # fmt: skip
    true = numpy_helper.from_array(np.array(True), "true")
    return [helper.make_node("Loop", ["", "true", "obs"], ["act"], body=body)], [true]


def filled():
    shape = numpy_helper.from_array(np.array([10**6, 10**6]), "shape")
    return [helper.make_node("ConstantOfShape", ["shape"], ["act"])], [shape]


def outer():
    """A column times a row: 8 numbers a step make 10¹² of a small file."""
    column = numpy_helper.from_array(np.ones((10**5, 1), np.float32), "column")
    row = numpy_helper.from_array(np.ones((1, 10**5), np.float32), "row")
    return [helper.make_node("MatMul", ["column", "row"], ["x"]), helper.make_node("ReduceSum", ["x"], ["act"])], [
        column,
        row,
    ]


def doubled():
    names = ["obs", *map(str, range(40))]
    nodes = [helper.make_node("Concat", [x, x], [y], axis=1) for x, y in pairwise(names)]
    return [*nodes, helper.make_node("Identity", ["39"], ["act"])], []


@pytest.mark.parametrize(("make", "words"), [
    (looped, ("Loop", "--trust-checkpoint")), (filled, ("ConstantOfShape", "--trust-checkpoint")),
    (lambda: ([helper.make_node("Gelu", ["obs"], ["act"], domain="own")], []), ("--trust-checkpoint",)),
    (outer, ("10,000,000,000 numbers",)), (doubled, ("numbers for an observation",)),
], ids=["loop", "constant", "own", "outer", "doubled"])  # fmt: skip
def test_onnx_that_is_more_than_layers_is_not_run(make, words, raw_data):
    refused(onnx_file(*make()), raw_data, *words)


def test_onnx_with_functions_of_its_own_is_not_run(raw_data):
    imports = [helper.make_opsetid("", 17)]
    twice = helper.make_function("own", "Twice", ["x"], ["y"], [helper.make_node("Add", ["x", "x"], ["y"])], imports)
    node = helper.make_node("Twice", ["obs"], ["act"], domain="own")
    refused(onnx_file([node], functions=[twice]), raw_data, "Twice", "--trust-checkpoint")


def test_onnx_that_branches_is_run_if_it_is_trusted(net, raw_data):
    nodes, weights = onnx_nodes(net)
    condition = numpy_helper.from_array(np.array(True), "true")
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, ["mean"], ["z"])],
            name,
            [],
            [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        )
        for name, op in (("then", "Neg"), ("else", "Abs"))
    }
    nodes[-1].output[0] = "mean"
    path = onnx_file([*nodes, helper.make_node("If", ["true"], ["act"], **branches)], [*weights, condition])
    refused(path, raw_data, "If", "--trust-checkpoint")
    close(acts(load_policy(path, raw_data, trust=True), raw_data), -net(raw_data.obs[:60]))


@pytest.mark.parametrize(("make", "words"), [
    (lambda: onnx_file(*onnx_nodes(network(17, 8, 6)), shape=("n", 17)), ("17 dimensions",)),
    (lambda: onnx_file(*onnx_nodes(network(17, 8, 6)), shape=("n", "s")), ("does not take an observation",)),
    (lambda: onnx_file(*onnx_nodes(network(S, 8, 6))), ("shape (1, 6)",)),
    (lambda: onnx_file([helper.make_node("Gemm", ["obs", "w"], ["act"], transB=1)],
                       [numpy_helper.from_array(np.full((A, S), np.nan, np.float32), "w")]), ("NaN",)),
    (lambda: onnx_file([helper.make_node("Cast", ["obs"], ["act"], to=1)], kind=TensorProto.INT64), ("int64",)),
    (lambda: Path("policy.onnx").write_text("hello") and "policy.onnx", ("no whole ONNX file",)),
    (lambda: os.truncate(onnx_file(*onnx_nodes(network(S, 99, A))), 900) or "policy.onnx", ("ONNX",)),
    (lambda: onnx_file([helper.make_node("Tanh", ["nothing"], ["act"])]), ("ONNX",)),
    (lambda: onnx_file([helper.make_node("Tanh", ["obs"], ["act"])], shape=[S]), (f"shape (batch, {S})",)),
    (lambda: onnx_file([helper.make_node("Tanh", ["obs"], ["act"])], outputs=()), ("has no output",)),
])  # fmt: skip
def test_onnx_that_does_not_fit_is_refused(make, words, raw_data):
    refused(make(), raw_data, *words)


def test_onnx_with_dropout_still_active_is_played_without(net, raw_data):
    nodes, weights = onnx_nodes(net)
    weights += [
        numpy_helper.from_array(np.array(0.3, np.float32), "rate"),
        numpy_helper.from_array(np.array(True), "train"),
    ]
    nodes.insert(2, helper.make_node("Dropout", ["h1", "rate", "train"], ["dropped"]))
    nodes[3].input[0] = "dropped"
    close(acts(load_policy(onnx_file(nodes, weights), raw_data), raw_data), net(raw_data.obs[:60]))


class Several(nn.Module):
    """An action, then something else."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        y = self.net(x)
        return y, (y * y).sum(-1)


class History(nn.Module):
    def forward(self, states, actions, returns):
        return actions[-1] + states.sum() + returns.sum()


class Numbers(nn.Module):
    def forward(self, x):
        return {"action": x[:, :3]}


class OneByOne(nn.Module):
    """Takes one observation and no more: of many it would give the first one's action."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x[:1])


def torchscript_file(module, example=None):
    program = torch.jit.script(module) if example is None else torch.jit.trace(module, example, check_trace=False)
    program.save("policy.pt")
    return "policy.pt"


def test_torchscript_plays_its_own_actions(net, raw_data):
    path = torchscript_file(net, torch.zeros(1, S))
    refused(path, raw_data, "--trust-checkpoint")
    for module in (net, Several(net), OneByOne(net), nn.Sequential(*net[:2], nn.Dropout(0.5), *net[2:])):
        policy = load_policy(torchscript_file(module), raw_data, trust=True)
        close(acts(policy, raw_data), net(raw_data.obs[:60]))
    policy = load_policy(torchscript_file(network(S, 32, A, activation=nn.Tanh).double()), raw_data, trust=True)
    assert acts(policy, raw_data).dtype == torch.float32


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchscript_that_does_not_fit_is_refused(net, raw_data):
    with_dropout = nn.Sequential(*net[:2], nn.Dropout(0.5), *net[2:])
    for module, example, words in (
        (with_dropout, torch.zeros(1, S), ("two different actions", "eval()")),
        (nn.Sequential(*net[:2], nn.BatchNorm1d(32), *net[2:]), torch.zeros(2, S), ("neighbours", "eval()")),
        (History(), (torch.zeros(5, S), torch.zeros(5, A), torch.zeros(5)), ("3 inputs", "Decision Transformer")),
        (network(17, 8, A), None, ("does not take an observation", "17x8")),
        (network(S, 8, 5), None, ("shape (1, 5)",)),
        (Numbers(), None, ("returns a dict",)),
    ):
        refused(torchscript_file(module, example), raw_data, *words, trust=True)


def test_torchscript_that_is_not_whole(net, raw_data, tmp_path):
    torchscript_file(net)
    content = (tmp_path / "policy.pt").read_bytes()
    (tmp_path / "policy.pt").write_bytes(content[:-100])
    refused("policy.pt", raw_data, "not whole", trust=True)
