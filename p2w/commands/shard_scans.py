"""Cut any folder of CT scans into shards of 128 x 128 x 64 sub-scans for pretraining.

    p2w shard --scans /data/ct --out shards
    p2w shard --scans /data/a /data/b --out shards --exclude '*_mask*' --workers 8
    p2w shard --scans /data/ct --out shards --dry-run
    p2w shard --scans /data/ct --out shards --short pad --groups '^([^/]+)/'
    p2w shard --scans /data/ct --out shards --spacing 1.5 1 1 --tile 64 96 96
    p2w shard --scans /data/ct --out shards --store scans      # training cuts sub-scans at random places

    p2w shard --scans /data/ct --list
    p2w shard --scans /data/ct --out shards --select "slice_thickness <= 3 and kernel ~ 'B30'"

Looks through these folders and all below them for MetaImage (.mhd, .mha), NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr) and
DICOM series (any file name and order, several series in a folder). Other modalities and localizers are named
and left out; scans that are damaged, whose slices are no straight volume, or that are not in HU are named, listed in
report.json, and make the exit code 1. At the end every file is accounted for. What is read and what is refused:
docs/scans.md; other sizes, spacings, modalities and splits: docs/cutting.md. Everything else is as for p2w shard-luna: stop
and repeat, `--shard-of i/n` on several machines.
"""

import dataclasses
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from p2w.ct.discover import SearchOptions, find_scans
from p2w.ct.orientation import Grid
from p2w.ct.scan import Modality, straightened
from p2w.ct.series_table import choose, series_rows, table_csv, table_json, table_text
from p2w.errors import UserError, program
from p2w.shards.build import BuildOptions
from p2w.shards.scan_shards import ShardingSettings, build_shards


@dataclass(frozen=True)
class ShardScansOptions:
    """Cut any folder of CT scans into shards of 128 x 128 x 64 sub-scans for pretraining."""

    scans: tuple[str, ...]
    """Folders of scans; all folders below them are searched too."""
    out: str = ""
    """Folder to write, new or of an earlier run of the same settings."""
    exclude: tuple[str, ...] = ()
    """Patterns of relative paths to skip, such as '*_mask*'."""
    allow_gaps: bool = False
    """Cut DICOM series with missing slices too, as if their slices were adjacent."""
    resample_tilt: bool = False
    """Resample DICOM series of tilted, drifting or unevenly spaced slices, and images with a sheared third axis, to a
    straight grid, and cut them too."""
    assume_hu: bool = False
    """Take values for HU without a test: for CT without air, such as brains without skull or cropped organs."""
    modality: Modality = "ct"
    """Of the scans: ct is in HU and tested for it; mr and pt are scaled by each scan's percentiles, 0.5 to 99.5 of 100."""
    list: bool = False
    """Print a table of the series and what would be done with them, from headers alone, and stop."""
    json: bool = False
    """Print that table as JSON, with all columns."""
    csv: bool = False
    """Print that table as CSV, with all columns."""
    select: str = ""
    """Cut only series of which this is true: "slice_thickness <= 3 and kernel ~ 'B30'"; columns as --csv names them."""
    one_per_study: Literal["", "thinnest"] = ""
    """Of each DICOM study cut one series alone: the one whose slices lie closest."""
    settings: Annotated[ShardingSettings, tyro.conf.arg(name="")] = ShardingSettings()  # noqa: RUF009 (frozen)
    build: Annotated[BuildOptions, tyro.conf.arg(name="")] = BuildOptions()  # noqa: RUF009 (frozen)


def _action(settings: ShardingSettings) -> Callable[[Grid], str]:
    """A function that says what would become of a scan of that grid."""
    tiling = settings.tiling

    def action(grid: Grid) -> str:
        shape = tiling.resampled_grid(grid.canonical()[0]).size[::-1]
        tiling.check_size(shape)
        many = tiling.count(shape)
        return f"stored whole, {many} an epoch" if settings.store == "scans" else f"cut into {many}"

    return action


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, find the scans and list or cut them."""
    options = tyro.cli(
        ShardScansOptions,
        args=argv,
        prog=program("shard"),
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    listing = options.list or options.json or options.csv
    if not options.out and not listing:
        raise UserError(
            "--out DIR is missing: the folder to write, new or of an earlier run of the same settings"
        )
    settings = dataclasses.replace(
        options.settings, allow_gaps=options.allow_gaps, resample_tilt=options.resample_tilt,
        assume_hu=options.assume_hu, modality=options.modality,
    )  # fmt: skip
    salt = settings.grouping.salt or (secrets.token_hex(16) if listing else "")
    search = SearchOptions(
        options.exclude, options.allow_gaps, options.resample_tilt, options.assume_hu, salt,
        options.modality.upper(),
    )  # fmt: skip
    found = find_scans([*options.scans], options.out, options=search)
    if options.resample_tilt:
        found.sources = [straightened(source) for source in found.sources]
    action = _action(settings)
    if options.select or options.one_per_study:
        found = choose(found, action, options.select, options.one_per_study)
    if listing:
        form = table_json if options.json else table_csv if options.csv else table_text
        print(form(series_rows(found, action)))
        return 0
    return build_shards(found, options.out, settings, options.build)
