"""Stable-Baselines3's policies act as there. The files are made here; test_foreign_live.py takes its own."""

import base64
import io
import json
import math
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from common import policies
from common.cli import UserError
from common.foreign import load_policy
from tests.foreign import A, S, acts, close, named, network, refused, standardised
from tests.test_inert import Evil


def sb3_file(state: dict, path="model.zip", **about):
    weights = io.BytesIO()
    torch.save(state, weights)
    about = {"policy_kwargs": {}, "use_sde": False} | about
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data", json.dumps(about))
        file.writestr("policy.pth", weights.getvalue())
    return path


def options(**strings) -> dict:
    """policy_kwargs as SB3 writes them: pickled, which is never read, and in words."""
    return {":type:": "<class 'dict'>", ":serialized:": base64.b64encode(pickle.dumps(Evil())).decode()} | strings


SHAPES = {"plain": ((256, 256), nn.ReLU), "small": ((64, 32), nn.Tanh), "none": ((), nn.ELU)}


@pytest.mark.parametrize("shape", SHAPES)
def test_sb3_squashed_gaussians(shape, raw_data):
    """SAC, TQC: a mean and a log std that depend on the state; observations are raw."""
    sizes, activation = SHAPES[shape]
    net, head = network(S, *sizes, 2 * A, activation=activation), nn.Linear(1, 1)
    first, second = (nn.Linear(net[-1].in_features, A) for _ in range(2))
    for head, rows in ((first, slice(A)), (second, slice(A, None))):
        head.weight.data, head.bias.data = net[-1].weight[rows], net[-1].bias[rows]
    state = named(actor__latent_pi=net[:-1], actor__mu=first, actor__log_std=second, critic__qf0=nn.Linear(2, 2),
                  critic_target__qf0=nn.Linear(2, 2))  # fmt: skip
    kwargs = options(activation_fn=f"<class 'torch.nn.modules.activation.{activation.__name__}'>")
    policy = load_policy(sb3_file(state, policy_kwargs=kwargs), raw_data)
    out = net(raw_data.obs[:60])
    assert policy["hidden_layers"] == [x for size in sizes for x in (size, activation.__name__)]
    close(acts(policy, raw_data), torch.tanh(out[:, :A]))
    close(policies.module(policy).spread(standardised(raw_data))[1], out[:, A:].clamp(-20, 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_sb3_deterministic(shape, raw_data):
    """TD3, DDPG."""
    sizes, activation = SHAPES[shape]
    net = network(S, *sizes, A, activation=activation, end=[nn.Tanh()])
    state = named(actor__mu=net, actor_target__mu=net, critic__qf0=nn.Linear(2, 2))
    kwargs = options(activation_fn=f"<class 'torch.nn.modules.activation.{activation.__name__}'>")
    close(acts(load_policy(sb3_file(state, policy_kwargs=kwargs), raw_data), raw_data), net(raw_data.obs[:60]))


@pytest.mark.parametrize("shared", [False, True])
def test_sb3_on_policy(shared, raw_data):
    """PPO, A2C, TRPO: a mean that no tanh bounds, tanh between the layers; formerly, layers that the critic shared."""
    net = network(S, 64, 32, A, activation=nn.Tanh)
    parts = {"mlp_extractor__shared_net": net[:2], "mlp_extractor__policy_net": nn.Sequential(net[2], nn.Tanh())}
    if not shared:
        parts = {"mlp_extractor__policy_net": net[:4]}
    state = named(**parts, action_net=net[-1], value_net=nn.Linear(32, 1), mlp_extractor__value_net=nn.Linear(3, 3))
    policy = load_policy(sb3_file(state | {"log_std": torch.tensor([-1.0, -0.5, -2.0])}), raw_data)
    mean = net(raw_data.obs[:60])
    assert policy["kind"] == "function"
    close(acts(policy, raw_data), mean.clamp(-1, 1))
    sampled = torch.stack([policy["actor"].sample(standardised(raw_data)) for _ in range(500)])
    want = (mean + torch.tensor([-1.0, -0.5, -2.0]).exp() * torch.randn(500, 60, A)).clamp(-1, 1)
    torch.testing.assert_close(sampled.std((0, 1)), want.std((0, 1)), rtol=0.1, atol=0)


class Renorm(nn.Module):
    """Batch renormalisation as sb3-contrib's CrossQ has it."""

    def __init__(self, n, eps=1e-3):
        super().__init__()
        self.eps, self.scale, self.bias = eps, nn.Parameter(torch.rand(n) + 0.5), nn.Parameter(torch.randn(n))
        self.register_buffer("ra_mean", torch.randn(n))
        self.register_buffer("ra_var", torch.rand(n))
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x):
        return (x - self.ra_mean) / (self.ra_var + self.eps).sqrt() * self.scale + self.bias


@pytest.mark.parametrize("eps", [1e-3, 0.5])
def test_crossq(eps, raw_data):
    body = nn.Sequential(
        Renorm(S, eps), nn.Linear(S, 64), nn.ReLU(), Renorm(64, eps), nn.Linear(64, 32), nn.ReLU(), Renorm(32, eps)
    )
    mu, log_std = nn.Linear(32, A), nn.Linear(32, A)
    kwargs = {} if eps == 1e-3 else {"batch_norm_eps": eps}
    policy = load_policy(
        sb3_file(named(actor__latent_pi=body, actor__mu=mu, actor__log_std=log_std), policy_kwargs=kwargs), raw_data
    )
    hidden = body.requires_grad_(False)(raw_data.obs[:60])
    torch.testing.assert_close(acts(policy, raw_data), torch.tanh(mu(hidden)).detach(), rtol=1e-3, atol=1e-4)
    got = policies.module(policy).spread(standardised(raw_data))[1]
    torch.testing.assert_close(got, log_std(hidden).detach().clamp(-20, 2), rtol=1e-3, atol=1e-3)


def td3_state():
    return named(actor__mu=network(S, 32, A))


def ppo_state():
    net = network(S, 32, A)
    return named(mlp_extractor__policy_net=net[:2], action_net=net[-1]) | {"log_std": torch.zeros(A)}


@pytest.mark.parametrize(("state", "about", "words"), [
    (td3_state, dict(use_sde=True), "gSDE"),
    (lambda: td3_state() | named(actor__features_extractor__0=nn.Linear(S, S)), {}, "features extractor"),
    (td3_state, dict(policy_kwargs=options(features_extractor_class="<class 'x.Scaled'>")), "extractor of its own"),
    (td3_state, dict(policy_class={"__module__": "__main__"}), "policy class of its own"),
    (td3_state, dict(policy_kwargs=options(activation_fn="partial(<class 'LeakyReLU'>, 0.1)")), "activations"),
    (td3_state, dict(policy_kwargs=options(activation_fn="<class '__main__.Sine'>")), "activations"),
    (lambda: ppo_state() | named(lstm_actor=nn.Linear(2, 2)), {}, "RecurrentPPO"),
    (lambda: {k: v for k, v in ppo_state().items() if k != "log_std"}, {}, "discrete"),
    (ppo_state, dict(action_space={"low": "[-0.4 -0.4 -0.4]", "high": "[0.4 0.4 0.4]"}), "from -0.4 to 0.4"),
    (ppo_state, dict(action_space={"low": "[0. 0. 0.]", "high": "[1. 1. 1.]"}), "from 0 to 1 and not within ± 1"),
    (lambda: named(q_net__q_net=network(S, 8, 2)), {}, "unknown kind"),
    (lambda: named(actor__mu=network(5, 8, A)), {}, "5 observations"),
    (lambda: ppo_state() | {"log_std": torch.zeros(5)}, {}, "log_std of shape (5,)"),
    (lambda: named(actor__mu=network(S, 8, A)) | {"actor.mu.0.bias": torch.zeros(3)}, {}, "bias does not fit"),
])  # fmt: skip
def test_what_is_not_read_of_sb3_is_named(state, about, words, raw_data):
    refused(sb3_file(state(), **about), raw_data, words)


def test_a_model_that_is_not_whole(raw_data):
    sb3_file(td3_state())
    with zipfile.ZipFile("model.zip") as file:
        parts = {name: file.read(name) for name in file.namelist()}
    for change in ({"data": b"{"}, {"data": b"[]"}, {"policy.pth": parts["policy.pth"][:-50]}, {"policy.pth": b"x"}):
        with zipfile.ZipFile("bad.zip", "w") as file:
            for name, content in (parts | change).items():
                file.writestr(name, content)
        refused("bad.zip", raw_data)
    with zipfile.ZipFile("bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in (parts | {"policy.pth": bytes(1 << 26)}).items():
            file.writestr(name, content)
    refused("bomb.zip", raw_data, "unpack to")
    refused(sb3_file(td3_state() | {"actor.mu.0.weight": torch.full((32, S), math.nan)}), raw_data, "holds NaN")


# ----------------------------------------------------------------------------------------------- VecNormalize


def vecnormalize_file(path, monkeypatch, mean, var, **fields):
    """A VecNormalize as Stable-Baselines3 saves it, and something that would run if anything were run."""
    names = {"stable_baselines3.common.running_mean_std": "RunningMeanStd",
             "stable_baselines3.common.vec_env.vec_normalize": "VecNormalize"}  # fmt: skip
    made = []
    with monkeypatch.context() as context:
        for module, name in names.items():
            made.append(type(name, (), {"__module__": module}))
            for i in range(module.count(".") + 1):
                package = module.rsplit(".", i)[0]
                context.setitem(sys.modules, package, types.ModuleType(package))
        for (module, name), cls in zip(names.items(), made, strict=True):
            setattr(sys.modules[module], name, cls)
        statistics, wrapper = made[0](), made[1]()
        statistics.__dict__ |= {"mean": mean, "var": var, "count": 1e6}
        wrapper.__dict__ |= {"norm_obs": True, "obs_rms": statistics, "clip_obs": 10.0, "epsilon": 1e-8, "evil": Evil()}
        wrapper.__dict__ |= fields
        with open(path, "wb") as file:
            pickle.dump(wrapper, file)


@pytest.fixture
def statistics(raw_data):
    obs = raw_data.obs.double().numpy()
    mean, var = obs.mean(0) + 0.3, 2 * obs.var(0)
    var[4] = 1e-4  # so that the clip matters
    return mean, var


def normalised(data, mean, var, clip=10.0, eps=1e-8):
    return ((data.obs[:60] - torch.tensor(mean)) / (torch.tensor(var) + eps).sqrt()).clamp(-clip, clip).float()


@pytest.mark.parametrize("place", ["vecnormalize.pkl", "vec_normalize.pkl", "Hopper-v3/vecnormalize.pkl",
                                   "rl_model_vecnormalize_100_steps.pkl", "--normalize-from"])  # fmt: skip
def test_vecnormalize_is_found_where_its_makers_put_it(place, raw_data, statistics, tmp_path, monkeypatch):
    folder = tmp_path / "Hopper-v3_2"
    (folder / "Hopper-v3").mkdir(parents=True)
    monkeypatch.chdir(folder)
    file = tmp_path / "elsewhere.pkl" if place == "--normalize-from" else folder / place
    vecnormalize_file(file, monkeypatch, *statistics, clip_obs=5.0)
    net = network(S, 64, A)
    path = sb3_file(named(actor__mu=net), "rl_model_100_steps.zip")
    policy = load_policy(path, raw_data, normalize_from=str(file) if place == "--normalize-from" else "")
    torch.testing.assert_close(
        acts(policy, raw_data), torch.tanh(net(normalised(raw_data, *statistics, 5.0))), rtol=1e-3, atol=1e-4
    )
    assert policy["hidden_layers"] == ["Clip", 64, "ReLU"]
    assert not (tmp_path / "executed").exists() and not (folder / "executed").exists()


def test_vecnormalize_that_leaves_observations_alone(raw_data, statistics, monkeypatch):
    net = network(S, 64, A)
    path = sb3_file(named(actor__mu=net))
    vecnormalize_file("vecnormalize.pkl", monkeypatch, *statistics, norm_obs=False)
    close(acts(load_policy(path, raw_data), raw_data), torch.tanh(net(raw_data.obs[:60])))


def test_vecnormalize_that_is_none(raw_data, statistics, monkeypatch):
    path = sb3_file(td3_state())
    mean, var = statistics
    for arrays in ((mean[:5], var[:5]), (mean, -var), (mean * math.nan, var), ("mean", var)):
        vecnormalize_file("vecnormalize.pkl", monkeypatch, *arrays)
        with pytest.raises(UserError, match="vecnormalize.pkl holds no statistics"):
            load_policy(path, raw_data)
    for content in (b"", b"hello", pickle.dumps([1]), pickle.dumps(Evil())):
        with open("vecnormalize.pkl", "wb") as file:
            file.write(content)
        with pytest.raises(UserError, match="vecnormalize.pkl holds no statistics"):
            load_policy(path, raw_data)
        assert load_policy(path, raw_data, normalize_from="none")["kind"] == "deterministic"


@pytest.mark.parametrize(("last", "original", "on_policy", "lacks"), [
    (np.float32, np.float64, False, True), (np.float32, np.float64, True, True),
    (np.float64, np.float64, False, False), (np.float64, np.float64, True, False),
    (np.float32, np.float32, False, False), (np.float32, np.float32, True, True),
    (np.float64, None, True, False), (None, None, True, False),
])  # fmt: skip
def test_a_model_that_was_normalised_says_so(last, original, on_policy, lacks, raw_data):
    def item(dtype):
        array = None if dtype is None else np.zeros((1, S), dtype)
        return None if array is None else {":serialized:": base64.b64encode(pickle.dumps(array)).decode()}

    state = ppo_state() if on_policy else td3_state()
    path = sb3_file(state, _last_obs=item(last), _last_original_obs=item(original))
    if lacks:
        refused(path, raw_data, "VecNormalize", "--normalize-from")
    else:
        assert load_policy(path, raw_data)
    assert load_policy(path, raw_data, normalize_from="none")
