"""What ends a run before its time, see `common.cli.run`."""


class UserError(Exception):
    """Something the user can mend. The message is one sentence that names the remedy; `before` it stands what shows
    where, the traceback of code that is the user's own."""

    before = ""


class Interrupted(Exception):
    """The user asked the run to stop (Ctrl-C or SIGTERM); what was trained so far is on disk."""
