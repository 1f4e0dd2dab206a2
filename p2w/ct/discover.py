"""Find the scans in a folder: in LUNA16's layout, or in any tree of MetaImage, NIfTI, NRRD and DICOM files."""

import fnmatch
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from p2w.ct.dicom import Slice, not_a_scan, order_series, read_slice
from p2w.ct.orientation import BadScan, Grid
from p2w.errors import UserError

IMAGES = (".mhd", ".mha", ".nii", ".nii.gz", ".nrrd", ".nhdr")
# Never a scan, so not even opened: data files of a header, notes, pictures, tables, archives.
OTHERS = {
    ".raw", ".zraw", ".csv", ".txt", ".md", ".json", ".xml", ".pdf", ".png", ".jpg", ".zip", ".gz", ".py",
    ".npy", ".tar", ".arrow", ".parquet",
}  # fmt: skip
UID_LENGTH = 100  # a name in a tar may have 155 characters before the last slash, a file name 255 bytes


@dataclass(frozen=True)
class ScanSource:
    """The files of one scan. `name` is for messages: a path relative to the folder that the user named."""

    uid: str
    name: str
    files: tuple[str, ...]  # one image header, or the slices of a DICOM series in order
    subset: int = -1  # number of LUNA16's subset, -1 for other data
    grid: Grid | None = None  # of a DICOM series, from its headers; None for image files
    exact: bool = True  # False: DICOM values need float, since a slope or intercept is not an integer


@dataclass
class ScanListing:
    """The scans of a folder. `bad` and `left_out` are (name, why); those left out are sound images, but not CT volumes."""

    sources: list[ScanSource] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    not_images: int = 0


def parse_subsets(text: str) -> list[int]:
    """LUNA16 subsets as "0-6" or "0,2,5-6", sorted. Raises UserError for anything else."""
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d)\s*(?:-\s*(\d)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UserError(
                f"--subsets {text!r}: {part!r} is not a subset; write them like 0-6 or 0,2,5-6 (0 to 9)"
            )
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def find_luna(root: str, subsets: list[int], flag: str = "--luna") -> tuple[ScanListing, list[int]]:
    """The scans `subset*/UID.mhd` of these subsets, and the subsets whose folder is missing.

    `flag` is the option that named `root`, for messages. Raises UserError when there is no scan.
    """
    if not os.path.isdir(root):
        raise UserError(
            f"{root}: no such folder; it should hold LUNA16's subset0 … subset9: name yours with {flag} DIR"
        )
    found, missing = ScanListing(), []
    for subset in subsets:
        folder = os.path.join(root, f"subset{subset}")
        if not os.path.isdir(folder):
            missing.append(subset)
            continue
        for name in sorted(os.listdir(folder)):
            if name.lower().endswith((".mhd", ".mha")) and not name.startswith("."):
                where = printable(f"subset{subset}/{name}")
                uid = safe_uid(os.path.splitext(os.path.basename(where))[0])
                found.sources.append(ScanSource(uid, where, (os.path.join(folder, name),), subset))
    if not found.sources:
        raise UserError(
            f"{root}: no subset*/UID.mhd there for subsets {','.join(map(str, subsets))}; LUNA16's subsets "
            f"lie in subset0 … subset9: name the folder above them with {flag} DIR, or choose other subsets"
        )
    return _unique(found), missing


def find_scans(
    roots: list[str], out: str, exclude: tuple[str, ...] = (), allow_gaps: bool = False, flag: str = "--scans"
) -> ScanListing:
    """All scans below `roots`, except in `out` and in files that match a pattern of `exclude`.

    No file is taken twice, even if one root is inside another or links lead to it: the first name counts. `flag` is the
    option that named the roots, for messages. Raises UserError when there is no image at all.
    """
    found, series = ScanListing(), defaultdict[str, list[tuple[str, Slice]]](list)
    roots = _outermost(roots, out)
    folders: set[str] = set()
    names: dict[str, str] = {}  # by real path
    for root in roots:
        if not os.path.isdir(root):
            raise UserError(f"{root}: no such folder; name the folder of your scans with {flag} DIR")
        if os.path.realpath(root) == os.path.realpath(out):
            raise UserError(
                f"{out}: shards get a folder of their own, not that of the scans: name it with --out DIR"
            )
        above = os.path.basename(os.path.abspath(root)) + "/" if len(roots) > 1 else ""
        for path in walk(root, out, folders):
            name = printable(above + os.path.relpath(path, root))
            if any(fnmatch.fnmatch(name, pattern) for pattern in exclude):
                continue
            first = names.setdefault(os.path.realpath(path), name) if os.path.exists(path) else name
            if first is name:
                _classify(path, name, found, series)
            elif name.lower().endswith(IMAGES):
                found.left_out.append((name, f"the same file as {first}"))
    for uid, members in sorted(series.items()):
        _add_series(uid, members, found, allow_gaps)
    if not (found.sources or found.bad or found.left_out):
        raise UserError(
            f"{', '.join(roots)}: no MetaImage, NIfTI, NRRD or DICOM there ({found.not_images} other files): "
            f"name the folder of your scans with {flag} DIR"
        )
    return _unique(found)


def _outermost(roots: list[str], out: str) -> list[str]:
    """The roots without those that are searched with another one, being the same folder or below it."""
    skipped = os.path.realpath(out)
    distinct = {os.path.realpath(root): root for root in roots}

    def inside(real: str, other: str) -> bool:
        below = os.path.relpath(real, other).split(os.sep)
        hidden = any(name.startswith(".") for name in below)  # or `..`: it lies elsewhere
        return real != other and not hidden and not f"{real}/".startswith(f"{skipped}/")

    return [root for real, root in distinct.items() if not any(inside(real, other) for other in distinct)]


def walk(root: str, out: str, seen: set[str] | None = None) -> Iterator[str]:
    """Yield the files below `root` in a fixed order, without hidden ones and `out`; links are followed, loops are not.

    Folders whose real path is in `seen` are skipped; those that are searched are added to it.
    """
    seen, skip = set() if seen is None else seen, os.path.realpath(out)
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen or real == skip:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(folder, name) for name in sorted(files) if not name.startswith("."))


def printable(name: str) -> str:
    """A path as one line of valid text, whatever bytes the file system has in it."""
    name = name.replace(os.sep, "/").replace("\n", "\\n").replace("\r", "\\r")
    return name.encode(errors="backslashreplace").decode()


def _is_text(path: str) -> bool:
    try:
        return bool(path.encode())
    except UnicodeEncodeError:
        return False


def _classify(path: str, name: str, found: ScanListing, series: dict[str, list[tuple[str, Slice]]]) -> None:
    """Add a file to the scans, the bad ones, its DICOM series, or the number of other files."""
    lower = name.lower()
    if not _is_text(path):
        found.bad.append((name, "its path is not UTF-8, which ITK cannot open: rename it"))
        return
    ending = next(
        (ending for ending in sorted(IMAGES, key=len, reverse=True) if lower.endswith(ending)), None
    )
    if ending and os.path.isfile(path):
        found.sources.append(ScanSource(safe_uid(name[: -len(ending)]), name, (path,)))
    elif ending and os.path.islink(path) and not os.path.exists(path):
        found.bad.append((name, "a link to a file that is not there"))
    elif os.path.splitext(lower)[1] in OTHERS or not os.path.isfile(path):
        found.not_images += 1
    else:
        try:
            one = read_slice(path)
        except (BadScan, OSError) as error:
            found.bad.append((name, str(error)))
            return
        if one is None:
            found.not_images += 1
        else:
            series[one.series].append((name, one))


def _add_series(uid: str, members: list[tuple[str, Slice]], found: ScanListing, allow_gaps: bool) -> None:
    """Add a DICOM series to the scans, the bad ones or those left out."""
    folder = os.path.commonpath([os.path.dirname(name) for name, _ in members])
    name = f"{folder or '.'} (series {uid})"
    reasons = {not_a_scan(one) for _, one in members}
    slices = [one for _, one in members if not_a_scan(one) is None]
    if not slices:
        found.left_out.append((name, ", ".join(sorted(reason for reason in reasons if reason))))
        return
    try:
        ordered, grid = order_series(slices, allow_gaps)
    except BadScan as error:
        found.bad.append((name, str(error)))
        return
    exact = all(float(number).is_integer() for one in ordered for number in one.rescale)
    found.sources.append(
        ScanSource(safe_uid(uid), name, tuple(one.path for one in ordered), grid=grid, exact=exact)
    )


def safe_uid(text: str) -> str:
    """A name that is valid in every file system and tar; if it had to be changed, with a hash of the original."""
    clean = re.sub(r"[^A-Za-z0-9._-]", "_", text.replace("/", "_")).lstrip(".-") or "_"
    if clean == text.replace("/", "_") and len(clean) <= UID_LENGTH:
        return clean
    return f"{clean[: UID_LENGTH - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _unique(found: ScanListing) -> ScanListing:
    """Keep the first of the scans with one uid; the others are bad, since the uid names the shard."""
    first: dict[str, ScanSource] = {}
    for source in sorted(found.sources, key=lambda source: source.name):
        kept = first.setdefault(source.uid, source)
        if kept is not source:
            found.bad.append(
                (source.name, f"has the same uid as {kept.name}, which is cut: rename or remove one")
            )
    found.sources = sorted(first.values(), key=lambda source: source.uid)
    found.bad.sort()
    found.left_out.sort()
    return found
