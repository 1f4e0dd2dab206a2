"""Advisory locks between processes (flock), which end with the process that holds them, however it ends.

A file system without locks (Lustre mounted without `-o flock` answers ENOSYS, NFS without its lock daemon ENOLCK) is not a
lock that another process holds: a warning says so once a folder, and the work goes on without.
"""

import errno
import fcntl
import functools
import os
import sys
from pathlib import Path

from p2w.errors import UserError

HELD = (errno.EWOULDBLOCK, errno.EACCES)  # by another process; the second where flock is made of POSIX locks
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class FileLock:
    """The lock of one file, which is made where it is missing and left where it is.

    >>> lock = FileLock(run / ".lock")
    >>> if not lock.acquire(): ...        # another process holds it
    >>> lock.release()                    # or the process ends
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._file: int | None = None

    def acquire(self, wait: bool = False) -> bool:
        """Hold the lock; False while another process does, unless `wait`.

        True where the file system has no locks, after a warning on stderr. Raises OSError where the file cannot be opened,
        and UserError where locking fails otherwise.
        """
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            held = _lock(file, self.path, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BaseException:
            os.close(file)
            raise
        if held:
            self._file = file
        else:
            os.close(file)
        return held

    def release(self) -> None:
        """Let go; nothing where it is not held."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def fileno(self) -> int:
        """Descriptor of the held file: a child process that inherits it holds the lock, too."""
        assert self._file is not None
        return self._file

    def write(self, text: str) -> None:
        """Leave a note for others in the held file, such as who holds it."""
        os.ftruncate(self.fileno(), 0)
        os.pwrite(self.fileno(), text.encode(), 0)

    def note(self) -> str:
        """What the last holder wrote."""
        try:
            return Path(self.path).read_text(errors="replace")[:200]
        except OSError:
            return ""


def is_held(path: str | os.PathLike[str], unknown: bool = True) -> bool:
    """Whether a process holds the lock of this file; `unknown` where that cannot be told, False where there is no file."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return unknown
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return True if error.errno in HELD else unknown
    finally:
        os.close(file)
    return False


def _lock(file: int, path: str, how: int) -> bool:
    """Lock an open file; False where another process holds it."""
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno in HELD:
            return False
        if error.errno not in NO_LOCKS:
            raise UserError(
                f"{path}: cannot be locked ({error.strerror}); name a folder on another disk"
            ) from error
        _warn(os.path.dirname(path) or ".", error.strerror or "no locks")
    return True


@functools.cache
def _warn(folder: str, why: str) -> None:
    """Once a folder and process."""
    print(
        f"warning: {folder}: this file system has no locks ({why}), so nothing keeps a second process out: start no "
        "other one on this folder (Lustre has them when mounted with -o flock)",
        file=sys.stderr,
        flush=True,
    )
