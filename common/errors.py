"""What ends a run before its time, see `common.cli.run`."""

import sysconfig
import traceback
from pathlib import Path

import gymnasium as gym

NOT_THEIRS = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), Path(__file__).parent  # nor frozen modules


class UserError(Exception):
    """Something the user can mend. The message is one sentence that names the remedy; `before` it stands what shows
    where, the traceback of code that is the user's own."""

    def __init__(self, message: str, before: str = ""):
        super().__init__(message)
        self.before = before


class Interrupted(Exception):
    """The user asked the run to stop (Ctrl-C or SIGTERM); what was trained so far is on disk."""


def is_theirs(file: str) -> bool:
    """Whether code is the user's own: none of Python's, a package's or this folder's."""
    return not file.startswith("<frozen ") and not any(Path(file).is_relative_to(folder) for folder in NOT_THEIRS)


def reason_of(error: BaseException) -> str:
    """What was raised, and the line of the user's own code that did, if any."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_theirs(frame.filename)]
    place = f", {Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


def traceback_of(error: BaseException) -> str:
    """The traceback from the first line of the user's own code on, "" where there is none."""
    here = error.__traceback__
    while here and not is_theirs(here.tb_frame.f_code.co_filename):
        here = here.tb_next
    return "".join(traceback.format_exception(type(error), error, here)) if here else ""


def remedy_of(error: BaseException, otherwise: str = "mend it there") -> str:
    """What helps where the user's own code failed."""
    missing = isinstance(error, (ImportError, gym.error.DependencyNotInstalled))
    return "install what it needs or mend what it imports" if missing else otherwise


def is_out_of_memory(error: BaseException) -> bool:
    """Of the machine, as Python says it or PyTorch."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
