"""Ten million sub-scans of 300,000 scans: how long opening their manifest takes, and how much memory of whom.

    python bench/large_set.py                                   # then bench/results/large_set.json
    python bench/large_set.py --rows 1000000 --scans 30000 --out /tmp/large.json

The manifest is generated; its shards do not exist, and are not looked for. Every figure is of a process of its own, which
does nothing else. Seconds are processor time, so that other work on the machine counts little. Memory is what
/proc/self/smaps_rollup says at the end (private: no other process has it; mapped: pages of files, which all ranks of a node
have together) and the highest resident memory while opening, above that of the imports.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tyro

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO)]

from bench.common import RESULTS, Goal, Row, save, show  # noqa: E402
from p2w.shards.manifest import manifest_bytes, open_manifest  # noqa: E402
from p2w.shards.manifest_schema import MANIFEST_NAME, SUB_SCAN_COLUMNS  # noqa: E402
from p2w.stream.local import LocalSet  # noqa: E402
from p2w.stream.sampler import Sampler  # noqa: E402

GIB, SHAPE, BATCH = 2**30, (64, 128, 128), 4096


@dataclass(frozen=True)
class Options:
    """Size of the set."""

    rows: int = 10_000_000
    scans: int = 300_000
    out: Path = RESULTS / "large_set.json"
    child: str = ""
    """What one process does: generate, open or order; all three, one after the other, without it."""
    folder: Path = Path()
    """Where, for one process."""


def generate(folder: Path, rows: int, scans: int) -> None:
    """Write the manifest of a set with this many sub-scans and scans, its split one tenth for validation."""
    rng = np.random.default_rng(0)
    scan = np.sort(rng.integers(0, scans, rows)).astype(np.int32)
    place = np.arange(rows) - np.searchsorted(scan, scan)
    uids = [f"1.3.6.1.4.1.14519.5.2.1.6279.6001.{100_000_000_000 + number}" for number in range(scans)]
    nbytes = 2 * int(np.prod(SHAPE))
    texts = pa.DictionaryArray.from_arrays(scan, pa.array(uids)).cast(pa.string())
    columns: dict[str, Any] = {
        "scan_uid": texts,
        "shard": pa.DictionaryArray.from_arrays(scan, pa.array([f"{u}.tar" for u in uids])).cast(pa.string()),
        "split": pa.DictionaryArray.from_arrays((scan % 10 == 0).astype(np.int32), ["train", "val"]).cast("string"),
        "offset": 1664 + place * (nbytes + 2048),
        "nbytes": np.full(rows, nbytes),
        "crc32c": rng.integers(0, 1 << 32, rows).astype(np.uint32),
        "subset": np.full(rows, -1, np.int16),
        "z": (place // 16 * 64).astype(np.int32),
        "y": (place // 4 % 4 * 128).astype(np.int32),
        "x": (place % 4 * 128).astype(np.int32),
        "mean_hu": rng.normal(-600, 200, rows).astype(np.float32),
        "std_hu": rng.normal(400, 50, rows).astype(np.float32),
    }  # fmt: skip
    columns |= {f"spacing_{axis}": (0.6 + scan % 100 / 200).astype(np.float32) for axis in "zyx"}
    four = {name: np.char.zfill(columns[name].astype("U4"), 4) for name in "zyx"}
    tail = np.char.add(np.char.add(np.char.add("/z", four["z"]), np.char.add("_y", four["y"])), "_x")
    columns["key"] = pa.compute.binary_join_element_wise(texts, pa.array(np.char.add(tail, four["x"])), "")
    table = pa.table({name: columns[name] for name in SUB_SCAN_COLUMNS.names}).cast(SUB_SCAN_COLUMNS)
    count = np.bincount(scan, minlength=scans)
    grid = {"shape": [400, 512, 512], "spacing_mm": [0.7, 0.7, 0.7], "origin_xyz_mm": [-180.0, -170.0, 20.5]}
    meta = {
        "format": "tar", "shape": list(SHAPE), "dtype": "int16", "window_hu": [-1000, 1000],
        "split": {"train_scans": uids, "val_scans": uids[::10]},
        "shards": [
            {"name": f"{uid}.tar", "nbytes": 10240 + int(n) * (nbytes + 2048), "crc32c": at}
            for at, (uid, n) in enumerate(zip(uids, count, strict=True))
        ],
        "sources": [
            {
                "uid": uid, "file": f"folder/{uid}.mhd", "subset": -1, "nbytes": 10**8 + at, "left_out": 3,
                "checksum": f"crc32c:{at:08x}", "direction_xyz": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], **grid,
            }
            for at, uid in enumerate(uids)
        ],
    }  # fmt: skip
    (folder / MANIFEST_NAME).write_bytes(manifest_bytes(table, meta))


def memory() -> dict[str, float]:
    """Private and shared resident memory, and the highest so far, in GiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith(" kB")}
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    private = kib["Private_Dirty"] + kib["Private_Clean"]
    peak, anonymous = int(status["VmHWM"].split()[0]), kib["Anonymous"]
    # Pages of a file that only this process has mapped count as private in smaps; another rank would share them.
    return {
        "private": anonymous / 2**20,
        "mapped": (private + kib["Shared_Clean"] + kib["Shared_Dirty"] - anonymous) / 2**20,
        "peak": peak / 2**20,
    }


def measured(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What `work` returned, and its processor seconds and memory."""
    before, began = memory(), time.process_time()
    found = work()
    seconds, after = time.process_time() - began, memory()
    return found, {"seconds": seconds} | {name: after[name] - before[name] for name in after}


def child(options: Options) -> None:
    """One process: print its figures as JSON."""
    if options.child == "generate":
        _, told = measured(lambda: generate(options.folder, options.rows, options.scans))
        told["bytes"] = (options.folder / MANIFEST_NAME).stat().st_size
        print(json.dumps(told))
        return
    shards, opened = measured(lambda: LocalSet(open_manifest(options.folder)))
    told = {"open": opened}
    if options.child == "order":
        sampler = Sampler(shards, "train", BATCH, seed=0, rank=0, world_size=1, training=True)
        _, told["ids"] = measured(lambda: sampler.all_ids)
        _, told["order"] = measured(lambda: [sampler.step_ids(0, step) for step in range(sampler.steps)])
        _, told["one step"] = measured(lambda: sampler.step_ids(7, sampler.steps // 2))
        told["n"] = {"ids": sampler.n}
    print(json.dumps(told))


def main() -> None:
    """Generate, open twice, draw an epoch; print and write."""
    options = tyro.cli(Options, description=__doc__)
    if options.child:
        child(options)
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("P2W_BENCH_DIR")) as folder:

        def run(what: str) -> dict[str, Any]:
            command = [sys.executable, __file__, "--rows", str(options.rows), "--scans", str(options.scans)]
            command += ["--child", what, "--folder", folder]
            found = subprocess.run(command, capture_output=True, text=True, check=True)
            print(what, found.stdout.strip(), flush=True)
            return json.loads(found.stdout)

        made, first, second = run("generate"), run("open"), run("order")
        index = next(Path(folder).glob(".manifest-*.arrow"), None)
        size = index.stat().st_size if index else 0
    rows = [
        Row("write", "the manifest", made["seconds"], "s", "ours", note=f"{made['bytes'] / 1e6:,.0f} MB"),
        Row("open", "first: the mapped file is made", first["open"]["seconds"], "s", "ours", note=f"{size / 1e6:,.0f} MB"),
        Row("open", "every later one", second["open"]["seconds"], "s", "ours"),
        *(
            Row(f"memory {name}", f"{kind} open", told["open"][name], "GiB", "ours")
            for name in ("private", "mapped", "peak")
            for kind, told in (("first", first), ("later", second))
        ),
        Row("order", "ids of the split", second["ids"]["seconds"], "s", "ours"),
        Row("order", "ids of all steps of an epoch", second["order"]["seconds"], "s", "ours"),
        Row("order", "ids of one step", second["one step"]["seconds"], "s", "ours"),
        Row("order", "private memory for it", second["order"]["private"], "GiB", "ours"),
    ]  # fmt: skip
    goals = [
        Goal("seconds to open, the first time", first["open"]["seconds"], 10, at_least=False),
        Goal("GiB at the peak, the first time", first["open"]["peak"], 1, at_least=False),
        Goal("GiB at the peak, later", second["open"]["peak"], 1, at_least=False),
        Goal("seconds for the ids of an epoch", second["order"]["seconds"], 1, at_least=False),
    ]
    question = f"What do {options.rows:,} sub-scans of {options.scans:,} scans take to open?"
    show(save(options.out, question, "python bench/large_set.py", rows, goals))


if __name__ == "__main__":
    main()
