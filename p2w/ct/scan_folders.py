"""Folders of scans: walking through them, and names of files that are safe to print, to store and to put into a tar."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence

from p2w.errors import UserError

UID_LENGTH = 100  # a name in a tar may have 155 characters before the last slash, a file name 255 bytes


def walk(
    root: str,
    out: str,
    seen: set[str] | None = None,
    unreadable: Callable[[OSError], None] | None = None,
    hidden: Callable[[int], None] | None = None,
) -> Iterator[str]:
    """Yield the files below `root` in a fixed order, without hidden ones and `out`; links are followed, loops are not.

    Folders whose real path is in `seen` are skipped; those that are searched are added to it. A folder that cannot be read
    is passed to `unreadable`; without that it is a UserError, since scans in it would be missing without a word. `hidden`
    is told how many hidden files and folders each folder has.
    """

    def failed(error: OSError) -> None:
        if unreadable is None:
            raise UserError(
                f"{error.filename}: the folder cannot be read ({error.strerror}): permit it, or name another folder"
            ) from error
        unreadable(error)

    seen, skip = set() if seen is None else seen, os.path.realpath(out) if out else ""
    for folder, folders, files in os.walk(root, followlinks=True, onerror=failed):
        real = os.path.realpath(folder)
        if real in seen or real == skip:
            folders.clear()
            continue
        seen.add(real)
        if hidden is not None:
            hidden(sum(name.startswith(".") for name in (*folders, *files)))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(folder, name) for name in sorted(files) if not name.startswith("."))


def outermost_roots(roots: list[str], out: str) -> list[str]:
    """The roots without those that are searched with another one, being the same folder or below it."""
    skipped = os.path.realpath(out) if out else "\0"
    distinct = {os.path.realpath(root): root for root in roots}

    def inside(real: str, other: str) -> bool:
        below = os.path.relpath(real, other).split(os.sep)
        hidden = any(name.startswith(".") for name in below)  # or `..`: it lies elsewhere
        return real != other and not hidden and not f"{real}/".startswith(f"{skipped}/")

    return [root for real, root in distinct.items() if not any(inside(real, other) for other in distinct)]


def names_of_roots(roots: Sequence[str]) -> list[str]:
    """What the names of scans begin with: nothing for one root, else as many last folders of each as tell them apart."""
    if len(roots) == 1:
        return [""]
    parts = [os.path.abspath(root).strip(os.sep).split(os.sep) for root in roots]
    depth = 1
    while len({tuple(own[-depth:]) for own in parts}) < len(parts):
        depth += 1
    return ["/".join(own[-depth:]) + "/" for own in parts]


def printable(name: str) -> str:
    """A path as one line of valid text, whatever bytes the file system has in it."""
    name = name.replace(os.sep, "/").replace("\n", "\\n").replace("\r", "\\r")
    return name.encode(errors="backslashreplace").decode()


def is_text(path: str) -> bool:
    """Whether a path is valid UTF-8."""
    try:
        return bool(path.encode())
    except UnicodeEncodeError:
        return False


def safe_uid(text: str) -> str:
    """A name that is valid in every file system and tar; if it had to be changed, with a hash of the original."""
    clean = re.sub(r"[^A-Za-z0-9._-]", "_", text.replace("/", "_")).lstrip(".-") or "_"
    if clean == text.replace("/", "_") and len(clean) <= UID_LENGTH:
        return clean
    return f"{clean[: UID_LENGTH - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
