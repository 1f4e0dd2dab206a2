"""How fast are sub-scans read? Ours against the bound (np.copyto) and against stock loaders, warm page cache.

    python bench/stream.py                               # table, and bench/results/stream.json
    python bench/stream.py --samples 64 --rounds 3 --out /tmp/stream.json

Every case reads all samples once a round, 16 a batch; cases take turns, the median over the rounds counts.
Ours and the memmap are shuffled globally; webdataset reads its shards in order, its fastest way.
"""

import functools
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import psutil
import torch
import tyro
import webdataset as wds
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from p2w.data.manifest import NAME, VERSION, manifest_bytes
from p2w.data.shard import open_shard
from p2w.data.stream import Stream, open_set

SHAPE, PER_SHARD = (64, 128, 128), 32


@dataclass(frozen=True)
class Options:
    """What to measure."""

    samples: int = 256  # sub-scans of 2 MiB
    batch: int = 16
    rounds: int = 9
    out: str = "bench/results/stream.json"
    folder: str | None = None  # where the temporary data set goes; default: the system's


def write_set(folder: str, form: str, wholes: np.ndarray) -> list[str]:
    """Cut `wholes` (N, D, H, W) into a data set; returns the shards' paths."""
    os.makedirs(folder)
    rows, shards = [], []
    for number in range(len(wholes) // PER_SHARD):
        uid = f"scan{number:03d}"
        shard = open_shard(f"{folder}/{uid}.{form}", SHAPE)
        for tile in range(PER_SHARD):
            row = {
                "key": f"{uid}/z{tile:04d}_y0000_x0000",
                "scan_uid": uid,
                "subset": -1,
                "z": tile,
                "y": 0,
                "x": 0,
            }
            row |= {"spacing_z": 1.0, "spacing_y": 1.0, "spacing_x": 1.0, "mean_hu": 0.0, "std_hu": 0.0}
            row |= {"split": "train", "shard": f"{uid}.{form}"}
            rows.append(shard.add(row, wholes[number * PER_SHARD + tile]))
        done = shard.close()
        shards.append({"name": f"{uid}.{form}", "nbytes": done.nbytes, "crc32c": done.crc32c})
    meta = {"schema": VERSION, "format": form, "shape": list(SHAPE), "dtype": "int16", "shards": shards}
    with open(f"{folder}/{NAME}", "wb") as file:
        file.write(manifest_bytes(rows, meta))
    return [f"{folder}/{shard['name']}" for shard in shards]


class Memmap(Dataset):
    """The usual way with a DataLoader: one .npy, mapped, indexed."""

    def __init__(self, path: str) -> None:
        self.array = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.array[index]))


@dataclass(frozen=True)
class Case:
    """One way to read all samples once: `run` is timed and returns how many came, `rest` is not timed."""

    run: Callable[[], int]
    rest: Callable[[], None] = lambda: None


# One map of the shards for all cases, as a training run has: the page tables of twelve maps evict each other.
opened = functools.cache(open_set)


def ours(folder: str, options: Options, readers: int, verify: bool) -> Case:
    stream = Stream(opened(folder, verify), batch=options.batch, readers=readers)
    epochs = itertools.count()
    kept = []

    def epoch() -> int:  # begins with threads not yet started: nothing has been read ahead
        kept[:] = [stream.batches(next(epochs))]
        return sum(len(batch.voxels) for batch in itertools.islice(kept[0], stream.steps_per_epoch))

    return Case(epoch, stream.close)  # what the readers have read ahead by then counts for nothing


def bound(wholes: np.ndarray, options: Options) -> Case:
    out = np.zeros((options.batch, *SHAPE), np.int16)

    def epoch() -> int:
        for count, index in enumerate(np.random.default_rng(0).permutation(len(wholes))):
            np.copyto(out[count % options.batch], wholes[index])
        return len(wholes)

    return Case(epoch)


def loader(path: str, options: Options, workers: int) -> Case:
    data = DataLoader(
        Memmap(path), options.batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    return Case(lambda: sum(len(batch) for batch in data))


def webdataset(shards: list[str], options: Options, workers: int) -> Case:
    data = wds.WebDataset(shards, shardshuffle=False).decode().to_tuple("npy").batched(options.batch)
    data = wds.WebLoader(data, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    return Case(lambda: sum(len(batch[0]) for batch in data))


def cases(folder: str, options: Options) -> dict[str, Case]:
    wholes = np.random.default_rng(0).integers(-1000, 1001, (options.samples, *SHAPE), dtype=np.int16)
    np.save(f"{folder}/all.npy", wholes)
    found: dict[str, Case] = {"bound: np.copyto": bound(wholes, options)}
    for form in ("tar", "arrow"):
        shards = write_set(f"{folder}/{form}", form, wholes)
        if form == "tar":
            tars = shards
        for readers in (0, 1, 2):
            for verify in (True, False):
                name = f"p2w {form}, readers {readers}, {'checksum' if verify else 'no checksum'}"
                found[name] = ours(f"{folder}/{form}", options, readers, verify)
    for workers in (0, 1, 2):
        found[f"peer: DataLoader over .npy memmap, workers {workers}"] = loader(
            f"{folder}/all.npy", options, workers
        )
        found[f"peer: webdataset tar, workers {workers}"] = webdataset(tars, options, workers)
    return found


def cpu_seconds() -> float:
    """CPU time of this process, its threads and its running workers: the cost on a busy machine too."""
    process = psutil.Process()
    times = [process.cpu_times(), *(child.cpu_times() for child in process.children())]
    return sum(time.user + time.system for time in times)


@dataclass
class Measured:
    """Samples a second in each round, and CPU ms a sample over all rounds."""

    rates: list[float]
    cpu_ms: float = 0.0


def measure(found: dict[str, Case], options: Options, console: Console) -> dict[str, Measured]:
    """Every case in turn, round after round; round 0 warms up and does not count."""
    measured = {name: Measured([]) for name in found}
    for round_ in track(range(options.rounds + 1), "rounds", console=console):
        for name, case in found.items():
            busy, began = cpu_seconds(), time.perf_counter()
            count = case.run()
            seconds = time.perf_counter() - began
            case.rest()
            busy = cpu_seconds() - busy
            assert count >= options.samples // options.batch * options.batch, (name, count)
            if round_:
                measured[name].rates.append(count / seconds)
                measured[name].cpu_ms += 1000 * busy / count / options.rounds
    return measured


def machine() -> dict[str, object]:
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "load_average": os.getloadavg(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "numpy", "webdataset", "pyarrow", "crc32c")},
    }


def ratios(measured: dict[str, Measured]) -> dict[str, float | str]:
    """What the goals are about; each ratio is taken within a round, where the machine was in one state."""

    def over(a: str, b: str) -> float:
        pairs = zip(measured[a].rates, measured[b].rates, strict=True)
        return statistics.median(x / y for x, y in pairs)

    peers = [name for name in measured if name.startswith("peer")]
    best_peer = max(peers, key=lambda name: statistics.median(measured[name].rates))
    found: dict[str, float | str] = {"best peer": best_peer}
    for readers in (0, 1, 2):
        on, off = (f"p2w tar, readers {readers}, {kind}" for kind in ("checksum", "no checksum"))
        found[f"readers {readers}: times the best peer"] = over(on, best_peer)
        found[f"readers {readers}: np.copyto is faster by"] = over("bound: np.copyto", on)
        found[f"readers {readers}: the checksum's share of the time"] = 1 - over(on, off)
        found[f"readers {readers}: arrow over tar"] = over(on.replace("tar", "arrow"), on)
    return found


def main(options: Options) -> None:
    console = Console()
    torch.set_num_threads(1)
    result = {"question": "samples/s of reading 2 MiB sub-scans, warm page cache", "machine": machine()}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measured = measure(cases(folder, options), options, console)
    table = Table("case", "samples/s", "GB/s", "spread", "CPU ms a sample")
    for name, case in measured.items():
        rate = statistics.median(case.rates)
        spread = f"{min(case.rates):,.0f} - {max(case.rates):,.0f}"
        table.add_row(
            name, f"{rate:,.0f}", f"{rate * np.prod(SHAPE) * 2 / 1e9:.1f}", spread, f"{case.cpu_ms:.2f}"
        )
    console.print(table)
    found = ratios(measured)
    for name, value in found.items():
        console.print(f"{name}: {value if isinstance(value, str) else round(value, 2)}")
    result |= {"samples": options.samples, "batch": options.batch, "ratios": found}
    result |= {"cases": {name: vars(case) for name, case in measured.items()}}
    result |= {"load_average_after": os.getloadavg()}
    os.makedirs(os.path.dirname(options.out) or ".", exist_ok=True)
    with open(options.out, "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
