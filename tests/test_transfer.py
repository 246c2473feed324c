"""Policies handed on from one kind to another, and policies from elsewhere."""

import base64
import io
import json
import os
import pickle
import zipfile

import pytest
import torch

import o2ppo
import o2sac
import o2td3
from common import cli, evaluation, policies, tasks
from common.cli import UserError
from common.foreign import load_policy
from common.transfer import transfer
from offline import awac, bc, cql, iql, rebrac, td3_bc
from tests.conftest import TINY

S, A = 11, 3
ACTORS = {"squashed_gaussian": o2sac.Actor, "deterministic": o2td3.Actor, "gaussian": o2ppo.Actor}


def checkpoint(kind, data, hidden_layers=2):
    torch.manual_seed(5)
    net = policies.Policy(kind, S, A, hidden_layers)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.02 * torch.randn_like(p))
        if kind == "gaussian":
            net.log_std.copy_(torch.tensor([-1.0, -1.5, -0.5]))
    return dict(
        kind=kind, obs_dim=S, action_dim=A, hidden_layers=hidden_layers, state_mean=torch.zeros(S), algorithm="test",
        state_std=torch.ones(S), env_id="x", simulator=tasks.resolve(tasks.DEMO).simulator, seed=0, steps=1, score=1.0,
        actor=net.state_dict(),
    )  # fmt: skip


@pytest.fixture
def evaluator():
    return evaluation.Evaluator(tasks.resolve(tasks.DEMO), torch.zeros(S), torch.ones(S), 2)


def bar(total):
    from tqdm import tqdm

    return tqdm(total=total, disable=True)


def raw_dataset(data):
    """As `datasets.load` leaves it: not standardised."""
    data.standardise(torch.full((S,), -0.5), torch.full((S,), 0.4))
    return data


# ----------------------------------------------------------------------------------------------- between our kinds


@pytest.mark.parametrize("script", [cql, iql, td3_bc, bc, awac, rebrac, o2sac, o2td3, o2ppo])
def test_every_actor_of_a_kind_has_one_layout(script, data):
    if hasattr(script, "training_step"):
        agent = script.Agent(script.Args(hidden_layers=2), S, A)
        kind, actor = agent.kind, agent.actor
    else:
        kind, actor = next((k, v(S, A, 2)) for k, v in ACTORS.items() if v is script.Actor)
        agent = script.Agent(cli.complete(script.Args()), checkpoint(kind, data))
        actor = agent.actor
    net = policies.Policy(kind, S, A, 2)
    net.load_state_dict(actor.state_dict())
    obs = torch.randn(20, S)
    torch.testing.assert_close(net.mode(obs), agent.act(obs))
    if kind != "deterministic":
        for a, b in zip(net.spread(obs), actor(obs), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("source", policies.KINDS)
@pytest.mark.parametrize("kind", policies.KINDS)
def test_every_kind_becomes_every_other_with_the_same_mode(source, kind, data, evaluator, capsys):
    policy = checkpoint(source, data)
    new = transfer(policy, kind, data, evaluator, bar)
    before, after = policies.module(policy), policies.module(new)
    torch.testing.assert_close(after.mode(data.obs), before.mode(data.obs), rtol=0, atol=1e-6)
    ACTORS[kind](S, A, 2).load_state_dict(new["actor"])
    if source == kind:
        assert new is policy and not capsys.readouterr().out
        return
    out = capsys.readouterr().out
    assert "mean action error" in out and out.split("score ")[1].split(" → ")[0] in out.split(" → ")[-1]
    if kind == "deterministic":
        return
    torch.manual_seed(0)
    obs = data.obs[:100].repeat(200, 1)
    theirs = before.sample(obs)
    if theirs is None:  # taken as TD3 plays it
        theirs = (before.mode(obs) + 0.1 * torch.randn(len(obs), A)).clamp(-1, 1)
    spread = (theirs - before.mode(obs)).pow(2).mean(0).sqrt()
    mine = (after.sample(obs) - after.mode(obs)).pow(2).mean(0).sqrt()
    torch.testing.assert_close(mine, spread, rtol=0.35, atol=0.02)


# ----------------------------------------------------------------------------------------------- CORL


def corl_actor(algorithm):
    """An actor under the names that CORL's classes give to their parameters."""
    torch.manual_seed(2)
    sizes = {"cql": [256, 256, 256, 6], "iql": [256, 256, 3], "td3_bc": [256, 256, 3], "awac": [256, 256, 256, 3]}
    prefix = {"cql": "base_network", "iql": "net.net", "td3_bc": "net", "awac": "_mlp"}[algorithm]
    state, inputs = {}, S
    for i, outputs in enumerate(sizes[algorithm]):
        layer = torch.nn.Linear(inputs, outputs)
        state |= {f"{prefix}.{2 * i}.weight": layer.weight.data, f"{prefix}.{2 * i}.bias": layer.bias.data}
        inputs = outputs
    if algorithm == "cql":
        state |= {"log_std_multiplier.constant": torch.tensor(0.7), "log_std_offset.constant": torch.tensor(-1.3)}
    if algorithm in ("iql", "awac"):
        state["log_std" if algorithm == "iql" else "_log_std"] = torch.tensor([-1.0, -0.5, -2.0])
    return state, prefix


def forward(state, prefix, x):
    names = sorted((k for k in state if k.endswith("weight")), key=lambda k: int(k.split(".")[-2]))
    for name in names:
        x = x @ state[name].T + state[name.replace("weight", "bias")]
        x = torch.relu(x) if name != names[-1] else x
    return x


@pytest.mark.parametrize("algorithm", ["cql", "iql", "td3_bc", "awac"])
def test_corl(algorithm, data, tmp_path):
    data = raw_dataset(data)
    state, prefix = corl_actor(algorithm)
    path = tmp_path / "checkpoint_9.pt"
    torch.save({"actor": state, "total_it": 9}, path)
    policy = load_policy(path, data)
    obs = (data.obs[:50] - data.obs.mean(0)) / (data.obs.std(0, correction=0) + 1e-3)
    torch.testing.assert_close((policy["state_mean"], policy["state_std"]), data.statistics())
    out = forward(state, prefix, obs)
    if algorithm == "awac":  # its mean is not bounded by tanh
        assert policy["kind"] == "function"
        torch.testing.assert_close(policy["actor"].mode(obs), out.clamp(-1, 1), rtol=1e-4, atol=1e-5)
        return
    net = policies.module(policy)
    torch.testing.assert_close(net.mode(obs), torch.tanh(out[:, :3]), rtol=1e-4, atol=1e-5)
    if algorithm == "cql":
        torch.testing.assert_close(net.spread(obs)[1], 0.7 * out[:, 3:] - 1.3, rtol=1e-4, atol=1e-5)
    if algorithm == "iql":
        torch.testing.assert_close(net.spread(obs)[1], state["log_std"])


class Scalar(torch.nn.Module):
    """CORL's CQL puts such a module, not its weights, into its checkpoint."""

    def __init__(self):
        super().__init__()
        self.constant = torch.nn.Parameter(torch.zeros(1))


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_objects_in_a_checkpoint_are_not_brought_to_life(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = raw_dataset(data)
    state, _ = corl_actor("cql")
    torch.save({"actor": state, "sac_log_alpha": Scalar()}, "cql.pt")
    assert load_policy("cql.pt", data)["kind"] == "squashed_gaussian"
    torch.save({"actor": state, "extra": Evil()}, "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"actor": state, "extra": Evil()}))
    for name in ("evil.pt", "evil.pkl"):
        try:
            assert load_policy(name, data)["kind"] == "squashed_gaussian"
        except UserError as error:
            assert name in str(error)
        assert not (tmp_path / "executed").exists()


# ----------------------------------------------------------------------------------------------- Stable-Baselines3


def sb3_zip(path, algorithm, width=256, activation=None):
    torch.manual_seed(2)
    hidden = [torch.nn.Linear(S, width), torch.nn.Linear(width, width)]
    mean, log_std = torch.nn.Linear(width, A), torch.nn.Linear(width, A)
    prefix = {"sac": "actor.latent_pi", "td3": "actor.mu", "ppo": "mlp_extractor.policy_net"}[algorithm]
    head = {"sac": "actor.mu", "td3": "actor.mu.4", "ppo": "action_net"}[algorithm]
    layers = {f"{prefix}.0": hidden[0], f"{prefix}.2": hidden[1], head: mean}
    if algorithm == "sac":
        layers["actor.log_std"] = log_std
    state = {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}
    if algorithm == "ppo":
        state["log_std"] = torch.tensor([-1.0, -0.5, -2.0])
    kwargs = {} if activation is None else {
        ":type:": "<class 'dict'>", ":serialized:": base64.b64encode(pickle.dumps(Evil())).decode(),
        "activation_fn": f"<class 'torch.nn.modules.activation.{activation}'>",
    }  # fmt: skip
    weights = io.BytesIO()
    torch.save(state, weights)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("policy.pth", weights.getvalue())
        file.writestr("data", json.dumps({"policy_kwargs": kwargs, "use_sde": False}))

    def act(obs, activate):
        for layer in hidden:
            obs = activate(layer(obs))
        return mean(obs), log_std(obs)

    return act


@pytest.mark.parametrize(
    ("algorithm", "width", "activation", "kind"),
    [
        ("sac", 256, None, "squashed_gaussian"),
        ("sac", 64, None, "function"),
        ("td3", 256, None, "deterministic"),
        ("td3", 400, "Tanh", "function"),
        ("ppo", 64, None, "function"),
        ("ppo", 256, "ReLU", "function"),
    ],
)
def test_stable_baselines(algorithm, width, activation, kind, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = raw_dataset(data)
    act = sb3_zip(tmp_path / "model.zip", algorithm, width, activation)
    policy = load_policy("model.zip", data)
    mean, std = data.statistics()
    obs = (data.obs[:50] - mean) / std
    activate = getattr(torch, (activation or ("Tanh" if algorithm == "ppo" else "ReLU")).lower())
    with torch.no_grad():
        theirs, log_std = act(data.obs[:50], activate)  # raw observations
    want = theirs.clamp(-1, 1) if algorithm == "ppo" else torch.tanh(theirs)
    assert policy["kind"] == kind and not (tmp_path / "executed").exists()
    source = policy["actor"] if kind == "function" else policies.module(policy)
    torch.testing.assert_close(source.mode(obs), want, rtol=1e-3, atol=1e-4)
    if kind == "squashed_gaussian":
        torch.testing.assert_close(source.spread(obs)[1], log_std, rtol=1e-3, atol=1e-4)
    elif algorithm != "td3":
        many = torch.stack([source.sample(obs) for _ in range(400)])
        if algorithm == "ppo":
            u = theirs + torch.tensor([-1.0, -0.5, -2.0]).exp() * torch.randn(400, 50, A)
            expected = u.clamp(-1, 1).std(0).mean()
        else:
            expected = torch.tanh(theirs + log_std.exp() * torch.randn(400, 50, A)).std(0).mean()
        assert many.std(0).mean().item() == pytest.approx(expected.item(), rel=0.1)


# ----------------------------------------------------------------------------------------------- programs


class Exported(torch.nn.Module):
    """A policy as d3rlpy exports it: raw observations in, actions out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.net = torch.nn.Sequential(torch.nn.Linear(S, 32), torch.nn.Tanh(), torch.nn.Linear(32, A), torch.nn.Tanh())

    def forward(self, x):
        return self.net(x)


def onnx_file(path, net):
    """The same network as an ONNX file."""
    from onnx import TensorProto, helper, numpy_helper, save

    tensors = {name: value.detach().numpy() for name, value in net.net.named_parameters()}
    nodes = [
        helper.make_node("Gemm", ["obs", "0.weight", "0.bias"], ["a"], transB=1),
        helper.make_node("Tanh", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "2.weight", "2.bias"], ["c"], transB=1),
        helper.make_node("Tanh", ["c"], ["act"]),
    ]
    graph = helper.make_graph(
        nodes, "policy", [helper.make_tensor_value_info("obs", TensorProto.FLOAT, ["n", S])],
        [helper.make_tensor_value_info("act", TensorProto.FLOAT, ["n", A])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )  # fmt: skip
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))


@pytest.mark.parametrize("kind", policies.KINDS)
def test_onnx_is_distilled(kind, data, tmp_path, evaluator, capsys):
    net = Exported()
    onnx_file(tmp_path / "policy.onnx", net)
    raw = raw_dataset(data)
    policy = load_policy(tmp_path / "policy.onnx", raw)
    obs = raw.obs[:50].clone()
    mean, std = raw.statistics()
    torch.testing.assert_close(policy["actor"].mode((obs - mean) / std), net(obs).detach(), rtol=1e-4, atol=1e-5)
    raw.standardise(mean, std)
    new = transfer(policy, kind, raw, evaluator, bar, steps=1_500)
    assert new["transfer_error"] < 0.05
    got = policies.module(new).mode(raw.obs[:50])
    assert (got - net(obs)).abs().mean() < 0.05
    assert f"mean action error {new['transfer_error']:.2g}" in capsys.readouterr().out


def test_torchscript_needs_trust(data, tmp_path):
    net = Exported()
    torch.jit.trace(net, torch.zeros(1, S)).save(str(tmp_path / "policy.pt"))
    data = raw_dataset(data)
    with pytest.raises(UserError, match="--trust-checkpoint"):
        load_policy(tmp_path / "policy.pt", data)
    policy = load_policy(tmp_path / "policy.pt", data, trust=True)
    mean, std = data.statistics()
    obs = data.obs[:50]
    torch.testing.assert_close(policy["actor"].mode((obs - mean) / std), net(obs).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["onnx text", "zip", "sde", "other size", "corl size"])
def test_refused_with_one_sentence(kind, data, tmp_path):
    data = raw_dataset(data)
    path = tmp_path / ("p.onnx" if kind == "onnx text" else "p.zip")
    if kind == "onnx text":
        path.write_text("hello")
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("policy.pth", b"x")
    elif kind == "corl size":
        state, _ = corl_actor("iql")
        torch.save({"actor": state | {"net.net.0.weight": torch.zeros(256, 17)}}, path)
    else:
        sb3_zip(path, "td3")
        with zipfile.ZipFile(path, "a") as file:
            if kind == "sde":
                file.writestr("data", json.dumps({"use_sde": True}))
            else:
                weights = io.BytesIO()
                torch.save({"actor.mu.0.weight": torch.zeros(4, 5), "actor.mu.0.bias": torch.zeros(4)}, weights)
                file.writestr("policy.pth", weights.getvalue())
    with pytest.raises(UserError) as error:
        load_policy(path, data)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------- the matrix

SMALL = {
    o2sac: ["--align-steps", "4", "--align-eval-every", "4", "--online-steps", "90", "--learning-starts", "60",
            "--utd", "2", "--eval-every", "90", "--batch-size", "32"],
    o2td3: ["--align-steps", "4", "--align-eval-every", "4", "--online-steps", "90", "--learning-starts", "60",
            "--eval-every", "90", "--batch-size", "32"],
    o2ppo: ["--online-steps", "64", "--rollout-steps", "32", "--minibatch-size", "16", "--num-envs", "4",
            "--update-epochs", "1", "--eval-every", "64", "--reevaluate-batch-size", "32"],
}  # fmt: skip


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    return tmp_path_factory.mktemp("matrix")


@pytest.mark.parametrize("algorithm", ["cql", "iql", "td3_bc", "bc", "awac", "rebrac"])
@pytest.mark.parametrize("script", [o2sac, o2td3, o2ppo])
def test_every_offline_policy_into_every_online_algorithm(script, algorithm, shared_runs, run_script, monkeypatch):
    monkeypatch.setattr(transfer, "__defaults__", (50, 0.1))
    flags = [flag for flag in TINY if flag not in ("--batch-size", "32")]
    code, out, err = run_script(
        script, *flags, *SMALL[script], "--env-id", "hopper-medium-demo", "--offline", algorithm,
        "--offline-steps", "4", "--reevaluate-steps", "4", "--log-every", "4", "--run-dir", shared_runs,
    )  # fmt: skip
    assert code == 0, err
    run = shared_runs / f"hopper-medium-demo__{script.__name__}__{algorithm}__0"
    result = json.loads((run / "result.json").read_text())
    assert result["offline_algorithm"] == algorithm and result["best"] >= result["offline"]
    handed_on = torch.load(run / "policy.pt", weights_only=True)
    ACTORS[handed_on["kind"]](S, A, handed_on["hidden_layers"]).load_state_dict(handed_on["actor"])
    exact = {"cql": "squashed_gaussian", "td3_bc": "deterministic", "rebrac": "deterministic"}.get(
        algorithm, "gaussian"
    )
    assert ("transfer:" in out) == (handed_on["kind"] != exact) == (run / "offline.pt").exists()
    if "transfer:" in out:
        before, after = out.split("transfer:")[1].split("score ")[1].split("\n")[0].split(" → ")
        assert before == after  # the mode is exact


def test_a_policy_of_another_kind_is_handed_on_once(shared_runs, run_script, monkeypatch):
    """Started again, a run takes the policy that it distilled before."""
    monkeypatch.setattr(transfer, "__defaults__", (50, 0.1))
    flags = [flag for flag in TINY if flag not in ("--batch-size", "32")]
    command = [
        *flags, *SMALL[o2td3], "--env-id", "hopper-medium-demo", "--offline", "iql", "--offline-steps", "4",
        "--reevaluate-steps", "4", "--log-every", "4", "--run-dir", shared_runs, "--exp-name", "twice",
    ]  # fmt: skip
    assert "transfer:" in run_script(o2td3, *command)[1]
    code, out, _ = run_script(o2td3, *command)
    assert code == 0 and "transfer:" not in out
