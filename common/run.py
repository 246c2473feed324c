"""One run's folder: its arguments, its log, its checkpoints.

    runs/<dataset>__<script>__<offline>__<seed>/
        args.json  progress.csv  events.out.tfevents…  reevaluate.pt  align.pt  finetune.pt  policy.pt  result.json

Every file is written aside and renamed, so that an interruption never leaves half of one.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import torch
from tqdm import tqdm

from common import tasks, track
from common.checkpoint import rng_state, save_tensors, set_rng_state, sha256, verify, write_atomic
from common.errors import UserError
from common.identity import changed, code_of, fingerprint, script_of, versions
from common.log import Log, score_of
from common.owner import own
from common.stages import ablations_of
from common.usage import unlike

# What may differ between two starts of the same run without making it another experiment.
FREE_ARGS = {
    "run_dir",
    "device",
    "compile",
    "track",
    "wandb_project_name",
    "wandb_entity",
    "capture_video",
    "checkpoint_seconds",
    "eval_workers",
    "num_seeds",
    "script",
    "go_on",
}


def script_name(args) -> str:
    """The script that these arguments belong to: the name of its file, which a copy does not share."""
    return script_of(args).stem


def dataset_label(args) -> str:
    """The dataset's part of a run folder's name."""
    return Path(args.dataset_path).stem or args.env_id.replace("/", "-")


def origin(args) -> str:
    """The offline policy's part of a run folder's name: its algorithm; of a file, its folder, name and content."""
    path = Path(args.offline)
    if not path.is_file() or path.suffix == ".py":
        return path.stem
    folder = path.resolve().parent.name.removeprefix(f"{dataset_label(args)}__").replace("__", "-")
    return f"{folder}-{path.stem}-{sha256(path)[:6]}"


def run_name(args) -> str:
    """<dataset>__<script>__<offline>__<seed> of a fine-tuning run, with its ablations and its preset if it has any."""
    ablations = "".join(f"-no-{name}" for name in ablations_of(args) if not getattr(args, name))
    preset = "" if args.preset == "none" else f"__{args.preset}"
    return f"{dataset_label(args)}__{args.exp_name}{ablations}__{origin(args)}__{args.seed}{preset}"


def make_folder(folder: Path, chosen_by: str = "--run-dir") -> None:
    """Make a folder, which the user chose by that argument. Raises UserError where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink(missing_ok=True)  # another process may have been as far
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder} ({error.strerror}); choose {chosen_by}") from error


def own_run(folder: Path, wait: bool = False):
    """The lock of a run folder, taken. Raises UserError where another process has it, unless it may `wait`."""
    return own(folder / ".lock", f"another process is at work in {folder}", wait)


def read_json(path: Path, remedy: str) -> dict:
    """A JSON file that this project wrote. Raises UserError where it is damaged."""
    try:
        found = json.loads(path.read_text())
        made_with = found.get("made_with", {})
        whole = all(isinstance(made_with.get(part, {}), dict) for part in ("code", "versions"))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error
    if not whole:
        raise UserError(f"{path} is damaged (made_with); {remedy}")
    return found


def plain(args) -> dict:
    """Arguments as JSON holds them."""
    return json.loads(json.dumps(dataclasses.asdict(args), default=str))


def other_arguments(args, old: dict) -> str:
    """In words, which of a run's arguments were others when args.json was written, which holds `old`; "" for none.

    Files may have moved with their folders, for what they hold is compared: a policy, a dataset, a task's code.
    """
    now, was = plain(args), plain(type(args)()) | old  # one that is newer was as it is by itself
    for name in ("offline", "dataset_path", "env_id"):
        new, before = str(now.get(name)), str(was.get(name))
        if Path(new).suffix and Path(new).name == Path(before).name:
            was[name] = now[name]
    differ = [name for name in now if name not in FREE_ARGS and was[name] != now[name]]
    return ", ".join(unlike(name, was[name], "now", now[name]) for name in differ)


class Run:
    """A run in its folder. `measure` is what its evaluations give: a "score", or a "return" without a scale."""

    def __init__(self, args, name: str, data, wait: bool = False):
        """Take the folder `name` for this process alone: whoever comes second waits for it, or is refused.

        `data` is not standardised yet, or None for a run that needs none. Raises UserError where the folder holds a
        run of other arguments, code or data.
        """
        self.args, self.name = args, name
        self.dir = Path(args.run_dir) / name
        self.seconds: dict[str, float] = {}  # training time of each stage
        self.last_score, self.last_returns = math.nan, []  # of the last evaluation; the returns of its episodes
        self.trained = False  # whether this start has trained anything
        self.auto: dict[str, dict] = {}  # of stages that may end at a plateau: steps, limit, and which of these it was
        self.regime: dict | None = None  # of the policy that it starts from and the data, see common/regime.py
        self.old_args: dict = {}  # what args.json held before the code changed, which its checkpoints may not fit
        self.measure = data.task.measure if data else "return"
        code = code_of(script_of(args), tasks.registrar(args.env_id))
        self.made_with = {"versions": versions(), "code": code, "data": fingerprint(data)}
        self._earlier()  # refused before anything is written, and before waiting
        new = not self.dir.exists()
        make_folder(self.dir)
        self.lock = own_run(self.dir, wait)
        try:  # once the folder is this process's, for W&B's run goes with it
            send = track.start(args, name) if args.track else None
        except UserError:
            if new:
                shutil.rmtree(self.dir)
            raise
        for left in self.dir.glob("*.part"):  # by a process that was killed
            left.unlink()
        self._keep_args()
        self.logged = Log(self.dir, args, send)

    # ------------------------------------------------------------------------------------------ start

    def _earlier(self) -> tuple[dict, list[str]]:
        """args.json as it is, and in words what has changed since and is no reason to stop. Raises UserError."""
        path = self.dir / "args.json"
        saved = (self.dir / "result.json").exists() or any(self.dir.glob("*.pt"))
        if not path.exists() or not saved:  # it was refused, or killed before its first checkpoint
            return {}, []
        afresh = "give this run a name of its own with --exp-name" if self.args.script else "choose another --run-dir"
        old = read_json(path, f"{afresh}, or delete that folder")
        was, now = {"versions": {}, "code": {}} | old.get("made_with", {}), self.made_with
        if differ := other_arguments(self.args, old):
            words = f"{self.dir} holds a run with other arguments: {differ}"
            raise UserError(f"{words}; {afresh}, or delete that folder")
        names = {"data": Path(self.args.dataset_path).name or self.args.env_id,
                 "offline": getattr(self.args, "offline", "")}  # fmt: skip
        before, here = (
            {what: made.get(what) for what in names} | made.get("offline_others", {}) for made in (was, now)
        )
        for what, content in here.items():
            if None not in (content, before.get(what)) and content != before[what]:
                other = "on other data" if what == "data" else "from another policy"
                words = f"{names.get(what, what)} is not what it was; {afresh}, or delete that folder"
                raise UserError(f"{self.dir} holds a run {other}: {words}")
        notes = [
            f"this run was begun with {name} {was['versions'].get(name)}, and this is {version}"
            for name, version in now["versions"].items() if was["versions"].get(name) != version
        ]  # fmt: skip
        if differ := changed(was["code"], now["code"]):
            more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
            words = f"{', '.join(differ[:5])}{more} changed since"
            if not self.args.go_on:
                remedy = f"{afresh}, or go on with what is there by --continue"
                raise UserError(f"{self.dir} holds a run of other code: {words}; {remedy}")
            notes.append(f"going on with a run of other code: {words}")
        return old, notes

    def _keep_args(self) -> None:
        """Write args.json: the arguments, what the run is made with, and what it was made with before."""
        old, notes = self._earlier()
        for note in notes:
            print(f"note: {note}")
        before = old.get("made_with_before", []) + ([old.get("made_with", {})] if notes else [])
        self.made_with = old.get("made_with", {}) | self.made_with
        kept = plain(self.args) | {"made_with": self.made_with} | ({"made_with_before": before} if before else {})
        if old and changed(old.get("made_with", {}).get("code", {}), self.made_with["code"]):
            self.old_args = old
        write_atomic(self.dir / "args.json", json.dumps(kept, indent=2).encode())

    def starts_from(self, policy: Path, *others: Path) -> None:
        """Note the content of the policy that the run starts from, and of `others` beside it. Raises UserError where
        one of them was another."""
        self.made_with["offline"] = sha256(policy)
        if others:
            self.made_with["offline_others"] = {path.parent.name: sha256(path) for path in others}
        self._keep_args()

    def log(self, stage: str, step: int, scalars: dict[str, float]) -> None:
        """Log scalars under their names in progress.csv. Raises UserError when one of them is NaN or infinite."""
        self.logged.add(stage, step, scalars)
        self.last_score = self.logged.rows[-1].get(score_of(stage), self.last_score)

    def scores(self, stage: str) -> list[float]:
        """Every evaluation score of a stage, in order."""
        return [score for _, score in self.logged.evaluations(stage)]

    # ------------------------------------------------------------------------------------------ checkpoints

    def save(self, stage: str, step: int, done: bool, state: dict) -> None:
        """Write everything that `restore` needs to go on as if nothing had happened."""
        self.trained = True
        if not state["stepper"].finite():  # never over a good checkpoint
            self.log(stage, step, {f"{stage}/{k}": v for k, v in state["stepper"].means().items()})
        self.logged.save()
        tensors = {name: thing.state_dict() for name, thing in state.items()}
        own_rows = sum(row["stage"] == stage for row in self.logged.rows)
        save_tensors(
            self.dir / f"{stage}.pt",
            {"step": step, "done": done, "state": tensors, "rng": rng_state(), "own_rows": own_rows,
             "seconds": self.seconds.get(stage, 0.0), "last_score": self.last_score,
             "last_returns": self.last_returns},
        )  # fmt: skip

    def restore(self, stage: str, state: dict, device: torch.device) -> tuple[int, bool]:
        """Load a stage's checkpoint into `state` (things with `load_state_dict`); (step, done), or (0, False)."""
        path = self.dir / f"{stage}.pt"
        if not path.exists():
            self.logged.cut(stage)
            return 0, False
        verify(path)
        try:
            saved = torch.load(path, map_location=device, weights_only=True)
            for name, thing in state.items():
                thing.load_state_dict(saved["state"][name])
        except Exception as error:  # a damaged file fails in as many ways as there are bytes
            words, remedy = f"{path} is not a checkpoint of this run", "delete it and start again"
            if self.old_args:
                write_atomic(self.dir / "args.json", json.dumps(self.old_args, indent=2).encode())
                words, remedy = f"{path} does not fit the changed code", "undo the change, or use another --exp-name"
            raise UserError(f"{words} ({(str(error).splitlines() or [''])[-1].strip()}); {remedy}") from error
        set_rng_state(saved["rng"])
        if not saved["done"]:
            others = sum(row["stage"] != stage for row in self.logged.rows)  # older checkpoints count them, too
            self.logged.cut(stage, saved.get("own_rows", saved.get("rows", 0) - others))
            tqdm.write(f"{stage}: continuing at step {saved['step']:,}")
        self.seconds[stage], self.last_score = saved["seconds"], saved["last_score"]
        self.last_returns = saved["last_returns"]
        return saved["step"], saved["done"]
