"""One run's folder: its arguments, its log, its checkpoints, and the loop that trains a stage and can be resumed.

    runs/<env_id>__<script>__<offline>__<seed>/
        args.json  progress.csv  events.out.tfevents…  reevaluate.pt  align.pt  finetune.pt  policy.pt  result.json

Every file is written aside and renamed, so that an interruption never leaves half of one.
"""

import csv
import dataclasses
import io
import json
import math
import signal
import time
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.checkpoint import rng_state, save_tensors, set_rng_state, write_atomic
from common.cli import Interrupted, UserError
from common.steps import Stepper

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
}


def dataset_label(args) -> str:
    """The dataset's part of a run folder's name."""
    return Path(args.dataset_path).stem or args.env_id.replace("/", "-")


def run_name(args) -> str:
    """<env_id>__<script>__<offline>__<seed> of a fine-tuning run, with its ablations and its preset if it has any."""
    ablations = "".join(f"-no-{name}" for name in ("reevaluate", "align", "constrain") if not getattr(args, name, True))
    preset = "" if args.preset == "none" else f"__{args.preset}"
    return f"{dataset_label(args)}__{args.exp_name}{ablations}__{Path(args.offline).stem}__{args.seed}{preset}"


def make_folder(folder: Path) -> None:
    """Make a run folder. Raises UserError where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"cannot write to the run folder {folder} ({error.strerror}); choose --run-dir") from error


class Run:
    stop = False  # whether a signal asked to stop

    def __init__(self, args, name: str):
        self.args, self.name = args, name
        self.dir = Path(args.run_dir) / name
        self.rows: list[dict] = []  # everything logged so far, one dictionary a row: the content of progress.csv
        self.seconds: dict[str, float] = {}  # training time of each stage
        self.last_score = math.nan
        make_folder(self.dir)
        self._keep_args()
        if (self.dir / "progress.csv").exists():
            with open(self.dir / "progress.csv", newline="") as file:
                self.rows = [{k: _number(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
        for old in self.dir.glob("events.out.tfevents*"):
            old.unlink()  # written again from progress.csv, so that a resumed run shows no step twice
        if getattr(args, "track", False):
            self._track()
        self.writer = SummaryWriter(str(self.dir))
        self.writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + "\n".join(
            f"|{key}|{value}|" for key, value in vars(args).items()))  # fmt: skip
        for row in self.rows:
            self._to_tensorboard(row)
        Run.stop = False
        signal.signal(signal.SIGINT, Run.ask_to_stop)
        signal.signal(signal.SIGTERM, Run.ask_to_stop)

    # ------------------------------------------------------------------------------------------ start

    def _keep_args(self) -> None:
        path = self.dir / "args.json"
        new = json.loads(json.dumps(dataclasses.asdict(self.args), default=str))
        if path.exists():
            old = json.loads(path.read_text())
            differ = [k for k in new if k not in FREE_ARGS and old.get(k) != new[k]]
            if differ:
                was = ", ".join(f"--{k.replace('_', '-')} {old.get(k)} (now {new[k]})" for k in differ)
                raise UserError(
                    f"{self.dir} holds a run with other arguments: {was}; give this one a name of its own with "
                    "--exp-name, or delete that folder"
                )
        write_atomic(path, json.dumps(new, indent=2).encode())

    def _track(self) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("--track needs Weights & Biases; install it with: pip install wandb") from error
        wandb.init(
            project=self.args.wandb_project_name, entity=self.args.wandb_entity, sync_tensorboard=True,
            config=vars(self.args), name=self.name, id=self.name, resume="allow", dir=str(self.dir),
        )  # fmt: skip

    @staticmethod
    def ask_to_stop(*_) -> None:
        """Of a signal. Whichever run is being trained, an offline one or this one, saves and stops at its next step."""
        Run.stop = True

    # ------------------------------------------------------------------------------------------ log

    def log(self, stage: str, step: int, scalars: dict[str, float]) -> None:
        """Log scalars under their TensorBoard names. Raises UserError when one of them is NaN or infinite."""
        for name, value in scalars.items():
            if not math.isfinite(value):
                saved = self.dir / f"{stage}.pt"
                self.writer.flush()
                last = f"the last checkpoint is {saved}" if saved.exists() else "there is no checkpoint of this stage"
                raise UserError(
                    f"{name} became {value} in stage {stage!r} before step {step}; {last}. Look at the losses in "
                    "TensorBoard, and try a smaller learning rate"
                )
            if name.endswith("score"):
                self.last_score = value
        row = {"stage": stage, "step": step, **scalars}
        self.rows.append(row)
        self._to_tensorboard(row)

    def _to_tensorboard(self, row: dict) -> None:
        for name, value in row.items():
            if name not in ("stage", "step"):
                self.writer.add_scalar(name, value, row["step"])

    def write_csv(self) -> None:
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomic(self.dir / "progress.csv", text.getvalue().encode())

    def scores(self, stage: str) -> list[float]:
        """Every evaluation score of a stage, in order."""
        return [v for row in self.rows if row["stage"] == stage for k, v in row.items() if k.endswith("/score")]

    # ------------------------------------------------------------------------------------------ checkpoints

    def save(self, stage: str, step: int, done: bool, state: dict) -> None:
        """Write everything that `restore` needs to go on as if nothing had happened."""
        sums = state["stepper"].sums
        if sums is not None and not sums.isfinite().all():  # never over a good checkpoint
            self.log(stage, step, {f"{stage}/{k}": v for k, v in state["stepper"].means().items()})
        self.write_csv()
        self.writer.flush()
        tensors = {name: thing.state_dict() for name, thing in state.items()}
        save_tensors(
            self.dir / f"{stage}.pt",
            {"step": step, "done": done, "state": tensors, "rng": rng_state(), "rows": len(self.rows),
             "seconds": self.seconds.get(stage, 0.0), "last_score": self.last_score},
        )  # fmt: skip

    def restore(self, stage: str, state: dict, device: torch.device) -> tuple[int, bool]:
        """Load a stage's checkpoint into `state` (things with `load_state_dict`); (step, done), or (0, False)."""
        path = self.dir / f"{stage}.pt"
        if not path.exists():
            self.rows = [row for row in self.rows if row["stage"] != stage]
            return 0, False
        try:
            saved = torch.load(path, map_location=device, weights_only=True)
            for name, thing in state.items():
                thing.load_state_dict(saved["state"][name])
        except Exception as error:  # a damaged file fails in as many ways as there are bytes
            raise UserError(f"{path} is not a checkpoint of this run ({error}); delete it and start again") from error
        set_rng_state(saved["rng"])
        if not saved["done"]:
            self.rows = self.rows[: saved["rows"]]
            tqdm.write(f"{stage}: continuing at step {saved['step']:,}")
        self.seconds[stage], self.last_score = saved["seconds"], saved["last_score"]
        return saved["step"], saved["done"]

    # ------------------------------------------------------------------------------------------ train

    def train(self, stage: str, make_step, steps: int, state: dict, *, device, compile=False, log_every: int,
              evaluate=None, evaluate_every: int = 0, probe=None, phases: int = 1) -> None:  # fmt: skip
        """Train a stage for `steps` steps in all, resuming where an earlier start of the same command stopped.

        `state` names all that training changes. `make_step()`, called once that is restored, gives the step; it
        returns named scalar tensors, logged as their means over `log_every` steps. `evaluate()` returns a score every
        `evaluate_every` steps; `probe()` scalars that are logged at the start and with those means; `phases`: see
        `Stepper`.
        """
        stepper = Stepper(None, device, graph=compile, phases=phases)
        state = state | {"stepper": stepper}
        done_steps, done = self.restore(stage, state, device)
        if done:
            return
        stepper.step = make_step()
        if probe and not done_steps:
            self.log(stage, 0, probe())
        with self.progress(stage, steps, done_steps) as bar:
            clock = Clock(self, stage)
            while done_steps < steps:
                n = min(_until(done_steps, log_every, steps), _until(done_steps, evaluate_every or steps, steps), 10)
                stepper.run(n)
                done_steps += n
                scalars = {}
                if done_steps % log_every == 0 or done_steps == steps:
                    scalars = {f"{stage}/{name}": value for name, value in stepper.means().items()}
                    scalars |= probe() if probe else {}
                if evaluate and (done_steps % evaluate_every == 0 or done_steps == steps):
                    scalars[f"{stage}/score"] = evaluate()
                if scalars:
                    self.log(stage, done_steps, scalars)
                self.show(bar, n)
                clock.tick(done_steps, done_steps == steps, state)

    def progress(self, stage: str, total: int, initial: int) -> tqdm:
        # miniters: by itself tqdm looks at its clock less often the faster steps are, and then for long not at all
        # when they slow down, as fine-tuning does at its first update
        return tqdm(total=total, initial=initial, desc=f"{stage:<10}", unit="step", mininterval=0.5, miniters=1,
                    smoothing=0.05, dynamic_ncols=True)  # fmt: skip

    def show(self, bar: tqdm, n: int) -> None:
        if math.isfinite(self.last_score):
            bar.set_postfix_str(f"score {self.last_score:.1f}", refresh=False)
        bar.update(n)


class Clock:
    """Adds up a stage's time and saves it every `--checkpoint-seconds`, at its end, and when asked to stop."""

    def __init__(self, run: Run, stage: str):
        self.run, self.stage = run, stage
        self.before, self.start = run.seconds.get(stage, 0.0), time.monotonic()
        self.saved = self.start

    def tick(self, step: int, done: bool, state: dict) -> None:
        now = time.monotonic()
        self.run.seconds[self.stage] = self.before + now - self.start
        if done or self.run.stop or now - self.saved >= self.run.args.checkpoint_seconds:
            self.run.save(self.stage, step, done, state)
            self.saved = now
        if self.run.stop:
            raise Interrupted(
                f"{self.stage} is saved at step {step:,} in {self.run.dir}; the same command continues from there"
            )


def _until(step: int, every: int, total: int) -> int:
    """Steps from `step` to the next multiple of `every`, or to the end."""
    return min(every - step % every, total - step)


def _number(text: str):
    try:
        value = float(text)
    except ValueError:
        return text
    return int(value) if value.is_integer() and "." not in text and "e" not in text else value
