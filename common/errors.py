"""What ends a run before its time, see `common.cli.run`."""

import sysconfig
import traceback
from pathlib import Path


class UserError(Exception):
    """Something the user can mend. The message is one sentence that names the remedy; `before` it stands what shows
    where, the traceback of code that is the user's own."""

    before = ""


class Interrupted(Exception):
    """The user asked the run to stop (Ctrl-C or SIGTERM); what was trained so far is on disk."""


def reason_of(error: Exception) -> str:
    """What was raised, and the line of the user's own code that did, if any: of none of Python's, a package's or this
    folder's."""
    not_theirs = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), Path(__file__).parent
    frames = [x for x in traceback.extract_tb(error.__traceback__) if not x.filename.startswith("<frozen ")]
    frames = [x for x in frames if not any(Path(x.filename).is_relative_to(folder) for folder in not_theirs)]
    place = f", {Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
