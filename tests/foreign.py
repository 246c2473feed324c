"""What the tests of policies from elsewhere share: networks, and how a policy that was read acts."""

import pytest
import torch
from torch import nn

from common import policies
from common.cli import UserError
from common.foreign import load_policy

S, A = 11, 3  # hopper's observations and actions


def acts(policy: dict, data, n=60) -> torch.Tensor:
    """What a policy that was read does at the first raw observations of the data."""
    return policies.player(policy).mode((data.obs[:n] - policy["state_mean"]) / policy["state_std"])


def standardised(data, n=60) -> torch.Tensor:
    mean, std = data.statistics()
    return (data.obs[:n] - mean) / std


def close(got, want) -> None:
    torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-5)


def refused(path, data, *words, **options) -> str:
    with pytest.raises(UserError) as error:
        load_policy(path, data, **options)
    said = str(error.value)
    assert str(path) in said and "\n" not in said and all(word in said for word in words), said
    return said


def network(*sizes, activation=nn.ReLU, norm=None, end=()):
    """Linear layers with (a norm and) an activation between them."""
    layers = []
    for i, o in zip(sizes[:-2], sizes[1:-1], strict=True):
        layers += [nn.Linear(i, o), *([norm(o)] if norm else []), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]), *end).requires_grad_(False)


def named(**parts) -> dict:
    """State dictionaries under prefixes; __ stands for a dot."""
    return {
        f"{name.replace('__', '.')}.{key}": value
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    }
