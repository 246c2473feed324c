"""An experiment is a list of runs of the top-level scripts. Ray schedules them as processes of their own; finished ones
are kept, so the same command started again does what is missing."""

import collections
import contextlib
import dataclasses
import functools
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).parent.parent))  # so that the scripts run from anywhere

import offline
from common import cli, datasets, pretrain, tasks
from common import stages as scripts
from common.bounds import at_least
from common.checkpoint import aside
from common.errors import Interrupted
from common.identity import changed, code_of, fingerprint
from common.run import make_folder, other_arguments, read_json, run_name
from common.usage import flag

import tyro
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
HANDED_ON = ("offline.pt", "transfer.pt", "progress.csv")  # what a run that shares stages takes over beside them


@dataclass
class Args:
    scale: Literal["demo", "quick", "paper"] = "demo"
    """budgets of every run: the scripts' presets, or the paper's"""
    run_flags: str = ""
    """further arguments of every run, as --run-flags="--online-steps 5000 --eval-every 1000": other budgets than the
    scale's"""
    seeds: Annotated[int, at_least(1)] = 3
    """seeds 0, 1, … of every setting"""
    env_id: str = "hopper-medium-demo"
    """the dataset"""
    dataset_path: str = ""
    """an HDF5 file in D4RL's layout, used in place of the one that --env-id names"""
    algorithms: tuple[str, ...] = ("o2sac", "o2td3", "o2ppo")
    """the online algorithms: names of scripts here or in baselines/, or paths of your own"""
    run_dir: str = "runs/experiments"
    """where run folders are made, from the project's folder; all experiments share them"""
    out: str = "runs/experiments"
    """where figures and tables are written, likewise"""
    ray_address: str | None = None
    """a Ray cluster, whose machines see this folder and --run-dir at the same place; None: this machine alone"""
    cpus_per_run: Annotated[int, at_least(1)] = 1
    """threads of a run; as many runs go side by side as there are cores for them"""
    gpus_per_run: Annotated[float, at_least(0)] = 0.0
    """GPUs of a run, or the share of one"""
    compile: bool = True
    """compile the training steps where the scale's preset does"""
    retries: Annotated[int, at_least(0)] = 2
    """how often a run that died is continued from its last checkpoint"""
    go_on: Annotated[bool, tyro.conf.arg(name="continue")] = False
    """take runs as they are, and go on with them, although the code has changed since"""


@dataclass(frozen=True)
class Spec:
    """One run: a script, where it starts from, its seed, and what is special about it.

    `base` is a run with the same first stages, those named in `stages`: its checkpoints of them are taken over; None:
    of all before the last.
    """

    script: str
    offline: str
    seed: int
    flags: tuple[str, ...] = ()
    base: "Spec | None" = None
    stages: tuple[str, ...] | None = None

    def variant(self, name: str, *flags: str, stages: tuple[str, ...] | None = None) -> "Spec":
        """This run with other arguments, under a name of its own; it has those `stages` in common, None: all but the
        last, (): none, so that it does not wait for this one."""
        exp_name = f"{Path(self.script).stem}-{name}"
        base = None if stages == () else self
        return Spec(self.script, self.offline, self.seed, ("--exp-name", exp_name, *flags), base, stages)

    @property
    def shared(self) -> tuple[str, ...]:
        """The stages whose checkpoints are taken over."""
        names = tuple(stage.name for stage in scripts.online(self.script).STAGES[:-1])
        return names if self.stages is None else self.stages


def offline_of(args: Args, script: str) -> str:
    """The offline algorithm that a script starts from by itself at that scale: its preset's, whose policy may ship."""
    declared = scripts.online(script)
    return cli.parse(declared.Args, declared.PRESETS, declared.FAMILIES, flags_of(args, 0)).offline


def full(args: Args, script: str, seed: int, *flags: str) -> Spec:
    """A script's whole method, from that algorithm's policy."""
    return Spec(script, offline_of(args, script), seed, flags)


def flags_of(args: Args, seed: int) -> list[str]:
    preset = "none" if args.scale == "paper" else args.scale
    flags = ["--preset", preset, "--env-id", absolute(args.env_id), "--seed", str(seed)]
    flags += ["--run-dir", str(ROOT / args.run_dir)]
    flags += [] if args.compile else ["--no-compile"]
    flags += ["--continue"] if args.go_on else []
    return flags + (["--dataset-path", str(Path(args.dataset_path).absolute())] if args.dataset_path else [])


def absolute(env_id: str) -> str:
    """The same name, wherever a run is started: of `file.py:Id` the file's whole path."""
    file, _, name = env_id.rpartition(":")
    return f"{Path(file).absolute()}:{name}" if file.endswith(".py") else env_id


def check_own(args: Args, *flags: str) -> None:
    """Refuse to have in --run-flags what an experiment sets itself, run by run. Raises UserError."""
    typed = {word.split("=")[0].replace("_", "-") for word in args.run_flags.split()}
    if both := typed.intersection(flags):
        raise cli.UserError(f"this experiment sets {', '.join(sorted(both))} itself; leave that out of --run-flags")


def command_line(args: Args, spec: Spec) -> list[str]:
    file = Path(spec.offline)  # runs are started in the project's folder
    try:
        typed = shlex.split(args.run_flags)
    except ValueError as error:
        raise cli.UserError(f"--run-flags cannot be read ({error}): {args.run_flags}") from error
    check_own(
        args, "--seed", "--num-seeds", "--preset", "--env-id", "--dataset-path", "--run-dir"
    )  # arguments of every experiment
    return [*flags_of(args, spec.seed), "--offline", str(file.absolute() if file.is_file() else file),
            *typed, *spec.flags]  # fmt: skip


def parsed(args: Args, spec: Spec):
    """The run's own arguments, as its script reads them. Raises UserError where it has none of that name."""
    script, words = scripts.online(spec.script), tuple(command_line(args, spec))
    try:
        return read(script, words)
    except SystemExit:
        raise cli.UserError(not_read(args, spec, words)) from None


@functools.lru_cache(1_000)  # asked for several times of each run, and tyro takes its time
def read(script, words: tuple[str, ...]):
    with contextlib.redirect_stderr(io.StringIO()):  # tyro's words are about the script that was started
        return cli.parse(script.Args, script.PRESETS, script.FAMILIES, list(words))


def not_read(args: Args, spec: Spec, words: tuple[str, ...]) -> str:
    """What is wrong with a run's arguments: an unknown one, or else a value."""
    script = scripts.online(spec.script)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            unknown = tyro.cli(script.Args, args=words, return_unknown_args=True)[1]
    except SystemExit:
        typed = shlex.quote(f"--run-flags={args.run_flags}")
        file = os.path.relpath(script.__file__)
        return f"{spec.script} cannot read a value in {typed}; python {file} --help says what its arguments take"
    return f"{spec.script} has no {' '.join(unknown)}, which this experiment gives to it"


def check_stages(args: Args, spec: Spec, *names: str) -> None:
    """Raises UserError where the run has not one of the stages that an experiment is about, or leaves it out."""
    declared = {stage.name for stage in scripts.online(spec.script).STAGES}
    if lacking := [name for name in names if name not in declared]:
        raise cli.UserError(
            f"{spec.script} has no stage {' and no '.join(lacking)}, of which this asks; see --algorithms"
        )
    chosen = parsed(args, spec)
    if missing := [name for name in names if not getattr(chosen, name, True)]:
        raise cli.UserError(f"this asks what {' and '.join(missing)} does; leave --no-{missing[0]} out of --run-flags")


def folder(args: Args, spec: Spec) -> Path:
    """The run's folder, named as its script does."""
    found = parsed(args, spec)
    return Path(found.run_dir) / run_name(found)


def offline_policy(args: Args, spec: Spec) -> Path:
    """Where the policy that a run starts from is, or will be."""
    found, trained = parsed(args, spec), trained_for(args, spec)
    return trained[0] if trained else offline.shipped(found) or Path(found.offline)


def trained_for(args: Args, spec: Spec) -> tuple[Path, list[str]] | None:
    """The policy that is trained for a run, and the command that does it with the arguments which the run itself would
    train it with; None where none is trained."""
    found = parsed(args, spec)
    if not offline.is_algorithm(found.offline) or offline.shipped(found):
        return None
    script, chosen = offline.algorithm_args(found)
    words = flags_of(args, spec.seed)
    usual = cli.parse(script.Args, script.PRESETS, script.FAMILIES, words)
    words += [
        word for name, value in vars(chosen).items() if value != getattr(usual, name) for word in flag(name, value)
    ]
    return Path(chosen.run_dir) / pretrain.run_name(chosen) / "policy.pt", [script.__file__, *words]


def check_shared(args: Args, spec: Spec) -> None:
    """Raises UserError if `spec` differs from its base in more than what it may."""
    mine, theirs = (dataclasses.asdict(parsed(args, s)) for s in (spec, spec.base))
    script = scripts.online(spec.script)
    own = [stage for stage in script.STAGES if stage.name not in spec.shared]
    allowed = {"exp_name", *getattr(script, "FINETUNING_ARGS", ()), *(stage.name for stage in own)}
    differ = [name for name in mine if mine[name] != theirs[name] and name not in allowed]
    if differ := [name for name in differ if not any(stage.owns(name) for stage in own)]:
        raise cli.UserError(
            f"{spec.script}: runs that differ in {', '.join(differ)} cannot share stages; if fine-tuning alone reads "
            "that, the script's FINETUNING_ARGS have to name it"
        )


def check_done(args: Args, done: list[Spec]) -> None:
    """Raises UserError where finished runs are of other arguments, or of other code than the scripts are now, unless
    --continue takes the latter."""
    task = tasks.registrar(absolute(args.env_id))
    codes = {script: code_of(file_of(script), task) for script in {spec.script for spec in done}}
    others = {}
    for spec in done:
        old = read_json(path := folder(args, spec) / "args.json", "delete that folder")
        if differ := other_arguments(parsed(args, spec), old):
            remedy = "choose another --run-dir, or delete that folder"
            raise cli.UserError(f"{path.parent} holds a finished run with other arguments: {differ}; {remedy}")
        made_with = old.get("made_with", {})
        if differ := changed(made_with.get("code", {}), codes[spec.script]):
            others[path.parent] = differ
    if others and not args.go_on:
        path, differ = next(iter(others.items()))
        example = f"{path.name}: {', '.join(differ[:5])} changed since"
        remedy = "choose another --run-dir, or take them as they are with --continue"
        of_all = "1 finished run is" if len(others) == 1 else f"{len(others)} finished runs are"
        raise cli.UserError(f"{of_all} of other code ({example}); {remedy}")


def check_data(args: Args, done: list[Spec], data: datasets.Dataset | None) -> None:
    """Raises UserError where finished runs, or those still to be made beside them on `data`, are on different data."""
    found = {}
    for spec in done:
        path = folder(args, spec) / "args.json"
        if known := read_json(path, "delete that folder").get("made_with", {}).get("data"):
            found.setdefault(known, path.parent.name)
    if found and data:
        found.setdefault(fingerprint(data), "the data at hand")
    if len(found) > 1:
        words = " and ".join(list(found.values())[:2])
        raise cli.UserError(
            f"finished runs are on other data than what stands beside them ({words}); choose another --run-dir"
        )


def file_of(script: str) -> Path:
    return Path(scripts.online(script).__file__)


def execute(command: list[str], threads: int, retries: int, share: list[tuple[Path, Path]], *needed) -> str | None:
    """Run a command to its end, continuing it when it dies; None, or what it said last.

    `needed` are results of what has to be finished before; `share` names files to be copied from there to here.
    """
    if failure := next(filter(None, needed), None):
        return f"not started: {failure}"
    for source, target in share:
        if source.exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with aside(target) as temporary:
                shutil.copy(source, temporary)
    for _ in range(retries + 1):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode in (0, 2):  # 2: the script itself says that something has to be mended first
            break
    last_words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return None if done.returncode == 0 else f"{' '.join(command)}: {last_words}"


def schedule(args: Args, jobs: dict) -> list[str]:
    """Run `jobs`, key -> (command, share, keys of jobs that have to be finished before); what failed, a line each."""
    try:
        import ray  # takes seconds
    except ImportError as error:
        raise cli.UserError(f"this needs Ray ({error}): pip install -r requirements-experiments.txt") from error

    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # wherever this was started
    environment = {"env_vars": {"PYTHONPATH": path}}
    sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(args.ray_address, include_dashboard=False, log_to_driver=False, logging_level="warning",
                 runtime_env=environment)  # fmt: skip
    except Exception as error:  # Ray's own are of many kinds, and a node that is too slow is a plain Exception
        remedy = "see --ray-address" if args.ray_address else "on a busy machine the same command may start it later"
        raise cli.UserError(f"Ray does not start ({str(error).partition(chr(10))[0].rstrip('.')}); {remedy}") from error
    signal.signal(signal.SIGTERM, sigterm)  # with Ray's own it would end in a dump of the stack
    have, needs = ray.cluster_resources(), {"CPU": args.cpus_per_run, "GPU": args.gpus_per_run}
    lacking = [f"{n:g} {kind}s a run" for kind, n in needs.items() if n > have.get(kind, 0)]
    if lacking and args.ray_address is None:  # a cluster may grow
        ray.shutdown()
        raise cli.UserError(f"there are fewer than {' and '.join(lacking)} here; see --cpus-per-run and --gpus-per-run")
    remote = ray.remote(execute).options(
        num_cpus=args.cpus_per_run, num_gpus=args.gpus_per_run, max_retries=args.retries
    )
    started = {}
    for key, (command, share, needed) in jobs.items():  # each after those that it needs
        waiting_for = [started[k] for k in needed if k in started]
        started[key] = remote.remote(command, args.cpus_per_run, args.retries, share, *waiting_for)
    failures, waiting = [], list(started.values())
    try:
        with tqdm(total=len(waiting), desc="runs", unit="run") as bar:
            while waiting:
                done, waiting = ray.wait(waiting)
                for job in done:
                    try:
                        failures += filter(None, [ray.get(job)])
                    except ray.exceptions.RayError as error:  # the machine it ran on is gone, and retries did not help
                        words = [line for line in str(error).splitlines() if line.strip()]
                        failures.append((words or ["Ray failed"])[-1])
                    bar.update()
    except KeyboardInterrupt as stop:
        raise Interrupted("the runs that were at work, too; the same command goes on from what they saved") from stop
    finally:
        ray.shutdown()
    return failures


def with_base(args: Args, spec: Spec) -> list[Spec]:
    """A run behind the one that it takes stages over from; a finished run takes nothing over any more."""
    return [spec] if spec.base is None or finished(args, [spec]) else [spec.base, spec]


def missing(args: Args, specs: list[Spec]) -> dict[Path, tuple]:
    """The jobs, by the folder or the file that they make, of what is missing of `specs`, the bases of the
    unfinished ones and their offline policies. Raises UserError where one cannot be run, or is there already and is
    another one."""
    make_folder(ROOT / args.out, "--out")
    everything = dict.fromkeys(s for spec in specs for s in with_base(args, spec))
    folders = {spec: folder(args, spec) for spec in everything}
    if twice := [path.name for path, n in collections.Counter(folders.values()).items() if n > 1]:
        raise cli.UserError(
            f"two runs of this experiment would be one, {twice[0]}: leave out of --run-flags what it sets itself, and "
            "give files of --algorithms names of their own"
        )
    done = [spec for spec, path in folders.items() if (path / "result.json").exists()]
    undone = [spec for spec in everything if spec not in done]
    check_done(args, done)
    data = None
    if undone:
        chosen = parsed(args, undone[0])
        data = datasets.load(chosen.env_id, chosen.dataset_path, "cpu", chosen.max_episode_steps)
    check_data(args, done, data)
    policies = {spec: trained_for(args, spec) for spec in undone}
    for spec in undone:  # before anything is trained
        offline.check(parsed(args, spec), data)
    trained = dict(filter(None, policies.values()))  # once for all the runs that start from it
    jobs = {path: (command, [], []) for path, command in trained.items() if not path.exists()}
    for spec in undone:
        here, share = folders[spec], []
        needed = [policies[spec][0]] if policies[spec] else []
        if spec.base:
            check_shared(args, spec)
            there = folders[spec.base]
            share = [(there / n, here / n) for n in (*(f"{s}.pt" for s in spec.shared), *HANDED_ON)]
            needed.append(there)
        jobs[here] = ([str(file_of(spec.script)), *command_line(args, spec)], share, needed)
    return jobs


def run_all(args: Args, specs: list[Spec]) -> list[str]:
    """Do what `missing` finds; what failed, a line each."""
    return run_tasks({args.env_id: (args, specs)})[1]


def run_tasks(asked: dict[str, tuple[Args, list[Spec]]]) -> tuple[list[str], list[str]]:
    """The same for several tasks, all side by side: on which runs were done, and what failed, a line each.

    Of a task that cannot be run the others do not suffer, unless it is the first. Raises UserError of that one, and
    where no run at all comes to its end.
    """
    jobs, possible, failures = {}, [], []
    for task, (args, specs) in asked.items():
        try:
            jobs |= missing(args, specs)
            possible.append(task)
        except cli.UserError as error:  # as of data that cannot be had
            if task == next(iter(asked)):
                raise
            failures.append(f"{task}: {error}")
            print(f"note: {task} is left out: {error}")  # before hours of the others
    if jobs:
        failures += schedule(args, jobs)
    done = [task for task in possible if finished(*asked[task])]
    if not done:
        raise cli.UserError(f"no run came to its end: {'; '.join(failures[:3]) or 'there is nothing to run'}")
    return done, failures


def finished(args: Args, specs: list[Spec]) -> list[Path]:
    """The folders of those runs that came to their end."""
    return [path for spec in specs if ((path := folder(args, spec)) / "result.json").exists()]
