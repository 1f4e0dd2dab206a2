"""Locks of a folder that is written by several processes, in a folder of their own that the last one out removes."""

import contextlib
import os
from collections.abc import Iterator

from p2w.errors import UserError
from p2w.file_lock import FileLock


@contextlib.contextmanager
def hold(folder: str, name: str, refusal: str | None = None) -> Iterator[None]:
    """Hold the lock `name` of `folder` (made, and removed by the last one out).

    While another process holds it: wait, or raise UserError(refusal) where there is one. On a file system
    without locks nothing is locked, and a warning says so; what is written there must be written aside and renamed.
    """
    path = os.path.join(folder, f"{name}.lock")
    for _ in range(1000):
        lock = FileLock(path)
        try:
            if not _acquire(lock, folder, wait=not refusal):
                raise UserError(refusal or "locked")
            if not os.path.exists(path) or os.fstat(lock.fileno()).st_ino != os.stat(path).st_ino:
                continue  # the last holder removed the file between our open and our lock
            try:
                yield
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                with contextlib.suppress(OSError):
                    os.rmdir(folder)  # succeeds for the last one out
            return
        finally:
            lock.release()
    raise UserError(f"{path}: the lock vanished a thousand times; remove {folder}, or name another --out")


def _acquire(lock: FileLock, folder: str, wait: bool) -> bool:
    """Lock. The last one out may take the folder away between the two steps; they are repeated."""
    where = os.path.dirname(folder)
    for attempt in range(1000):
        try:
            os.makedirs(folder, exist_ok=True)
            return lock.acquire(wait)
        except FileNotFoundError as error:
            if attempt == 999 or not os.path.isdir(where):
                raise UserError(f"{where}: no folder can be made there; name another --out") from error
        except OSError as error:
            raise UserError(
                f"{where} cannot be written ({error.strerror}): name another --out DIR"
            ) from error
    raise AssertionError("not reached")
