"""Cut any folder of CT scans into shards of 128 x 128 x 64 sub-scans for pretraining.

    p2w shard --scans /data/ct --out shards
    p2w shard --scans /data/a /data/b --out shards --exclude '*_mask*' --workers 8
    p2w shard --scans /data/ct --out shards --dry-run

Looks through these folders and all below them for MetaImage (.mhd, .mha), NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr) and
DICOM series (any file name and order, several series in a folder). Other modalities and localizers are named
and left out; scans that are damaged or not in HU are named, listed in report.json, and make the exit code 1.
Everything else is as for p2w shard-luna: stop and repeat, `--shard-of i/n` on several machines.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated

import tyro

from p2w.ct.discover import SearchOptions, find_scans
from p2w.ct.percentiles import Modality
from p2w.errors import program
from p2w.shards.build import BuildOptions
from p2w.shards.scan_shards import ShardingSettings, build_shards


@dataclass(frozen=True)
class ShardScansOptions:
    """Cut any folder of CT scans into shards of 128 x 128 x 64 sub-scans for pretraining."""

    scans: tuple[str, ...]
    """Folders of scans; all folders below them are searched too."""
    out: str
    """Folder to write, new or of an earlier run of the same settings."""
    exclude: tuple[str, ...] = ()
    """Patterns of relative paths to skip, such as '*_mask*'."""
    allow_gaps: bool = False
    """Cut DICOM series with missing slices too, as if their slices were adjacent."""
    modality: Modality = "ct"
    """Of the scans: ct is in HU and tested for it; mr and pt are scaled by each scan's percentiles, 0.5 to 99.5 of 100."""
    settings: Annotated[ShardingSettings, tyro.conf.arg(name="")] = ShardingSettings()  # noqa: RUF009 (frozen)
    build: Annotated[BuildOptions, tyro.conf.arg(name="")] = BuildOptions()  # noqa: RUF009 (frozen)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, find the scans and cut them."""
    options = tyro.cli(
        ShardScansOptions,
        args=argv,
        prog=program("shard"),
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    settings = dataclasses.replace(options.settings, allow_gaps=options.allow_gaps, modality=options.modality)
    search = SearchOptions(
        options.exclude, options.allow_gaps, salt=settings.grouping.salt, modality=options.modality.upper()
    )
    found = find_scans(list(options.scans), options.out, options=search)
    return build_shards(found, options.out, settings, options.build)
