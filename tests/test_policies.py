"""policy.pt: all that anyone needs to use a policy, checked whenever it is loaded."""

import dataclasses
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import common.envs
import common.spaces
from baselines import rlpd
from common import policies
from common.checkpoint import save_tensors
from common.cli import UserError
from common.datasets import load
from common.foreign import load_policy
from common.nn import Clip, ensemble_mlp, hidden_of, mlp, widths_of
from common.physics import as_d4rl
from tests import test_spaces  # noqa: F401 - which registers Reach-v0
from tests.test_transfer import A, S, checkpoint

NETWORKS = ([256, "ReLU", 256, "ReLU"], [64, "Tanh", 32, "Tanh"], [16, "LayerNorm", "ELU"], ["Clip", 8, "GELU"], [])


@pytest.fixture
def saved(tmp_path):
    """A policy with critics in a file of its own: (path, what the file holds)."""
    critic = {f"net.{key}": value for key, value in ensemble_mlp(2, S + A, 2, 1, True).state_dict().items()}
    critics = {"layer_norm": True, "hidden_layers": 2, "critic": critic}
    fields = checkpoint("squashed_gaussian") | {"state_mean": torch.arange(S) / 3, "state_std": torch.full((S,), 2.5)}
    path = tmp_path / "policy.pt"
    policies.save_policy(path, **fields, critic=critics)
    return path, torch.load(path, weights_only=True)


@pytest.mark.parametrize("hidden_layers", NETWORKS, ids=str)
@pytest.mark.parametrize("kind", policies.KINDS)
def test_a_file_alone_gives_back_its_policy(kind, hidden_layers, tmp_path):
    fields = checkpoint(kind, hidden_layers) | {"state_mean": torch.randn(S), "state_std": torch.rand(S) + 0.1}
    bounds = {f"net.0.{name}": torch.full((S,), value) for name, value in (("low", -0.7), ("high", 0.7))}
    fields["actor"] |= {name: bound for name, bound in bounds.items() if name in fields["actor"]}
    policies.save_policy(tmp_path / "policy.pt", **fields)
    policy, original = policies.load(tmp_path / "policy.pt"), policies.module(fields)
    raw = torch.randn(30, S).double().numpy()
    want = original.mode((torch.tensor(raw).float() - fields["state_mean"]) / fields["state_std"]).numpy()
    got = policy.act(raw)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    assert isinstance(got, np.ndarray) and got.dtype == np.float32
    np.testing.assert_allclose(policy.act(raw[3]), want[3], rtol=0, atol=1e-6)
    torch.testing.assert_close(policy.act(torch.tensor(raw)), torch.tensor(want), rtol=0, atol=1e-6)


RANGE = torch.tensor([[-2.0, 0.0, -1.6], [2.0, 1.0, 0.5]]).double()


def test_act_gives_actions_in_the_range_of_the_environment(tmp_path):
    fields = checkpoint("deterministic") | {"action_range": RANGE}
    fields["actor"] = {name: 100 * weight for name, weight in fields["actor"].items()}  # so that most are at a bound
    policies.save_policy(tmp_path / "policy.pt", **fields)
    policy, raw = policies.load(tmp_path / "policy.pt"), torch.randn(200, S)
    (low, high), unit, got = RANGE, policy.mode(policy.seen(raw)), policy.act(raw)
    assert unit.abs().max() == 1 and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), low + (unit.double() + 1) / 2 * (high - low), rtol=1e-6, atol=1e-6)
    assert (got >= low.float()).all() and (got <= high.float()).all() and got.amax(0).equal(high.float())
    np.testing.assert_array_equal(policy.act(raw.numpy()), got)
    torch.testing.assert_close(policies.to_unit(got, RANGE), unit, rtol=0, atol=1e-6)
    assert policies.to_unit(torch.full((1, A), 3.0), RANGE).tolist() == [[1, 1, 1]]


def test_observations_that_are_none_of_its_environments_are_named_with_what_helps():
    ant = policies.module(checkpoint("deterministic", obs_dim=111) | {"simulator": "D4RL's ant"})
    goals = policies.module(checkpoint("deterministic", obs_dim=7) | {"simulator": "Reach-v0"})
    for policy, env in ((ant, as_d4rl(gym.make("Ant-v4"))), (goals, gym.make("Reach-v0"))):
        with pytest.raises(UserError) as error:
            policy.act(env.reset(seed=0)[0])
        helps = eval(str(error.value).rpartition(": ")[2], {"env": env, "common": common, "spaces": common.spaces})
        assert policy.act(helps.reset(seed=0)[0]).shape == (A,)
    for obs, words in ((np.zeros(17), "of the shape (17,)"), (np.zeros((2, 8)), "(2, 8)"), (3.0, "a float")):
        with pytest.raises(UserError, match="of Reach-v0 takes observations of 7 numbers") as error:
            goals.act(obs)
        assert words in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_does_not_say_the_range_learns_it_from_the_data(tmp_path):
    data, old, new = load("hopper-medium-demo").head(50), tmp_path / "old.pt", tmp_path / "new.pt"
    for path, more in ((old, {}), (new, {"action_range": RANGE})):
        policies.save_policy(path, **checkpoint("deterministic"), **more)
    assert "action_range" not in load_policy(old, data)
    with pytest.raises(UserError, match=r"gives actions from \[-2.0, 0.0, .* takes -1 to 1"):
        load_policy(new, data)
    data.task = dataclasses.replace(data.task, action_range=tuple(map(tuple, RANGE.tolist())))
    for path in (old, new):
        assert load_policy(path, data)["action_range"].equal(RANGE)
    fresh = rlpd.at_random(SimpleNamespace(made_with={}, dir=tmp_path), data)
    assert fresh["action_range"].equal(RANGE)
    data.task = dataclasses.replace(data.task, action_range=tuple(map(tuple, (2 * RANGE).tolist())))
    with pytest.raises(UserError, match=r"takes \[-4.0, 0.0, "):
        load_policy(new, data)


def test_a_network_and_its_description_are_the_same_thing():
    for hidden_layers in NETWORKS:
        assert hidden_of(mlp(S, hidden_layers, A)) == hidden_layers
    assert hidden_of(mlp(S, 2, A)) == [256, "ReLU", 256, "ReLU"]
    assert hidden_of(mlp(S, (64, 32), A, torch.nn.Tanh)) == [64, "Tanh", 32, "Tanh"]
    assert widths_of(ensemble_mlp(2, S, (64, 32), 1, "after")) == [64, 32]
    assert widths_of(ensemble_mlp(3, S, (), 1)) == []
    clip = Clip(2)
    clip.low[0], clip.high[1] = -1, 2
    assert clip(torch.tensor([[-3.0, -3.0], [5.0, 5.0]])).tolist() == [[-1.0, -3.0], [5.0, 2.0]]


def test_extra_entries_are_carried(saved):
    path, whole = saved
    save_tensors(path, whole | {"made_with": {"torch": "2.13.0"}, "note": "mine"})
    read = policies.read(path)
    assert read["made_with"] == {"torch": "2.13.0"} and read["note"] == "mine"


def actor_with(**changes):
    return lambda file: (
        file | {"actor": file["actor"] | {f"net.{key[1:]}.weight": value for key, value in changes.items()}}
    )


def critic_with(**changes):
    return lambda file: file | {"critic": file["critic"] | changes}


def moved(file, name, by):
    changed = file["actor"][name].clone()
    changed.view(-1)[7] += by
    return file | {"actor": file["actor"] | {name: changed}}


CRAFTED = {
    "an older version": (lambda file: file | {"format": "o2rl-policy-1"}, "another version"),
    "an entry is missing": (lambda file: {key: file[key] for key in file if key != "state_std"}, "state_std"),
    "a number for layers": (lambda file: file | {"hidden_layers": 10_000_000}, "hidden_layers"),
    "far too many layers": (lambda file: file | {"hidden_layers": [1] * 10_000}, "cannot be built"),
    "a wide layer": (lambda file: file | {"hidden_layers": [10**12, "ReLU"]}, "cannot be built"),
    "a layer unknown": (lambda file: file | {"hidden_layers": [256, "Conv2d", 256, "ReLU"]}, "cannot be built"),
    "a layer of tensors": (lambda file: file | {"hidden_layers": [torch.ones(3)]}, "cannot be built"),
    "a kind unknown": (lambda file: file | {"kind": "transformer"}, "cannot be built"),
    "no dimension": (lambda file: file | {"obs_dim": 0}, "cannot be built"),
    "other layers": (lambda file: file | {"hidden_layers": [64, "ReLU", 256, "ReLU"]}, "net.0.weight is"),
    "one layer more": (lambda file: file | {"hidden_layers": [256, "ReLU"] * 3}, "net.6.weight is missing"),
    "another activation": (lambda file: file | {"hidden_layers": [256, "ReLU", 256, "Tanh"]}, "does not act as it did"),
    "a weight too many": (actor_with(_9=torch.zeros(3, 3)), "net.9.weight does not belong"),
    "a weight of text": (actor_with(_2="weights"), "net.2.weight is no array"),
    "a complex weight": (actor_with(_2=torch.zeros(256, 256, dtype=torch.complex64)), "net.2.weight is no array"),
    "a weight in double precision": (actor_with(_2=torch.zeros(256, 256).double()), "net.2.weight is"),
    "a weight without numbers": (actor_with(_2=torch.zeros(256, 256, device="meta")), "which no policy needs"),
    "a weight of one number": (actor_with(_2=torch.zeros(1, 1).expand(256, 256)), "than the file holds"),
    "a weight of NaN": (lambda file: moved(file, "net.2.weight", math.nan), "net.2.weight holds NaN"),
    "a weight of infinity": (lambda file: moved(file, "net.2.weight", math.inf), "net.2.weight holds NaN"),
    "a mean that moved": (lambda file: moved(file, "net.4.weight", 0.01), "does not act as it did"),
    "one mean for all": (lambda file: file | {"state_mean": torch.zeros(1)}, "mean is"),
    "whole numbers": (lambda file: file | {"state_mean": torch.zeros(S, dtype=torch.int64)}, "mean is no array"),
    "another deviation": (lambda file: file | {"state_std": 1.001 * file["state_std"]}, "does not act as it did"),
    "no deviation": (lambda file: file | {"state_std": torch.zeros(S)}, "does not act as it did"),
    "a range of one number": (lambda file: file | {"action_range": torch.ones(2).double()}, "range is"),
    "a range of nothing": (lambda file: file | {"action_range": torch.ones(2, A).double()}, "has actions from"),
    "another range": (lambda file: file | {"action_range": RANGE}, "does not act as it did"),
    "no examples": (lambda file: file | {"examples": {}}, "obs is missing"),
    "empty examples": (lambda file: file | {"examples": {key: x[:0] for key, x in file["examples"].items()}},
                       "does not act as it did"),
    "critics that are none": (lambda file: file | {"critic": 3}, "critic with missing"),
    "critics of many layers": (critic_with(hidden_layers=10_000_000), "critic that cannot be built"),
    "critics of other layers": (critic_with(hidden_layers=3), "its critic net."),
    "critics of other widths": (critic_with(hidden_layers=[256, 128]), "its critic net."),
    "critics of endless width": (critic_with(hidden_layers=[10**12]), "critic that cannot be built"),
    "critics of names": (critic_with(hidden_layers=["ReLU"]), "critic that cannot be built"),
    "critics without norm": (critic_with(layer_norm=False), "its critic net."),
    "no critics": (critic_with(critic={}), "its critic net.0.weight is missing"),
}  # fmt: skip


@pytest.mark.parametrize("what", CRAFTED)
def test_a_file_that_is_not_what_it_says_is_refused(what, saved):
    path, whole = saved
    craft, words = CRAFTED[what]
    save_tensors(path, craft(whole))
    with pytest.raises(UserError) as error:
        policies.read(path)
    assert str(path) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_none_is_refused(tmp_path):
    torch.save({"actor": {}}, tmp_path / "other.pt")
    (tmp_path / "empty.pt").touch()
    wrong = {"none.pt": "no file", "other.pt": "no policy of this project", "": "is a folder", "empty.pt": "is empty"}
    for name, words in wrong.items():
        with pytest.raises(UserError, match=words):
            policies.read(tmp_path / name)


def test_a_file_with_any_damaged_byte_in_its_directory_is_refused_in_a_sentence(tmp_path):
    policies.save_policy(path := tmp_path / "policy.pt", **{k: v for k, v in checkpoint("deterministic").items()
                                                          if k != "format"})  # fmt: skip
    whole, data = path.read_bytes(), load("hopper-medium-demo")
    start = whole.rindex(b"PK\x01\x02")
    refused = 0
    for place in range(start, start + 40, 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            load_policy(path, data)
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused
