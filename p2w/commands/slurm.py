"""Write the Slurm scripts that come with p2w into a folder, to be submitted from where your data is.

p2w slurm --out slurm
sbatch slurm/pretrain.sbatch paper --shards shards --run-dir runs/paper
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from p2w.errors import UserError, program
from p2w.files import write_atomic

SCRIPTS = Path(__file__).parent.parent / "sbatch"


@dataclass(frozen=True)
class SlurmOptions:
    """Write the Slurm scripts into a folder."""

    out: Path = Path("slurm")
    """Folder to write; scripts there that were changed are left alone and named."""


def main(argv: list[str] | None = None) -> int:
    """Copy the scripts. Raises UserError for one that is there with other contents."""
    out = tyro.cli(SlurmOptions, args=argv, prog=program("slurm"), description=__doc__).out
    scripts = {out / path.name: path.read_bytes() for path in sorted(SCRIPTS.glob("*.sbatch"))}
    if not scripts:
        raise UserError(f"{SCRIPTS}: no scripts there, so this installation is not whole: install p2w again")
    for path, text in scripts.items():
        if path.exists() and path.read_bytes() != text:
            raise UserError(
                f"{path}: is there and differs from p2w's; move it away, or name another folder with --out"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; name another folder with --out") from error
    for path, text in scripts.items():
        write_atomic(path, text)
        path.chmod(0o755)
        print(path)
    return 0
