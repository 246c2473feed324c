"""What an `--env-id` means: its simulator, its data, its scale. One entry a family; nothing else looks at names.

A family is a function from the name to a `Task`, or to None where the name is not one of its own. A new one is one more
such function, named in `FAMILIES`, and, where it needs one, an environment file beside this.
"""

import contextlib
import difflib
import functools
import importlib.util
import math
import runpy
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec

from common.errors import UserError, is_out_of_memory, reason_of, remedy_of
from common.specs import in_minari, in_words, minari_dataset, stored_spec

SHIPPED = Path(__file__).parent.parent / "datasets"
ROBOTS = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4", "ant": "Ant-v4"}
QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "full-replay", "expert")
ROBOT_IDS = [f"{robot}-{quality}-v2" for robot in ROBOTS for quality in QUALITIES]
MAZE_STEPS = {"umaze": 700, "medium": 1_000, "large": 1_000}  # of an episode
MAZE_DATA = ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")
MAZE_IDS = [f"antmaze-{data}-v2" for data in MAZE_DATA]
HAND_STEPS = {"pen": 100, "door": 200, "hammer": 200, "relocate": 200}  # of an episode
HAND_IDS = [f"{hand}-{data}-v1" for hand in HAND_STEPS for data in ("human", "cloned", "expert")]
D4RL_IDS = [*ROBOT_IDS, *MAZE_IDS, *HAND_IDS]
DEMO, MAZE_DEMO = DEMOS = ("hopper-medium-demo", "antmaze-umaze-demo")


@dataclass(frozen=True)
class Task:
    """A dataset and the simulator that it belongs to.

    family     - "locomotion", "antmaze", "adroit", "minari", "gymnasium"
    env_id     - the name that the user gave
    data       - the dataset's own name, on which the choice of constants rests: the file's, where one was given
    simulator  - the simulator in words; a policy can be used wherever these are the same
    spec       - how Gymnasium makes it: id, arguments, time limit
    d4rl       - whether its physics are D4RL's (see common/physics.py) and not those of the MuJoCo that is installed
    forces     - zeros that follow each observation: D4RL's ant observes contact forces that its MuJoCo left at zero
    references - returns of a random policy and of an expert, which score 0 and 100; None: the score is the return
    eval_spec  - the environment in which scores are measured, where it is another one
    notes      - sentences for the user about what of all that is not as it was stored
    kind       - what it is, from the family to the data: "antmaze-medium-play"; see `matches`
    goes_on    - whether episodes of the data go on after a row that is terminal, so that time-outs alone cut them
    marked     - whether time-outs in the data are all marked, so that episodes longer than the limit of play are meant
    next_infos - whether the file's qpos and qvel are the state after each row, which the next row shows
    reach      - how far the position, which is what is observed first, can move in a step
    hidden     - whether rewards depend on more than what is observed, so that no row's can be checked
    keys       - the parts of a dictionary of observations that make up a vector, in their order; see common/spaces.py
    clip       - standardised observations are held within ± this, by the environments as by the data
    arrives    - whether an episode of the data is over at its first reward, whatever comes after it there
    action_range - the environment's lowest and highest actions, (A,) each, where they are not ±1
    """

    family: str
    env_id: str
    data: str
    simulator: str
    spec: EnvSpec
    d4rl: bool = False
    forces: int = 0
    references: tuple[float, float] | None = None
    eval_spec: EnvSpec | None = None
    notes: tuple[str, ...] = ()
    kind: str = ""
    goes_on: bool = False
    marked: bool = False
    next_infos: bool = False
    reach: float | None = None
    hidden: bool = False
    keys: tuple[str, ...] = ()
    clip: float = math.inf
    arrives: bool = False
    action_range: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @property
    def measure(self) -> str:
        """What the number that an evaluation gives is called."""
        return "return" if self.references is None else "score"

    @property
    def usual_clip(self) -> float | None:
        """Where a policy that is trained on such data has its standardised observations held; None: nowhere.

        What is constant in the data comes as hundreds and thousands in play: a door that no demonstration opened.
        """
        return 10.0 if self.family in ("adroit", "gymnasium") else None

    @property
    def expert(self) -> bool:
        """Whether the data are an expert's, all or in part (medium-expert): the paper's constants differ there."""
        return "expert" in self.data.lower()

    @property
    def quality(self) -> str:
        """D4RL's word for the policies behind a robot's data, one of `QUALITIES`; "" where the name holds none."""
        name = self.data.lower().replace("_", "-")
        return max((quality for quality in QUALITIES if quality in name), key=len, default="")

    def matches(self, name: str) -> bool:
        """Whether the task is of that kind or family, with whose name its own begins: "antmaze", "antmaze-medium"."""
        return f"{self.kind or self.family}-".startswith(f"{name}-")

    @property
    def robot(self) -> str:
        """The robot's name in D4RL's spelling: "hopper", …"""
        return self.spec.id.split("/")[-1].split("-")[0].lower()

    @property
    def maze(self) -> str:
        """The map of `common.antmaze` on which the first two observations are a place; "" for none."""
        return self.spec.kwargs.get("maze", "")

    @property
    def max_episode_steps(self) -> int:
        return self.spec.max_episode_steps


def resolve(env_id: str, dataset_path: str = "") -> Task:
    """The task that `--env-id` and `--dataset-path` name. Raises UserError."""
    data = Path(dataset_path).stem if dataset_path else env_id
    for family in FAMILIES:
        if task := family(env_id, data):
            if task.family == "gymnasium" and not dataset_path:
                raise UserError(f"--env-id {env_id} is an environment; give the data to start from with --dataset-path")
            return task
    known = [*D4RL_IDS, *DEMOS, *(gym.registry if dataset_path else ())]
    near = difflib.get_close_matches(env_id, known, n=3, cutoff=0.3)
    hint = f"; the nearest names are: {', '.join(near)}" if near else f"; try {DEMO}"
    raise UserError(f"--env-id {env_id!r} is not known{hint}")


def limited(task: Task, max_episode_steps: int | None) -> Task:
    """`task` with a time limit, its own or else this one; without any an evaluation might never end.

    Raises UserError where there is none, and where there are two.
    """
    specs = {name: spec for name in ("spec", "eval_spec") if (spec := getattr(task, name))}
    without = {name: spec for name, spec in specs.items() if spec.max_episode_steps is None}
    if without and max_episode_steps is None:
        raise UserError(f"{in_words(*without.values())} has no time limit; give one with --max-episode-steps")
    if not without and max_episode_steps not in (None, task.max_episode_steps):
        raise UserError(
            f"--max-episode-steps is for environments without a limit, but {task.simulator} has one of "
            f"{task.max_episode_steps:,} steps"
        )
    return replace(task, **{n: replace(spec, max_episode_steps=max_episode_steps) for n, spec in without.items()})


# ----------------------------------------------------------------------------------------------- families


def locomotion(env_id: str, data: str) -> Task | None:
    """D4RL's robots, `hopper-medium-v2` and so on, and the dataset that ships: v4 keeps the model and reward of v2."""
    if env_id != DEMO and env_id not in ROBOT_IDS:
        return None
    robot = env_id.split("-")[0]
    spec, forces = gym.spec(ROBOTS[robot]), 84 if robot == "ant" else 0
    simulator = f"D4RL's {robot}"
    return Task("locomotion", env_id, data, simulator, spec, True, forces, reference_returns(f"{robot}-medium-v2"))


def antmaze(env_id: str, data: str) -> Task | None:
    """D4RL's ant, which has to come through a maze to a goal that it does not observe: the return is 1 or 0.

    The goals of the data's rewards are not those of the environment, which draws one for each episode.
    """
    from common.antmaze import AntMazeEnv  # which reads a file of d4rl, and so needs this module

    if not env_id.startswith("antmaze-"):
        return None
    if env_id[:-1] + "2" in MAZE_IDS and env_id not in MAZE_IDS:
        raise UserError(
            f"--env-id {env_id} is not played: in v0 and v1 time-outs stand in the wrong rows and all episodes share "
            f"one goal; take {env_id[:-1]}2, with --dataset-path for an old file, whose time-outs are then put right"
        )
    if env_id not in (*MAZE_IDS, MAZE_DEMO):
        return None
    data = {Path(d4rl_url(name)).stem: name for name in MAZE_IDS}.get(data, data)
    kind, maze = (data if data in MAZE_IDS else env_id).removesuffix("-v2"), env_id.split("-")[1]
    if maze not in kind:
        raise UserError(f"--env-id {env_id} is another maze than that of {data}, whose data these are; name the latter")
    spec = EnvSpec(f"AntMaze-{maze}", AntMazeEnv, max_episode_steps=MAZE_STEPS[maze], kwargs={"maze": maze})
    return Task(
        "antmaze", env_id, data, f"D4RL's antmaze-{maze}", spec, True, references=(0.0, 1.0), kind=kind,
        goes_on=True, next_infos=True, reach=1.0, hidden=True,
    )  # fmt: skip


def adroit(env_id: str, data: str) -> Task | None:
    """D4RL's hand with 24 degrees of freedom: a pen, a door, a hammer, a ball."""
    hand, _, rest = env_id.partition("-")
    if hand not in HAND_STEPS or f"{env_id[:-1]}1" not in HAND_IDS:
        return None
    if env_id not in HAND_IDS:
        raise UserError(f"--env-id {env_id} is not played, for v0's simulator is another; take {env_id[:-1]}1")
    if importlib.util.find_spec("gymnasium_robotics") is None:
        raise UserError(
            f"--env-id {env_id} needs the models of gymnasium-robotics; install it with: pip install gymnasium-robotics"
        )
    from common.adroit import HANDS

    kind = f"adroit-{(data if data in HAND_IDS else env_id).removesuffix('-v1')}"
    if not kind.startswith(f"adroit-{hand}-"):
        raise UserError(f"--env-id {env_id} is another task than that of {data}, whose data these are; name the latter")
    spec = EnvSpec(f"D4RL/{hand}", HANDS[hand], max_episode_steps=HAND_STEPS[hand])
    return Task(
        "adroit", env_id, data, f"D4RL's {hand}", spec, True, references=reference_returns(env_id), kind=kind,
        marked=True,
    )  # fmt: skip


def minari(env_id: str, data: str) -> Task | None:
    """A dataset of Minari: one that is on this machine, or an id with a slash."""
    if env_id in gym.registry or ":" in env_id or not ("/" in env_id or in_minari(env_id)):
        return None
    dataset = minari_dataset(env_id)
    if dataset.env_spec is None:
        raise UserError(
            f"the Minari dataset {env_id} names no environment (its env_spec is empty), but fine-tuning needs one: "
            "create the dataset again with env=…"
        )
    spec, notes = stored_spec(dataset.env_spec, env_id)
    if env_id.startswith("D4RL/antmaze/"):
        return minari_maze(env_id, data, spec, notes)
    if env_id.startswith(tuple(f"D4RL/{hand}/" for hand in HAND_STEPS)):
        notes.append(
            "the actions are those of D4RL's file, replayed in that environment: what came of them there is other than "
            "in D4RL, and so are rewards and scores"
        )
    # Minari's own accessor for it would make the environment, from whatever the dataset says
    stored, eval_spec = getattr(dataset, "_eval_env_spec", None), None
    if stored is not None and stored != dataset.env_spec:
        eval_spec, more = stored_spec(stored, env_id)
        notes += [f"scores are measured in the dataset's evaluation environment, {in_words(eval_spec)}", *more]
    metadata = dataset.storage.metadata
    references = tuple(metadata.get(f"ref_{end}_score") for end in ("min", "max"))
    if None in references:
        references = None
    elif not references[0] < references[1]:
        low, high = references
        notes.append(f"its reference returns make no scale, from {low:g} (0) up to {high:g} (100): scores are returns")
        references = None
    return Task("minari", env_id, data, in_words(spec), spec, False, 0, references, eval_spec, tuple(notes))


def minari_maze(env_id: str, data: str, spec: EnvSpec, notes: list[str]) -> Task:
    """Gymnasium's ant in a maze whose goal it observes, made a task of D4RL's kind: to come there once.

    As it is stored it goes on at the goal, paid for every step, to its time limit. Its evaluation environment is left
    out: umaze's is the mirror image of the maze of the data (https://github.com/Farama-Foundation/Minari/issues/304).
    """
    spec = replace(spec, kwargs=spec.kwargs | dict(continuing_task=False, reset_target=False))
    kind = "antmaze-" + env_id.removeprefix("D4RL/antmaze/").rpartition("-")[0]
    notes = (*notes, "an episode ends where the ant first comes to its goal, in play as in the data")
    return Task("minari", env_id, data, spec.id, spec, references=(0.0, 1.0), notes=notes, kind=kind, arrives=True)


def gymnasium(env_id: str, data: str) -> Task | None:
    """Any environment that Gymnasium knows: its id, or `module:Id` where a module or a file makes it known."""
    name = env_id.rpartition(":")[2]
    registrar(env_id)
    if name not in gym.registry:
        return None
    spec = gym.registry[name]
    return Task("gymnasium", env_id, data, in_words(spec), spec)


FAMILIES = (locomotion, antmaze, adroit, minari, gymnasium)


def registrar(env_id: str) -> Path | None:
    """The user's own file behind `module:Id` or `path/to/file.py:Id`, imported, so that it registers the environment;
    None for other names, and for a package that is installed. Raises UserError where it cannot be imported.
    """
    name = env_id.rpartition(":")[0]
    if not name:
        return None
    file = Path(name).expanduser().resolve() if name.endswith(".py") else None
    if file and "." in file.stem:
        raise UserError(f"--env-id {env_id}: Python imports no file with a dot in its name; rename {file.name}")
    if file and not file.is_file():
        raise UserError(f"--env-id {env_id}: there is no file {file}; see to its name")
    if file and str(file.parent) not in sys.path:  # which evaluation's processes share, and so find it by its name
        sys.path.append(str(file.parent))
    try:
        module = importlib.import_module(file.stem if file else name)
    except (Exception, SystemExit) as error:  # it is the user's own code, and may do anything
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise UserError(f"--env-id {env_id}: there is no module {name}; see to its name, or install it") from None
        if is_out_of_memory(error):
            raise
        words = f"--env-id {env_id}: {name} cannot be imported ({reason_of(error)})"
        raise UserError(f"{words}; {remedy_of(error)}") from error
    if getattr(module, "__file__", None) is None:  # a folder, or one of Python's own
        return None
    found = Path(module.__file__).resolve()
    if file and found != file:
        raise UserError(f"--env-id {env_id}: a module {file.stem} is there already ({found}); rename your file")
    return None if {"site-packages", "dist-packages"} & {*found.parts} else found


# ----------------------------------------------------------------------------------------------- registries


def d4rl_file(name: str) -> Path:
    """A file of the package d4rl, which is read as data: it needs mujoco-py and does not import on a current machine.

    Raises UserError where it is not installed.
    """
    spec = importlib.util.find_spec("d4rl")
    if spec is None:
        raise UserError("the package d4rl is missing; install it with: pip install --no-deps d4rl==1.1")
    return Path(spec.submodule_search_locations[0]) / name


@functools.cache
def d4rl_registry() -> dict:
    """The tables of `d4rl/infos.py` (DATASET_URLS, REF_MIN_SCORE, REF_MAX_SCORE)."""
    return runpy.run_path(str(d4rl_file("infos.py")))


def d4rl_url(name: str) -> str:
    """Where D4RL's file of that name lies. It is called otherwise: antmaze-umaze-v2 is Ant_maze_u-maze_…_fixed.hdf5."""
    return d4rl_registry()["DATASET_URLS"][name]


def is_d4rls(path: Path) -> bool:
    """Whether a file is called as one of D4RL's is."""
    if path.stem.replace("_", "-") in D4RL_IDS:
        return True
    with contextlib.suppress(UserError):  # without the registry nobody knows
        return path.name in {Path(d4rl_url(name)).name for name in D4RL_IDS}
    return False


def reference_returns(name: str) -> tuple[float, float] | None:
    """D4RL's (random, expert) returns for a dataset, or None where it has none and scores are plain returns."""
    low, high = (d4rl_registry()[f"REF_{end}_SCORE"].get(name) for end in ("MIN", "MAX"))
    return None if low is None else (low, high)
