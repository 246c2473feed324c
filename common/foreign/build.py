"""From the layers that a file holds to a policy of ours: one of our kinds where it is one, else a function."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from common.cli import UserError
from common.inert import fault_of
from common.nn import Clip, hidden_of
from common.policies import FORMAT, examples_of, range_of


class Function:
    """A policy that is no network of ours: `mode(obs)` gives its most likely actions, `sample(obs)` sampled ones."""

    def __init__(self, mode, sample=None):
        self.mode, self._sample = mode, sample

    def sample(self, obs: torch.Tensor) -> torch.Tensor | None:
        return self._sample(obs) if self._sample else None


@dataclass
class View:
    """How a policy sees a raw observation: (obs - mean) / std, held within ± clip."""

    mean: torch.Tensor  # (S,)
    std: torch.Tensor  # (S,)
    clip: float = math.inf

    def __call__(self, obs: torch.Tensor) -> torch.Tensor:
        return ((obs - self.mean) / self.std).clamp(-self.clip, self.clip)


def raw_view(data) -> View:
    return View(torch.zeros_like(data.obs[0]), torch.ones_like(data.obs[0]))


def wrap(
    data, actor, algorithm: str, kind: str = "function", hidden: list | None = None, view: View | None = None
) -> dict:
    """The fields of a policy checkpoint around `actor`, whose states `view` standardises, or the data."""
    mean, std = (view.mean, view.std) if view else data.statistics()
    hidden = [256, "ReLU"] * 3 if hidden is None else hidden  # of a function: what it will be distilled into
    return dict(
        format=FORMAT, kind=kind, obs_dim=data.obs.shape[1], action_dim=data.actions.shape[1], hidden_layers=hidden,
        state_mean=mean, state_std=std, algorithm=algorithm, env_id="", simulator=data.task.simulator, seed=0, steps=0,
        score=math.nan, examples=examples_of(data), data={}, made_with={}, actor=actor, **range_of(data),
    )  # fmt: skip


def misfit(path: Path, data, what: str) -> UserError:
    return UserError(
        f"{path} {what}, but {data.task.simulator} has {data.obs.shape[1]} observations and {data.actions.shape[1]} "
        "actions; choose the --env-id that it was trained on"
    )


# ---------------------------------------------------------------------------------------------- layers


class Affine(nn.Module):
    """x ↦ gain x + shift: what a normalisation layer does with the statistics that it has learned."""

    def __init__(self, mean, var, weight, bias, eps: float):
        super().__init__()
        self.gain = weight / (var + eps).sqrt()
        self.shift = bias - mean * self.gain


def layers_of(state: dict, prefix: str, path: Path, activation=nn.ReLU, eps: float = 1e-3) -> list[nn.Module]:
    """The layers of a Sequential in order, taken out of `state`; `prefix` is a regular expression. Raises UserError.

    A layer without weights is not in the file: where the numbers leave room between two others, `activation` lies
    there. `eps` is that of batch renormalisation.
    """
    parts: dict[int, dict] = {}
    for key in list(state):
        if match := re.fullmatch(prefix + r"\.(\d+)\.(\w+)", key):
            parts.setdefault(int(match[1]), {})[match[2]] = number(state, key, path)
    layers, last = [], -1
    for i in sorted(parts):
        if layers and i > last + 1:
            layers.append(activation())
        layers.append(layer_of(parts[i], f"layer {i}", path, eps))
        last = i
    return layers


def closed(layers: list[nn.Module], activation=nn.ReLU) -> list[nn.Module]:
    """`layers` with the activation behind the last linear one, which has no number to be seen by."""
    but_norms = [layer for layer in layers if not isinstance(layer, (nn.LayerNorm, Affine))]
    return [*layers, activation()] if but_norms and isinstance(but_norms[-1], nn.Linear) else layers


def stacked(first: nn.Linear, second: nn.Linear, path: Path) -> nn.Linear:
    """A layer with the outputs of both: the two heads of a squashed Gaussian. Its log std is the output - 1."""
    if first.weight.shape != second.weight.shape:
        raise UserError(f"{path} has a mean and a log std of different shapes; save it anew")
    part = {name: torch.cat([getattr(first, name), getattr(second, name)]) for name in ("weight", "bias")}
    part["bias"][len(first.bias) :] += 1
    return layer_of(part, "head", path)


def layer_of(part: dict[str, torch.Tensor], name: str, path: Path, eps: float = 1e-3) -> nn.Module:
    """A layer with these parameters. Raises UserError for one of an unknown kind."""
    weight = part.get("weight")
    if {"ra_mean", "ra_var", "scale", "bias"} <= part.keys():
        return Affine(part["ra_mean"], part["ra_var"], part["scale"], part["bias"], eps)
    if {"running_mean", "running_var", "weight", "bias"} <= part.keys():
        return Affine(part["running_mean"], part["running_var"], weight, part["bias"], 1e-5)
    if weight is None or not set(part) <= {"weight", "bias"} or weight.ndim not in (1, 2):
        raise UserError(f"{path} has a layer of an unknown kind ({name}: {', '.join(part)}); export it to ONNX")
    if weight.ndim == 2:
        layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
    else:
        layer = nn.LayerNorm(len(weight))
    bias = part.get("bias", weight.new_zeros(len(weight)))
    if bias.shape != weight.shape[:1]:
        raise UserError(f"{path} has a layer whose bias does not fit its weight ({name}); save it anew")
    layer.weight, layer.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    return layer


def linear(state: dict, name: str, path: Path) -> nn.Linear:
    """One linear layer, taken out of `state`. Raises UserError."""
    part = {key: number(state, f"{name}.{key}", path) for key in ("weight", "bias") if f"{name}.{key}" in state}
    layer = layer_of(part, name, path)
    if not isinstance(layer, nn.Linear):
        raise UserError(f"{path}: {name} is no linear layer; export it to ONNX")
    return layer


def number(state: dict, key: str, path: Path) -> torch.Tensor:
    """A tensor, taken out of `state`, in double precision. Raises UserError where it is not one."""
    if key not in state:
        raise UserError(f"{path} has an actor without {key}, which its kind needs; save it again")
    tensor = state.pop(key)
    if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point() and tensor.ndim == 0:
        return tensor  # a count of steps
    if fault := fault_of(tensor):
        raise UserError(f"{path} cannot be used: {key} {fault}; train it again, or take another policy")
    return tensor.double()


# ---------------------------------------------------------------------------------------------- networks


def network(path, data, layers, kind: str, algorithm: str, view: View, log_std=None, bounded: bool = True) -> dict:
    """A multilayer perceptron that sees `view`, as a policy of `kind`. Raises UserError where it does not fit.

    Where the mean of a Gaussian is not `bounded` by tanh it is no policy of ours, but a function.
    """
    layers = folded(path, layers)
    obs_dim, action_dim = data.obs.shape[1], data.actions.shape[1]
    outputs = action_dim * (2 if kind == "squashed_gaussian" else 1)
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if not linears:
        raise UserError(f"{path} holds no layers of a policy that is known here; export it to ONNX")
    if (linears[0].in_features, linears[-1].out_features) != (obs_dim, outputs):
        actions = linears[-1].out_features * action_dim / outputs
        raise misfit(path, data, f"is a policy of {linears[0].in_features} observations and {actions:g} actions")
    width = obs_dim
    for layer in layers:
        takes = layer.in_features if isinstance(layer, nn.Linear) else getattr(layer, "normalized_shape", [width])[0]
        if takes != width:
            raise UserError(f"{path} has layers that do not fit each other ({width} and {takes} units); save it anew")
        width = getattr(layer, "out_features", width)
    if log_std is not None and log_std.shape != (action_dim,):
        raise UserError(f"{path} has a log_std of shape {tuple(log_std.shape)} for {action_dim} actions; save it anew")

    layers, view = seen_by_data(layers, view, data)
    net = nn.Sequential(*layers).to(data.obs)
    if bounded:
        actor = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
        if kind == "gaussian":
            actor["log_std"] = log_std.to(data.obs)
        return wrap(data, actor, algorithm, kind, hidden_of(net), view)
    std = log_std.to(data.obs).clamp(-20, 2).exp()
    return wrap(
        data,
        Function(
            lambda obs: net(obs).clamp(-1, 1),
            lambda obs: (net(obs) + std * torch.randn(len(obs), action_dim, device=obs.device)).clamp(-1, 1),
        ),
        algorithm, view=view,
    )  # fmt: skip


def folded(path: Path, layers: list[nn.Module]) -> list[nn.Module]:
    """The same function without batch normalisation: it goes into the linear layer behind it, or before it."""
    layers = list(layers)
    while found := [i for i, layer in enumerate(layers) if isinstance(layer, Affine)]:
        i = found[0]
        affine = layers.pop(i)
        if isinstance(layers[i], nn.Linear) and len(affine.gain) == layers[i].in_features:
            layers[i].bias.data += layers[i].weight @ affine.shift
            layers[i].weight.data *= affine.gain
        elif i and isinstance(layers[i - 1], nn.Linear) and len(affine.gain) == layers[i - 1].out_features:
            layers[i - 1].weight.data *= affine.gain[:, None]
            layers[i - 1].bias.data *= affine.gain
            layers[i - 1].bias.data += affine.shift
        else:
            raise UserError(
                f"{path} has batch normalisation beside no linear layer, which is not read; export it to ONNX"
            )
    return layers


def seen_by_data(layers: list[nn.Module], view: View, data) -> tuple[list[nn.Module], View | None]:
    """The same policy for states that the data's own statistics standardise, so that critics see these , and
    None; with no linear layer to take the change of scale, the policy as it is, and `view`.
    """
    mean, std, its_mean, its_std = (x.cpu().double() for x in (*data.statistics(), view.mean, view.std))
    scale, shift = std / its_std, (mean - its_mean) / its_std  # what it sees, of what the data show
    first, own = layers[0], None
    if isinstance(first, nn.Linear):
        first.bias.data += first.weight @ shift
        first.weight.data *= scale
    else:
        scale, shift, own = torch.ones_like(scale), torch.zeros_like(shift), view
    if math.isinf(view.clip):
        return layers, own
    clip = Clip(len(scale))
    clip.low, clip.high = (-view.clip - shift) / scale, (view.clip - shift) / scale
    return [clip, *layers], own
