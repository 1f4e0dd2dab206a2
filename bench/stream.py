"""How fast are sub-scans read? Ours against the bound (np.copyto) and against stock loaders, warm page cache.

    python bench/stream.py                               # table, and bench/results/stream.json
    python bench/stream.py --samples 64 --rounds 3 --out /tmp/stream.json

Every case reads all samples once a round, 16 a batch; the cases take turns, and the median over the rounds counts.
Ours and the memmap are shuffled globally; webdataset reads its shards in order, its fastest way.
"""

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
import torch
import tyro
import webdataset as wds
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

from p2w.data.manifest import NAME, VERSION, manifest_bytes, publish
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
    publish(f"{folder}/{NAME}", manifest_bytes(rows, meta), "bench")
    return [f"{folder}/{shard['name']}" for shard in shards]


class Memmap(Dataset):
    """The usual way with a DataLoader: one .npy, mapped, indexed."""

    def __init__(self, path: str) -> None:
        self.array = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(self.array[index]))


def ours(folder: str, options: Options, readers: int, verify: bool) -> Callable[[], int]:
    stream = Stream(open_set(folder, verify), batch=options.batch, readers=readers)
    state = {"epoch": 0, "batches": stream.batches()}

    def epoch() -> int:  # one running iteration: threads and buffers stay, as in training
        return sum(len(next(state["batches"]).voxels) for _ in range(stream.steps_per_epoch))

    return epoch


def bound(wholes: np.ndarray, options: Options) -> Callable[[], int]:
    out = np.zeros((options.batch, *SHAPE), np.int16)

    def epoch() -> int:
        for count, index in enumerate(np.random.default_rng(0).permutation(len(wholes))):
            np.copyto(out[count % options.batch], wholes[index])
        return len(wholes)

    return epoch


def loader(path: str, options: Options, workers: int) -> Callable[[], int]:
    data = DataLoader(
        Memmap(path), options.batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda: sum(len(batch) for batch in data)


def webdataset(shards: list[str], options: Options, workers: int) -> Callable[[], int]:
    data = wds.WebDataset(shards, shardshuffle=False).decode().to_tuple("npy").batched(options.batch)
    data = wds.WebLoader(data, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    return lambda: sum(len(batch[0]) for batch in data)


def cases(folder: str, options: Options) -> dict[str, Callable[[], int]]:
    wholes = np.random.default_rng(0).integers(-1000, 1001, (options.samples, *SHAPE), dtype=np.int16)
    np.save(f"{folder}/all.npy", wholes)
    found: dict[str, Callable[[], int]] = {"bound: np.copyto": bound(wholes, options)}
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


def measure(
    found: dict[str, Callable[[], int]], options: Options, console: Console
) -> dict[str, list[float]]:
    """Samples a second of each case in each round; round 0 warms up and is dropped."""
    rates: dict[str, list[float]] = {name: [] for name in found}
    for round_ in track(
        range(options.rounds + 1), "rounds", console=console, disable=not console.is_terminal
    ):
        for name, epoch in found.items():
            began = time.perf_counter()
            count = epoch()
            rates[name].append(count / (time.perf_counter() - began))
            assert count >= options.samples // options.batch * options.batch, (name, count)
            assert round_ < options.rounds + 1
    return {name: values[1:] for name, values in rates.items()}


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


def ratios(medians: dict[str, float], rates: dict[str, list[float]]) -> dict[str, float]:
    """What the goals are about; ratios are taken within a round, where the machine was in one state."""

    def over(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(rates[a], rates[b], strict=True))

    best_peer = max((name for name in medians if name.startswith("peer")), key=medians.__getitem__)
    found = {"best peer": best_peer}
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
    before = machine()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rates = measure(cases(folder, options), options, console)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    table = Table("case", "samples/s", "GB/s", "spread")
    for name, rate in medians.items():
        spread = f"{min(rates[name]):,.0f} - {max(rates[name]):,.0f}"
        table.add_row(name, f"{rate:,.0f}", f"{rate * np.prod(SHAPE) * 2 / 1e9:.1f}", spread)
    console.print(table)
    found = ratios(medians, rates)
    for name, value in found.items():
        console.print(f"{name}: {value if isinstance(value, str) else round(value, 2)}")
    result = {"question": "samples/s of reading 2 MiB sub-scans, warm page cache", "machine": before}
    result |= {
        "options": vars(options) | {"folder": None},
        "median": medians,
        "rounds": rates,
        "ratios": found,
    }
    os.makedirs(os.path.dirname(options.out) or ".", exist_ok=True)
    with open(options.out, "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
