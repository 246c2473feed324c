"""CORL's checkpoints: a dictionary with an `actor`, as algorithms/offline/*.py and algorithms/finetune/*.py save it.

Its policies see standardised observations, or not, or standardised by the best tenth of the data alone; the checkpoint
does not say which, but config.yaml does, which CORL writes beside it.
"""

import re
from pathlib import Path

import torch
import torch.nn as nn
import yaml

from common.cli import UserError
from common.foreign.build import View, closed, layers_of, linear, network, number, raw_view, stacked


def corl(path: Path, data, checkpoint: dict, view: View | None) -> dict:
    """The policy of a checkpoint. `view`: what `--normalize-from` says about the observations. Raises UserError."""
    # `torch.compile` and DataParallel put their own prefix before a parameter's name
    state = {
        re.sub(r"(^|\.)(?:_orig_mod|module)\.", r"\1", str(key)): value for key, value in checkpoint["actor"].items()
    }
    options, kind, log_std = {}, "deterministic", None
    if "mu.weight" in state and "log_sigma.weight" in state:
        algorithm, kind = "CORL sac_n or edac", "squashed_gaussian"
        head = stacked(linear(state, "mu", path), linear(state, "log_sigma", path), path)
        layers = [*closed(layers_of(state, "trunk", path)), head]
    else:
        layers = layers_of(state, r"(?:base_network(?:\.network)?|net(?:\.net)?|_mlp)", path)
        if not layers or not isinstance(layers[-1], nn.Linear):
            fault = "whose last layer is not linear" if layers else unread(state) or "that holds no layers"
            raise UserError(f"{path} has an actor {fault}; export it to ONNX")
        algorithm = "CORL td3_bc"
        if "log_std_offset.constant" in state:
            algorithm, kind = "CORL cql", "squashed_gaussian"
            scale, offset = (number(state, f"log_std_{name}.constant", path) for name in ("multiplier", "offset"))
            half = len(layers[-1].bias) // 2  # log std = scale · output + offset; ours is output - 1
            layers[-1].weight.data[half:] *= scale
            layers[-1].bias.data[half:] = scale * layers[-1].bias[half:] + offset + 1
        elif "_log_std" in state:
            algorithm, kind, log_std, options = (
                "CORL awac",
                "gaussian",
                number(state, "_log_std", path),
                {"bounded": False},
            )
        elif "log_std" in state:
            algorithm, kind, log_std = "CORL iql", "gaussian", number(state, "log_std", path)
    if left := unread(state):
        raise UserError(f"{path} has an actor {left}; export it to ONNX")
    if view is None:
        view = standardisation(path, data, checkpoint, raw=algorithm == "CORL sac_n or edac" or "vae" in checkpoint)
    return network(path, data, layers, kind, algorithm, view, log_std, **options)


def unread(state: dict) -> str:
    """What is left of an actor once its layers were taken, in words; "" for nothing."""
    return f"with {', '.join(state)[:200]}, which is not read" if state else ""


def standardisation(path: Path, data, checkpoint: dict, raw: bool) -> View:
    """How a policy of CORL's sees observations. `raw`: not standardised by default (SAC-N, EDAC, SPOT). UserError."""
    file = path.parent / "config.yaml"
    if not file.is_file():
        if checkpoint.keys() == {"actor", "actor_optimizer", "total_it"}:
            raise UserError(
                f"{path} looks like a policy of CORL's any_percent_bc.py, which standardises observations by the best "
                "part of the data: put its config.yaml beside it, or say --normalize-from 0.1 (or what its frac was)"
            )
        said = "raw" if raw else "standardised by this dataset"
        print(f"{path.name}: observations are {said}, as is CORL's default; --normalize-from says otherwise")
        return raw_view(data) if raw else View(*data.statistics())
    try:
        config = yaml.safe_load(file.read_text())
        normalize, fraction = bool(config.get("normalize", not raw)), float(config.get("frac", 1))
        discount = float(config.get("discount", 0.99))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is no configuration of CORL's; repair it, or say --normalize-from none or 1"
        ) from error
    how = f"standardised by the best {fraction:g} of this dataset" if fraction < 1 else "standardised by this dataset"
    print(f"{path.name}: observations are {how if normalize else 'raw'}, as {file} says")
    return best_view(data, fraction, discount) if normalize else raw_view(data)


def best_view(data, fraction: float, discount: float = 0.99) -> View:
    """Mean and std of the best `fraction` of the trajectories, chosen as any_percent_bc.py does: by discounted return.

    A trajectory ends at a terminal or after 1,000 steps; the last one only counts if it ends.
    """
    if fraction >= 1:
        return View(*data.statistics())
    index, ends = torch.arange(len(data)), data.terminations.bool().cpu()
    start = torch.where(torch.cat([torch.tensor([True]), ends[:-1]]), index, 0).cummax(0).values
    step = (index - start) % 1_000
    ends |= step == 999
    trajectory = torch.cat([torch.tensor([0]), ends.cumsum(0)[:-1]])
    returns = torch.bincount(trajectory, data.rewards.cpu().double() * discount**step)[: max(1, int(ends.sum()))]
    best = returns.argsort(descending=True)[: max(1, int(fraction * len(returns)))]
    obs = data.obs[torch.isin(trajectory, best).to(data.obs.device)]
    return View(obs.mean(0), obs.std(0, correction=0) + 1e-3)
