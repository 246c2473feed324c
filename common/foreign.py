"""Policies from elsewhere, read without running anything that their files contain:

CORL             - a dictionary with an `actor` entry, as algorithms/offline/{cql,iql,td3_bc,awac}.py save it
Stable-Baselines3 - the .zip of a SAC, TD3 or PPO model with an MLP policy
ONNX             - a policy as d3rlpy exports it (needs onnxruntime)
TorchScript      - likewise; it is a program, so it is only loaded with --trust-checkpoint
"""

import io
import json
import pickle
import re
import zipfile
from pathlib import Path

import torch

from common.checkpoint import load_tensors
from common.cli import UserError
from common.policies import FORMAT, check_policy

HELP = (
    "give --offline the name of an algorithm, a policy.pt of this project, a checkpoint of CORL, a policy exported to "
    "ONNX or TorchScript, or a .zip of Stable-Baselines3"
)


class Function:
    """A policy that is no network of ours: `mode(obs)` gives its most likely actions, `sample(obs)` sampled ones."""

    def __init__(self, mode, sample=None):
        self.mode, self._sample = mode, sample

    def sample(self, obs: torch.Tensor) -> torch.Tensor | None:
        return self._sample(obs) if self._sample else None


def load_policy(path: str | Path, data, trust: bool = False) -> dict:
    """Read a policy of any of these formats and check that it fits `data`, which is not standardised yet.

    Returns the fields of `common.policies.FIELDS`; one that is no network of ours has the kind "function" and a
    `Function` as its actor. All take observations standardised by `state_mean` and `state_std`. Raises UserError.
    """
    path, device = Path(path), data.obs.device
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}; {HELP}")
    if path.suffix == ".onnx":
        return wrap(path, data, raw_function(onnx_function(path), data))
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    if "policy.pth" in names:
        return stable_baselines(path, data)
    if any("/code/" in name for name in names):
        if not trust:
            raise UserError(
                f"{path} is a TorchScript program; pass --trust-checkpoint to run it if you know its origin"
            )
        return wrap(path, data, raw_function(torchscript_function(path, device), data))
    try:
        checkpoint = load_tensors(path, device)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path} is not a checkpoint that can be read safely ({first}); {HELP}") from error
    if isinstance(checkpoint, dict) and checkpoint.get("format") == FORMAT:
        check_policy(checkpoint, path, data.task.simulator, data.obs.shape[1], data.actions.shape[1])
        return checkpoint
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("actor"), dict):
        return corl(path, data, checkpoint["actor"])
    raise UserError(f"{path} holds no policy that is known here; {HELP}")


def wrap(path: Path, data, actor, kind: str = "function", hidden_layers: int = 3, algorithm: str = "") -> dict:
    """The fields of a policy checkpoint around `actor`, with the dataset's own statistics."""
    mean, std = data.statistics()
    if kind == "function":
        with torch.no_grad():
            actions = actor.mode((data.obs[:2] - mean) / std)
        if actions.shape != data.actions[:2].shape:
            raise_misfit(path, data)
    return dict(
        format=FORMAT, kind=kind, obs_dim=data.obs.shape[1], action_dim=data.actions.shape[1], state_mean=mean,
        hidden_layers=hidden_layers, state_std=std, algorithm=algorithm or path.stem, env_id="", steps=0, seed=0,
        simulator=data.task.simulator, score=float("nan"), actor=actor,
    )  # fmt: skip


def raise_misfit(path: Path, data) -> None:
    raise UserError(
        f"{path} is a policy of other dimensions than {data.task.simulator} has ({data.obs.shape[1]} observations, "
        f"{data.actions.shape[1]} actions); choose the --env-id that it was trained on"
    )


# ---------------------------------------------------------------------------------------------- formats


def corl(path: Path, data, state: dict) -> dict:
    """CORL's policies see observations standardised by the dataset's own mean and std, which they do not store."""
    layers = layers_of(state, r"(?:base_network(?:\.network)?|net(?:\.net)?|_mlp)")
    if "log_std_offset.constant" in state:
        weight, bias = layers[-1]
        scale, offset = state["log_std_multiplier.constant"], state["log_std_offset.constant"]
        half = len(bias) // 2  # log std = scale · output + offset; ours is output - 1
        weight = torch.cat([weight[:half], scale * weight[half:]])
        layers[-1] = (weight, torch.cat([bias[:half], scale * bias[half:] + offset + 1]))
        return network(path, data, layers, "squashed_gaussian", "CORL cql")
    if "_log_std" in state:
        return network(path, data, layers, "gaussian", "CORL awac", log_std=state["_log_std"], bounded=False)
    if "log_std" in state:
        return network(path, data, layers, "gaussian", "CORL iql", log_std=state["log_std"])
    return network(path, data, layers, "deterministic", "CORL td3_bc")


def stable_baselines(path: Path, data) -> dict:
    """Stable-Baselines3's policies see raw observations; their weights are in policy.pth, their shape in data."""
    with zipfile.ZipFile(path) as file:
        try:
            state = torch.load(io.BytesIO(file.read("policy.pth")), map_location=data.obs.device, weights_only=True)
            about = json.loads(file.read("data"))
        except (KeyError, pickle.UnpicklingError, RuntimeError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"{path} is not a whole model of Stable-Baselines3 ({first}); save it again") from error
    if about.get("use_sde"):
        raise UserError(f"{path} explores with gSDE, which is not read here; train it with use_sde=False")
    default = "Tanh" if "action_net.weight" in state else "ReLU"
    activation = re.search(r"\.(\w+)'>", str(about.get("policy_kwargs", {}).get("activation_fn", f".{default}'>")))
    options = dict(activation=activation[1] if activation else default, raw=True)
    if "action_net.weight" in state:
        layers = layers_of(state, r"mlp_extractor\.policy_net") + [
            (state["action_net.weight"], state["action_net.bias"])
        ]
        return network(path, data, layers, "gaussian", "SB3 ppo", log_std=state["log_std"], bounded=False, **options)
    if "actor.log_std.weight" in state:
        head = [torch.cat([state[f"actor.mu.{name}"], state[f"actor.log_std.{name}"]]) for name in ("weight", "bias")]
        head[1][len(head[1]) // 2 :] += 1  # our log std is the output - 1
        layers = layers_of(state, r"actor\.latent_pi") + [tuple(head)]
        return network(path, data, layers, "squashed_gaussian", "SB3 sac", **options)
    if any(name.startswith("actor.mu.0") for name in state):
        return network(path, data, layers_of(state, r"actor\.mu"), "deterministic", "SB3 td3", **options)
    raise UserError(f"{path} is no SAC, TD3 or PPO model with an MLP policy; {HELP}")


def raw_function(act, data) -> Function:
    """A policy that takes raw observations, as one that takes standardised ones."""
    mean, std = data.statistics()
    return Function(lambda obs: act(obs * std + mean).clamp(-1, 1))


def onnx_function(path: Path):
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path} needs ONNX Runtime; install it with: pip install onnxruntime") from error
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no public base class
        raise UserError(
            f"{path} is not an ONNX model that can be read ({str(error)[:100]}); export it again"
        ) from error
    name, outputs = session.get_inputs()[0].name, [session.get_outputs()[0].name]

    return lambda obs: torch.as_tensor(session.run(outputs, {name: obs.cpu().numpy()})[0], device=obs.device)


def torchscript_function(path: Path, device):
    try:
        return torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        raise UserError(f"{path} is not a whole TorchScript file ({str(error).splitlines()[0]})") from error


# ---------------------------------------------------------------------------------------------- networks


def layers_of(state: dict, prefix: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(weight, bias) of the linear layers of a Sequential, in order."""
    found = {int(match[1]): key for key in state if (match := re.fullmatch(prefix + r"\.(\d+)\.weight", key))}
    return [(state[found[i]], state[found[i].replace("weight", "bias")]) for i in sorted(found)]


def network(
    path: Path, data, layers: list, kind: str, algorithm: str, log_std=None, bounded=True, activation="ReLU", raw=False
) -> dict:
    """A multilayer perceptron as one of our networks where it has their shape, else as a function.

    `raw` networks take observations as they are; standardising is undone in their first layer.
    """
    outputs = data.actions.shape[1] * (2 if kind == "squashed_gaussian" else 1)
    if not layers or layers[0][0].shape[1] != data.obs.shape[1] or layers[-1][0].shape[0] != outputs:
        raise_misfit(path, data)
    if raw:
        mean, std = data.statistics()
        weight, bias = layers[0]
        layers = [(weight * std, bias + weight @ mean), *layers[1:]]
    if bounded and activation == "ReLU" and all(weight.shape[0] == 256 for weight, _ in layers[:-1]):
        actor = {}
        for i, (weight, bias) in enumerate(layers):
            actor |= {f"net.{2 * i}.weight": weight, f"net.{2 * i}.bias": bias}
        if log_std is not None:
            actor["log_std"] = log_std
        return wrap(path, data, actor, kind, len(layers) - 1, algorithm)

    activate = {"ReLU": torch.relu, "Tanh": torch.tanh, "ELU": torch.nn.functional.elu}.get(activation)
    if activate is None:
        raise UserError(f"{path} has {activation} units, which are not read here; export it to ONNX")

    def forward(obs):
        for weight, bias in layers[:-1]:
            obs = activate(torch.nn.functional.linear(obs, weight, bias))
        return torch.nn.functional.linear(obs, *layers[-1])

    def mode(obs):
        out = forward(obs)
        if kind == "squashed_gaussian":
            return torch.tanh(out.chunk(2, dim=-1)[0])
        return torch.tanh(out) if bounded else out.clamp(-1, 1)

    def sample(obs):
        out = forward(obs)
        if kind == "squashed_gaussian":
            u_mean, u_log_std = out.chunk(2, dim=-1)
            return torch.tanh(u_mean + (u_log_std - 1).clamp(-20, 2).exp() * torch.randn_like(u_mean))
        action_mean = torch.tanh(out) if bounded else out
        return (action_mean + log_std.clamp(-20, 2).exp() * torch.randn_like(out)).clamp(-1, 1)

    return wrap(path, data, Function(mode, None if kind == "deterministic" else sample), algorithm=algorithm)
