"""The loop of every stage, offline and online: where it stopped, how far it is, when it is saved."""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator

import torch
from tqdm import tqdm

from common import steps
from common.cli import Patient
from common.errors import Interrupted
from common.plateau import Plateau
from common.steps import Stepper


class Loop:
    """The steps of a stage that are still to be done, of `total` in all.

    `state` names all that the stage changes: things with `state_dict` and `load_state_dict`. They are restored when the
    loop is made, and saved every `--checkpoint-seconds`, at the end, and when a signal asks to stop. `start` is the
    step that it goes on from, and `done` whether nothing is left to do. `total` may become the step that was reached,
    between two blocks, which ends the stage. The progress bar shows the last score, and beside it that of the state's
    `best` where there is one. Of steps that are taken one by one `probe()` is logged before the first of every
    `--probe-every`, and after the last.
    """

    def __init__(self, run, stage: str, total: int, state: dict, device: torch.device, probe: Callable | None = None):
        self.probe = probe
        self.run, self.stage, self.total, self.state, self.device = run, stage, total, state, device
        self.start, self.done = run.restore(stage, state, device)
        self.before = run.seconds.get(stage, 0.0)
        self.step, self.began = self.start, time.monotonic()

    @property
    def rate(self) -> float:
        """Steps a second since this start."""
        return (self.step - self.start) / max(time.monotonic() - self.began, 1e-9)

    def blocks(self, size: int | Callable[[int], int]) -> Iterator[tuple[int, int]]:
        """(step reached at its end, its length) of each block of `size` steps, or of `size(steps done)`.

        Whatever the caller does between two blocks belongs to the former: it is saved after that.
        """
        if self.done:
            return
        saved = self.began = time.monotonic()
        with noted_signals() as signals, progress_bar(self.stage, self.total, self.start) as bar, said_in(bar):
            while self.step < self.total:
                n = min(size(self.step) if callable(size) else size, self.total - self.step)
                self.step += n
                yield self.step, n
                now, step, stop = time.monotonic(), self.step, bool(signals)
                self.run.seconds[self.stage] = self.before + now - self.began
                if step == self.total or stop or now - saved >= self.run.args.checkpoint_seconds:
                    self.run.save(self.stage, step, step == self.total, self.state)
                    saved = now
                if stop:
                    where = f"{self.stage} is saved at step {step:,} in {self.run.dir}"
                    raise Interrupted(f"{where}; the same command continues from there")
                if math.isfinite(self.run.last_score):
                    best = f" (best {self.state['best'].score:.1f})" if "best" in self.state else ""
                    bar.set_postfix_str(f"{self.run.measure} {self.run.last_score:.1f}{best}", refresh=False)
                bar.total = self.total
                bar.update(n)

    def evaluate(self, evaluator, more: dict[str, float] | None = None) -> bool:
        """Evaluate the state's `agent` where the loop stands; whether that made it the `best`.

        Logged are its scores, the means of what the `stepper` returned since the last time, and `more`.
        """
        agent, best, stepper = (self.state[name] for name in ("agent", "best", "stepper"))
        found = evaluator.scalars(agent.act, self.device, final=self.step == self.total)
        improved = best.update(found["score"], agent.actor, f"online, step {self.step:,}", evaluator.last)
        scores = {f"charts/{name}": value for name, value in found.items()}
        losses = {f"losses/{name}": value for name, value in stepper.means().items()}
        standing = {"charts/best_score": best.score, "charts/SPS": self.rate}
        self.run.log(self.stage, self.step, scores | standing | (more or {}) | losses)
        return improved

    def __iter__(self) -> Iterator[int]:
        """The steps one by one, counted from 1."""
        for step, _ in self.blocks(1):
            if self.probe and (step - 1) % self.run.args.probe_every == 0:
                self.run.log(self.stage, step - 1, self.probe())
            yield step
            if self.probe and step == self.total:
                self.run.log(self.stage, step, self.probe())


def train(run, stage: str, make_step, steps: int, state: dict, *, device, compile=False, log_every: int, evaluate=None,
          evaluate_every: int = 0, probe=None, phases: int = 1, plateau: Plateau | None = None) -> int:  # fmt: skip
    """Train a stage for `steps` steps in all, resuming where an earlier start of the same command stopped; how many it
    took.

    `state` names all that training changes. `make_step()`, called once that is restored, gives the step; it returns
    named scalar tensors, logged as their means over `log_every` steps. `evaluate(last)` returns a "score" and what
    comes with it every `evaluate_every` steps, `last` being true after all; `probe()` scalars that are logged at the
    start and with those means; with a `plateau` the stage ends once that scalar of the probe's is at rest; `phases`:
    see `Stepper`.
    """
    stepper = Stepper(None, device, graph=compile, phases=phases)
    state = state | {"stepper": stepper} | ({"plateau": plateau} if plateau else {})
    loop = Loop(run, stage, steps, state, device)
    if loop.done:
        return loop.start
    stepper.step = make_step()
    if probe and not loop.start:
        run.log(stage, 0, probe())
    evaluate_every = evaluate_every or steps

    def until_something_is_due(step: int) -> int:
        return min(log_every - step % log_every, evaluate_every - step % evaluate_every, 10)

    for step, n in loop.blocks(until_something_is_due):
        stepper.run(n)
        scalars = {}
        if step % log_every == 0 or step == steps:
            scalars = {f"{stage}/{name}": value for name, value in stepper.means().items()}
            scalars |= probe() if probe else {}
            if plateau and plateau.add(scalars[plateau.scalar]):
                loop.total = step
        if evaluate and (step % evaluate_every == 0 or step == loop.total):
            scalars |= {f"{stage}/{name}": value for name, value in evaluate(step == loop.total).items()}
        if scalars:
            run.log(stage, step, scalars)
    return loop.step


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Until the end, Ctrl-C, SIGTERM and the closing of the terminal interrupt nothing: they come into the list."""
    came: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def said_in(bar: tqdm) -> Iterator[None]:
    """Until the end, a step that makes its caller wait, as the first one does that is compiled, says so in the bar."""
    before, steps.say = steps.say, bar.set_postfix_str
    try:
        yield
    finally:
        steps.say = before


def progress_bar(stage: str, total: int, initial: int = 0) -> tqdm:
    # miniters: by itself tqdm looks at its clock less often the faster steps are, and then for long not at all when
    # they slow down, as fine-tuning does at its first update
    return tqdm(total=total, initial=initial, desc=f"{stage:<10}", unit="step", mininterval=0.5, miniters=1,
                smoothing=0.05, dynamic_ncols=True, file=Patient(sys.stderr))  # fmt: skip
