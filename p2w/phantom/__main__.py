"""Write synthetic chest CTs in LUNA16's layout.

    python -m p2w.phantom                                            # 12 scans to LUNA16/
    python -m p2w.phantom --out LUNA16 --scans 12 --shape 128 256 256 --seed 1 --workers 2
    python -m p2w.phantom --out VARIED --varied                      # patients and scanners that differ more

Interrupted? The same command completes the folder. Exit code 0: written; 2: it cannot be, one line says why.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from p2w.errors import UserError, exits
from p2w.phantom import write_luna


@dataclass(frozen=True)
class PhantomArgs:
    """Write synthetic chest CTs in LUNA16's layout."""

    out: Path = Path("LUNA16")
    """Folder to write; new, empty or an interrupted phantom of the same settings."""
    scans: int = 12
    """Number of scans."""
    shape: Annotated[tuple[int, int, int], tyro.conf.arg(metavar="Z Y X")] = (128, 256, 256)
    """Voxels of a scan: slices, rows, columns."""
    spacing: Annotated[tuple[float, float, float] | None, tyro.conf.arg(metavar="Z Y X")] = None
    """Size of a voxel in mm; default: drawn for each scan so that it shows the whole chest."""
    seed: int = 0
    """Other seeds give other patients."""
    subsets: int = 10
    """Number of folders subset0, subset1, ...; scan i goes into folder i modulo this number."""
    varied: tyro.conf.FlagCreatePairsOff[bool] = False
    """Draw patients and scanners that differ more: habitus, age, disease all over the lungs, phases of contrast agent,
    kernels, doses. Without, the phantoms of earlier versions."""
    workers: int = 1
    """Number of processes; the bytes do not depend on it."""


@exits
def main() -> None:
    """Parse the command line, write the scans and print what was written."""
    args = tyro.cli(PhantomArgs, prog="python -m p2w.phantom", description=__doc__)
    with _follow(args.scans) as done:
        try:
            write_luna(
                args.out, args.scans, args.seed, shape=args.shape, spacing_mm=args.spacing,
                subsets=args.subsets, workers=args.workers, varied=args.varied, done=done,
            )  # fmt: skip
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"{args.out}: {why}; mend it and repeat the command, it goes on") from None
    print(f"{args.out}: {args.scans} scans of {' x '.join(map(str, args.shape))} voxels (z y x)", flush=True)


@contextmanager
def _follow(total: int) -> Iterator[Callable[[str], None]]:
    """Show progress: a bar on a terminal, elsewhere a line per scan."""
    console, begin, count = Console(), time.perf_counter(), 0
    columns = [
        TextColumn("phantom scans"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
    ]
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, rate="")

        def done(uid: str) -> None:
            nonlocal count
            count += 1
            spent = time.perf_counter() - begin
            bar.update(task, completed=count, rate=f"{count / spent:.2f} scans/s")
            if not console.is_terminal:
                left = spent / count * (total - count)
                print(
                    f"scan {count}/{total}  {count / spent:.2f} scans/s  {left:.0f} s left  {uid}", flush=True
                )

        yield done


if __name__ == "__main__":
    main()
