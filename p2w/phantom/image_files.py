"""Phantom scans as files: LUNA16's own layout (`write_luna`), and NIfTI volumes with masks in LPS order.

OUT/
  phantom.json           settings of this folder: seed, version, shape, subsets, scans
  subset0/UID.mhd        header; written last, so a scan that has it is complete
  subset0/UID.raw        int16 HU, little-endian, z y x
  masks/UID.mha          label map (labels.Label), uint8, compressed, same geometry
  masks/UID.json         nodules and candidates of this scan, from which the two tables are made
  annotations.csv        seriesuid,coordX,coordY,coordZ,diameter_mm
  candidates_V2.csv      seriesuid,coordX,coordY,coordZ,class

Every eighth scan is stored as some scans of LUNA16 are: rows and columns reversed, with the direction
matrix -1 0 0 0 -1 0 0 0 1 to say so. World positions do not change by it.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from p2w.errors import UserError
from p2w.files import write_atomic
from p2w.phantom.chest import PhantomScan, Triple, check_phantom, make_scan

VERSION = 1  # of the phantom: raised when the same seed gives other bytes
_FLIP_EVERY, _FLIP_AT = 8, 3


@dataclass(frozen=True)
class PhantomJob:
    """One scan to write."""

    out: Path
    index: int
    seed: int
    shape: tuple[int, int, int]
    spacing_mm: Triple | None
    subsets: int
    varied: bool = False

    @property
    def uid(self) -> str:
        """A legal DICOM UID under 2.25 (made from a UUID; no organisation's root), a function of seed and
        index."""
        name = f"p2w phantom {VERSION} seed {self.seed} scan {self.index}{' varied' * self.varied}"
        return f"2.25.{uuid.uuid5(uuid.NAMESPACE_URL, name).int}"

    @property
    def header(self) -> Path:
        """Path of the scan's .mhd."""
        return self.out / f"subset{self.index % self.subsets}" / f"{self.uid}.mhd"

    @property
    def record(self) -> Path:
        """Path of the JSON with the scan's nodules and candidates."""
        return self.out / "masks" / f"{self.uid}.json"


def write_luna(
    out: Path,
    scans: int,
    seed: int,
    *,
    shape: tuple[int, int, int] = (128, 256, 256),
    spacing_mm: Triple | None = None,
    subsets: int = 10,
    workers: int = 1,
    varied: bool = False,
    done: Callable[[str], None] | None = None,
) -> list[str]:
    """Write `scans` phantoms of `shape` (z, y, x) under `out`; returns their uids and calls `done(uid)`
    after each.

    The bytes depend on seed, shape and spacing alone, not on `workers`. Scans that are there already are
    kept, so the same call after an interruption completes the folder. Raises UserError when `out` holds
    anything else, or for settings that make no scan.
    """
    check_phantom(seed, shape, spacing_mm)
    for name, value, low in (("scans", scans, 1), ("subsets", subsets, 1), ("workers", workers, 1)):
        if value < low:
            raise UserError(f"phantom: --{name} {value} is too few; give {low} or more")
    identity = {
        "what": "synthetic chest CTs in LUNA16's layout; no patient is shown",
        "version": VERSION,
        "seed": seed,
        "shape_zyx": list(shape),
        "spacing_mm_zyx": None if spacing_mm is None else list(spacing_mm),
        "subsets": subsets,
    } | ({"varied": True} if varied else {})
    jobs = [PhantomJob(out, i, seed, shape, spacing_mm, subsets, varied) for i in range(scans)]
    _claim(out, identity, jobs)
    for job in jobs:
        job.header.parent.mkdir(parents=True, exist_ok=True)
    (out / "masks").mkdir(exist_ok=True)
    todo = [job for job in jobs if not (job.header.exists() and job.record.exists())]
    for uid in chain(
        (job.uid for job in jobs if job not in todo), in_workers(_write_scan, [*zip(todo)], workers)
    ):
        if done is not None:
            done(uid)
    _write_tables(out, jobs)

    return [job.uid for job in jobs]


def in_workers(write: Callable[..., str], jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[str]:
    """What `write(*job)` returns for each of the jobs, as they end; with several, in processes of their own."""
    if workers == 1 or len(jobs) < 2:
        yield from (write(*job) for job in jobs)
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), get_context("spawn"), _end_with_parent) as pool:
        try:
            for done in as_completed([pool.submit(write, *job) for job in jobs]):
                yield done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """End this worker when the process that started it is killed; else it would wait for work for ever."""
    parent = parent_process()
    assert parent is not None  # this runs in workers only

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def claim_folder(out: Path, name: str, fits: Callable[[Any], bool]) -> Path:
    """Create `out`, or check that the JSON file `name` in it says the settings that it `fits`; the path of that file.

    Raises UserError for a folder with other files, or with phantoms of other settings.
    """
    note = out / name
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out must be a folder, new or empty")
    if note.exists():
        try:
            same = fits(json.loads(note.read_text()))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{note}: cannot be read ({error}); remove the folder or choose another --out"
            ) from None
        if not same:
            raise UserError(
                f"{out}: holds another phantom (see {name}); remove the folder or choose another --out"
            )
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: is not empty and no phantom (no {name}); choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    return note


def _claim(out: Path, identity: dict, jobs: list[PhantomJob]) -> None:
    """Take `out` for these scans. Raises UserError for a folder with others, or on a disk without room for them."""
    expected = {"varied": False} | identity  # folders of earlier versions do not say it

    def fits(there: Any) -> bool:
        said = {"varied": False} | there
        return all(said[key] == value for key, value in expected.items()) and int(there["scans"]) <= len(jobs)

    note = claim_folder(out, "phantom.json", fits)
    missing = sum(not job.header.exists() for job in jobs)
    need, free = missing * int(np.prod(jobs[0].shape)) * 2.1, shutil.disk_usage(out).free
    if need > free:
        raise UserError(
            f"{out}: {missing} scans take {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room"
        )
    write_atomic(note, json.dumps({**identity, "scans": len(jobs)}, indent=1) + "\n")


def _write_scan(job: PhantomJob) -> str:
    """Make one scan and write its files, the header last."""
    own = int(np.random.SeedSequence([job.seed, job.index]).generate_state(1)[0])
    scan = make_scan(own, job.shape, job.spacing_mm, varied=job.varied)
    flipped = job.index % _FLIP_EVERY == _FLIP_AT
    turn = (slice(None), slice(None, None, -1), slice(None, None, -1)) if flipped else ()
    spacing = scan.spacing_mm[::-1]
    origin = np.array(scan.origin_mm[::-1])
    direction = np.array([-1.0, -1.0, 1.0]) if flipped else np.ones(3)
    last = np.array(job.shape[::-1]) - 1
    origin = np.where(direction < 0, origin + last * spacing, origin)
    labels = sitk.GetImageFromArray(np.ascontiguousarray(scan.labels[turn]))
    labels.SetSpacing(spacing)
    labels.SetOrigin(origin.tolist())
    labels.SetDirection(np.diag(direction).ravel().tolist())
    mask = job.out / "masks" / f"{job.uid}.mha"
    part = mask.with_name(f".{mask.stem}.part.mha")
    try:
        sitk.WriteImage(labels, str(part), useCompression=True, compressionLevel=1)
    except RuntimeError as error:  # what SimpleITK makes of a full disk or a folder it may not write
        raise OSError(f"{mask} cannot be written: {str(error).splitlines()[-1]}") from None
    os.replace(part, mask)
    voxels = np.ascontiguousarray(scan.voxels[turn], "<i2")
    write_atomic(job.header.with_suffix(".raw"), voxels.data)
    write_atomic(job.record, json.dumps(_record(scan), indent=1) + "\n")
    write_atomic(job.header, _header(job, spacing, origin, direction))
    return job.uid


def _record(scan: PhantomScan) -> dict:
    nodules = [
        {"mm_xyz": n.centre_mm[::-1], "diameter_mm": n.diameter_mm, "kind": n.kind} for n in scan.nodules
    ]
    candidates = [{"mm_xyz": c.centre_mm[::-1], "class": int(c.positive)} for c in scan.candidates]
    return {"scan_seed": scan.seed, "nodules": nodules, "candidates": candidates}


def _header(job: PhantomJob, spacing: tuple, origin: np.ndarray, direction: np.ndarray) -> str:
    """A MetaImage header with the keys that LUNA16's have; x, y, z order."""

    def row(values: np.ndarray | tuple) -> str:
        return " ".join(f"{v:.10g}" for v in values)

    return (
        "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
        f"CompressedData = False\nTransformMatrix = {row(np.diag(direction).ravel())}\n"
        f"Offset = {row(origin)}\nCenterOfRotation = 0 0 0\n"
        f"AnatomicalOrientation = RAI\nElementSpacing = {row(spacing)}\nDimSize = {row(job.shape[::-1])}\n"
        f"ElementType = MET_SHORT\nElementDataFile = {job.uid}.raw\n"
    )


def _write_tables(out: Path, jobs: list[PhantomJob]) -> None:
    """Write annotations.csv and candidates_V2.csv from the JSON of all scans, in the order of the scans."""
    nodules, candidates = (
        ["seriesuid,coordX,coordY,coordZ,diameter_mm"],
        ["seriesuid,coordX,coordY,coordZ,class"],
    )
    for job in jobs:
        record = json.loads(job.record.read_text())
        for n in record["nodules"]:
            nodules.append(",".join([job.uid, *(f"{v:.6f}" for v in n["mm_xyz"]), f"{n['diameter_mm']:.6f}"]))
        for c in record["candidates"]:
            candidates.append(",".join([job.uid, *(f"{v:.6f}" for v in c["mm_xyz"]), str(c["class"])]))
    write_atomic(out / "annotations.csv", "\n".join([*nodules, ""]))
    write_atomic(out / "candidates_V2.csv", "\n".join([*candidates, ""]))


def write_image(
    path: Path,
    values: NDArray,
    spacing_zyx: Sequence[float],
    origin_zyx: Sequence[float],
    flipped: bool = False,
) -> None:
    """An image of values [z,y,x] in LPS orientation; with `flipped`, stored with rows, columns and direction reversed."""
    spacing, origin = np.array(spacing_zyx[::-1], float), np.array(origin_zyx[::-1], float)
    image = sitk.GetImageFromArray(np.ascontiguousarray(values[:, ::-1, ::-1] if flipped else values))
    if flipped:
        last = np.array(values.shape[::-1]) - 1
        origin = origin + np.array([1, 1, 0]) * last * spacing
        image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(origin.tolist())
    try:
        sitk.WriteImage(image, str(path), useCompression=True, compressionLevel=1)
    except RuntimeError as error:  # what SimpleITK makes of a full disk or a folder it may not write
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[-1]}") from None


def blob(
    shape: tuple[int, int, int],
    spacing: Sequence[float] | NDArray,
    centre: NDArray,
    radius_mm: float,
    rng: np.random.Generator,
    rough: float = 0.15,
) -> tuple[tuple[slice, slice, slice], NDArray[np.float32]]:
    """An irregular lump at a centre in voxels: its bounding box, and there the depth in mm (negative outside)."""
    step = np.array(spacing)
    reach = (1.6 * radius_mm + 2 * step.max()) / step
    low = np.maximum(np.floor(centre - reach), 0).astype(int)
    high = np.maximum(np.minimum(np.ceil(centre + reach) + 1, shape).astype(int), low)
    box = (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
    grid = np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)), indexing="ij")
    offset = (np.stack(grid, axis=-1) - centre) * step
    stretch = rng.uniform(0.75, 1.3, 3)
    gap = np.linalg.norm(offset * stretch, axis=-1)
    way = offset / (np.linalg.norm(offset, axis=-1, keepdims=True) + 1e-6)
    bumps = sum(np.cos(way @ (rng.normal(size=3) * f) + rng.uniform(0, 6)) for f in (1.5, 2.5, 4.0))
    return box, (radius_mm * (1 + rough / 2 * np.asarray(bumps)) - gap).astype(np.float32)
