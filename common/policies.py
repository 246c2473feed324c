"""Policies on disk and in memory: plain tensors, and all that anyone needs to use them.

    policy = policies.load("runs/…/policy.pt")
    obs, _ = env.reset()
    action = policy.act(obs)

Three kinds, each with one layout of weights that every script's actor of that kind shares:

squashed_gaussian - `net` gives mean and log std of u (2 A outputs, the log std before -1 and a clamp); a = tanh(u)
gaussian          - `net` gives the mean before its tanh (A outputs), `log_std` (A,) is free of the state
deterministic     - `net` gives the action before its tanh (A outputs)
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.checkpoint import save_tensors
from common.cli import UserError
from common.identity import fingerprint
from common.inert import fault_of, read_tensors
from common.nn import ACTIVATIONS, SIZED, ensemble_mlp, hidden_of, mlp, widths
from common.run import script_name
from common.stages import KINDS

FORMAT = "o2rl-policy-2"
# hidden_layers: the network's, as `common.nn.mlp` takes them; state_mean, state_std: what raw observations are
# standardised by; examples: raw observations "obs" and the "actions" that belong to them, which every load compares;
# data: what it was trained on; made_with: what else its maker recorded. `clip` is there where standardised observations
# are held within ± it, `action_range` (2, A) where the environment's actions are not within ±1, a `critic` where one
# was learned, and a `learner` where training can go on: its arguments "args", all its networks "agent", and its
# optimisers by name.
FIELDS = {"kind": str, "obs_dim": int, "action_dim": int, "hidden_layers": list, "state_mean": torch.Tensor,
          "state_std": torch.Tensor, "algorithm": str, "env_id": str, "simulator": str, "seed": int, "steps": int,
          "score": float, "examples": dict, "data": dict, "made_with": dict, "actor": dict}  # fmt: skip
MOST_LAYERS = 100


class Policy(nn.Module):
    """The network of any kind. `mode(obs)`: most likely actions (B, A); `spread(obs)`: see there.

    They take standardised observations and give actions in [-1, 1], as all networks here; `act` takes and gives what
    an environment does.
    """

    def __init__(self, kind: str, obs_dim: int, action_dim: int, hidden_layers: int | Sequence[int | str]):
        super().__init__()
        self.kind = kind
        self.net = mlp(obs_dim, hidden_layers, action_dim * (2 if kind == "squashed_gaussian" else 1))
        if kind == "gaussian":
            self.log_std = nn.Parameter(torch.zeros(action_dim))
        self.register_buffer("state_mean", torch.zeros(obs_dim), persistent=False)
        self.register_buffer("state_std", torch.ones(obs_dim), persistent=False)
        self.register_buffer("action_range", None, persistent=False)
        self.clip, self.simulator = math.inf, ""

    @torch.no_grad()
    def act(self, obs):
        """The most likely action for raw observations, both an environment's own: (S,) -> (A,) or (B, S) -> (B, A).

        NumPy's arrays in, NumPy's out; else tensors. Raises UserError for what is no observation of its environment.
        """
        actions = to_range(self.mode(self.seen(obs)), self.action_range)
        return actions.cpu().numpy() if isinstance(obs, np.ndarray) else actions

    def seen(self, obs) -> torch.Tensor:
        """Raw observations as the network sees them, standardised. Raises UserError for what is none."""
        if np.shape(obs)[-1:] != self.state_mean.shape:
            raise self.misfit(obs)
        raw = torch.as_tensor(obs, dtype=self.state_mean.dtype, device=self.state_mean.device)
        return ((raw - self.state_mean) / self.state_std).clamp(-self.clip, self.clip)

    def misfit(self, obs) -> UserError:
        shape, n = np.shape(obs), len(self.state_mean)
        if self.simulator == "D4RL's ant" and shape[-1:] == (27,):
            remedy = "add the contact forces that Gymnasium leaves out: common.envs.ZeroForces(env, 84)"
        elif isinstance(obs, dict) or math.prod(shape) == n:
            remedy = "make them a vector, with common.spaces: spaces.Flat(env, spaces.order_of(env))"
        else:
            remedy = "act in the environment that it was trained in"
        found = f"of the shape {shape}" if shape else f"a {type(obs).__name__}"
        return UserError(
            f"a policy of {self.simulator or 'this kind'} takes observations of {n:,} numbers, but was given {found}; "
            f"{remedy}"
        )

    def mode(self, obs: torch.Tensor) -> torch.Tensor:
        out = self.net(obs)
        return torch.tanh(out.chunk(2, dim=-1)[0] if self.kind == "squashed_gaussian" else out)

    def spread(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Mean and log std, of u = atanh(a) for a squashed Gaussian, of a for a Gaussian; None if deterministic."""
        if self.kind == "squashed_gaussian":
            mean, log_std = self.net(obs).chunk(2, dim=-1)
            return mean, (log_std - 1.0).clamp(-20.0, 2.0)
        if self.kind == "gaussian":
            return torch.tanh(self.net(obs)), self.log_std.clamp(-20.0, 2.0)
        return None

    def sample(self, obs: torch.Tensor) -> torch.Tensor | None:
        """Actions as they are executed, (B, A) in [-1, 1]; None if deterministic."""
        if self.kind == "deterministic":
            return None
        mean, log_std = self.spread(obs)
        x = mean + log_std.exp() * torch.randn_like(mean)
        return torch.tanh(x) if self.kind == "squashed_gaussian" else x.clamp(-1, 1)


def to_range(actions: torch.Tensor, action_range: torch.Tensor | None) -> torch.Tensor:
    """Actions (…, A) in [-1, 1] as an environment of that range (2, A) takes them; None: ±1, which changes nothing."""
    if action_range is None:
        return actions
    low, high = action_range.double()  # in single precision the sum may lie beyond a bound
    return (low + (actions.double() + 1) / 2 * (high - low)).to(actions.dtype)


def to_unit(actions: torch.Tensor, action_range: torch.Tensor | None) -> torch.Tensor:
    """The reverse: an environment's own actions in [-1, 1], where those beyond its range are clipped."""
    if action_range is None:
        return actions.clamp(-1, 1)
    low, high = action_range.double()
    return (2 * (actions.double() - low) / (high - low) - 1).clamp(-1, 1).to(actions.dtype)


def range_of(data) -> dict:
    """The field `action_range` of policies of the data's environment; nothing where its actions are within ±1."""
    found = data.task.action_range
    return {"action_range": torch.tensor(found, dtype=torch.float64, device=data.obs.device)} if found else {}


def module(policy: dict) -> Policy:
    """The network of a policy checkpoint, on the device of its weights."""
    net = Policy(policy["kind"], policy["obs_dim"], policy["action_dim"], policy["hidden_layers"])
    net.load_state_dict(policy["actor"])
    net.state_mean, net.state_std, net.clip = policy["state_mean"], policy["state_std"], policy.get("clip", math.inf)
    net.action_range, net.simulator = policy.get("action_range"), policy["simulator"]
    return net.to(policy["state_mean"].device).requires_grad_(False)


def player(policy: dict):
    """What acts, by `mode(obs)` and `sample(obs)`: the network of a policy, or the function of one from elsewhere."""
    return policy["actor"] if policy["kind"] == "function" else module(policy)


# ---------------------------------------------------------------------------------------------- writing


def save_policy(path: Path, **fields) -> None:
    """Write a policy checkpoint with the fields of `FIELDS`, and `critic` (a dictionary) where there is one.

    `examples` needs raw observations, "obs", alone: the actions that belong to them are added here.
    """
    missing = FIELDS.keys() - fields.keys()
    if missing:
        raise ValueError(f"a policy checkpoint needs {sorted(missing)}")
    obs = fields["examples"]["obs"]
    fields["examples"] = {"obs": obs, "actions": exact_actions(fields, obs)}
    save_tensors(Path(path), fields | {"format": FORMAT})


def exact_actions(policy: dict, obs: torch.Tensor) -> torch.Tensor:
    """The policy's most likely actions in double precision on the CPU, which are the same on every machine."""
    return module(policy).cpu().double().act(obs.cpu())


def examples_of(data) -> dict:
    """A few observations of a dataset that is not standardised yet, from all over it."""
    return {"obs": data.obs[:: max(1, len(data) // 16)][:16].clone()}


def description_of(data, args) -> dict:
    """What a policy's file and a result say of the dataset that they were made with, which is not standardised yet."""
    return {"name": data.task.data, "file": Path(args.dataset_path).name, "source": data.source,
            "transitions": len(data), "sha256": fingerprint(data)}  # fmt: skip


def save_online(run, policy: dict, actor: nn.Module, best) -> None:
    """policy.pt and best.pt of a fine-tuning run that started from `policy`, and where they come from in it.

    An `actor` that is more than one network says by `exported()` which fields of the file are others then.
    """
    same = {k: policy[k] for k in ("kind", "obs_dim", "action_dim", "state_mean", "state_std", "simulator", "examples",
                                   "made_with", "clip", "action_range") if k in policy}  # fmt: skip
    last, last_score = run.logged.evaluations("finetune")[-1]
    kept = {"policy": (last_score, f"online, step {last:,}", actor.state_dict()),
            "best": (best.score, best.origin, best.weights)}  # fmt: skip
    for name, (score, origin, weights) in kept.items():
        fields = same | dict(
            algorithm=script_name(run.args), env_id=run.data["name"], seed=run.args.seed, steps=last, origin=origin,
            score=score, data=run.data,
        )  # fmt: skip
        if hasattr(actor, "exported"):
            whole = copy.deepcopy(actor)
            whole.load_state_dict(weights)
            fields |= whole.exported()
        else:
            fields |= dict(hidden_layers=hidden_of(actor.net), actor=weights)
        save_policy(run.dir / f"{name}.pt", **fields)


# ---------------------------------------------------------------------------------------------- reading


def go_on(optimizers: dict, policy: dict, *names: str) -> None:
    """Bring optimisers to where the offline run of `policy` left them: those of these names, else all."""
    for name in names or optimizers:
        optimizers[name].load_state_dict(policy["learner"][name])


def load(path: str | Path, device: torch.device | str = "cpu") -> Policy:
    """The policy of a policy.pt or best.pt, ready to `act`. Raises UserError."""
    return module(read(path, device))


def read(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """All fields of a policy.pt, checked. Raises UserError."""
    policy = read_tensors(Path(path), device)
    if not is_ours(policy):
        raise UserError(f"{path} is no policy of this project")
    name_widths(policy)
    check_policy(policy, Path(path))
    return policy


def name_widths(policy: dict) -> None:
    """Rename what a learner's arguments were called when each of its layers had 256 units, and they counted them."""
    learner = policy.get("learner")
    args = learner.get("args") if isinstance(learner, dict) else None
    if isinstance(args, dict):
        for old, new in (("hidden_layers", "hidden"), ("critic_layers", "critic_hidden")):
            if isinstance(args.get(old), int) and 0 < args[old] <= MOST_LAYERS:
                args[new] = widths(args.pop(old))


def is_ours(checkpoint: object) -> bool:
    return isinstance(checkpoint, dict) and str(checkpoint.get("format")).startswith("o2rl-policy-")


def check_policy(policy: dict, path: Path) -> None:
    """Refuse a policy.pt that is not what it says it is. Raises UserError."""
    if policy["format"] != FORMAT:
        raise UserError(
            f"{path} was written by another version of this project ({policy['format']}, not {FORMAT}) and does not "
            "describe its network; delete it and start the command that made it again"
        )
    wrong = [name for name, kind in FIELDS.items() if not isinstance(policy.get(name), kind)]
    if wrong:
        raise UserError(f"{path} has missing or foreign entries ({', '.join(wrong)}); make it again")
    kind, obs_dim, action_dim, hidden = (policy[name] for name in ("kind", "obs_dim", "action_dim", "hidden_layers"))
    if kind not in KINDS or len(hidden) > MOST_LAYERS or not all(map(is_layer, [obs_dim, action_dim, *hidden])):
        raise UserError(f"{path} describes a network that cannot be built ({kind}, {str(hidden)[:80]}); make it again")
    mean, std, examples = policy["state_mean"], policy["state_std"], policy["examples"]
    obs = examples.get("obs")
    n = len(obs) if isinstance(obs, torch.Tensor) and obs.ndim else 0
    with torch.device("meta"):  # takes no memory, whatever the file declares
        net = Policy(kind, obs_dim, action_dim, hidden)
        like = {"obs": torch.empty(n, obs_dim), "actions": torch.empty(n, action_dim, dtype=torch.float64)}
    check_tensors(policy["actor"], net.state_dict(), path, "its actor")
    check_tensors({"mean": mean, "std": std}, {"mean": net.state_mean, "std": net.state_std}, path, "its statistics")
    check_tensors(examples, like, path, "its examples")
    if "action_range" in policy:
        limits = policy["action_range"]
        check_tensors({"range": limits}, {"range": like["actions"].new_empty(2, action_dim)}, path, "its actions")
        if not (limits[0] < limits[1]).all():
            raise UserError(f"{path} has actions from {limits[0].tolist()} to {limits[1].tolist()}; make it again")
    clip = policy.get("clip", math.inf)
    if type(clip) is not float or not clip > 0:
        raise UserError(f"{path} holds observations within ± {clip!r:.80}, which is no number above 0; make it again")
    if "critic" in policy:
        check_critic(policy["critic"], obs_dim + action_dim, path)
    error = (exact_actions(policy, obs) - examples["actions"].cpu()).abs()
    if not ((std > 0).all() and n and error.max() < 1e-6):
        raise UserError(f"{path} does not act as it did when it was saved: it was damaged or edited; make it again")


def is_layer(layer: object) -> bool:
    """Whether `mlp` can make a layer of that, of a size that anyone would use."""
    return layer in (*ACTIVATIONS, *SIZED) if isinstance(layer, str) else type(layer) is int and 0 < layer < 1_000_000


def check_critic(critic: object, inputs: int, path: Path) -> None:
    """Refuse critics that are not in the shape that they say. Raises UserError."""
    kinds = {"layer_norm": (bool, str), "hidden_layers": (int, list), "critic": dict}
    if not isinstance(critic, dict) or not all(isinstance(critic.get(name), kind) for name, kind in kinds.items()):
        raise UserError(f"{path} has a critic with missing or foreign entries; make it again")
    if critic["layer_norm"] not in (True, False, "after"):
        raise UserError(f"{path} has a critic whose normalisation {critic['layer_norm']!r} is not known; make it again")
    hidden = critic["hidden_layers"]  # widths, or in older files the number of layers of 256 units
    many = hidden if isinstance(hidden, int) else len(hidden)
    if not 0 <= many <= MOST_LAYERS or not all(type(x) is int and is_layer(x) for x in widths(hidden)):
        raise UserError(f"{path} describes a critic that cannot be built ({str(hidden)[:80]}); make it again")
    with torch.device("meta"):
        net = ensemble_mlp(2, inputs, hidden, 1, critic["layer_norm"])
    like = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    check_tensors(critic["critic"], like, path, "its critic")


def check_tensors(tensors: dict, like: dict[str, torch.Tensor], path: Path, where: str) -> None:
    """Refuse what has not exactly the names, shapes and types of `like`, or numbers that are none. Raises UserError."""
    wrong = [f"{name} is missing" for name in like if name not in tensors]
    wrong += [f"{name} does not belong there" for name in tensors if name not in like]
    wrong += [f"{name} {fault}" for name in like if name in tensors and (fault := fault_of(tensors[name], like[name]))]
    if wrong:
        raise UserError(f"{path} cannot be used: in {where} {wrong[0]}; train it again, or take another policy")


def check_environment(policy: dict, path: Path, data) -> None:
    """Refuse a policy of another environment than the data's. Raises UserError."""
    here = data.task.simulator, data.obs.shape[1], data.actions.shape[1]
    if (policy["simulator"], policy["obs_dim"], policy["action_dim"]) != here:
        raise UserError(
            f"{path} is a policy for {policy['simulator']} ({policy['env_id']}, {policy['obs_dim']} observations, "
            f"{policy['action_dim']} actions), but this run is in {here[0]} ({here[1]}, {here[2]}); choose the "
            "--env-id that it was trained on"
        )
    theirs, ours = (x["action_range"].tolist() if "action_range" in x else None for x in (policy, range_of(data)))
    if theirs not in (None, ours):  # older files do not say
        low, high = ours or (-1, 1)
        raise UserError(
            f"{path} gives actions from {theirs[0]} to {theirs[1]}, but {here[0]} takes {low} to {high}; choose the "
            "--env-id that it was trained on"
        )
