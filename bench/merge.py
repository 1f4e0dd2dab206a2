"""How does merging a set grow with its scans? Records of scans that were never cut, at 3,000 and 30,000 of them.

    python bench/merge.py                    # then bench/results/merge.json

Measured, in one process: the end of one share of a job array while others still cut (which every share asks once), and of
the last one (all records are read, the manifest is written). The records have 33 sub-scans each, as 10 million sub-scans of
300,000 scans have. Seconds are processor time; the goal is that ten times the scans take at most 13 times as long.
"""

import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import tyro

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO)]

from bench.common import RESULTS, Goal, Row, save, show  # noqa: E402
from p2w.ct.discover import ScanListing, ScanSource  # noqa: E402
from p2w.files import canonical_json  # noqa: E402
from p2w.shards.build import merge_records, unfinished_sources  # noqa: E402
from p2w.shards.build_folder import JobShare  # noqa: E402
from p2w.shards.scan_shards import ScanFolder, ShardingSettings  # noqa: E402

SUB_SCANS = 33


def record_of(uid: str) -> dict:
    """What `p2w shard` writes of a scan."""
    nbytes = 2 * 64 * 128 * 128
    rows = [
        {
            "key": f"{uid}/z{64 * (at // 16):04d}_y{128 * (at // 4 % 4):04d}_x{128 * (at % 4):04d}", "scan_uid": uid,
            "subset": -1, "z": 64 * (at // 16), "y": 128 * (at // 4 % 4), "x": 128 * (at % 4), "mean_hu": -600.5,
            "std_hu": 410.25, "spacing_x": 0.75, "spacing_y": 0.75, "spacing_z": 1.25, "offset": 640 + at * (nbytes + 2048),
            "nbytes": nbytes, "crc32c": 7919 * at,
        }
        for at in range(SUB_SCANS)
    ]  # fmt: skip
    grid = {
        "shape": [192, 512, 512],
        "spacing_mm": [1.25, 0.75, 0.75],
        "origin_xyz_mm": [-180.0, -170.0, 20.5],
    }
    return grid | {
        "direction_xyz": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], "uid": uid, "name": f"{uid}.mhd", "subset": -1,
        "nbytes": 10**8, "checksum": "crc32c:00000001", "left_out": 3, "rows": rows,
        "shard": {"nbytes": 10240 + SUB_SCANS * (nbytes + 2048), "crc32c": 5},
    }  # fmt: skip


def measured(scans: int, root: Path) -> dict[str, float]:
    """Seconds of both ends of a share, in a folder of so many records."""
    folder = ScanFolder(str(root), ShardingSettings())
    folder.prepare(JobShare())
    sources = [
        ScanSource(f"1.2.840.{number:08d}", f"1.2.840.{number:08d}.mhd", ()) for number in range(scans)
    ]
    for source in sources[:-1]:
        Path(folder.sidecar(source.uid)).write_bytes(canonical_json(record_of(source.uid)))
    listing, found = ScanListing(sources, [], []), {}

    def timed(name: str, work) -> None:
        began = time.process_time()
        work()
        found[name] = time.process_time() - began

    timed("a share ends", lambda: unfinished_sources(listing, folder))
    last = sources[-1]
    Path(folder.sidecar(last.uid)).write_bytes(canonical_json(record_of(last.uid)))
    (root / ".run").mkdir(exist_ok=True)
    timed(
        "the last share ends", lambda: (unfinished_sources(listing, folder), merge_records(listing, folder))
    )
    found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return found


def main(scans: tuple[int, int] = (3000, 30_000), out: Path = RESULTS / "merge.json") -> None:
    """Measure both sizes, compare, write."""
    results = {}
    for count in scans:
        root = Path(tempfile.mkdtemp())
        try:
            results[count] = measured(count, root / "set")
        finally:
            shutil.rmtree(root)
    rows = [
        Row(
            name,
            f"{count:,} scans",
            found[name],
            "s",
            "ours",
            note=f"{found['peak_gib']:.2f} GiB at the peak",
        )
        for name in ("a share ends", "the last share ends")
        for count, found in results.items()
    ]
    few, many = (results[count]["the last share ends"] for count in scans)
    grown = many / few / (scans[1] / scans[0])
    goals = [Goal("seconds a scan at the larger size over the smaller", grown, 1.3, at_least=False)]
    show(save(out, "How does merging grow with the scans?", "python bench/merge.py", rows, goals))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
