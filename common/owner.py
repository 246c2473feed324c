"""One owner for what several processes might write at once: a lock that ends with its process, however that ends."""

from pathlib import Path

from filelock import FileLock, Timeout

from common.cli import UserError


def own(path: Path, busy: str, wait: bool = False) -> FileLock:
    """The lock `path`, taken; `release()` gives it back. This process may take it again and again.

    Where another process has it, `wait` until that one gives it back, and say so; else raises UserError(busy).
    """
    lock = FileLock(path, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        if not wait:
            raise UserError(f"{busy}; wait until it has ended") from error
        print(f"{busy}: waiting for it", flush=True)
        lock.acquire(poll_interval=0.5)
    except OSError as error:
        print(f"note: {path} cannot be locked ({error.strerror}): see to it that no other process writes there")
    return lock
