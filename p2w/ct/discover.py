"""Find the scans in a folder: in LUNA16's layout, or in any tree of MetaImage, NIfTI, NRRD and DICOM files.

Every file is accounted for: it belongs to a scan, to something bad or left out, or is passed over for a reason.
"""

import fnmatch
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from p2w.ct.dicom import NO_POSITION, SeriesInfo, Slice, not_a_scan, read_slice, starts_as_dicom
from p2w.ct.dicom_series import DicomVolume, people_apart, volumes_of, without_scouts
from p2w.ct.enhanced_dicom import frames_of
from p2w.ct.meta_image import meta_image_files
from p2w.ct.orientation import BadScan, Grid, reason_of
from p2w.ct.scan_folders import is_text, names_of_roots, outermost_roots, printable, safe_uid, walk
from p2w.ct.voxel_files import nrrd_files
from p2w.errors import UserError

IMAGES = (".mhd", ".mha", ".nii", ".nii.gz", ".nrrd", ".nhdr")
# Files of these endings are hardly ever scans: only their first bytes are read, to see whether they are DICOM.
ENDINGS = {
    "tables, notes and programs": ".csv .txt .md .json .xml .py .pdf .html .parquet",
    "pictures": ".png .jpg .jpeg .gif .bmp .tif",
    "archives: unpack them": ".zip .tar .7z .rar .tgz",
    "packed files: unpack them": ".gz .bz2 .xz .zst",
    "Analyze or NIfTI pairs (.hdr, .img): convert them to .nii": ".hdr .img",
    "voxels without a header (.raw)": ".raw .zraw .bin",
    "NumPy arrays, which have no geometry": ".npy .npz",
    "volumes of FreeSurfer or MINC: convert them to .nii": ".mgz .mgh .mnc",
    "shards": ".arrow",
}
OTHERS = {ending: reason for reason, endings in ENDINGS.items() for ending in endings.split()}
NO_IMAGE = "files that are no images"
NO_PIXELS = "DICOM without pixels (reports, plans, DICOMDIR)"
COPIES = "copies of another DICOM file"
HIDDEN = "hidden files and folders (names that begin with a dot)"
SCOUTS = "DICOM images: a localizer (of another orientation than all others of its series)"


@dataclass(frozen=True)
class ScanSource:
    """The files of one scan. `name` is for messages: a path relative to the folder that the user named."""

    uid: str
    name: str
    files: tuple[str, ...]  # one image header, or the slices of a DICOM series in order
    subset: int = -1  # number of LUNA16's subset, -1 for other data
    grid: Grid | None = None  # of a DICOM series, from its headers; None for image files
    exact: bool = True  # False: DICOM values need float, since a slope or intercept is not an integer
    info: SeriesInfo = SeriesInfo()  # noqa: RUF009 (frozen)
    assume_hu: bool = False  # take the values for HU without a test
    # Of slices that have to be resampled: where they lie (x, y, z in mm), and why.
    positions: tuple[tuple[float, ...], ...] = ()
    resampled: str = ""
    # Of a multi-frame series: for each slice, the number of its file and of its frame.
    frames: tuple[tuple[int, int], ...] = ()


@dataclass
class ScanListing:
    """The scans of a folder. `bad` and `left_out` are (name, why); those left out are sound images, but not CT volumes.

    `files` counts all files seen, `passed_over` those that belong to no scan, by reason.
    """

    sources: list[ScanSource] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    not_images: int = 0
    files: int = 0
    passed_over: Counter[str] = field(default_factory=Counter)
    # By name: what is known of series that are no scans
    infos: dict[str, ScanSource] = field(default_factory=dict)

    def table(self) -> list[str]:
        """Lines that account for every file seen: how many are images that are read, and why others are passed over."""
        read = self.files - self.passed_over.total()
        lines = [
            f"files seen     {self.files:,}",
            f"  read         {read:,} files of {len(self.sources):,} scans",
        ]
        for reason, count in sorted(self.passed_over.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"  passed over  {count:,}: {reason}")
        return lines


@dataclass(frozen=True)
class SearchOptions:
    """How folders are searched for scans."""

    exclude: tuple[str, ...] = ()  # patterns of relative paths
    allow_gaps: bool = False  # take series with missing slices, as if their slices were adjacent
    resample: bool = False  # take series of tilted or uneven slices, to be resampled
    assume_hu: bool = False  # take values for HU without a test
    salt: str = ""  # of the hashes in SeriesInfo
    modality: str = "CT"  # of the DICOM series that are scans, others are left out: CT, MR or PT


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
    roots: list[str],
    out: str,
    exclude: tuple[str, ...] = (),
    allow_gaps: bool = False,
    flag: str = "--scans",
    options: SearchOptions | None = None,
) -> ScanListing:
    """All scans below `roots`, except in `out` and in files that match a pattern of `exclude`.

    No file is taken twice, even if one root is inside another or links lead to it: the first name counts. `flag` is the
    option that named the roots, for messages; `options` has more settings, in place of `exclude` and `allow_gaps`. Raises
    UserError when there is no image at all.
    """
    search = _Search(options or SearchOptions(exclude, allow_gaps))
    found = search.found
    roots = outermost_roots(roots, out)
    folders: set[str] = set()
    names: dict[str, str] = {}  # by real path
    for root in roots:
        if not os.path.isdir(root):
            raise UserError(f"{root}: no such folder; name the folder of your scans with {flag} DIR")
        if out and os.path.realpath(root) == os.path.realpath(out):
            raise UserError(
                f"{out}: shards get a folder of their own, not that of the scans: name it with --out DIR"
            )
    for root, above in zip(roots, names_of_roots(roots), strict=True):
        for path in walk(root, out, folders, search.unreadable(root, above), search.count_hidden):
            name = printable(above + os.path.relpath(path, root))
            found.files += 1
            if any(fnmatch.fnmatch(name, pattern) for pattern in search.options.exclude):
                found.passed_over["excluded (--exclude)"] += 1
                continue
            first = names.setdefault(os.path.realpath(path), name) if os.path.exists(path) else name
            if first is name:
                search.classify(path, name)
            else:
                found.passed_over["the same files as others, by links"] += 1
                if name.lower().endswith(IMAGES):
                    found.left_out.append((name, f"the same file as {first}"))
    search.finish()
    if not (found.sources or found.bad or found.left_out):
        raise UserError(
            f"{', '.join(roots)}: no MetaImage, NIfTI, NRRD or DICOM there ({found.not_images} other files"
            f"{_reasons(found)}): name the folder of your scans with {flag} DIR"
        )
    return _unique(found)


def _reasons(found: ScanListing) -> str:
    """Why files were passed over, where there is more to say than that they are no images."""
    counted = [
        f"{count} {reason}" for reason, count in found.passed_over.items() if reason in set(OTHERS.values())
    ]
    return f"; {', '.join(counted)}" if any(":" in reason for reason in counted) else ""


NO_POSITIONS = (
    "{} of {} slices without a position in space (ImagePositionPatient); SliceLocation does not replace it, since it says "
    "nothing of x and y and may be counted from anywhere: export the series from its archive again"
)


class _Search:
    """The listing while files are looked at one after the other; series are put together at the end."""

    def __init__(self, options: SearchOptions) -> None:
        self.options = options
        self.found = ScanListing()
        self.series: dict[str, list[tuple[str, Slice]]] = defaultdict(list)
        self.nameless: list[str] = []  # DICOM images without a SeriesInstanceUID
        self.voxel_files: dict[str, str] = {}  # path -> name, of files that may be another's voxels
        # Folder, kind of fault
        self.damaged: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)

    def pass_over(self, reason: str) -> None:
        """Count a file that belongs to no scan."""
        self.found.passed_over[reason] += 1
        self.found.not_images += 1

    def count_hidden(self, count: int) -> None:
        """Account for hidden files and folders, which are not looked into."""
        if count:
            self.found.files += count
            self.found.passed_over[HIDDEN] += count

    def unreadable(self, root: str, above: str) -> Callable[[OSError], None]:
        """A function that names a folder below `root` that cannot be read among the bad ones."""

        def name_it(error: OSError) -> None:
            name = printable(above + os.path.relpath(str(error.filename), root))
            self.found.bad.append((name, f"the folder cannot be read ({error.strerror}), nor what is in it"))

        return name_it

    def classify(self, path: str, name: str) -> None:
        """Add a file to the scans, the bad ones, its DICOM series, or the number of other files."""
        found, lower = self.found, name.lower()
        if not is_text(path):
            self.bad_file(name, "its path is not UTF-8, which ITK cannot open: rename it")
            return
        ending = next(
            (ending for ending in sorted(IMAGES, key=len, reverse=True) if lower.endswith(ending)), None
        )
        if ending and os.path.isfile(path):
            uid = safe_uid(name[: -len(ending)])
            found.sources.append(ScanSource(uid, name, (path,), assume_hu=self.options.assume_hu))
        elif ending and os.path.islink(path) and not os.path.exists(path):
            self.bad_file(name, "a link to a file that is not there")
        elif not os.path.isfile(path):
            self.pass_over("no files (folders, pipes, broken links)")
        else:
            self._dicom(path, name)

    def _dicom(self, path: str, name: str) -> None:
        """Add a file to its DICOM series, if it is one, whatever its name."""
        ending = os.path.splitext(name.lower())[1]
        reason = OTHERS.get(ending)
        try:
            with open(path, "rb") as file:
                dicom = starts_as_dicom(file.read(132))
            one = read_slice(path, self.options.modality) if dicom or not reason or ending == ".gz" else None
        except (BadScan, OSError) as error:
            self.bad_file(name, reason_of(error))
            return
        if one is None and reason:
            self._other(path, name, ending, reason)
        elif one is None:
            self.pass_over(NO_PIXELS if dicom else NO_IMAGE)
        elif not one.series and not_a_scan(one, self.options.modality) is None:
            self.nameless.append(name)
        elif not one.series:
            self.pass_over(
                f"DICOM images without SeriesInstanceUID: {not_a_scan(one, self.options.modality)}"
            )
        else:
            self.series[one.series].append((name, one))

    def _other(self, path: str, name: str, ending: str, reason: str) -> None:
        if ending in (".raw", ".zraw", ".gz", ".img", ".txt", ".bin"):
            self.voxel_files[os.path.realpath(path)] = name
        self.pass_over(reason)

    def bad_file(self, name: str, why: str) -> None:
        """Remember a damaged file; those of one folder and one kind of fault become one line."""
        self.damaged[os.path.dirname(name), re.sub(r"[\d,]+", "", why)].append((name, why))
        self.found.passed_over["damaged files"] += 1

    def finish(self) -> None:
        """Put series together, and name what could not be used."""
        found = self.found
        for (folder, _), files in self.damaged.items():
            if len(files) == 1:
                found.bad.append(files[0])
            else:
                name, why = files[0]
                found.bad.append(
                    (folder or ".", f"{len(files)} files, the first {os.path.basename(name)}: {why}")
                )
        folders = Counter(os.path.dirname(name) or "." for name in self.nameless)
        for folder, count in folders.items():
            why = f"{count} CT images without a SeriesInstanceUID, so nothing says which belong together: give them one"
            found.bad.append((f"{folder} (no series)", why))
            found.passed_over["CT images without SeriesInstanceUID"] += count
        for uid, members in sorted(self.series.items()):
            self._add_series(uid, members)
        self._name_voxel_files()

    def _name_voxel_files(self) -> None:
        """Count voxel files that a header names among the files that are read."""
        if not self.voxel_files:
            return
        for source in self.found.sources:
            path = source.files[0]
            lower = path.lower()
            try:
                own = meta_image_files(path) if lower.endswith((".mhd", ".mha")) else ()
                own = nrrd_files(path) if lower.endswith((".nhdr", ".nrrd")) else own
            except (BadScan, OSError):
                continue
            for file in own:
                name = self.voxel_files.pop(os.path.realpath(file), None)
                if name is not None:
                    reason = OTHERS[os.path.splitext(name.lower())[1]]
                    self.found.passed_over[reason] -= 1
                    self.found.passed_over += Counter()  # drops reasons of which nothing is left

    def _add_series(self, uid: str, members: list[tuple[str, Slice]]) -> None:
        """Add a DICOM series to the scans, the bad ones or those left out."""
        found = self.found
        name = _series_name(uid, [name for name, _ in members])
        reasons = Counter(reason for _, one in members if (reason := not_a_scan(one, self.options.modality)))
        for reason, count in reasons.items():
            found.passed_over[f"DICOM images: {reason}"] += count
        slices = [(name, one) for name, one in members if not_a_scan(one, self.options.modality) is None]
        sizes = {(one.rows, one.columns) for _, one in slices or members}
        lost = [
            (one.rows, one.columns) in sizes
            for _, one in members
            if not_a_scan(one, self.options.modality) == NO_POSITION
        ]
        if any(lost):  # a volume that lost slices, which at its ends would leave no gap
            found.bad.append((name, NO_POSITIONS.format(sum(lost), sum(lost) + len(slices))))
            found.passed_over["slices of bad series"] += len(slices)
        elif not slices:
            found.left_out.append((name, ", ".join(sorted(reasons))))
        if any(lost) or not slices:
            self._remember(name, [one for _, one in members])
            return
        names = {one.path: name for name, one in slices}
        groups = people_apart([one for _, one in slices])
        for number, group in enumerate(groups, start=1):
            own = _series_name(uid, [names[one.path] for one in group])
            if len(groups) > 1:
                own += " of several patients or studies under this uid"
            frames: list[Slice] = []
            try:
                every = frames_of(group, self.options.modality)
                frames = without_scouts(every)
                if len(frames) < len(every):
                    found.passed_over[SCOUTS] += len(
                        {one.path for one in every} - {one.path for one in frames}
                    )
                volumes = volumes_of(frames, self.options.allow_gaps, self.options.resample)
            except (BadScan, OSError) as error:
                found.bad.append((own, reason_of(error)))
                self._remember(own, group)
                found.passed_over["slices of bad series"] += len({one.path for one in frames or group})
                continue
            for volume in volumes:
                self._add_volume(uid, own, volume, number if len(groups) > 1 else 0)

    def _remember(self, name: str, slices: list[Slice]) -> None:
        """Keep what headers say of a series that is no scan, for the table of series."""
        files = tuple(one.path for one in slices)
        self.found.infos[name] = ScanSource("", name, files, info=slices[0].info(self.options.salt))

    def _add_volume(self, uid: str, name: str, volume: DicomVolume, group: int) -> None:
        """Add a scan; `group` is the number of its patient under this uid, 0 where there is one."""
        first = volume.slices[0]
        exact = all(float(number).is_integer() for one in volume.slices for number in one.rescale)
        own = uid
        if group:  # by a hash of what is unique to it, since the uid is not
            tells = (
                f"{first.study}|{first.frame_of_reference}|{first.instance}|{first.position}|{name}|{group}"
            )
            own += "-" + hashlib.sha256(tells.encode()).hexdigest()[:8]
        if volume.part:
            own += "-" + volume.part.replace(" ", "_")
            name = f"{name}, {volume.part}"
        files = tuple(dict.fromkeys(one.path for one in volume.slices))
        number = {path: i for i, path in enumerate(files)}
        frames = tuple((number[one.path], one.frame) for one in volume.slices)
        if volume.copies:
            self.found.passed_over[COPIES] += volume.copies
        self.found.sources.append(
            ScanSource(
                safe_uid(own),
                name,
                files,
                grid=volume.grid,
                exact=exact,
                info=first.info(self.options.salt, volume.part),
                assume_hu=self.options.assume_hu,
                positions=volume.positions,
                resampled=volume.resampled,
                frames=frames if any(one.has_groups for one in volume.slices) else (),
            )
        )


def _series_name(uid: str, names: list[str]) -> str:
    """The folder that the files of a series have in common, and its uid."""
    folder = os.path.commonpath([os.path.dirname(name) for name in names])
    return f"{folder or '.'} (series {uid})"


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
