"""How fast are scans cut, against plain reading with SimpleITK, and how much memory does a worker take?

    python bench/shard.py                       # synthetic scans of LUNA16's size
    python bench/shard.py --scans DIR           # every scan below DIR
    python bench/shard.py --scans DIR --repeats 9

The floor is `SimpleITK.ReadImage` of the same files (which checks nothing). Both run in one process and take
turns, on files the system has cached; only ratios count on a busy machine, above all those of processor time. Reading alone
(`read_scan`, with every check) is timed beside cutting. Of scans that are given, the sub-scans are also packed by zstd
(`--compress`), and unpacked again. Then whole runs, of one and of two
workers, beside as many processes that only read: what six more scans take, so that starting counts for nothing. Memory:
peak of a fresh process that cuts one 512 x 512 x 764 scan. Results go to bench/results/shard.json.
"""

import contextlib
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import tyro
from common import RESULTS, Goal, Row, save, show

from p2w.ct.discover import ScanSource, find_scans
from p2w.ct.orientation import BadScan
from p2w.ct.scan import quiet_itk, read_scan, source_files
from p2w.shards.build import BuildOptions, cut_source
from p2w.shards.build_folder import JobShare
from p2w.shards.scan_shards import ScanFolder, ShardingSettings, build_shards
from p2w.shards.writer import unpack_voxels

FEW, MANY = 2, 8  # scans


@dataclass(frozen=True)
class Options:
    """How fast are scans cut, against plain reading with SimpleITK?"""

    scans: str = ""
    """Folder of scans; synthetic ones where it is empty."""
    repeats: int = 5
    memory: bool = True
    """Measure the peak memory too (writes 400 MB to the temporary folder)."""
    runs: bool = True
    """Measure whole runs of one and of two workers too."""
    out: str = os.fspath(RESULTS / "shard.json")


def synthetic(path: Path, slices: int) -> None:
    """A scan of LUNA16's size, noise and all (noise decides how it compresses)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:512j, -1:1:512j]
    plain = np.where(x**2 + (1.4 * y) ** 2 < 0.7, np.where(abs(abs(x) - 0.4) < 0.25, -850, 40), -1000)
    noise = rng.normal(0, 15, (8, 512, 512))
    hu = np.stack([plain + noise[z % 8] for z in range(slices)]).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(hu), str(path), "packed" in path.name)


def read(source: ScanSource) -> None:
    """Read a scan by SimpleITK alone: the least that cutting it could take."""
    sitk.ReadImage(source.files if source.grid is not None else source.files[0])


def read_bytes() -> int:
    """Bytes this process has asked the system for."""
    return int(Path("/proc/self/io").read_text().split()[1])


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What `work` returns, and its seconds by the clock and of the processor."""
    started = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - started[0], time.process_time() - started[1]


def measure(source: ScanSource, folder: ScanFolder, repeats: int) -> dict[str, Any]:
    """Times of reading and of cutting one scan, the best of `repeats`; or why it was refused."""
    runs: dict[str, list[tuple[float, float]]] = {"floor": [], "read": [], "cut": []}
    disk = []
    for _ in range(repeats):
        ways = {
            "floor": lambda: read(source),
            "read": lambda: read_scan(source),
            "cut": lambda: cut_source(source, folder, JobShare()),
        }
        for name, work in ways.items():
            before = read_bytes()
            try:
                record, *seconds = timed(work)
            except BadScan as error:
                return {"scan": source.name, "bad": str(error)}
            runs[name].append((seconds[0], seconds[1]))
        disk.append(read_bytes() - before)
        if "bad" in record:
            return {"scan": source.name, "bad": record["bad"]}
        with contextlib.suppress(FileNotFoundError):  # a scan that is cut once replaces no shard
            os.unlink(folder.shard(source.uid))
    wall, cpu = ({name: min(one[at] for one in found) for name, found in runs.items()} for at in (0, 1))
    kept = 2 * 64 * 128 * 128 * len(record["rows"])
    return {
        "scan": os.path.basename(source.name)[-40:],
        "shape": record["shape"],
        "files": [os.path.splitext(name)[1] for name in source_files(source)][:2],
        "seconds": {name: round(value, 3) for name, value in wall.items()},
        "processor_seconds": {name: round(value, 3) for name, value in cpu.items()},
        "read_over_floor": round(cpu["floor"] / cpu["read"], 2),
        "cut_over_floor": round(cpu["floor"] / cpu["cut"], 2),
        "voxels_per_s": round(float(np.prod(record["shape"])) / wall["cut"]),
        "read_per_source_byte": round(statistics.median(disk) / record["nbytes"], 3),
        "written_per_kept_byte": round(record["shard"]["nbytes"] / kept, 4),
    }


def packing(sources: Sequence[ScanSource], root: Path) -> tuple[list[Row], list[Goal]]:
    """How small `--compress zstd` makes the sub-scans of these scans, and how fast they unpack."""
    folder = ScanFolder(str(root), ShardingSettings(format="arrow", compress="zstd"))
    ratios, plain, cpu = [], 0, 0.0
    with folder.share_lock(JobShare()):
        folder.prepare(JobShare())
        for source in sources:
            record = cut_source(source, folder, JobShare())
            if "bad" in record or not record["rows"]:
                continue
            data = Path(folder.shard(source.uid)).read_bytes()
            parts = [data[row["offset"] : row["offset"] + row["nbytes"]] for row in record["rows"]]
            size = 2 * int(np.prod(folder.settings.tiling.shape))
            *_, seconds = timed(lambda: [unpack_voxels(part, size) for part in parts])  # noqa: B023
            ratios.append(len(parts) * size / sum(map(len, parts)))
            plain, cpu = plain + len(parts) * size, cpu + seconds
    group = f"--compress zstd, {len(ratios)} scans"
    rows = [
        Row(
            group, "bytes of voxels for a byte stored, the median scan", statistics.median(ratios), "", "ours"
        ),
        Row(group, "the same, the scan that packs least", min(ratios), "", "ours"),
        Row(group, "unpacked by one core, processor time", plain / cpu / 1e9, "GB/s", "ours"),
    ]
    return rows, [Goal("bytes of voxels for a byte packed, the median scan", statistics.median(ratios), 1.5)]


def headers(path: Path, count: int) -> list[str]:
    """A plain scan under so many names, in a folder of its own: all headers name one file of voxels."""
    path.mkdir()
    synthetic(path / "plain0.mhd", 275)
    for number in range(1, count):
        (path / f"plain{number}.mhd").write_text((path / "plain0.mhd").read_text())
    return sorted(str(file) for file in path.glob("*.mhd"))


def read_path(path: str) -> None:
    """Read a file by SimpleITK alone."""
    sitk.ReadImage(path)


def whole_runs(scratch: Path, repeats: int) -> dict[int, tuple[float, float]]:
    """Workers -> (scans a second cut, scans a second read), medians; turns are taken."""
    paths = {count: headers(scratch / f"of{count}", count) for count in (FEW, MANY)}
    seconds: dict[tuple[str, int, int], list[float]] = {}
    for turn in range(repeats):
        for workers in (1, 2):
            for count, names in paths.items():
                began = time.perf_counter()
                out = scratch / f"out{turn}-{workers}-{count}"
                assert (
                    build_shards(
                        find_scans([str(scratch / f"of{count}")], str(out)),
                        str(out),
                        ShardingSettings(),
                        BuildOptions(workers=workers),
                    )
                    == 0
                )
                seconds.setdefault(("cut", workers, count), []).append(time.perf_counter() - began)
                shutil.rmtree(out)
                began = time.perf_counter()
                with multiprocessing.get_context("spawn").Pool(workers) as pool:
                    pool.map(read_path, names, chunksize=1)
                seconds.setdefault(("read", workers, count), []).append(time.perf_counter() - began)

    def rate(what: str, workers: int) -> float:
        few, many = (statistics.median(seconds[what, workers, count]) for count in (FEW, MANY))
        return (MANY - FEW) / (many - few)

    return {workers: (rate("cut", workers), rate("read", workers)) for workers in (1, 2)}


def report(rows: list[dict[str, Any]], runs: dict[int, tuple[float, float]]) -> tuple[list[Row], list[Goal]]:
    """Rows and goals for the table."""
    table, goals = [], []
    for one in rows:
        group = f"{'x'.join(map(str, one['shape']))} {one['files'][-1]}, one process, processor time"
        note = (
            f"read {one['read_per_source_byte']} times, written {one['written_per_kept_byte']} per byte kept"
        )
        rates = {name: 1 / seconds for name, seconds in one["processor_seconds"].items()}
        table.append(
            Row(group, "p2w: read, checked, cut, written", rates["cut"], "scans/s", "ours", note=note)
        )
        table.append(Row(group, "p2w: read and checked", rates["read"], "scans/s", "ours"))
        table.append(Row(group, "SimpleITK.ReadImage alone", rates["floor"], "scans/s", "bound"))
        name = f"{one['files'][-1]}"
        goals.append(
            Goal(
                f"cut, times the speed of ReadImage, {name}",
                one["cut_over_floor"],
                0.3 if name == ".raw" else 1.0,
            )
        )
        goals.append(
            Goal(f"bytes written per byte kept, {name}", one["written_per_kept_byte"], 1.01, at_least=False)
        )
        goals.append(
            Goal(
                f"bytes read per byte of the source, {name}", one["read_per_source_byte"], 1.1, at_least=False
            )
        )
    for workers, (cut, alone) in runs.items():
        group = f"512x512x275 plain, {workers} worker(s)"
        table.append(Row(group, "p2w, a whole run", cut, "scans/s", "ours"))
        table.append(Row(group, "SimpleITK.ReadImage alone", alone, "scans/s", "bound"))
    if runs:
        goals.append(Goal("two workers are faster than one by", runs[2][0] / runs[1][0], 1.7))
    return table, goals


def peak_memory(scratch: Path) -> dict[str, float]:
    """MiB, of a process that cuts one 512 x 512 x 764 scan and does nothing else."""
    peaks = {}
    for name in ("plain.mhd", "packed.mhd", "packed.nii.gz"):
        folder = scratch / name.replace(".", "_")
        folder.mkdir()
        synthetic(folder / name, 764)
        line = [sys.executable, __file__, "--scans", str(folder), "--repeats", "0", "--no-memory"]
        peaks[name] = float(
            subprocess.run(line, check=True, capture_output=True, text=True).stdout.split()[-1]
        )
        for path in folder.iterdir():
            path.unlink()
    return peaks


def main() -> None:
    """Time the writing of shards with one and more workers, and write the result."""
    options = tyro.cli(Options, description=__doc__)
    quiet_itk(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        where = options.scans
        if not where:
            where = str(scratch / "scans")
            os.mkdir(where)
            for file in ("packed.mhd", "plain.mhd"):
                synthetic(Path(where) / file, 275)
        folder = ScanFolder(str(scratch / "shards"), ShardingSettings())
        found = find_scans([where], folder.root)
        with folder.share_lock(JobShare()):
            folder.prepare(JobShare())
            if options.repeats == 0:  # the process whose memory is measured
                assert "bad" not in cut_source(found.sources[0], folder, JobShare())
                status = dict(
                    line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
                )
                # Not getrusage, which counts the parent's before exec
                print(int(status["VmHWM"].split()[0]) / 1024)
                return
            rows = [measure(source, folder, options.repeats) for source in found.sources]
        more_rows, more_goals = packing(found.sources, scratch / "packed") if options.scans else ([], [])
        memory = peak_memory(scratch) if options.memory else {}
        runs = whole_runs(scratch, max(1, options.repeats // 2)) if options.runs else {}
    table, goals = report([row for row in rows if "bad" not in row], runs)
    table, goals = table + more_rows, goals + more_goals
    if memory:
        goals.append(Goal("MiB at most in a worker, 512x512x764", max(memory.values()), 2048, at_least=False))
    said = {"--scans DIR": options.scans, "--no-memory": not options.memory, "--no-runs": not options.runs}
    command = " ".join(["python bench/shard.py", *(name for name, given in said.items() if given)])
    question = "cutting scans against SimpleITK.ReadImage"
    show(save(Path(options.out), question, command, table, goals, scans=rows, peak_mib=memory))


if __name__ == "__main__":
    main()
