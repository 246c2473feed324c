"""The command line: presets, and one clear sentence instead of a traceback."""

import dataclasses
import signal
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
import tyro

Args = TypeVar("Args")


class UserError(Exception):
    """Something the user can mend. The message is one sentence that names the remedy."""


class Interrupted(Exception):
    """The user asked the run to stop (Ctrl-C or SIGTERM); what was trained so far is on disk."""


def parse(args_class: type[Args], presets: dict[str, dict], argv: list[str] | None = None) -> Args:
    """Read the command line twice: once for `--preset`, then again with that preset's values as the defaults.

    What the user writes on the command line therefore always wins over the preset.
    """
    doc = sys.modules[args_class.__module__].__doc__
    preset = tyro.cli(args_class, args=argv, description=doc).preset
    defaults = dataclasses.replace(args_class(), preset=preset, **presets.get(preset, {}))
    return tyro.cli(args_class, args=argv, default=defaults, description=doc)


def run(main: Callable[[], None]) -> None:
    """Call `main`. A `UserError` becomes one line on stderr and exit code 2; an interruption becomes exit code 130."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except UserError as error:
        sys.exit(_fail(f"error: {error}", 2))
    except (Interrupted, KeyboardInterrupt) as stop:
        sys.exit(_fail(f"stopped: {stop or 'nothing was being trained yet'}", 130))
    except torch.cuda.OutOfMemoryError as error:
        sys.exit(_fail(f"error: the GPU has too little free memory ({error}); use --device cpu or a free GPU", 2))


def _fail(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def check_positive(args, *names: str, at_least: float = 1) -> None:
    """Refuse budgets and sizes below `at_least`. Raises UserError."""
    for name in names:
        if not getattr(args, name) >= at_least:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} is {getattr(args, name)}, but has to be at least {at_least}")


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        found = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise UserError(f"--device {name} is not available here; this machine has: {', '.join(found)}") from error
    return device
