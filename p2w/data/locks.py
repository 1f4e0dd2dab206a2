"""Advisory locks between processes, which end with the process that holds them, however it ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from typing import IO

from p2w.errors import UserError


@contextlib.contextmanager
def hold(folder: str, name: str, refusal: str | None = None) -> Iterator[None]:
    """Hold the lock `name` of `folder` (made, and removed by the last one out).

    While another process holds it: wait, or raise UserError(refusal) where there is one. On a file system
    without locks nothing is locked; what is written there must be written aside and renamed.
    """
    path = os.path.join(folder, f"{name}.lock")
    for _ in range(1000):
        with _open(folder, path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if refusal else 0))
            except BlockingIOError as error:
                raise UserError(refusal or "locked") from error
            except OSError:
                pass
            if not os.path.exists(path) or os.fstat(file.fileno()).st_ino != os.stat(path).st_ino:
                continue  # the last holder removed the file between our open and our lock
            try:
                yield
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                with contextlib.suppress(OSError):
                    os.rmdir(folder)  # succeeds for the last one out
            return
    raise UserError(f"{path}: the lock vanished a thousand times; remove {folder}, or name another --out")


def _open(folder: str, path: str) -> IO[str]:
    """The lock file. The last one out may take the folder away between the two steps; they are repeated."""
    where = os.path.dirname(folder)
    for attempt in range(1000):
        try:
            os.makedirs(folder, exist_ok=True)
            return open(path, "a")
        except FileNotFoundError as error:
            if attempt == 999 or not os.path.isdir(where):
                raise UserError(f"{where}: no folder can be made there; name another --out") from error
        except OSError as error:
            raise UserError(
                f"{where} cannot be written ({error.strerror}): name another --out DIR"
            ) from error
    raise AssertionError("not reached")


def is_free(path: str) -> bool:
    """Whether no process holds this lock file."""
    try:
        with open(path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:
        return False
