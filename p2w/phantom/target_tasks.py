"""Write phantoms of the five target tasks, in the file formats of the real data."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from p2w.errors import UserError, exits
from p2w.files import write_atomic
from p2w.phantom import brats, ct_targets
from p2w.phantom.chest import check_phantom
from p2w.phantom.image_files import claim_folder, in_workers, write_luna
from p2w.progress import Progress, say

USAGE = """Write phantoms of the target tasks, in the formats of LUNA16, LIDC-IDRI, LiTS, a CTPA set and BraTS.

    python -m p2w.phantom.target_tasks --out phantom-targets                        # all five, 20 patients each
    python -m p2w.phantom.target_tasks --out T --tasks lcs bms --patients 40 --shape 64 128 128 --workers 2
    python -m p2w.phantom.target_tasks --out T --tasks dicom                        # a hospital's folder: DICOM, liver masks

Then, for instance:

    p2w prepare lcs --source T/LiTS --out targets/lcs --train 0-23 --val 24-27 --test 28-39
    p2w prepare general --source T/DICOM --images dicom --masks '*_liver.nii.gz' --out targets/liver

Interrupted? The same command completes the folder. Exit code 0: written; 2: it cannot be, one line says why.
"""


VERSION = 2  # raised when the same seed gives other bytes
Shape = tuple[int, int, int]
Writer = Callable[[Path, int, int, Shape], None]  # folder of one patient, seed, number, shape


@dataclass(frozen=True)
class TaskFormat:
    """The functions that write one patient of a task, and the files over all patients."""

    folder: str
    patient: Writer
    finish: Callable[[Path, list[Path]], None] = lambda out, parts: None


TASKS: dict[str, TaskFormat] = {
    "ncc": TaskFormat("LUNA16", lambda *_: None),  # by write_luna
    "ncs": TaskFormat("LIDC-IDRI", ct_targets.write_lidc_patient),
    "lcs": TaskFormat("LiTS", ct_targets.write_lits_patient),
    "ecc": TaskFormat("CTPA", ct_targets.write_ctpa_patient, ct_targets.write_candidate_table),
    "bms": TaskFormat("BraTS", brats.write_brats_patient),
    "organs": TaskFormat("Organs", ct_targets.write_organs_patient, ct_targets.write_organs_table),
    "anatomy": TaskFormat("Anatomy", ct_targets.write_anatomy_patient, ct_targets.write_organs_table),
    "dicom": TaskFormat("DICOM", ct_targets.write_dicom_patient),
}


def write_targets(
    out: Path, tasks: Sequence[str], patients: int, seed: int, shape: Shape, workers: int = 1
) -> Iterator[str]:
    """Write `patients` phantoms of each task under `out`; gives a name after each.

    The bytes depend on seed, number and shape alone. Raises UserError when `out` holds anything else, or for settings
    that make no phantom.
    """
    check_phantom(seed, shape, None)
    for name, value in (("patients", patients), ("workers", workers)):
        if value < 1:
            raise UserError(f"phantom: --{name} {value} is too few; give 1 or more")
    if min(shape) < 32:
        raise UserError(
            f"phantom: --shape {' '.join(map(str, shape))}: a target needs 32 voxels along each axis"
        )
    identity = {"version": VERSION, "seed": seed, "shape_zyx": list(shape)}
    note = claim_folder(out, "phantom-targets.json", lambda there: there == identity)
    write_atomic(note, json.dumps(identity, indent=1) + "\n")
    for task in tasks:
        root = out / TASKS[task].folder
        if task == "ncc":
            names: list[str] = []
            write_luna(
                root, patients, seed, shape=shape, spacing_mm=ct_targets.spacing_of(shape), workers=workers,
                done=names.append,
            )  # fmt: skip
            _first_table(root)
            yield from names
        else:
            root.mkdir(exist_ok=True)
            yield from _write_all(task, root, patients, seed, shape, workers)


def _write_all(task: str, root: Path, patients: int, seed: int, shape: Shape, workers: int) -> Iterator[str]:
    """Write the patients that are missing, then the files over all patients."""
    parts = [root / ".phantom" / f"{number:04d}" for number in range(patients)]
    todo = [number for number in range(patients) if not (parts[number] / "done").exists()]
    yield from (f"{task} {number}" for number in range(patients) if number not in todo)
    yield from in_workers(_write, [(task, root, number, seed, shape) for number in todo], workers)
    TASKS[task].finish(root, parts)


def _write(task: str, root: Path, number: int, seed: int, shape: Shape) -> str:
    """Write one patient to a temporary folder, move it file by file, then mark it as done."""
    part = root / ".phantom" / f"{number:04d}"
    fresh = part / "files"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    TASKS[task].patient(fresh, seed, number, shape)
    for folder, _, files in os.walk(fresh):
        below = root / Path(folder).relative_to(fresh)
        below.mkdir(parents=True, exist_ok=True)
        for name in files:
            if name == "note.json":  # for `finish`
                os.replace(Path(folder) / name, part / name)
            else:
                os.replace(Path(folder) / name, below / name)
    shutil.rmtree(fresh)
    write_atomic(part / "done", b"")
    return f"{task} {number}"


def _first_table(root: Path) -> None:
    """Write candidates.csv as in LUNA16's first version: several detectors may have found the same nodule."""
    lines = (root / "candidates_V2.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    more = [
        [uid, *(f"{float(v) + 0.5:.6f}" for v in xyz), label] for uid, *xyz, label in rows if label == "1"
    ]
    table = [lines[0], *(",".join(row) for row in [*rows, *more])]
    write_atomic(root / "candidates.csv", "\n".join([*table, ""]))


@dataclass(frozen=True)
class TargetPhantomArgs:
    """Write phantoms of the target tasks, in the formats of LUNA16, LIDC-IDRI, LiTS, a CTPA set and BraTS."""

    out: Path = Path("phantom-targets")
    """Folder to write; new, empty or an interrupted one of the same settings."""
    tasks: tuple[Literal["ncc", "ncs", "lcs", "ecc", "bms", "organs", "anatomy", "dicom"], ...] = (
        "ncc", "ncs", "lcs", "ecc", "bms",
    )  # fmt: skip
    """Names of the tasks; organs: organs, lobes and vertebrae told by place, in nnU-Net's layout; anatomy: the same, of
    patients and scanners that differ more; dicom: DICOM series with masks. All three are for `p2w prepare custom`."""
    patients: int = 20
    """Number of patients of each task."""
    shape: Annotated[tuple[int, int, int], tyro.conf.arg(metavar="Z Y X")] = (64, 128, 128)
    """Voxels of a chest: slices, rows, columns; brains have three quarters of them along each axis."""
    seed: int = 1000
    """Other seeds give other patients."""
    workers: int = 1
    """Number of processes; the bytes do not depend on it."""


@exits
def main() -> None:
    """Parse the command line, write the phantoms and print what was written."""
    args = tyro.cli(TargetPhantomArgs, prog="python -m p2w.phantom.target_tasks", description=USAGE)
    with Progress(len(args.tasks) * args.patients, "patients") as progress:
        try:
            for name in write_targets(
                args.out, args.tasks, args.patients, args.seed, args.shape, args.workers
            ):
                progress.step(name)
                progress.tick()
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"{args.out}: {why}; mend it and repeat the command, it goes on") from None
    for task in args.tasks:
        say(f"{args.out / TASKS[task].folder}: {args.patients} patients for task {task}")


if __name__ == "__main__":
    main()
