"""Layers and an optimiser for networks this small: two critics cost one matrix product, not two."""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn


products = torch.float32  # what products between hidden layers are taken of


@contextlib.contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """Until the end, products between hidden layers are taken of numbers of this type."""
    global products
    before, products = products, dtype
    try:
        yield
    finally:
        products = before


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight between hidden layers: both, and what comes out, are rounded to `products`."""
    if products == torch.float32:
        return x @ weight
    return (x.to(products) @ weight.to(products)).to(x.dtype)


class Linear(nn.Linear):
    """A linear layer between hidden ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if products == torch.float32:
            return super().forward(x)
        # not `product` with the weight transposed, whose gradient would be transposed twice on its way back
        return F.linear(x.to(products), self.weight.to(products)).to(x.dtype) + self.bias


class EnsembleLinear(nn.Module):
    """`n` linear layers side by side: (n, B, inputs) -> (n, B, outputs), in one batched matrix product.

    Weights are orthogonal, biases zero. An input of (m, B, inputs) with m < n goes through the first m layers alone.
    `hidden`: it lies between hidden layers, see `product`.
    """

    def __init__(self, n: int, inputs: int, outputs: int, hidden: bool = False):
        super().__init__()
        self.hidden = hidden
        self.weight = nn.Parameter(torch.empty(n, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(n, 1, outputs))
        for weight in self.weight:
            nn.init.orthogonal_(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight[: len(x)], self.bias[: len(x)]
        if weight.shape[2] == 1:  # a matrix product with a single column is slower than its sum
            return (x * weight.transpose(1, 2)).sum(-1, keepdim=True) + bias
        y = product(x, weight) if self.hidden else x @ weight
        return y + bias  # not baddbmm, which would copy the bias into place first: a kernel more on a GPU


class EnsembleLayerNorm(nn.Module):
    """Layer normalisation of (n, B, features), with a scale and shift for each of the `n` networks."""

    def __init__(self, n: int, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n, 1, features))
        self.bias = nn.Parameter(torch.zeros(n, 1, features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.bias[: len(x)], F.layer_norm(x, x.shape[-1:]), self.weight[: len(x)])


ACTIVATIONS = {cls.__name__: cls for cls in (nn.ReLU, nn.Tanh, nn.ELU, nn.GELU, nn.SiLU, nn.LeakyReLU)}


class Clip(nn.Module):
    """Holds each of its inputs (..., n) between two bounds of its own, which are not learned."""

    def __init__(self, n: int):
        super().__init__()
        self.register_buffer("low", torch.full((n,), -math.inf))
        self.register_buffer("high", torch.full((n,), math.inf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp(self.low, self.high)


SIZED = {"LayerNorm": nn.LayerNorm, "Clip": Clip}


def widths(hidden_layers: int | Sequence[int]) -> list[int]:
    """The widths of hidden layers; a number stands for so many layers of 256 units."""
    return [256] * hidden_layers if isinstance(hidden_layers, int) else list(hidden_layers)


def mlp(inputs: int, hidden_layers: int | Sequence[int | str], outputs: int, activation=nn.ReLU) -> nn.Sequential:
    """Hidden layers, then Linear: (..., inputs) -> (..., outputs).

    `hidden_layers` holds their widths, each layer followed by `activation`. With names among them it lists all that
    comes before the last layer: a number is a linear layer of that width, a name one of `ACTIVATIONS` or `SIZED`.
    """
    hidden_layers = widths(hidden_layers)
    if all(isinstance(layer, int) for layer in hidden_layers):
        hidden_layers = [layer for width in hidden_layers for layer in (width, activation.__name__)]
    layers = []
    for layer in hidden_layers:
        if layer in ACTIVATIONS:
            layers.append(ACTIVATIONS[layer]())
        elif layer in SIZED:
            layers.append(SIZED[layer](inputs))
        else:
            layers.append((Linear if layers else nn.Linear)(inputs, layer))
            inputs = layer
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def hidden_of(net: nn.Sequential) -> list[int | str]:
    """What `mlp` made `net` from, as the list of its hidden layers."""
    return [layer.out_features if isinstance(layer, nn.Linear) else type(layer).__name__ for layer in net[:-1]]


def widths_of(net: nn.Sequential) -> list[int]:
    """The widths of the hidden layers that `ensemble_mlp` made `net` from."""
    return [layer.weight.shape[2] for layer in net[:-1] if isinstance(layer, EnsembleLinear)]


def ensemble_mlp(
    n: int, inputs: int, hidden_layers: int | Sequence[int], outputs: int, layer_norm: bool | str = False
) -> nn.Sequential:
    """`n` networks side by side, (n, B, inputs) -> (n, B, outputs), with hidden layers of these widths.

    `layer_norm`: a LayerNorm before each ReLU; "after": behind it.
    """
    layers = []
    for width in widths(hidden_layers):
        layers.append(EnsembleLinear(n, inputs, width, hidden=bool(layers)))
        if layer_norm == "after":
            layers += [nn.ReLU(inplace=True), EnsembleLayerNorm(n, width)]
        elif layer_norm:
            layers += [EnsembleLayerNorm(n, width), nn.ReLU(inplace=True)]
        else:
            layers += [nn.ReLU(inplace=True)]
        inputs = width
    return nn.Sequential(*layers, EnsembleLinear(n, inputs, outputs))


def orthogonal(net: nn.Sequential, hidden: float, last: float) -> None:
    """Give a network orthogonal weights, those of its last layer times `last` and the others times `hidden`."""
    layers = [layer for layer in net if isinstance(layer, nn.Linear | EnsembleLinear)]
    for layer in layers:
        for weight in layer.weight if isinstance(layer, EnsembleLinear) else [layer.weight]:
            nn.init.orthogonal_(weight, last if layer is layers[-1] else hidden)
        nn.init.zeros_(layer.bias)


# Many tensors in one kernel. PyTorch promises none of these names: where one is missing, plain tensors do the same.
ONE_KERNEL = all(hasattr(torch, name) for name in ("_fused_adam_", "_foreach_norm", "_foreach_lerp_"))


class Adam:
    """Adam (Kingma & Ba, 2015) on gradients that are passed in: `optimizer.step(torch.autograd.grad(loss, params))`.

    Passing gradients, not storing them in `.grad`, keeps each loss's gradient where it belongs: an actor loss cannot
    leak into the critics. One fused kernel updates everything, and its state can live in a CUDA graph.
    """

    def __init__(self, params, lr: float, eps: float = 1e-8):
        self.params = list(params)
        device = self.params[0].device
        self.lr, self.eps = torch.tensor(float(lr), device=device), eps
        self.exp_avg = [torch.zeros_like(p) for p in self.params]
        self.exp_avg_sq = [torch.zeros_like(p) for p in self.params]
        self.count = torch.zeros(len(self.params), device=device)
        self.steps = list(self.count.unbind())  # views, so that one addition counts for all

    @torch.no_grad()
    def step(self, grads) -> None:
        self.count.add_(1)
        if not ONE_KERNEL:
            return self.step_one_by_one(grads)
        torch._fused_adam_(
            self.params, list(grads), self.exp_avg, self.exp_avg_sq, [], self.steps,
            lr=self.lr, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=self.eps, amsgrad=False, maximize=False,
        )  # fmt: skip

    def step_one_by_one(self, grads) -> None:
        """θ -= lr m̂ / (√v̂ + ε), m̂ and v̂ being the means of gradients and their squares, without the bias to zero."""
        moments = zip(self.params, grads, self.exp_avg, self.exp_avg_sq, self.steps, strict=True)
        for param, grad, mean, square, n in moments:
            mean.lerp_(grad, 1 - 0.9)
            square.lerp_(grad**2, 1 - 0.999)
            param.sub_(self.lr * (mean / (1 - 0.9**n)) / ((square / (1 - 0.999**n)).sqrt() + self.eps))

    def state_dict(self) -> dict:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "steps": self.steps}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        for name in ("exp_avg", "exp_avg_sq", "steps"):
            for mine, theirs in zip(getattr(self, name), state[name], strict=True):
                mine.copy_(theirs)


def clip_grad_norm(grads, max_norm: float | None) -> list[torch.Tensor]:
    """The gradients, scaled down together where their common norm is above `max_norm`; None leaves them as they are."""
    if max_norm is None:
        return list(grads)
    norms = torch._foreach_norm(list(grads)) if ONE_KERNEL else [torch.linalg.vector_norm(grad) for grad in grads]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return [grad * scale for grad in grads]


@torch.no_grad()
def in_chunks(fn, *tensors: torch.Tensor, size: int = 65_536) -> torch.Tensor | list[torch.Tensor]:
    """`fn` on all rows of the tensors, a chunk at a time; it returns a tensor or a tuple of tensors."""
    parts = [fn(*chunk) for chunk in zip(*(tensor.split(size) for tensor in tensors), strict=True)]
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    return [torch.cat(part) for part in zip(*parts, strict=True)]


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau source, for every parameter."""
    if ONE_KERNEL:
        torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)
        return
    for mine, theirs in zip(target.parameters(), source.parameters(), strict=True):
        mine.lerp_(theirs, tau)


def gaussian_log_prob(u: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """log N(u; mean, exp(log_std)^2), summed over the last dimension: (..., A) -> (...)."""
    z = (u - mean) * torch.exp(-log_std)
    return (-0.5 * z * z - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_entropy(log_std: torch.Tensor) -> torch.Tensor:
    """Entropy of N(·, exp(log_std)^2), summed over the last dimension: (..., A) -> (...)."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def before_tanh(actions: torch.Tensor) -> torch.Tensor:
    """u of stored actions tanh(u); one at the very edge, where u is infinite, counts as one close to it."""
    return torch.atanh(actions.clamp(-0.999999, 0.999999))


def tanh_log_det(u: torch.Tensor) -> torch.Tensor:
    """log |d tanh(u) / du|, summed over the last dimension, in a form that does not overflow: (..., A) -> (...)."""
    return (2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)
