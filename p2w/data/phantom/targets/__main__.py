"""Write phantoms of the target tasks, in the formats of LUNA16, LIDC-IDRI, LiTS, a CTPA set and BraTS.

python -m p2w.data.phantom.targets --out phantom-targets                        # all five, 20 patients each
python -m p2w.data.phantom.targets --out T --tasks lcs bms --patients 40 --shape 64 128 128 --workers 2

Then, for instance: python preprocess/prepare_target.py lcs --source T/LiTS --out targets/lcs --train 0-23 --val 24-27
--test 28-39. Interrupted? The same command completes the folder. Exit code 0: written; 2: it cannot be, one line says why.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from p2w.data.phantom.targets.write import TASKS, write_targets
from p2w.data.progress import Progress, say
from p2w.errors import UserError, exits


@dataclass(frozen=True)
class Args:
    """Write phantoms of the target tasks, in the formats of LUNA16, LIDC-IDRI, LiTS, a CTPA set and BraTS."""

    out: Path = Path("phantom-targets")
    """Folder to write; new, empty or an interrupted one of the same settings."""
    tasks: tuple[Literal["ncc", "ncs", "lcs", "ecc", "bms"], ...] = ("ncc", "ncs", "lcs", "ecc", "bms")
    """Which."""
    patients: int = 20
    """Of each task."""
    shape: Annotated[tuple[int, int, int], tyro.conf.arg(metavar="Z Y X")] = (64, 128, 128)
    """Voxels of a chest: slices, rows, columns; brains have three quarters of them along each axis."""
    seed: int = 1000
    """Other seeds give other patients."""
    workers: int = 1
    """Processes; the bytes do not depend on it."""


@exits
def main() -> None:
    """Parse, write, say what was written."""
    args = tyro.cli(Args, description=__doc__)
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
