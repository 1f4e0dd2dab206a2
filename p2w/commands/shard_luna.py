"""Cut LUNA16 into shards of 128 x 128 x 64 sub-scans for pretraining.

    p2w shard-luna                              # LUNA16/ -> shards/, subsets 0-6
    p2w shard-luna --luna /data/LUNA16 --out /scratch/shards --format arrow --workers 8
    p2w shard-luna --z-margin 25 --min-std 0    # the paper's 28,144 sub-scans
    p2w shard-luna --store scans                # whole scans, of which training cuts sub-scans at random places
    p2w shard-luna --dry-run                    # headers only: how many, how large, how long

Stop it whenever you like: the same command goes on where it stopped. To share the work between machines with a common
disk, or the tasks of a job array, give each `--shard-of i/n` (i from 0): the one that ends last writes the manifest, and
the set is the same, byte for byte, as that of one process. Exit code 0; 1 when a scan was bad
(named, and listed in report.json); 2 when nothing could be done.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from p2w.ct.discover import find_luna, parse_subsets
from p2w.errors import program
from p2w.progress import say
from p2w.shards.build import BuildOptions
from p2w.shards.scan_shards import ShardingSettings, build_shards


@dataclass(frozen=True)
class ShardLunaOptions:
    """Cut LUNA16 into shards of 128 x 128 x 64 sub-scans for pretraining."""

    luna: str = "LUNA16"
    """Folder that holds subset0 … subset9."""
    out: str = "shards"
    """Folder to write, new or of an earlier run of the same settings."""
    subsets: str = "0-6"
    """Which subsets, as 0-6 or 0,2,5-6. The paper pretrains on 0-6 and never sees 7-9."""
    settings: Annotated[ShardingSettings, tyro.conf.arg(name="")] = ShardingSettings()  # noqa: RUF009 (frozen)
    build: Annotated[BuildOptions, tyro.conf.arg(name="")] = BuildOptions()  # noqa: RUF009 (frozen)


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, find the scans and cut them."""
    options = tyro.cli(
        ShardLunaOptions,
        args=argv,
        prog=program("shard-luna"),
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    found, missing = find_luna(options.luna, parse_subsets(options.subsets))
    if missing:
        say(f"warning: {options.luna} has no subset{', subset'.join(map(str, missing))}; going on without")
    return build_shards(found, options.out, options.settings, options.build)
