"""Files that are whole or absent, JSON that is checked before use, locks between processes, and CRC-32C.

A form is a type (`float` takes whole numbers too, `int` takes no bool), `None`, `[form]` for a list of any length,
`{key: form}` for an object that has these keys (and maybe others), or a tuple of forms of which one must fit.

Locks are advisory and end with the process that holds them, however it ends.
"""

import contextlib
import errno
import fcntl
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import crc32c as package

from p2w.errors import UserError


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write `path` so that a reader, or a power cut, sees the old file or the new one, never a half."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def append(path: Path, line: str) -> None:
    """Add a whole line to a file, or, when the disk is full, nothing: half a line would spoil the next."""
    data = line.encode() + b"\n"
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def canonical_json(value: object, indent: int | None = None) -> bytes:
    """JSON with one spelling for one value, so that equal content means equal bytes."""
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(value, sort_keys=True, separators=separators, indent=indent, ensure_ascii=False)
    return text.encode() + b"\n"


def write_published(path: str, data: bytes, temporary: str) -> None:
    """Write `data` to `temporary`, flush it to the disk, rename it: `path` is whole or absent, never half."""
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def parse_json(data: bytes | str, form: Any) -> Any:
    """The value in `data`.

    Raises:
        ValueError: not JSON, NaN or infinite numbers, a key twice in one object, or not of the form; in one line.
    """
    try:
        value = json.loads(data, object_pairs_hook=_no_duplicate_keys, parse_constant=_refuse_nan)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if said := type_mismatch(value, form):
        raise ValueError(said)
    return value


def type_mismatch(value: Any, form: Any, where: str = "it") -> str | None:
    """What keeps `value` from being of the form, None when nothing does."""
    if isinstance(form, tuple):
        found = [type_mismatch(value, one, where) for one in form]
        return None if None in found else found[-1]
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{where} is no object"
        lacking = next((key for key in form if key not in value), None)
        if lacking is not None:
            return f"{where} lacks {lacking!r}"
        inside = ((value[key], one, f"{key!r} of {where}") for key, one in form.items())
    elif isinstance(form, list):
        if not isinstance(value, list):
            return f"{where} is no list"
        inside = ((one, form[0], f"entry {index} of {where}") for index, one in enumerate(value))
    else:
        return None if _is_type(value, form) else f"{where} is {_short(value)}"
    return next((said for one in inside if (said := type_mismatch(*one))), None)


def _is_type(value: Any, kind: type | None) -> bool:
    if kind is None:
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | None) else f"of type {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:40]}…"


def _no_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{_short(next(n for n in names if names.count(n) > 1))} stands twice in one object")
    return made


def _refuse_nan(text: str) -> float:
    raise ValueError(f"{text} is no number")


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


@contextlib.contextmanager
def hold_lock(folder: str, name: str, refusal: str | None = None) -> Iterator[None]:
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


def _fastest() -> tuple[Callable[[Any, int], int], str]:
    if importlib.util.find_spec("awscrt") is None:
        return package.crc32c, "crc32c"
    from awscrt import checksums  # noqa: PLC0415  (an extra)

    return checksums.crc32c, "awscrt"


crc32c, LIBRARY = (
    _fastest()
)  # (contiguous bytes, the checksum of what came before or 0) -> checksum; and whose it is
