"""What a script declares about itself: from these names all else finds out what it is made of.

    Args, PRESETS, FAMILIES  its arguments, and what presets and families of data set otherwise
    KIND                     the kind of policy that it starts from, see common/policies.py
    Agent(args, policy)      all that it learns; `act(obs)` gives the most likely actions
    Optimizers(args, agent)  a dictionary of optimisers
    STAGES                   its stages in order, each a `Stage`; the last one, "finetune", interacts
    ABLATIONS                arguments whose --no-… leaves a part of the method out; a stage's has the stage's name
    FINETUNING_ARGS          what only the last stage reads: runs that differ in nothing else share the stages before
    main()                   the whole run
    GOES_ON                  that it starts from the offline algorithm's critics and optimisers, too (`learner`)
    TAKES_CRITIC             False: without re-evaluation it starts with a new critic, not with the offline algorithm's
    FROM_SCRATCH             that it starts from nothing
    critic_probe(args, agent, held_out)  how its Q is asked, a `Probe` (common/probe.py), after a stage reevaluate:
                             experiments/truth.py does

From ABLATIONS on all but main may be missing. A copy of a script under another name is found by its file.
"""

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from common import bounds, cli, loop, tasks
from common.errors import UserError, is_out_of_memory, reason_of, remedy_of
from common.identity import ROOT
from common.plateau import LOOKS, Plateau
from common.usage import flag, flag_of

KINDS = ("squashed_gaussian", "gaussian", "deterministic")  # of policies, see common/policies.py
REMEDY = "see the foot of o2sac.py, and docs/extend.md"
NEEDED = ("Args", "PRESETS", "FAMILIES", "KIND", "Agent", "Optimizers", "STAGES", "main")


@dataclass(frozen=True)
class Stage:
    """One stage of a script.

    name       - of its checkpoint and of its scalars
    steps      - the argument that holds how many steps it has, or "auto"; environment steps in the last stage
    make_step  - make_step(args, source, agent, optimizers) gives its step; with `schedules`, their tensors come last
    done       - what the policy is after it, in a word for tables
    eval_every - the argument that holds the steps between evaluations of `agent.act`; "": it is not evaluated
    source     - source(args, data) is what its steps draw from; None: the data themselves
    schedules  - schedules(args) names what changes during the stage, each a function of the step
    per_step   - per_step(args) is how many environment steps belong to one step; None: one
    plateau    - the probe's scalar whose plateau ends it where its steps are "auto"
    """

    name: str
    steps: str
    make_step: Callable
    done: str
    eval_every: str = ""
    source: Callable | None = None
    schedules: Callable | None = None
    per_step: Callable | None = None
    plateau: str = ""

    def example(self, args, data, agent, optimizers):
        """A step on a source of its own, to be timed."""
        source = self.source(args, data) if self.source else data
        given = [source, agent, optimizers]
        if self.schedules:
            given.append(Schedules(self.schedules(args), data.obs.device).tensors)
        return self.make_step(args, *given)

    def auto(self, args) -> bool:
        """Whether it ends at a plateau."""
        return getattr(args, self.steps) == "auto"

    def limit(self, args) -> int:
        """How many steps it has at most: with "auto" as many as preset, family or script give it otherwise."""
        if not self.auto(args):
            return getattr(args, self.steps)
        script, task = declared(args), tasks.resolve(args.env_id, args.dataset_path)
        chosen = cli.chosen(script.PRESETS, script.FAMILIES, args.preset, task).get(self.steps, "auto")
        found = chosen if chosen != "auto" else getattr(type(args), self.steps)
        if found == "auto":
            raise UserError(f"{flag_of(self.steps)} is auto in the script too: its limit has to stand there")
        return found

    def owns(self, argument: str) -> bool:
        """Whether the argument's name says that it belongs to this stage: align_eval_every to that of align_steps."""
        return argument.startswith(self.steps.removesuffix("_steps") + "_")

    def number(self, args) -> int:
        """How many steps `make_step`'s step is taken at most, 0 where the stage is left out."""
        n = self.limit(args) if getattr(args, self.name, True) else 0
        return round(n / self.per_step(args)) if self.per_step else n


class Schedules:
    """Numbers that change during a stage: functions of its step, by name. `tensors` holds what they are now.

    A compiled or captured step reads Python's numbers once, but tensors anew each time.
    """

    def __init__(self, functions: dict[str, Callable[[int], float]], device: torch.device):
        if constant := [name for name, function in functions.items() if not callable(function)]:
            raise UserError(f"the schedule {constant[0]} has to be a function of the step, as lambda step: 3.0")
        self.functions = functions
        self.tensors = {name: torch.zeros((), device=device) for name in functions}
        self.fill(1)  # the first step: O2SAC's and O2TD3's functions may divide by it

    def fill(self, step: int) -> None:
        for name, function in self.functions.items():
            self.tensors[name].fill_(function(step))

    def scalars(self) -> dict[str, float]:
        """What they are now, as they are logged."""
        return {f"charts/{name}": tensor.item() for name, tensor in self.tensors.items()}


def train(run, stage: Stage, data, agent, optimizers, probe=None, evaluator=None) -> None:
    """Train `agent` in a stage on the dataset, from where an earlier start of the same command stopped."""
    args, device = run.args, data.obs.device

    def evaluate(last: bool) -> dict[str, float]:
        scalars = evaluator.scalars(agent.act, device, last)
        run.last_returns = evaluator.last.tolist()
        return scalars

    limit, plateau = stage.limit(args), Plateau(stage.plateau) if stage.auto(args) else None
    log_every = max(1, limit // LOOKS) if plateau else args.log_every  # where it ends is no matter of logging
    steps = loop.train(
        run, stage.name, lambda: stage.make_step(args, data, agent, optimizers), limit,
        {"agent": agent, **optimizers}, device=device, compile=args.compile, log_every=log_every, probe=probe,
        evaluate=evaluate if stage.eval_every else None,
        evaluate_every=getattr(args, stage.eval_every) if stage.eval_every else 0, plateau=plateau,
    )  # fmt: skip
    if plateau:
        ended = "plateau" if plateau.reached else "limit"
        run.auto[stage.name] = {"steps": steps, "limit": limit, "ended_by": ended}
        print(f"{stage.name}: {steps:,} of at most {limit:,} steps, ended by the {ended}")


# ----------------------------------------------------------------------------------------------- scripts


def declared(args) -> ModuleType:
    """The script that these arguments are written in."""
    return sys.modules[type(args).__module__]


def stages_of(args) -> tuple[Stage, ...]:
    """The stages of the script that these arguments are written in; an offline algorithm declares none."""
    return getattr(declared(args), "STAGES", ())


def ablations_of(args) -> tuple[str, ...]:
    return getattr(declared(args), "ABLATIONS", ())


def idle(args) -> list[str]:
    """In words, which arguments are the user's own and yet change nothing: those of a stage that is left out, and those
    that mean nothing without another one's value (`bounds.only_with`), which must not be idle itself. And whether
    fine-tuning ends before the policy's first update."""
    script, task, found = declared(args), tasks.resolve(args.env_id, args.dataset_path), {}
    usual = vars(type(args)(**cli.chosen(script.PRESETS, script.FAMILIES, args.preset, task)))
    constants = args.constants(task)
    out = [stage for stage in stages_of(args) if not getattr(args, stage.name, True)]
    needs = {name: mark for name, mark in bounds.marks_of(type(args)) if isinstance(mark, bounds.OnlyWith)}

    def why(name: str) -> str:
        """Why an argument changes nothing; "" where it changes something."""
        if left_out := next((stage.name for stage in out if stage.owns(name)), ""):
            return f"with --no-{left_out}"
        if name not in needs:
            return ""
        reasons = [why(other) for other in needs[name].met(args)] or [f"without {needs[name]}"]
        return "" if "" in reasons else reasons[0]  # of what it needs, one that is not idle itself is enough

    for name, value in vars(args).items():
        if value not in (usual[name], constants.get(name)) and (reason := why(name)):
            found.setdefault(reason, []).append(flag(name, value)[0])
    said = [f"{', '.join(flags)} change{'s' * (len(flags) == 1)} nothing {words}" for words, flags in found.items()]
    whole, starts, warmup = (getattr(args, name, 0) for name in ("online_steps", "learning_starts", "warmup_steps"))
    for typed, n in (("--learning-starts", starts), ("--warmup-steps", warmup)):
        if n and n >= whole:
            said.append(f"{typed} {n} leaves nothing of --online-steps {whole}: the policy stays as it is")
    if 0 < warmup <= starts < whole:
        flags = f"--warmup-steps {warmup} ends before the first update, after --learning-starts {starts}"
        said.append(f"{flags}: at no step the critics alone learn")
    return said


def find(name: str, *folders: str) -> Path:
    """The file of a script: a path, or a name in one of the project's `folders`, which come first. Raises UserError."""
    file = Path(f"{name.removesuffix('.py')}.py").expanduser()
    ours, bare = [ROOT / folder / file for folder in folders], file.stem == name
    places = [*ours, file] if bare else [file, *ours]
    if found := next((place.resolve() for place in places if place.is_file()), None):
        return found
    raise UserError(f"there is no script {name}: neither {', nor '.join(map(str, places))}")


def load(path: Path, needed: tuple[str, ...], remedy: str) -> ModuleType:
    """The script in a file, imported once. Raises UserError where it lacks one of the names in `needed`."""
    try:
        script = imported(path)
    except (Exception, SystemExit) as error:  # it is the user's own code
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path} cannot be imported: {reason_of(error)}; {remedy_of(error)}") from error
    require(script, needed, remedy)
    return script


def require(script: ModuleType, needed: tuple[str, ...], remedy: str) -> None:
    if missing := [name for name in needed if not hasattr(script, name)]:
        raise UserError(f"{script.__file__} lacks {', '.join(missing)}; {remedy}")


def imported(path: Path) -> ModuleType:
    if path.is_relative_to(ROOT) and not any("." in part for part in path.relative_to(ROOT).with_suffix("").parts):
        return importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    name = str(path)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def online(name: str) -> ModuleType:
    """A fine-tuning script by its name or path. Raises UserError where it does not declare what it is made of."""
    script = load(find(name, "", "baselines"), NEEDED, REMEDY)
    check(script)
    return script


def check(script: ModuleType) -> None:
    """Raises UserError where a script lacks what it has to declare, or declares what does not fit together."""
    require(script, NEEDED, REMEDY)
    known = {field.name for field in dataclasses.fields(script.Args)}
    if not script.STAGES or not all(isinstance(stage, Stage) for stage in script.STAGES):
        wrong = "STAGES has to be a tuple of one Stage or more"
    elif script.STAGES[-1].name != "finetune":
        wrong = "the last of its STAGES has to be named finetune"
    elif script.KIND not in KINDS:
        wrong = f"KIND has to be one of {', '.join(KINDS)}, not {script.KIND}"
    else:
        named = {f"the stage {stage.name}": (stage.steps, stage.eval_every) for stage in script.STAGES}
        named |= {name: getattr(script, name, ()) for name in ("ABLATIONS", "FINETUNING_ARGS")}
        lacking = [
            f"{name} (of {where})" for where, names in named.items() for name in names if name not in {"", *known}
        ]
        wrong = f"Args has no {', '.join(lacking)}" if lacking else ""
    if wrong:
        raise UserError(f"{script.__file__}: {wrong}; {REMEDY}")
