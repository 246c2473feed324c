"""CORL's policies act as in CORL. The files are made here, under the names that its classes give their parameters."""

import math

import pytest
import torch
from torch import nn

from common import policies
from common.cli import UserError
from common.foreign import load_policy
from tests.foreign import A, S, acts, close, named, network, refused, standardised


def corl_file(state: dict, config: str | None = None, **more):
    torch.save({"actor": state, "critic_1": {}, "total_it": 9} | more, "checkpoint_9.pt")
    if config is not None:
        with open("config.yaml", "w") as file:
            file.write(config)
    return "checkpoint_9.pt"


@pytest.mark.parametrize("layers", [(S, 256, 256, A), (S, 32, A), (S, A)], ids=str)
def test_corl_deterministic(layers, raw_data):
    """TD3+BC, SPOT, and IQL with a deterministic actor; without a configuration, standardised by the raw_data."""
    net = network(*layers)
    policy = load_policy(corl_file(named(net=net)), raw_data)
    assert policy["kind"] == "deterministic" and policy["hidden_layers"][::2] == list(layers[1:-1])
    close(acts(policy, raw_data), torch.tanh(net(standardised(raw_data))))
    policy = load_policy(corl_file(named(net__net=net)), raw_data)
    close(acts(policy, raw_data), torch.tanh(net(standardised(raw_data))))


def test_corl_cql(raw_data):
    net = network(S, 256, 256, 256, 2 * A)
    scalars = {"log_std_multiplier.constant": torch.tensor(0.7), "log_std_offset.constant": torch.tensor(-1.3)}
    policy = load_policy(corl_file(named(base_network=net) | scalars), raw_data)
    out = net(standardised(raw_data))
    close(acts(policy, raw_data), torch.tanh(out[:, :A]))
    spread = policies.module(policy).spread(standardised(raw_data))
    close(spread[0], out[:, :A])
    close(spread[1], 0.7 * out[:, A:] - 1.3)


@pytest.mark.parametrize("name", ["iql", "awac"])
def test_corl_gaussians(name, raw_data):
    net, log_std = network(S, 256, 256, A), torch.tensor([-1.0, -0.5, -2.0])
    state = named(net__net=net) | {"log_std": log_std} if name == "iql" else named(_mlp=net) | {"_log_std": log_std}
    policy = load_policy(corl_file(state), raw_data)
    mean = (
        torch.tanh(net(standardised(raw_data))) if name == "iql" else net(standardised(raw_data))
    )  # AWAC's is not bounded
    assert policy["kind"] == {"iql": "gaussian", "awac": "function"}[name]
    close(acts(policy, raw_data), mean.clamp(-1, 1))
    sampled = torch.stack([policies.player(policy).sample(standardised(raw_data)) for _ in range(500)])
    want = (mean + log_std.exp() * torch.randn(500, *mean.shape)).clamp(-1, 1)
    torch.testing.assert_close(sampled.std((0, 1)), want.std((0, 1)), rtol=0.1, atol=0)


def test_corl_sac_n_and_edac(raw_data):
    """Their observations are raw by default, their heads lie apart."""
    trunk, mu, log_sigma = network(S, 64, 64, 64), nn.Linear(64, A), nn.Linear(64, A)
    policy = load_policy(corl_file(named(trunk=trunk, mu=mu, log_sigma=log_sigma)), raw_data)
    hidden = torch.relu(trunk(raw_data.obs[:60]))
    close(acts(policy, raw_data), torch.tanh(mu(hidden)))
    close(policies.module(policy).spread(standardised(raw_data))[1], log_sigma(hidden))
    assert "sac_n or edac" in policy["algorithm"]


def test_compiled_dropped_out_and_without_biases(raw_data):
    """`torch.compile` puts a prefix before names; dropout is a layer that has none and does nothing in play."""
    net = network(S, 256, 256, A)
    apart = {key.replace("4.", "6.").replace("2.", "3."): value for key, value in net.state_dict().items()}
    for state in (
        {f"_orig_mod.net.{k}": v for k, v in net.state_dict().items()},
        {f"net.net.{k}": v for k, v in apart.items()},
    ):
        close(acts(load_policy(corl_file(state), raw_data), raw_data), torch.tanh(net(standardised(raw_data))))
    for layer in net[::2]:
        layer.bias.zero_()
    policy = load_policy(corl_file({k: v for k, v in named(net=net).items() if "weight" in k}), raw_data)
    close(acts(policy, raw_data), torch.tanh(net(standardised(raw_data))))


def test_layer_norm_before_and_behind_the_activation(raw_data):
    for net in (
        network(S, 64, 32, A, norm=nn.LayerNorm),
        nn.Sequential(nn.Linear(S, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, A)),
        nn.Sequential(nn.LayerNorm(S), nn.Linear(S, 16), nn.ReLU(), nn.Linear(16, A)),
    ):
        for p in net.requires_grad_(False).parameters():
            p.add_(0.1 * torch.randn_like(p))
        policy = load_policy(corl_file(named(net=net)), raw_data)
        assert "LayerNorm" in policy["hidden_layers"]
        close(acts(policy, raw_data), torch.tanh(net(standardised(raw_data))))


def test_the_configuration_says_how_observations_are_seen(raw_data, capsys):
    net = network(S, 256, 256, A)
    path = corl_file(named(net=net), "env: hopper-medium-v2\nname: TD3-BC-hopper\nnormalize: false\nalpha: 2.5\n")
    close(acts(load_policy(path, raw_data), raw_data), torch.tanh(net(raw_data.obs[:60])))
    assert "raw, as config.yaml says" in capsys.readouterr().out
    path = corl_file(named(net=net), "normalize: true\n", vae={})
    close(acts(load_policy(path, raw_data), raw_data), torch.tanh(net(standardised(raw_data))))
    close(acts(load_policy(path, raw_data, normalize_from="none"), raw_data), torch.tanh(net(raw_data.obs[:60])))
    for config in ("normalize: [", "- 3\n", "frac: much\n"):
        with pytest.raises(UserError, match="config.yaml is no configuration of CORL's"):
            load_policy(corl_file(named(net=net), config), raw_data)


def best_rows(data, fraction, discount):
    """As CORL's any_percent_bc.py chooses them, one row after another."""
    trajectories, rows, total, scale = [], [], 0.0, 1.0
    for i, (reward, end) in enumerate(zip(data.rewards.tolist(), data.terminations.tolist(), strict=True)):
        rows, total, scale = [*rows, i], total + scale * reward, scale * discount
        if end or len(rows) == 1_000:
            trajectories.append((total, rows))
            rows, total, scale = [], 0.0, 1.0
    trajectories.sort(reverse=True)
    return [i for _, rows in trajectories[: max(1, int(fraction * len(trajectories)))] for i in rows]


@pytest.mark.parametrize("terminals", ["some", "few"])
def test_the_best_tenth(terminals, raw_data):
    """CORL's 10%-BC standardises by what it keeps of the raw_data: ends are terminals and every 1,000th step."""
    if terminals == "few":
        raw_data.terminations *= (torch.arange(len(raw_data)) == raw_data.terminations.nonzero()[3, 0]).float()
    net = network(S, 256, 256, A)
    obs = raw_data.obs[best_rows(raw_data, 0.1, 0.9)]
    want = torch.tanh(net((raw_data.obs[:60] - obs.mean(0)) / (obs.std(0, correction=0) + 1e-3)))
    path = corl_file(named(net=net), "frac: 0.1\ndiscount: 0.9\nnormalize: true\n")
    close(acts(load_policy(path, raw_data), raw_data), want)


def test_a_cloned_policy_without_its_configuration_is_refused(raw_data):
    torch.save({"actor": named(net=network(S, 8, A)), "actor_optimizer": {}, "total_it": 9}, "checkpoint_9.pt")
    refused("checkpoint_9.pt", raw_data, "any_percent_bc.py", "--normalize-from 0.1")
    assert load_policy("checkpoint_9.pt", raw_data, normalize_from="1")["kind"] == "deterministic"
    for wrong in ("7", "nowhere.pkl", "nan"):
        with pytest.raises(UserError, match=f"--normalize-from {wrong}"):
            load_policy("checkpoint_9.pt", raw_data, normalize_from=wrong)


@pytest.mark.parametrize(("change", "words"), [
    (dict(net__net__0=nn.Linear(17, 256)), ("17 observations",)),
    (dict(net__net__4=nn.Linear(256, 6)), ("6 actions",)),
    (dict(net__net__2=nn.Linear(64, 256)), ("do not fit",)),
    (dict(net__net__3=nn.BatchNorm1d(9)), ("batch normalisation",)),
    (dict(net__net__3=nn.Conv1d(2, 2, 2)), ("unknown kind",)),
    (dict(attention=nn.Linear(2, 2)), ("attention.weight",)),
], ids=str)  # fmt: skip
def test_what_is_not_understood_of_an_actor_is_named(change, words, raw_data):
    net = network(S, 256, 256, A)
    refused(corl_file(named(net__net=net) | named(**change)), raw_data, *words)


def test_files_that_hold_something_else_are_named(raw_data):
    torch.save({"actor": {"net.0.weight": torch.full((A, S), math.nan)}}, "nan.pt")
    refused("nan.pt", raw_data, "net.0.weight holds NaN")
    torch.save({"model_state": {}, "state_mean": 0}, "dt.pt")
    refused("dt.pt", raw_data, "Decision Transformer")
    torch.save({"actor": {}}, "empty.pt")
    refused("empty.pt", raw_data, "no layers")
    for actor, words in [
        ({"log_std_offset.constant": torch.zeros(1)}, "log_std_offset.constant, which is not read"),
        ({"l1.weight": torch.ones(8, S), "l1.bias": torch.ones(8)}, "with l1.weight, l1.bias, which is not read"),
        (named(net=network(S, 8, A)) | {"net.9.weight": torch.ones(A), "net.9.bias": torch.zeros(A)}, "not linear"),
        (named(net=network(S, 8, A)) | {"log_std_offset.constant": torch.zeros(1)}, "log_std_multiplier.constant"),
    ]:
        torch.save({"actor": actor}, "part.pt")
        refused("part.pt", raw_data, words)
    torch.save([1], "list.pt")
    refused("list.pt", raw_data, "no policy that is known")
    refused("nothing.pt", raw_data, "there is no checkpoint")
