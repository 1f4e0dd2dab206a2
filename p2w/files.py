"""Atomic writes, JSON whose types are checked before use, locks between processes, and CRC-32C.

The expected type of JSON, a "form", is a type (`float` accepts integers too, `int` accepts no bool), `None`, `[form]` for a
list of any length, `{key: form}` for an object with these keys (and maybe others), or a tuple of forms of which one fits.

Locks are advisory and end with the process that has them, whatever ends it.
"""

import contextlib
import errno
import fcntl
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import crc32c as package

from p2w.errors import UserError


def write_atomic(path: Path, data: str | bytes | memoryview) -> None:
    """Replace `path` atomically: a reader, or a power cut, finds the complete old file or the complete new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_published(str(path), data.encode() if isinstance(data, str) else data, str(temporary))
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RIGHTS = (errno.EACCES, errno.EPERM, errno.EROFS)


def write_remedy(error: BaseException | None) -> str:
    """What to do about an error of writing: make room, change permissions, or look after the disk."""
    number, text = getattr(error, "errno", None), str(error)
    if number in ROOM or any(os.strerror(one) in text for one in ROOM):
        return "make room"
    if number in RIGHTS or any(os.strerror(one) in text for one in RIGHTS):
        return "change its permissions, or name another folder"
    if number in (errno.EIO, errno.ESTALE, errno.ENOTCONN):
        return "check the disk or its server"
    return "mend what the message names"


def append(path: Path, line: str) -> None:
    """Append a line to a file, or nothing when the disk is full: half a line would damage the next one. Raises OSError."""
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
    """JSON in UTF-8 with sorted keys and fixed separators, so that equal values give equal bytes."""
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(value, sort_keys=True, separators=separators, indent=indent, ensure_ascii=False)
    return text.encode() + b"\n"


def write_published(path: str, data: bytes | memoryview, temporary: str) -> None:
    """Write `data` to the path `temporary`, flush it to the disk and rename it to `path`, which is complete or absent."""
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sync_to_disk(path: str | os.PathLike[str]) -> None:
    """Flush a file or a folder to the disk; a rename inside a flushed folder survives a power cut. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_crc32c(file: BinaryIO) -> int:
    """CRC-32C of the rest of an unbuffered file. It is computed and read without the GIL, so threads run in parallel."""
    value, buffer = 0, memoryview(bytearray(4 << 20))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]
        value = crc32c(buffer[:count], value)
    return value


def parse_json(data: bytes | str, form: Any) -> Any:
    """Parse JSON and check it against the expected form.

    Raises:
        ValueError: not JSON, NaN or infinite numbers, a duplicate key, or another form; the message is one line.
    """
    try:
        value = json.loads(data, object_pairs_hook=_no_duplicate_keys, parse_constant=_refuse_nan)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if said := type_mismatch(value, form):
        raise ValueError(said)
    return value


def type_mismatch(value: Any, form: Any, where: str = "it") -> str | None:
    """Why `value` does not have the expected form, in words that begin with `where`; None when it does."""
    if isinstance(form, tuple):
        found = [type_mismatch(value, one, where) for one in form]
        return None if None in found else found[-1]
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{where} is not an object"
        lacking = next((key for key in form if key not in value), None)
        if lacking is not None:
            return f"{where} lacks {lacking!r}"
        inside = ((value[key], one, f"{key!r} of {where}") for key, one in form.items())
    elif isinstance(form, list):
        if not isinstance(value, Sequence) or isinstance(value, str):  # a list, or one that lies in a table
            return f"{where} is not a list"
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
        raise ValueError(f"{_short(next(n for n in names if names.count(n) > 1))} is twice in one object")
    return made


def _refuse_nan(text: str) -> float:
    raise ValueError(f"{text} is no number")


LOCKED = (
    errno.EWOULDBLOCK,
    errno.EACCES,
)  # by another process; EACCES where flock is emulated by POSIX locks
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class FileLock:
    """A lock on one file, which is created if it is missing and is not removed.

    >>> lock = FileLock(run / ".lock")
    >>> if not lock.acquire(): ...        # another process holds it
    >>> lock.release()                    # or the process ends
    """

    def __init__(self, path: str | os.PathLike[str], without: str = "") -> None:
        """`without` says what keeps a second process out where the file system has no locks; by default nothing does."""
        self.path, self.without = os.fspath(path), without
        self._file: int | None = None
        self.works = True  # whether the file system has locks, once one was asked for

    def acquire(self, wait: bool = False) -> bool:
        """Take the lock; False when another process has it, unless `wait`.

        True where the file system has no locks, after a warning on stderr. Raises OSError when the file cannot be opened,
        and UserError when locking fails for another reason.
        """
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            found = _lock(file, self.path, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), self.without)
            acquired, self.works = found is not False, found is not None
        except BaseException:
            os.close(file)
            raise
        if acquired:
            self._file = file
        else:
            os.close(file)
        return acquired

    def release(self) -> None:
        """Release the lock, if this object has it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def fileno(self) -> int:
        """Descriptor of the locked file: a child process that inherits it keeps the lock."""
        assert self._file is not None
        return self._file

    def write(self, text: str) -> None:
        """Write a text into the locked file for other processes, such as who has the lock."""
        os.ftruncate(self.fileno(), 0)
        os.pwrite(self.fileno(), text.encode(), 0)

    def note(self) -> str:
        """The text that the last process with the lock wrote; empty when there is none."""
        try:
            return Path(self.path).read_text(errors="replace")[:200]
        except OSError:
            return ""


def is_held(path: str | os.PathLike[str]) -> bool:
    """Whether a process has the lock of this file; True where that cannot be determined, False without a file."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False


def _lock(file: int, path: str, how: int, without: str = "") -> bool | None:
    """Lock an open file; False when another process has the lock, None without locks. Raises UserError when it fails."""
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno in LOCKED:
            return False
        if error.errno not in NO_LOCKS:
            raise UserError(
                f"{path}: cannot be locked ({error.strerror}); name a folder on another disk"
            ) from error
        _warn(os.path.dirname(path) or ".", error.strerror or "no locks", without or NOTHING)
        return None
    return True


NOTHING = "nothing keeps a second process out: start no other one on this folder"


@functools.cache
def _warn(folder: str, why: str, without: str) -> None:
    """Warn once per folder and process that a file system has no locks."""
    print(
        f"warning: {folder}: this file system has no locks ({why}), so {without} (Lustre has them when mounted with "
        "-o flock)",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def hold_lock(folder: str, name: str, refusal: str | None = None) -> Iterator[None]:
    """Hold the lock `name` of `folder` in the block; the folder is created, and removed by the last process to leave.

    While another process has it: wait, or raise UserError(refusal) if `refusal` is given. On a file system without locks
    nothing is locked, and a warning says so; files there must be written to a temporary path and renamed.
    """
    path = os.path.join(folder, f"{name}.lock")
    for _ in range(1000):
        lock = FileLock(path)
        try:
            if not _acquire(lock, folder, wait=not refusal):
                raise UserError(refusal or "locked")
            if not os.path.exists(path) or os.fstat(lock.fileno()).st_ino != os.stat(path).st_ino:
                continue  # the last process removed the file after we opened it
            try:
                yield
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                with contextlib.suppress(OSError):
                    os.rmdir(folder)  # succeeds for the last process to leave
            return
        finally:
            lock.release()
    raise UserError(f"{path}: the lock vanished a thousand times; remove {folder}, or name another --out")


def _acquire(lock: FileLock, folder: str, wait: bool) -> bool:
    """Create the folder and take the lock; repeated when the last process to leave removes the folder in between."""
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


LIBRARY = "crc32c" if importlib.util.find_spec("awscrt") is None else "awscrt"  # which computes CRC-32C


@functools.cache
def _crc32c_function() -> Callable[[Any, int], int]:
    """The fastest CRC-32C that is installed; awscrt takes long to import, so it waits for its first use."""
    if LIBRARY == "crc32c":
        return package.crc32c
    from awscrt import checksums  # noqa: PLC0415  (an extra)

    return checksums.crc32c


def crc32c(data: Any, value: int = 0) -> int:
    """CRC-32C of contiguous bytes, continued from the checksum of the bytes before them."""
    return _crc32c_function()(data, value)


def last_part(value: Any) -> Any:
    """Of a path or URL the last part, of lists and mappings the same with every text in them cut so; others as they are."""
    if isinstance(value, str):
        try:
            path = urlsplit(value).path if "://" in value else value
        except ValueError:  # such as http://[::1, which names nothing
            path = value.partition("?")[0]
        return path.rstrip("/").rpartition("/")[2]
    if isinstance(value, Mapping):
        return {name: last_part(one) for name, one in value.items()}
    if isinstance(value, Sequence):
        return [last_part(one) for one in value]
    return value
