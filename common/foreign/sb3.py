"""Stable-Baselines3's models: a .zip with the weights in policy.pth and, in data, how the policy was made.

Observations are raw, unless the model was trained inside `VecNormalize`, whose statistics are saved in a file of their
own. sb3-contrib saves its algorithms in the same layout.
"""

import base64
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.cli import UserError
from common.foreign.build import View, closed, layers_of, linear, network, number, raw_view, stacked
from common.inert import load_pickle, opened, read_tensors
from common.nn import ACTIVATIONS

# Of policy.pth, what no action depends on
CRITICS = re.compile(r"((critic|actor)_target|critic|mlp_extractor\.value_net|value_net|vf_features_extractor)\..*")


def stable_baselines(path: Path, data, view: View | None) -> dict:
    """The policy of a model. `view`: what `--normalize-from` says about the observations. Raises UserError."""
    try:
        with opened(path) as file:
            weights, about = file.read("policy.pth"), json.loads(file.read("data"))
        kwargs = about.get("policy_kwargs") or {}
        eps = float(kwargs.get("batch_norm_eps", 1e-3))
    except Exception as error:  # as in `read_tensors`
        raise UserError(f"{path} is no whole model of Stable-Baselines3 ({error}); save it again") from error
    state = read_tensors(path, "cpu", weights)
    if not isinstance(state, dict):
        raise UserError(f"{path} is no whole model of Stable-Baselines3; save it again")
    state = {str(key): value for key, value in state.items() if not CRITICS.fullmatch(str(key))}
    refuse_what_is_not_read(path, about, kwargs, state)

    on_policy = "action_net.weight" in state
    activation = activation_of(path, kwargs, nn.Tanh if on_policy else nn.ReLU)
    sequence = partial(layers_of, state, path=path, activation=activation, eps=eps)
    log_std, bounded = None, True
    if on_policy:
        kind, algorithm, log_std, bounded = "gaussian", "SB3 ppo", number(state, "log_std", path), False
        shared, own = sequence(r"mlp_extractor\.shared_net"), sequence(r"mlp_extractor\.policy_net")
        layers = [*closed(shared, activation), *closed(own, activation), linear(state, "action_net", path)]
    elif "actor.mu.weight" in state and "actor.log_std.weight" in state:
        kind, algorithm = "squashed_gaussian", "SB3 sac"
        head = stacked(linear(state, "actor.mu", path), linear(state, "actor.log_std", path), path)
        layers = [*closed(sequence(r"actor\.latent_pi"), activation), head]
    else:
        kind, algorithm, layers = "deterministic", "SB3 td3", sequence(r"actor\.mu")
    if state or not layers:
        known = "; read are SAC, TD3, PPO and what shares their layout, with an MLP policy"
        raise UserError(f"{path} has a policy of an unknown kind ({', '.join(state)[:200]}){known}; export it to ONNX")
    view = view or vecnormalize_beside(path, data, about, on_policy)
    return network(path, data, layers, kind, algorithm, view, log_std, bounded)


def refuse_what_is_not_read(path: Path, about: dict, kwargs: dict, state: dict) -> None:
    """Raises UserError for a policy whose actions are not those of its layers alone."""
    made_by = about.get("policy_class")
    module = str(made_by.get("__module__", "stable_baselines3.")) if isinstance(made_by, dict) else "stable_baselines3."
    extractor = str(kwargs.get("features_extractor_class", "FlattenExtractor'>"))
    limits = about.get("action_space") if isinstance(about.get("action_space"), dict) else {}
    limits = {
        float(x) for key in ("low", "high") for x in re.findall(r"-?\d+\.?\d*(?:e[-+]?\d+)?", str(limits.get(key, "")))
    }
    reasons = {
        "is a model of RecurrentPPO, which acts on a history": any(key.startswith("lstm_actor") for key in state),
        "has a features extractor of its own": not extractor.endswith("FlattenExtractor'>")
        or any("features_extractor." in key for key in state),
        "explores with gSDE (train it with use_sde=False)": about.get("use_sde") or kwargs.get("use_sde"),
        "has a policy class of its own": not module.startswith(("stable_baselines3.", "sb3_contrib.")),
        "chooses among discrete actions": "action_net.weight" in state and "log_std" not in state,
        f"acts from {min(limits, default=-1):g} to {max(limits, default=1):g} and not within ± 1": "log_std" in state
        and limits - {-1.0, 1.0},
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"{path} {reason}, which is not read here; export its policy to ONNX")


def activation_of(path: Path, kwargs: dict, default):
    if "activation_fn" not in kwargs:
        return default
    name = re.fullmatch(r"<class '(?:\w+\.)*(\w+)'>", str(kwargs["activation_fn"]))
    if not name or name[1] not in ACTIVATIONS:
        raise UserError(f"{path} has activations that are not read here ({kwargs['activation_fn']}); export it to ONNX")
    return ACTIVATIONS[name[1]]


# ---------------------------------------------------------------------------------------------- VecNormalize


def vecnormalize_beside(path: Path, data, about: dict, on_policy: bool) -> View:
    """The statistics beside a model, where SB3, its zoo and its callbacks put them; else none. Raises UserError."""
    names = [
        "vecnormalize.pkl",
        "vec_normalize.pkl",
        f"{re.sub(r'_[0-9]+$', '', path.parent.resolve().name)}/vecnormalize.pkl",
    ]
    if step := re.fullmatch(r"(.*)_(\d+)_steps", path.stem):  # of CheckpointCallback
        names.insert(0, f"{step[1]}_vecnormalize_{step[2]}_steps.pkl")
    found = [path.parent / name for name in names if (path.parent / name).is_file()]
    if found:
        print(f"{path.name}: observations are normalised by {found[0]}")
        return vecnormalize(found[0], data)
    if in_vecnormalize(about, on_policy):
        raise UserError(
            f"{path} was trained inside VecNormalize, whose statistics are not in it: put its vecnormalize.pkl beside "
            "it, or name that file with --normalize-from (none: raw observations)"
        )
    return raw_view(data)


def in_vecnormalize(about: dict, on_policy: bool) -> bool:
    """Whether the last observation that the model saw was normalised, as far as the model's file tells.

    SB3 keeps the original beside it. Normalised ones are float32, the simulators' own are doubles; where both are
    float32, algorithms that learn on-policy only have an original if they were normalised.
    """
    last, original = (pickled_array(about.get(name)) for name in ("_last_obs", "_last_original_obs"))
    if last is None or original is None:
        return False
    return last.dtype != original.dtype or (on_policy and original.dtype == np.float32)


def pickled_array(item: object) -> np.ndarray | None:
    try:
        array = load_pickle(base64.b64decode(item[":serialized:"]))
    except Exception:  # no item, or anything else than a pickle
        return None
    return array if isinstance(array, np.ndarray) else None


def vecnormalize(file: Path, data) -> View:
    """How a policy saw observations inside of the `VecNormalize` that was saved to `file`. Raises UserError."""
    try:
        saved = load_pickle(file.read_bytes())
        if type(saved).__name__ != "VecNormalize":
            raise ValueError(f"it holds a {type(saved).__name__}")
        if not saved.state["norm_obs"]:
            return raw_view(data)
        statistics = saved.state["obs_rms"].state
        mean, var = (torch.as_tensor(np.asarray(statistics[name], float), device="cpu") for name in ("mean", "var"))
        std, clip = (var + float(saved.state["epsilon"])).sqrt(), float(saved.state["clip_obs"])
        if not (
            mean.shape == var.shape == data.obs.shape[1:] and mean.isfinite().all() and (std > 0).all() and clip > 0
        ):
            raise ValueError(f"its mean and variance are of shape {tuple(mean.shape)} and {tuple(var.shape)}")
    except Exception as error:  # a damaged file fails in as many ways as there are bytes
        raise UserError(f"{file} holds no statistics of VecNormalize for this policy ({error})") from error
    return View(mean.to(data.obs), std.to(data.obs), clip)
