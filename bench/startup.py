"""Forecast of a start: from the command to the first step, for any number of ranks.

What cannot be known here is a setting with a default: how long an operation on a file takes where the environment and the
shards are. Everything else was measured on two cores, and is said in `STARTUP_SOURCES`.
"""

import math
from dataclasses import dataclass

IMPORT_S = 2.3  # of a core for `import torch` and p2w, from a warm page cache
IMPORT_FILES = 40_000  # times that a file is looked up or opened on the way, counted by strace
MEET_S = 1.0  # until the first ranks have met
MEET_RANK_S = 0.02  # for every further rank: the store asks DNS for the name of each, one after the other
GATHERS = 4  # of a number of each rank, before the first step: order, checkpoint twice, plan of the epoch
GATHER_RANK_S = 1e-4  # of a rank's processor, for each rank of such a gather, which goes round in a ring
ROW_S, MAPPED_ROW_S = (
    4e-7,
    2e-7,
)  # of opening the manifest, a row: the first time, and when its rows are mapped
MAPPED_FROM = 1_000_000  # rows
CHECKSUM_BYTES_PER_S = 5e9  # of a core
STARTUP_SOURCES = (
    f"{IMPORT_S} s of imports, {MEET_RANK_S * 1e3:.0f} ms a rank to meet (bench/store_load.py), "
    f"{GATHERS * GATHER_RANK_S * 1e3:.1f} ms a rank for collectives (bench/collectives.py), {ROW_S * 1e6:.1f} us a row "
    "of a manifest (bench/large_set.py)"
)


@dataclass(frozen=True)
class StartupRates:
    """Of the file system that holds the environment and the data; defaults are those of a local NVMe."""

    # To look up, open or stat one file; 2e-4 … 1e-3 on a shared file system that is busy
    file_op_s: float = 2e-5
    file_ops_per_s: float = math.inf  # that its servers do for all nodes together
    bytes_per_s: float = 2e9  # of a node
    bytes_per_s_in_all: float = math.inf


@dataclass(frozen=True)
class StartupForecast:
    """Seconds of the parts of a start."""

    imports_s: float
    meeting_s: float
    shards_s: float  # the manifest, and whether each shard is there
    checkpoint_s: float

    @property
    def total_s(self) -> float:
        """Seconds from the command to the first step."""
        return self.imports_s + self.meeting_s + self.shards_s + self.checkpoint_s

    def line(self) -> str:
        """One line for the terminal."""
        return (
            f"start {self.total_s:,.0f} s: imports {self.imports_s:,.1f}, shards {self.shards_s:,.1f}, meeting "
            f"{self.meeting_s:,.1f}, checkpoint {self.checkpoint_s:,.1f}"
        )


def forecast_startup(
    rates: StartupRates, *, ranks: int, per_node: int, cores_per_node: int, rows: int, shards: int, checkpoint_bytes: float
) -> StartupForecast:  # fmt: skip
    """Forecast of a start of `ranks` ranks, `per_node` of them on each node of so many cores.

    Every rank imports, and maps the manifest's rows; one rank of a node unpacks them and looks for the shards; one rank of a
    node reads the checkpoint from the disk and compares checksums, and the others read it from the page cache.
    """
    nodes = math.ceil(ranks / per_node)
    share = max(1.0, per_node / cores_per_node)  # ranks on one core

    def files(count: float) -> float:
        return max(count * rates.file_op_s, nodes * count / rates.file_ops_per_s)

    speed = min(rates.bytes_per_s, rates.bytes_per_s_in_all / nodes)
    # The ranks of a node import at the same time: the first to ask fetches a file, the others find it in the page cache.
    imports = IMPORT_S * share + files(IMPORT_FILES)
    mapped = MAPPED_ROW_S * share if rows >= MAPPED_FROM else 0.0
    unpacked = ROW_S if rows >= MAPPED_FROM else ROW_S * share
    checkpoint = checkpoint_bytes / speed + checkpoint_bytes / CHECKSUM_BYTES_PER_S * (1 + share)
    return StartupForecast(
        imports_s=imports,
        meeting_s=0.0 if ranks == 1 else MEET_S + (MEET_RANK_S + GATHERS * GATHER_RANK_S) * ranks,
        shards_s=rows * (unpacked + mapped) + files(shards),
        checkpoint_s=checkpoint if checkpoint_bytes else 0.0,
    )
