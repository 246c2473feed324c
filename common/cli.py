"""The command line: presets, and one clear sentence instead of a traceback."""

import contextlib
import dataclasses
import functools
import importlib.util
import operator
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import torch
import tyro

from common import bounds, tasks, usage
from common.bounds import above, at_least, between, finite, only_with
from common.errors import Interrupted, UserError, is_out_of_memory
from common.identity import script_of

Args = TypeVar("Args")


HOW_TO_SCHEDULE = (
    "what changes during training is a tensor that the caller fills, as threshold is in o2sac.py (docs/extend.md)"
)


NOTHING_TYPED = (
    "say what to run: `python {script} --preset demo` takes minutes on 2 cores, `--env-id {env_id}` has the paper's "
    "budgets and is for a GPU, and `--help` names all arguments"
)


@dataclass
class RunArgs:
    """What every script takes, whatever its algorithm. Each is set once: `dataclasses.replace` makes a changed copy."""

    # the run
    preset: Literal["none", "demo", "quick"] = "none"
    """demo: minutes on 2 cores, with hopper-medium-demo; quick: up to about an hour there; none: the paper's budgets"""
    exp_name: str = ""
    """the name of this experiment, a part of the run folder's name; none: that of the script's file"""
    script: tyro.conf.Suppress[str] = ""
    """the file that was started; none: the one in which these arguments are written"""
    go_on: Annotated[bool, tyro.conf.arg(name="continue")] = False
    """go on with a run although the code has changed since; both codes are recorded"""
    env_id: str = "hopper-medium-v2"
    """the dataset: a D4RL name, hopper-medium-demo, or a Minari id; with --dataset-path also any id of Gymnasium, or
    path/to/file.py:Id, where that file registers the environment"""
    dataset_path: str = ""
    """an HDF5 file in D4RL's layout, used in place of the one that --env-id names, which then says where to play"""
    max_episode_steps: Annotated[int | None, at_least(1)] = None
    """steps after which an episode is cut, for an environment that has no time limit of its own"""
    seed: Annotated[int, between(0, 2**32 - 1)] = 0
    """seed of the networks, of all sampling and of the training environments"""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes the GPU where there is one"""
    compile: bool = True
    """compile the training steps (and capture them in CUDA graphs on a GPU)"""
    deterministic: bool = False
    """bitwise repeatable kernels, and no TF32 on a GPU"""
    matmul: Literal["float32", "bfloat16"] = "float32"
    """numbers that the products between hidden layers are taken of in training; bfloat16, of 8 significant bits, is
    faster on some CPUs, and a run says if it is slower (README, Speed)"""
    run_dir: str = "runs"
    """where run folders are made"""
    checkpoint_seconds: Annotated[float, at_least(0)] = 60.0
    """time between checkpoints; an interrupted run continues from the last one"""

    # Weights & Biases
    track: bool = False
    """log to Weights & Biases too (needs `pip install wandb`)"""
    wandb_project_name: Annotated[str, only_with(track=True)] = "o2rl"
    """the project there"""
    wandb_entity: Annotated[str | None, only_with(track=True)] = None
    """the team there"""

    # rewards and evaluation
    reward_scale: Annotated[float, above(0)] = 1.0
    """rewards are multiplied by this in training, those of the data and those of play alike; scores never are"""
    reward_shift: Annotated[float, finite()] = 0.0
    """and this is added to them then"""
    eval_episodes: Annotated[int, at_least(1)] = 10
    """episodes of an evaluation, played side by side"""
    final_episodes: Annotated[int | None, at_least(1)] = None
    """episodes of the evaluations at the start and the end of training, which begin with those of every other one;
    None: as many as of the others"""
    eval_workers: Annotated[int | None, at_least(0)] = None
    """processes that share these episodes; None: on a GPU as many as there are cores to play them, on a CPU none"""

    def __post_init__(self) -> None:
        if not self.exp_name:  # a copy of a script is another experiment
            object.__setattr__(self, "exp_name", script_of(self).stem)

    def __setattr__(self, name: str, value) -> None:
        if name in vars(self):
            raise UserError(f"args.{name} stays as it was set, for steps have read it; {HOW_TO_SCHEDULE}")
        super().__setattr__(name, value)

    def constants(self, task: tasks.Task) -> dict:
        """Values of the arguments that depend on the data: they stand where neither user nor preset gives another."""
        return {}

    def check(self) -> None:
        """What cannot be said of one argument alone. Raises UserError."""


@dataclass
class OnlineArgs(RunArgs):
    """What the fine-tuning scripts take on top of that."""

    # the policy to start from
    num_seeds: Annotated[int, at_least(1)] = 1
    """seeds to run side by side, from --seed on; each has a run folder of its own"""
    offline: str = "cql"
    """a file in offline/ as cql, iql or td3_bc, or the PATH of your own (trained first if there is none yet); or the
    PATH of any policy"""
    offline_steps: Annotated[int | None, at_least(1)] = None
    """gradient steps of the offline algorithm, if it has to be trained; None: its own default or the preset's"""
    hidden: Annotated[tuple[int, ...] | None, at_least(1)] = None
    """widths of the policy's hidden layers, as 256 256, where it is trained or distilled for this run; a policy.pt
    keeps its own; None: as the offline algorithm has them"""
    trust_checkpoint: bool = False
    """load a policy that is a program (TorchScript, ONNX with loops); all others are read without running anything"""
    normalize_from: str = ""
    """how a policy from elsewhere saw observations, if its files do not say so: the vecnormalize.pkl of one of
    Stable-Baselines3, none (raw), 1 (standardised by the dataset), or a share as 0.1 (by its best trajectories)"""

    # measurements
    holdout: Annotated[float, between(0, 0.5)] = 0.01
    """share of the dataset that is kept out of fine-tuning, in whole episodes, to measure the critic on (probe/…)"""
    probe_every: Annotated[int, at_least(1)] = 1_000
    """environment steps between those measurements, in O2PPO rounded up to whole rollouts; before, they come with every
    logged mean"""
    regime_episodes: Annotated[int | None, at_least(0)] = None
    """episodes by which the policy is compared with the data before it goes online; fewer than 2: it is not; None: five
    for each of --eval-episodes, up to 50"""
    best_margin: Annotated[float, at_least(0)] = 0.0
    """an evaluation replaces the best so far, and with --reference best π_ref, only if it is better by this many
    standard errors of the difference, start by start; 0: any higher score does (the paper)"""
    capture_video: bool = False
    """film an episode of the final policy (needs `pip install moviepy`)"""

    def offline_changes(self, task: tasks.Task) -> dict:
        """Arguments of the offline algorithm that are others where this script is what it is trained for."""
        return {}

    def check(self) -> None:
        if self.best_margin and self.eval_episodes < 2:
            raise UserError("--best-margin counts standard errors, which one episode has none of; --eval-episodes 2")
        if self.capture_video:
            check_video()
        if self.seed + self.num_seeds > 2**32:
            raise UserError(f"--seed {self.seed} --num-seeds {self.num_seeds} goes beyond 2**32 - 1, the last seed")


def parse(
    args_class: type[Args], presets: dict[str, dict], families: dict[str, dict], argv: list[str] | None = None
) -> Args:
    """Read the command line: for `--preset`, for the data that it means, and with the values of both as the defaults.

    What the user writes therefore always wins over the preset, that over the family of the data (see `chosen`), and all
    of them over `constants` and over the defaults. Without `argv` it is the command line of this process, and the
    arguments are those of the script that was started. Raises UserError.
    """
    known = {field.name for field in dataclasses.fields(args_class)}
    for where, values in (presets | families).items():
        if lacking := values.keys() - known:
            file = sys.modules[args_class.__module__].__file__
            raise UserError(f"{file}: Args has no {', '.join(sorted(lacking))}, which {where!r} sets")
    started = os.path.abspath(sys.argv[0]) if argv is None and os.path.isfile(sys.argv[0]) else ""
    if argv is None and not (argv := sys.argv[1:]):
        raise UserError(NOTHING_TYPED.format(script=sys.argv[0], env_id=args_class().env_id))
    asks = [word for word in argv if word in ("-h", "--help")]
    argv = [word for word in argv if word not in asks]
    preset = tyro.cli(args_class, args=argv).preset
    given = {"script": started, "preset": preset}
    args = tyro.cli(args_class, args=argv, default=args_class(**given | presets.get(preset, {})))
    task = tasks.resolve(args.env_id, os.path.expanduser(args.dataset_path))
    defaults = args_class(**chosen(presets, families, preset, task) | given)
    if asks:
        without = args_class(**chosen({}, families, "none", task))
        show_help(args_class, defaults, without, without.constants(task), families)
    return complete(at_home(tyro.cli(args_class, args=argv, default=defaults)))


def at_home(args: Args) -> Args:
    """`args` with the home folder in the place of ~, which the shell leaves behind an equals sign and in quotes."""

    def home(value):
        if isinstance(value, tuple):
            return tuple(map(home, value))
        return os.path.expanduser(value) if isinstance(value, str) else value

    return dataclasses.replace(args, **{name: home(value) for name, value in vars(args).items()})


def chosen(presets: dict[str, dict], families: dict[str, dict], preset: str, task: tasks.Task) -> dict:
    """The values that a script declares for a task and a preset, the latter's before the former's.

    Both may be declared for a family or for a part of it, "antmaze" and "antmaze-medium", where the narrower one wins;
    a preset then by the name "demo antmaze".
    """
    names = sorted(filter(task.matches, families), key=len)
    names_of_presets = [preset, *(f"{preset} {name}" for name in names)]
    found = [families[name] for name in names] + [presets.get(name, {}) for name in names_of_presets]
    return functools.reduce(operator.or_, found, {})


def show_help(args_class: type, defaults, without, constants: dict, families: dict[str, dict]) -> None:
    """Print --help and end the program: with a preset's `defaults`, and what stands there `without` it."""
    changes = {}
    for field in dataclasses.fields(args_class):
        now, before = getattr(defaults, field.name), getattr(without, field.name)
        if now != before and field.name not in ("preset", "script", "exp_name"):
            changes[field.name] = now, constants.get(field.name) if before is None else before
    words = usage.of_preset(defaults.preset, changes) + usage.of_families(families)
    usage.show(args_class, defaults, changes, (sys.modules[args_class.__module__].__doc__ or "") + words)


def read(args_class: type[Args], description: str | None) -> Args:
    """The command line of a script that starts others, its numbers checked. Raises UserError."""
    args = at_home(tyro.cli(args_class, description=description))
    bounds.check(args)
    return args


def complete(args: Args) -> Args:
    """`args` with the constants of their data in the place of None, and checked. Raises UserError."""
    bounds.check(args)
    if "/" in args.exp_name or "__" in args.exp_name:
        raise UserError(
            f"{args.exp_name} is to be a part of a folder's name, without / and __; rename the file, or see --exp-name"
        )
    constants = args.constants(tasks.resolve(args.env_id, args.dataset_path))
    args = dataclasses.replace(args, **{k: value for k, value in constants.items() if getattr(args, k) is None})
    args.check()
    return args


STARTER = "O2RL_STARTED_BY"  # the process that a seed of --num-seeds belongs to


def end_with_starter() -> None:
    """Save and stop when the process that started this one is gone, even if it was killed and could tell nobody."""
    starter = int(os.environ.pop(STARTER, 0))

    def watch() -> None:
        while os.getppid() == starter:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    if starter:
        threading.Thread(target=watch, daemon=True).start()


def said_later(failed) -> None:
    """A full disk ends the thread of TensorBoard's writer, which raises the same again when it is next written to."""
    if not (issubclass(failed.exc_type, OSError) and type(failed.thread).__name__ == "_AsyncWriterThread"):
        threading.__excepthook__(failed)


def run(main: Callable[[], None]) -> None:
    """Call `main`. A `UserError` becomes one line on stderr and exit code 2; an interruption becomes exit code 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.excepthook = said_later
    end_with_starter()
    with contextlib.redirect_stdout(Patient(sys.stdout)), contextlib.redirect_stderr(Patient(sys.stderr)):
        try:
            main()
        except UserError as error:
            sys.exit(_fail(f"{error.before}error: {error}", 2))
        except (Interrupted, KeyboardInterrupt) as stop:
            words = str(stop) or "nothing was being trained at the moment; the same command goes on from what is saved"
            sys.exit(_fail(f"stopped: {words}", 130))
        except OSError as error:
            if error.filename is None:
                raise
            words = f"{error.filename} cannot be used ({error.strerror})"
            sys.exit(_fail(f"error: {words}; see to its permissions and its name, or give another", 2))
        except torch.cuda.OutOfMemoryError as error:
            sys.exit(_fail(f"error: the GPU has too little free memory ({error}); use --device cpu or a free GPU", 2))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            remedy = "ask for smaller batches or networks, fewer steps or less data"
            sys.exit(_fail(f"error: this machine has too little memory ({error}); {remedy}", 2))


def _fail(message: str, code: int) -> int:
    sys.stdout.flush()  # what was said before comes before it, in a file too
    print(message, file=sys.stderr, flush=True)
    return code


class Patient:
    """A stream that may lack characters, as where only ASCII is printed, or a reader, as where a terminal was closed or
    Ctrl-C has ended the other half of `… 2>&1 | tee log.txt`. What cannot be said is no reason to stop."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()


def check_video(flag: str = "--capture-video") -> None:
    """Refuse to film at the start of a run, not at its end, where a package is missing. Raises UserError."""
    if importlib.util.find_spec("moviepy") is None:
        raise UserError(f"{flag} needs MoviePy; install it with: pip install moviepy")
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # draw without a screen


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise UserError(
                f"--device {name} is not supported: steps and checkpoints are made for cpu and cuda, and nobody has "
                "tried them elsewhere; networks as small as these train on --device cpu, too"
            )
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        found = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise UserError(f"--device {name} is not available here; this machine has: {', '.join(found)}") from error
    return device
