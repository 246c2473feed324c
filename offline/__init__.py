"""Offline algorithms, one file each. The online scripts take them by name: `--offline cql`."""

import copy
import dataclasses
import math
import warnings
from pathlib import Path
from types import ModuleType

from common import cli, regime, tasks
from common.datasets import Dataset
from common.evaluation import Evaluator, make_evaluator
from common.foreign import load_policy, our_policy
from common.identity import script_of
from common.nn import hidden_of, mlp
from common.policies import player, save_policy
from common.pretrain import PretrainArgs
from common.run import plain
from common.stages import declared, find, load
from common.steps import seconds_per_step
from common.transfer import transfer
from common.usage import flag_of, unlike

import torch

ALGORITHMS = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py")))
NEEDED = ("Args", "PRESETS", "FAMILIES", "Agent", "Optimizers", "training_step", "train")

# What an online script hands on to the offline one that it calls
SHARED = ("preset", "env_id", "dataset_path", "max_episode_steps", "seed", "device", "compile", "deterministic",
          "matmul", "run_dir", "checkpoint_seconds", "eval_episodes", "final_episodes", "eval_workers",
          "go_on")  # fmt: skip
VALUED = ("reward_scale", "reward_shift", "gamma")  # what Q and V are values of, beside a policy


def is_algorithm(name: str) -> bool:
    """Whether `--offline` names an algorithm: a file of this folder, or a script of the user's; else it is a policy."""
    return name in ALGORITHMS or name.endswith(".py")


def idle(args) -> list[str]:
    """In words, which arguments are the user's own and yet change nothing, for what `--offline` names has no use."""
    if from_scratch(args):
        names, kind = ("offline_steps", "trust_checkpoint", "normalize_from"), f"{args.exp_name} starts from nothing"
    elif is_algorithm(args.offline):
        names, kind = ("trust_checkpoint",), f"--offline {args.offline} is an algorithm"
    else:
        names, kind = ("offline_steps",), f"--offline {args.offline} is a policy"
    flags = [flag_of(name) for name in names if getattr(args, name)]
    return [f"{', '.join(flags)} change{'s' * (len(flags) == 1)} nothing, for {kind}"] if flags else []


def algorithm(name: str) -> ModuleType:
    """The script of an offline algorithm. Raises UserError where it lacks what every script in this folder has."""
    return load(find(name, "offline"), NEEDED, "offline/bc.py is the shortest that has them all")


def algorithm_args(args):
    """The script that `--offline NAME` names, and the arguments that it is called with."""
    script = algorithm(args.offline)
    task = tasks.resolve(args.env_id, args.dataset_path)
    chosen = cli.chosen(script.PRESETS, script.FAMILIES, args.preset, task)
    changes = args.offline_changes(task)
    chosen |= {key: getattr(args, key) for key in SHARED} | changes
    parts = [Path(args.offline).stem]
    known = {field.name for field in dataclasses.fields(script.Args)}
    if lacking := [flag_of(name) for name in changes if name not in known]:
        words = f"{args.exp_name} starts from another algorithm: {args.offline} has no {', '.join(lacking)}"
        raise cli.UserError(f"{words}; leave --offline out")
    if changes:  # a run of its own
        parts.append(script_of(args).stem)
    if args.offline_steps is not None:
        chosen |= dict(steps=args.offline_steps)
        parts.append(str(args.offline_steps))
    if args.hidden is not None:
        if "hidden" not in known:
            raise cli.UserError(f"{script.__file__} has no argument hidden, which --hidden sets; leave that flag out")
        chosen |= dict(hidden=args.hidden)
        parts.append("x".join(map(str, args.hidden)) or "linear")
    if len(parts) > 1:
        chosen |= dict(exp_name="-".join(parts))
    return script, cli.complete(script.Args(**chosen))


def shipped(args) -> Path | None:
    """The policy of `--offline NAME` that ships with the repository for `--env-id`; None where there is none.

    It stands in for training one, unless the data, the number of steps or the layers are the user's own, or the script
    goes on with what the algorithm's optimisers and other networks hold, which a policy that ships leaves out.
    """
    own = args.dataset_path or (args.offline_steps, args.hidden) != (None, None) or goes_on(args)
    return None if own else shipped_file(args.env_id, args.offline)


def shipped_file(env_id: str, name: str) -> Path | None:
    """The file of that policy, whatever a run needs."""
    path = tasks.SHIPPED / "policies" / f"{env_id}__{name}.pt"
    return path if name in ALGORITHMS and path.exists() else None


def goes_on(args) -> bool:
    """Whether the script goes on with all that the offline algorithm learned, and not with its policy alone."""
    return getattr(declared(args), "GOES_ON", False)


def from_scratch(args) -> bool:
    """Whether the script starts from no policy at all."""
    return getattr(declared(args), "FROM_SCRATCH", False)


def check(args, data: Dataset) -> dict | None:
    """Refuse what `policy` would only stumble over, before anything is written. Raises UserError.

    It gives the policy that `--offline` names; None where that has to be trained, or none is needed.
    """
    if from_scratch(args):
        return None
    if is_algorithm(args.offline) and args.normalize_from:
        raise cli.UserError(f"a policy of {args.offline} knows how it sees observations; leave --normalize-from out")
    if is_algorithm(args.offline) and not shipped(args):
        check_algorithm(args)
        return None
    return checked(args, read(args, shipped(args) or Path(args.offline), data))


def check_algorithm(args) -> None:
    """Refuse, before it is trained, an algorithm that leaves what the script cannot go on with. Raises UserError."""
    if goes_on(args):
        check_valued(args, {})
        check_learner(args, untrained(args, 2, 1))
    else:
        algorithm_args(args)


def read(args, path: Path, data: Dataset) -> dict:
    """The policy in a file, ours or from elsewhere, as the arguments say. Raises UserError."""
    found = load_policy(path, data, args.trust_checkpoint, args.normalize_from)
    check_hidden(args, found)
    return found


def checked(args, found: dict) -> dict:
    """The same policy. Raises UserError where it lacks what the script needs of it."""
    check_critic(args, found)
    check_learner(args, found)
    check_valued(args, found)
    return found


def other_values(args, found: dict) -> str:
    """In words, of what else Q and V of the policy that `--offline` names are values than this run's; "" of nothing."""
    known = found.get("learner", {}).get("args", {})  # of a file without these nobody knows
    theirs = vars(algorithm_args(args)[1]) if is_algorithm(args.offline) else known
    differ = [name for name in VALUED if hasattr(args, name) and theirs.get(name) not in (None, getattr(args, name))]
    flags = [(flag_of(name), f"{theirs[name]:g}", f"{getattr(args, name):g}") for name in differ]
    return ", ".join(f"{flag} {there} (here {here})" for flag, there, here in flags)


def other_losses(args, found: dict) -> str:
    """In words, which arguments of both, of the loss and the like, were others for what a script goes on with."""
    known = found.get("learner", {}).get("args", {}) if goes_on(args) else {}
    if known and found["algorithm"] in ALGORITHMS:  # what there was no argument for then was as it usually is
        known = plain(algorithm(found["algorithm"]).Args()) | known
    shared = {field.name for kind in (cli.OnlineArgs, PretrainArgs) for field in dataclasses.fields(kind)}
    names = [field.name for field in dataclasses.fields(args) if field.name not in shared and field.name in known]
    here = plain(args)
    said = [unlike(name, known[name], "here", here[name]) for name in names if known[name] != here[name]]
    return f"; learned with {', '.join(said)}" if said else ""


def check_valued(args, found: dict) -> None:
    """Refuse to go on with what was learned from other rewards, or with another discount factor. Raises UserError."""
    if goes_on(args) and (differ := other_values(args, found)):
        own = args.offline_changes(tasks.resolve(args.env_id, args.dataset_path))  # no command makes such a one
        other = "" if own else ", or give the policy.pt of an offline run with the same"
        words = f"{args.exp_name} goes on with the Q and V of {args.offline}, which are learned with {differ}"
        raise cli.UserError(f"{words}; leave that out{other}")


def lacking(args, found: dict) -> str:
    """In words, what the script's networks miss in a policy, or find there in another shape; "" for nothing."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing is loaded: shapes alone are compared
            declared(args).Agent(args, found)
    except (KeyError, RuntimeError, TypeError) as error:
        return str(error).splitlines()[-1].strip(" \t.")
    return ""


def check_learner(args, found: dict) -> None:
    """Refuse a policy without what the script goes on with. Raises UserError."""
    if goes_on(args) and (words := lacking(args, found)):
        raise cli.UserError(
            f"{args.offline} does not hold what {args.exp_name} goes on with ({words}); leave --offline out, or give "
            f"a policy.pt that offline/{type(args).offline}.py wrote"
        )


def check_hidden(args, found: dict) -> None:
    """Have a policy that is no network of ours distilled into layers of --hidden. Raises UserError for any other."""
    if args.hidden is None or is_algorithm(args.offline):
        return
    if found["kind"] != "function":
        layers = " ".join(map(str, found["hidden_layers"]))
        raise cli.UserError(f"{args.offline} keeps the layers that it has ({layers}); leave --hidden out")
    found["hidden_layers"] = hidden_of(mlp(found["obs_dim"], args.hidden, found["action_dim"]))


def takes_critic(args) -> bool:
    """Whether fine-tuning starts from the offline algorithm's own critic: the naive switch."""
    own = getattr(args, "critic_init", "") == "random" or not getattr(declared(args), "TAKES_CRITIC", True)
    return not (getattr(args, "reevaluate", True) or own)


def check_critic(args, found: dict) -> None:
    if not takes_critic(args):
        return
    remedy = "leave that flag out" + ", or add --critic-init random" * hasattr(args, "critic_init")
    if "critic" not in found:
        raise cli.UserError(f"{args.offline} has no critic, which --no-reevaluate needs; {remedy}")
    if found["kind"] == declared(args).KIND and not goes_on(args) and (words := lacking(args, found)):
        other = f"the critic of {args.offline}, with which --no-reevaluate goes on, does not fit the script's"
        raise cli.UserError(f"{other} ({words}); {remedy}")


def policy(args, run, data: Dataset, *others: Path, alone: bool = True) -> tuple[dict, Evaluator]:
    """The policy that `--offline` names, as one of the script's kind, and an evaluator. Standardises `data`.

    An algorithm that was not trained yet is trained first; a policy of another kind is handed on by `transfer`, once.
    Its `score` is what the evaluator measures, and is printed beside the one in its file. `others`: the files from
    which the run starts as well. Where it is `alone` it is compared with the data.
    """
    path, handed_on = file_of(args, data), run.dir / "offline.pt"
    run.starts_from(path, *others)
    found = checked(args, our_policy(handed_on, data) if handed_on.exists() else read(args, path, data))
    data.standardise(found["state_mean"], found["state_std"], found.get("clip", math.inf))  # as the policy was trained
    data.transform_rewards(args.reward_scale, args.reward_shift)
    evaluator = make_evaluator(args, data, found["state_mean"], found["state_std"])
    stored, found["score"] = found["score"], evaluator(player(found).mode, data.obs.device, final=True)
    said = f"{stored:.1f} when it was saved" if math.isfinite(stored) else "none in its file"
    here = f"{data.task.measure} {found['score']:.1f} here, {said}"
    trained = f", {found['steps']:,} steps" if found["steps"] else ""  # else nobody knows
    print(f"offline policy: {found['algorithm']}{trained}; {here}{other_losses(args, found)}")
    if takes_critic(args) and (differ := other_values(args, found)):
        print(f"note: its critic, which this run starts from, is learned with {differ}")
    if found["kind"] != declared(args).KIND:
        found = transfer(found, declared(args).KIND, data, evaluator, run)
        check_critic(args, found)  # of another kind it could not be asked before
        save_policy(handed_on, **found)
    elif (stage := run.dir / "transfer.pt").exists():  # was done in an earlier start
        run.seconds["transfer"] = torch.load(stage, "cpu", weights_only=True)["seconds"]
    if alone:  # of the policy that goes online, and so the same when a run goes on
        regime.announce(run, data, evaluator, player(found).mode)
    found["progress"] = path.parent / "progress.csv"
    run.last_score, run.last_returns = found["score"], evaluator.last.tolist()
    return found, evaluator


def file_of(args, data: Dataset) -> Path:
    """The file of the policy that `--offline` names, trained first if there is none; `data` stays as it is."""
    if path := shipped(args):
        print(f"{args.offline} ships with the repository for {args.env_id}; --offline-steps N trains one of your own")
        return path
    if not is_algorithm(args.offline):
        return Path(args.offline)
    script, chosen = algorithm_args(args)
    return script.train(chosen, copy.copy(data))


def hidden_layers(args) -> int | tuple:
    """The layers of the policy that `--offline` names, as far as they can be known before it is there."""
    return getattr(algorithm_args(args)[1], "hidden", 2) if is_algorithm(args.offline) else 2


def seconds(args, data: Dataset) -> dict[str, float]:
    """Seconds of the stage that trains `--offline`, from a few timed steps; empty where none is trained."""
    if not is_algorithm(args.offline) or shipped(args):
        return {}
    script, chosen = algorithm_args(args)
    data, chosen = data.head(10_000), dataclasses.replace(chosen, compile=False)
    agent = script.Agent(chosen, data.obs.shape[1], data.actions.shape[1]).to(data.obs.device)
    step = script.training_step(chosen, data, agent, script.Optimizers(chosen, agent))
    return {"offline": getattr(args, "members", 1) * chosen.steps * seconds_per_step(step, data.obs.device)}


def learner(args, data: Dataset, found: dict | None) -> dict:
    """What a script that `goes_on` needs of a policy to be timed: that `found` by `check`, or untrained networks."""
    if not goes_on(args):
        return {}
    return found or untrained(args, data.obs.shape[1], data.actions.shape[1])


def untrained(args, obs_dim: int, action_dim: int) -> dict:
    """The same of the networks with which the algorithm begins that `--offline` names, for so many numbers."""
    script, chosen = algorithm_args(args)
    agent = script.Agent(chosen, obs_dim, action_dim).state_dict()
    return dict(obs_dim=obs_dim, action_dim=action_dim, learner={"args": plain(chosen), "agent": agent})
