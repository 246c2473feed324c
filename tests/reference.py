"""What the tests of losses share: reference versions in float64 that share nothing with the scripts but the weights.

Networks are evaluated layer by layer, and gradients come from one plain backward pass of the whole objective. The
scripts' gradients are read by replacing their optimisers.
"""

import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from common import replay
from common.nn import EnsembleLayerNorm

B, S, A = 32, 11, 3


class Recorder(dict):
    """Stands in for the optimisers: keeps the gradients that they are given and changes nothing."""

    class Slot:
        def __init__(self):
            self.calls = []
            self.steps, self.lr = [torch.zeros(())], torch.zeros(())

        def step(self, grads):
            self.calls.append([grad.clone() for grad in grads])

    def __missing__(self, name):
        self[name] = self.Slot()
        return self[name]


def mlp64(net, x, activation=torch.relu):
    """A Sequential of linear layers, the activation between them."""
    x = x.double()
    linears = [layer for layer in net if isinstance(layer, torch.nn.Linear)]
    for i, layer in enumerate(linears):
        x = x @ layer.weight.double().T + layer.bias.double()
        x = activation(x) if i < len(linears) - 1 else x
    return x


def actor64(actor, obs):
    """Mean and standard deviation of a squashed Gaussian's u."""
    x = mlp64(actor.net, obs)
    return x[:, :A], torch.clamp(x[:, A:] - 1, -20, 2).exp()


def critic64(critic, obs, actions):
    return ensemble64(critic.net, torch.cat([obs.double(), actions.double()], 1))


def ensemble64(net, inputs):
    """The values (n, B) of networks side by side, each by itself."""
    out = []
    for k in range(len(net[0].weight)):
        x = inputs.double()
        for layer in net:
            if isinstance(layer, torch.nn.ReLU):
                x = torch.relu(x)
            elif isinstance(layer, EnsembleLayerNorm):
                mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
                x = (x - mean) / torch.sqrt(variance + 1e-5) * layer.weight[k].double() + layer.bias[k].double()
            else:
                x = x @ layer.weight[k].double() + layer.bias[k].double()
        out.append(x[:, 0])
    return torch.stack(out)


def squashed(mean, std):
    return TransformedDistribution(Normal(mean, std), [TanhTransform(cache_size=1)])


def density64(u, mean, std):
    """log π(tanh(u)|s) (B,) of a squashed Gaussian."""
    return (Normal(mean, std).log_prob(u) - torch.log(1 - torch.tanh(u) ** 2)).sum(-1)


def log_prob64(distribution, actions):
    return distribution.log_prob(actions).sum(-1)


def noises(monkeypatch, *shapes):
    """Fixes what `torch.randn_like` gives, call by call; returns the list of it in float64."""
    torch.manual_seed(11)
    queue = [torch.randn(*shape) for shape in shapes]
    fed = iter(queue)
    monkeypatch.setattr(torch, "randn_like", lambda _: next(fed))
    return [noise.double() for noise in queue]


def fixed_rows(monkeypatch, module, data):
    """Makes `sample` return one known batch; returns it."""
    rows = torch.randint(len(data), (B,))
    batch = (*replay.split(data.table[rows], S, A), rows)
    monkeypatch.setattr(module, "sample", lambda *_: batch)
    return batch


def same(grads, loss, parameters, rtol=2e-4):
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(
            grad.double(), want.double(), rtol=rtol, atol=1e-5 * max(1.0, want.abs().max().item())
        )


class Outputs(torch.nn.Module):
    """Stands in for a network: gives the same outputs whatever it is asked, call by call, then again from the first.

    A test can so feed the numbers of a worked example to a script's losses. The first of them is its parameter.
    """

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = [torch.as_tensor(output, dtype=torch.float64).requires_grad_(i == 0)
                        for i, output in enumerate(outputs)]  # fmt: skip
        self.calls = 0

    def parameters(self, recurse=True):
        return iter(self.outputs[:1])

    def forward(self, *_):
        self.calls += 1
        return self.outputs[(self.calls - 1) % len(self.outputs)]


def check_trained_alike(found: dict, want: dict) -> None:
    """Weights after a few steps in two ways, all but one in a thousand: Adam carries a weight whose gradient is a
    rounding error, and so of either sign, by a whole learning rate."""
    for name, tensor in want.items():
        pair = (torch.as_tensor(x, dtype=torch.float64) for x in (found[name], tensor))
        apart = ~torch.isclose(*pair, rtol=1e-3, atol=2e-4)
        n = apart.numel()
        assert apart.sum() <= (max(1, n // 1_000) if n >= 100 else 0), f"{name}: {int(apart.sum())} of {n} differ"
