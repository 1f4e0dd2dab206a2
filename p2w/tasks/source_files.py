"""Source files of target tasks: tables of candidates and splits (CSV), images with their masks."""

import csv
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from p2w.ct.discover import IMAGES, ScanListing, ScanSource, SearchOptions, find_scans
from p2w.ct.orientation import BadScan, Grid
from p2w.ct.scan import ImageVolume, read_image, straightened
from p2w.ct.scan_folders import printable, safe_uid, walk
from p2w.errors import UserError
from p2w.files import file_crc32c
from p2w.tasks import crops
from p2w.tasks.task import SPLITS, CandidatePoint, Case, Cases, Triple


def read_csv(path: str, columns: Sequence[Sequence[str]]) -> Iterator[tuple[int, list[str]]]:
    """Line number and the values of the columns asked for; each column by any of its names, in any case.

    Values are separated by commas, or by tabs in a .tsv. A column whose names end with "" may be missing: its values are
    "" then. Of several columns that name the scan the first name counts. Raises UserError, also for other columns that are
    there twice, by one name or by two with different values, and for quotes that do not end.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            tabs = path.lower().endswith((".tsv", ".tab"))
            rows = csv.reader(file, delimiter="\t" if tabs else ",", strict=True)
            head = [name.strip().lower() for name in next(rows, [])]
            at = [_columns(path, head, names) for names in columns]
            for row in rows:
                if not any(value.strip() for value in row):
                    continue
                if len(row) != len(head):
                    raise UserError(
                        f"{path}, line {rows.line_num}: {len(row)} values, its head has {len(head)}"
                    )
                for same in at:
                    if len({row[i].strip() for i in same}) > 1:
                        both = " and ".join(f"{head[i]} {row[i].strip()!r}" for i in same)
                        raise UserError(
                            f"{path}, line {rows.line_num}: {both} differ, and either may be meant: remove a column"
                        )
                yield rows.line_num, [row[same[0]].strip() if same else "" for same in at]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: is no CSV table ({error})") from error


def _columns(path: str, head: list[str], names: Sequence[str]) -> list[int]:
    """The numbers of the columns that a value is in; of those that name the scan the first alone. Raises UserError."""
    for name in names:
        if head.count(name.lower()) > 1:
            raise UserError(f"{path}: has the column {name} twice in its head: remove one")
    found = [head.index(name.lower()) for name in names if name.lower() in head]
    if found:
        return found[:1] if "scan" in names else found
    if "" in names:
        return []
    remedy = "; values have to be separated by commas" if any(";" in name for name in head) else ""
    raise UserError(f"{path}: no column {names[0]} in its head ({', '.join(head)[:200]}){remedy}")


def parse_number(path: str, line: int, name: str, text: str) -> float:
    """The text as a finite number. Raises UserError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{path}, line {line}: {name} {text!r} is no number")
    return value


def parse_label(path: str, line: int, text: str) -> int:
    """The label 0 or 1. Raises UserError."""
    if text not in ("0", "1", "0.0", "1.0"):
        raise UserError(f"{path}, line {line}: class {text!r}: 0 or 1")
    return int(text[0])


def file_checksum(path: str) -> str:
    """CRC-32C of a file, as manifests spell it. Raises UserError."""
    try:
        with open(path, "rb", buffering=0) as file:
            return f"crc32c:{file_crc32c(file):08x}"
    except OSError as error:
        raise UserError(f"{os.fspath(path)}: cannot be read ({error.strerror})") from error


APART = 0.1  # voxels that a corner of the mask may be away from the image's


def files_below(root: str, out: str) -> dict[str, str]:
    """Name (relative, with /) -> path of every image file below a folder, in a fixed order; `out` is passed over."""
    paths = {printable(os.path.relpath(path, root)): path for path in walk(root, out)}
    return {name: path for name, path in paths.items() if name.lower().endswith(IMAGES)}


def file_stem(name: str) -> str:
    """A file's name without the ending of its format."""
    ending = max((ending for ending in IMAGES if name.lower().endswith(ending)), key=len, default="")
    return name[: len(name) - len(ending)] if ending else name


def matching(pattern: str, names: Iterable[str]) -> dict[str, str]:
    """Names that match a pattern, by what its `*` stands for. The pattern is that of a path below the folder, or of its end.

    Raises UserError for a pattern without exactly one `*`, and where two names match with one text.
    """
    if pattern.count("*") != 1:
        raise UserError(
            f"pattern {pattern!r}: has to have one *, which stands for the case, such as '*_ct.nii.gz'"
        )
    before, after = (re.escape(part) for part in pattern.split("*"))
    found: dict[str, str] = {}
    for name in names:
        if match := re.fullmatch(f"(?:.*/)??{before}(.+){after}", name) or re.fullmatch(
            f"{before}(.+){after}", name
        ):
            if match[1] in found:
                raise UserError(
                    f"pattern {pattern!r}: {found[match[1]]} and {name} both are case {match[1]!r}: rename one"
                )
            found[match[1]] = name
    return found


def first_of(names: Iterable[str]) -> str:
    """How many names there are and the first of them, for a message."""
    ordered = sorted(names)
    return f"{len(ordered)} files, the first {ordered[0]}" if len(ordered) > 1 else ordered[0]


def as_source(name: str, path: str, uid: str | None = None) -> ScanSource:
    """An image file as a scan to be read."""
    return ScanSource(safe_uid(uid or file_stem(name)), name, (path,))


def read_mask(
    source: ScanSource, grid: Grid, shape: tuple[int, ...], labels: tuple[int, ...], resample: bool
) -> tuple[NDArray[np.integer], ImageVolume]:
    """The mask as 0 and 1 on an image's grid, and the file; `labels`: what is foreground, () for all but 0.

    Raises BadScan when it holds anything but whole numbers, or negative ones and `labels` names none, or lies elsewhere
    than the image and is not to be resampled (by nearest neighbour).
    """
    image = read_labels(source)
    if not labels and (low := image.values.min()) < 0:
        raise BadScan(
            f"mask {source.name}: holds values from {low:g}: is it an image? name the values that are foreground, --labels"
        )
    mask = (np.isin(image.values, labels) if labels else image.values != 0).astype(np.uint8)
    return on_grid(mask, image.grid, source, grid, shape, resample), image


def read_labels(source: ScanSource) -> ImageVolume:
    """A mask file with its values unchanged. Raises BadScan when it cannot be read, or holds anything but whole numbers."""
    try:
        image = read_image(source)
    except BadScan as error:
        raise BadScan(f"mask {source.name}: {error}") from error
    values = image.values
    if values.dtype.kind == "f" and (values != np.rint(values)).any():
        raise BadScan(f"mask {source.name}: values that are no whole numbers: it is no mask")
    return image


def on_grid(
    mask: NDArray[np.integer],
    own: Grid,
    source: ScanSource,
    grid: Grid,
    shape: tuple[int, ...],
    resample: bool,
) -> NDArray[np.integer]:
    """A mask on its grid `own` as one on an image's grid.

    Raises BadScan where it lies elsewhere than the image, unless it is to be resampled (by nearest neighbour).
    """
    said = apart(grid, own)
    if said is None:
        return mask
    if not resample:
        raise BadScan(
            f"mask {source.name}: {said}; --resample-masks lays it over the image by nearest neighbour"
        )
    return _laid_over(mask, own, grid, shape)


def apart(one: Grid, other: Grid) -> str | None:
    """How two grids differ, as the end of a sentence; None when they are the same to a tenth of a voxel."""
    if one.size != other.size:
        sizes = [" x ".join(map(str, grid.size)) for grid in (other, one)]
        return f"is of {sizes[0]} voxels (x, y, z), its image of {sizes[1]}"
    last = np.array(one.size[::-1]) - 1
    corners = np.stack(np.meshgrid(*[[0, n] for n in last], indexing="ij"), -1).reshape(-1, 3)
    gap = crops.to_voxel(one, crops.to_world(other, corners)) - corners
    most = float(np.abs(gap).max())
    return f"lies up to {most:.1f} voxels away from its image" if most > APART else None


def _laid_over(
    mask: NDArray[np.integer], of: Grid, grid: Grid, shape: tuple[int, ...]
) -> NDArray[np.integer]:
    """The mask resampled to another grid by nearest neighbour, 0 beyond the mask."""
    from scipy import ndimage  # noqa: PLC0415  scipy takes long to import, and ranks need none of it

    to, start = crops.affine(grid)
    origin = crops.to_voxel(of, start)
    matrix = np.stack([crops.to_voxel(of, start + to[:, axis]) - origin for axis in range(3)], axis=1)
    return ndimage.affine_transform(mask, matrix, origin, output_shape=shape, order=0, mode="grid-constant")


COLUMNS = (
    ("series", "seriesuid", "scan"), ("x", "coordX"), ("y", "coordY"), ("z", "coordZ"), ("label", "class"),
    ("patient", "patientid", ""), ("fold", ""), ("split", ""),
)  # fmt: skip
FORM = "a table patient,series,x,y,z,label,fold"


@dataclass
class Series:
    """The rows of the table for one scan."""

    line: int
    patient: str
    fold: int
    split: str
    candidates: list[CandidatePoint] = field(default_factory=list)


def cases_of(source: str, out: str, table: str, ras: bool, resample: bool = False) -> Cases:
    """One case for each scan below `source` that the table names. Raises UserError for a table that breaks its rules."""
    listed = read_table(table, ras)
    found = find_scans([source], out, flag="--source", options=SearchOptions(resample=resample))
    found.sources = [straightened(scan) for scan in found.sources] if resample else found.sources
    cases = Cases(bad=list(found.bad), left_out=list(found.left_out))
    cases.tables = {os.path.basename(table): file_checksum(table)}
    names = scans_by_name(found)
    for series, entry in sorted(listed.items()):
        scan = names.get(series)
        if scan is None:
            cases.bad.append((series, f"is not below {source}, but in line {entry.line} of the table"))
            continue
        candidates = tuple(entry.candidates)
        files = (("ct", scan),)
        cases.cases.append(
            Case(scan.uid, scan.name, entry.patient, files, (), candidates, entry.split, entry.fold)
        )
    unlisted = len(found.sources) - len(cases.cases)
    if unlisted:
        cases.left_out.append((source, f"{unlisted} scans that the table does not name"))
    return cases


def scans_by_name(found: ScanListing) -> dict[str, ScanSource]:
    """Scans by every name that a table may use: uid, path below the folder, and file name where only one scan has it."""
    names: dict[str, list[ScanSource]] = {}
    for scan in found.sources:
        stem = file_stem(scan.name)
        series = scan.info.series or scan.uid
        for name in {scan.uid, series, scan.name, stem, os.path.basename(stem), os.path.basename(scan.name)}:
            names.setdefault(name, []).append(scan)
    return {name: scans[0] for name, scans in names.items() if len(scans) == 1}


def read_table(path: str, ras: bool) -> dict[str, Series]:
    """Series -> its candidates, world mm in LPS. Raises UserError where a series or patient is in two folds or splits."""
    listed: dict[str, Series] = {}
    split_of: dict[str, tuple[int, str, int]] = {}
    for line, (series, x, y, z, label, patient, fold, split) in read_csv(path, COLUMNS):
        if not series:
            raise UserError(f"{path}, line {line}: no series")
        own = patient or series
        at = parse_fold(path, line, fold), parse_split(path, line, split)
        entry = listed.setdefault(series, Series(line, own, *at))
        if entry.patient != own:
            raise UserError(
                f"{path}, line {line}: series {series} is of patient {own}, in line {entry.line} of another"
            )
        before = split_of.setdefault(own, (*at, line))
        if before[:2] != at:
            raise UserError(f"{path}, line {line}: patient {own} is in fold or split {fold or split}, in line "
                            f"{before[2]} in another: a patient has one")  # fmt: skip
        mm = [parse_number(path, line, axis, text) for axis, text in zip("xyz", (x, y, z), strict=True)]
        xyz: Triple = (-mm[0], -mm[1], mm[2]) if ras else (mm[0], mm[1], mm[2])
        entry.candidates.append(
            CandidatePoint(f"{os.path.basename(path)}:{line}", xyz, parse_label(path, line, label))
        )
    if not listed:
        raise UserError(f"{path}: has no candidate; {FORM} is needed")
    return listed


def parse_fold(path: str, line: int, text: str) -> int:
    """The fold of a row, -1 for none. Raises UserError."""
    if text in ("", "-1"):
        return -1
    if not text.isdecimal() or int(text) > 99:
        raise UserError(f"{path}, line {line}: fold {text!r}: a number from 0, or nothing in all lines")
    return int(text)


def parse_split(path: str, line: int, text: str) -> str:
    """The split of a row, "" for none. Raises UserError."""
    if text and text not in SPLITS:
        raise UserError(
            f"{path}, line {line}: split {text!r}: one of {', '.join(SPLITS)}, or nothing in all lines"
        )
    return text
