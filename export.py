"""Write a policy as ONNX: from raw observations to the most likely actions, both an environment's own.

    python export.py runs/hopper-medium-demo__o2sac__td3_bc__0__demo/best.pt         # writes best.onnx beside it

The file needs nothing of this project: `onnxruntime.InferenceSession("best.onnx").run(None, {"obs": obs})` with `obs`
(B, S) in single precision, as many as one likes, gives actions (B, A). `--offline best.onnx` takes it back.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from common import cli, policies
from common.checkpoint import write_atomic
from common.nn import Clip

import onnx
import torch
import tyro
from onnx import TensorProto, helper, numpy_helper
from torch import nn

OPSET = 17
ACTIVATIONS = {nn.ReLU: "Relu", nn.Tanh: "Tanh", nn.ELU: "Elu", nn.LeakyReLU: "LeakyRelu"}


@dataclass
class Args:
    policy: tyro.conf.Positional[str]
    """a policy.pt or best.pt"""
    out: str = ""
    """the file to write; none: beside the policy, with the ending .onnx"""


class Graph:
    """ONNX nodes that follow each other: each takes what the one before gave."""

    def __init__(self):
        self.nodes, self.weights, self.last = [], [], "obs"

    def constant(self, values) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(torch.as_tensor(values).float().cpu().numpy(), name))
        return name

    def add(self, op: str, *more, **attributes) -> None:
        """A node; `more` inputs are constants, or the names of what earlier nodes gave."""
        out = f"x_{len(self.nodes)}"
        inputs = [self.last, *(x if isinstance(x, str) else self.constant(x) for x in more)]
        self.nodes.append(helper.make_node(op, inputs, [out], **attributes))
        self.last = out


@torch.no_grad()
def to_onnx(policy: policies.Policy, obs_dim: int, action_dim: int) -> onnx.ModelProto:
    """The policy's `act` as a model."""
    graph, last = Graph(), policy.net[-1]
    graph.add("Sub", policy.state_mean)
    graph.add("Div", policy.state_std)
    if policy.clip < math.inf:
        graph.add("Max", -policy.clip)
        graph.add("Min", policy.clip)
    for layer in policy.net[:-1]:
        before = graph.last
        if isinstance(layer, nn.Linear):
            graph.add("Gemm", layer.weight, layer.bias, transB=1)
        elif isinstance(layer, nn.LayerNorm):
            graph.add("LayerNormalization", layer.weight, layer.bias, epsilon=layer.eps)
        elif isinstance(layer, Clip):
            graph.add("Max", layer.low)
            graph.add("Min", layer.high)
        elif isinstance(layer, nn.SiLU):  # x σ(x)
            graph.add("Sigmoid")
            graph.add("Mul", before)
        elif isinstance(layer, nn.GELU):  # x (1 + erf(x / √2)) / 2
            graph.add("Div", 2**0.5)
            graph.add("Erf")
            graph.add("Add", 1.0)
            graph.add("Mul", before)
            graph.add("Div", 2.0)
        else:
            slope = {"alpha": layer.negative_slope} if isinstance(layer, nn.LeakyReLU) else {}
            graph.add(ACTIVATIONS[type(layer)], **slope)
    # the mean alone: a squashed Gaussian's spread comes after it
    graph.add("Gemm", last.weight[:action_dim], last.bias[:action_dim], transB=1)
    graph.add("Tanh")
    if policy.action_range is not None:
        low, high = policy.action_range
        graph.add("Mul", (high - low) / 2)
        graph.add("Add", (high + low) / 2)
        graph.add("Max", low)  # single precision may round beyond them
        graph.add("Min", high)
    graph.nodes[-1].output[0] = "actions"
    source = helper.make_tensor_value_info("obs", TensorProto.FLOAT, ["batch", obs_dim])
    target = helper.make_tensor_value_info("actions", TensorProto.FLOAT, ["batch", action_dim])
    made = helper.make_graph(graph.nodes, "policy", [source], [target], graph.weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="o2rl", ir_version=8)
    onnx.checker.check_model(model)
    return model


def main() -> None:
    args = cli.read(Args, __doc__)
    path = Path(args.policy)
    fields = policies.read(path)
    out = Path(args.out or path.with_suffix(".onnx"))
    model = to_onnx(policies.module(fields), fields["obs_dim"], fields["action_dim"])
    write_atomic(out, model.SerializeToString(), "choose another --out")
    within = "the environment's range" if "action_range" in fields else "[-1, 1]"
    print(f"{out}: obs (batch, {fields['obs_dim']}) → actions (batch, {fields['action_dim']}) in {within}")


if __name__ == "__main__":
    cli.run(main)
