"""How fast are scans cut, against plain reading with SimpleITK, and how much memory does a worker take?

    python bench/shard.py                       # synthetic scans of LUNA16's size
    python bench/shard.py --scans DIR           # every scan below DIR
    python bench/shard.py --scans DIR --repeats 9

The floor is `SimpleITK.ReadImage` of the same files (which checks nothing). Both run in one process and take
turns, on files the system has cached; only the ratio counts on a busy machine. Memory: peak of a fresh
process that cuts one 512 x 512 x 764 scan. Results go to bench/results/shard.json.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import tyro

from p2w.data.cut import cut_scan
from p2w.data.find import Source, find_scans
from p2w.data.folder import Folder, Settings, Share
from p2w.data.scan import quiet, source_files

RESULTS = Path(__file__).parent / "results" / "shard.json"


@dataclass(frozen=True)
class Options:
    """How fast are scans cut, against plain reading with SimpleITK?"""

    scans: str = ""
    """Folder of scans; synthetic ones where it is empty."""
    repeats: int = 5
    memory: bool = True
    """Measure the peak memory too (writes 400 MB to the temporary folder)."""


def synthetic(path: Path, slices: int) -> None:
    """A scan of LUNA16's size, noise and all (noise decides how it compresses)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[-1:1:512j, -1:1:512j]
    plain = np.where(x**2 + (1.4 * y) ** 2 < 0.7, np.where(abs(abs(x) - 0.4) < 0.25, -850, 40), -1000)
    noise = rng.normal(0, 15, (8, 512, 512))
    hu = np.stack([plain + noise[z % 8] for z in range(slices)]).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(hu), str(path), "packed" in path.name)


def read(source: Source) -> None:
    sitk.ReadImage(source.files if source.grid is not None else source.files[0])


def read_bytes() -> int:
    """Bytes this process has asked the system for."""
    return int(Path("/proc/self/io").read_text().split()[1])


def measure(source: Source, folder: Folder, repeats: int) -> dict[str, object]:
    floor, ours, disk = [], [], []
    for _ in range(repeats):
        started = time.perf_counter(), time.process_time()
        read(source)
        floor.append((time.perf_counter() - started[0], time.process_time() - started[1]))
        before = read_bytes()
        started = time.perf_counter(), time.process_time()
        record = cut_scan(source, folder, Share())
        ours.append((time.perf_counter() - started[0], time.process_time() - started[1]))
        disk.append(read_bytes() - before)
    if "bad" in record:
        return {"scan": source.name, "bad": record["bad"]}
    wall = [statistics.median(run[0] for run in runs) for runs in (floor, ours)]
    cpu = [statistics.median(run[1] for run in runs) for runs in (floor, ours)]
    kept = 2 * 64 * 128 * 128 * len(record["rows"])
    return {
        "scan": os.path.basename(source.name)[-40:],
        "shape": record["shape"],
        "files": [os.path.splitext(name)[1] for name in source_files(source)][:2],
        "floor_s": round(wall[0], 3),
        "ours_s": round(wall[1], 3),
        "ratio": round(wall[1] / wall[0], 2),
        "cpu_ratio": round(cpu[1] / cpu[0], 2),
        "scans_per_s": round(1 / wall[1], 2),
        "voxels_per_s": round(float(np.prod(record["shape"])) / wall[1]),
        "read_per_source_byte": round(statistics.median(disk) / record["nbytes"], 3),
        "written_per_kept_byte": round(record["shard"]["nbytes"] / kept, 4),
    }


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
    options = tyro.cli(Options, description=__doc__)
    quiet(1)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        where = options.scans
        if not where:
            where = str(scratch / "scans")
            os.mkdir(where)
            for file in ("packed.mhd", "plain.mhd"):
                synthetic(Path(where) / file, 275)
        folder = Folder(str(scratch / "shards"), Settings())
        found = find_scans([where], folder.root)
        with folder.share_lock(Share()):
            folder.prepare(Share())
            if options.repeats == 0:  # the process whose memory is measured
                assert "bad" not in cut_scan(found.sources[0], folder, Share())
                status = dict(
                    line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
                )
                print(
                    int(status["VmHWM"].split()[0]) / 1024
                )  # not getrusage, which counts the parent's before exec
                return
            rows = [measure(source, folder, options.repeats) for source in found.sources]
        memory = peak_memory(scratch) if options.memory else {}
    result = {
        "question": "cutting a scan against SimpleITK.ReadImage, one process",
        "command": " ".join(["python bench/shard.py", *(["--scans DIR"] if options.scans else [])]),
        "date": datetime.date.today().isoformat(),
        "machine": {
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "load_average": round(os.getloadavg()[0], 1),
        "scans": rows,
        "peak_mib_512x512x764": memory,
    }
    for row in rows:
        print(row)
    print("peak MiB for 512 x 512 x 764:", memory)
    assert all(peak < 2048 for peak in memory.values()), "a worker may not take 2 GiB"
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
