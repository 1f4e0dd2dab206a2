"""How fast are sub-scans read? Ours against the bound (np.copyto) and against stock loaders, warm page cache.

    python bench/stream.py                                # peers that this Python can import
    python bench/stream.py --peers .peers/bin/python      # all of them: `make bench-peers`
    python bench/stream.py --folder /data/bench --write   # write the sets and stop; without --write, use what is there

512 sub-scans of 2 MiB, 16 a batch. Every case reads all of them once a round; cases take turns, ratios are taken within a
round. Before the rounds, after writing, every sample of every way is compared with what was written. Ours checks each
one in the rounds too, but where it says so; peers check nothing then, and their clock starts with their first batch.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from common import RESULTS, Goal, Row, over, rotate, row, save, show
from crc32c import crc32c

from p2w.files import LIBRARY
from p2w.files import crc32c as files_crc32c
from p2w.shards.manifest import manifest_bytes
from p2w.shards.manifest_schema import MANIFEST_NAME, MANIFEST_VERSION
from p2w.shards.writer import open_shard
from p2w.stream import local
from p2w.stream.local import ShardSet
from p2w.stream.prefetch import DeviceCache
from p2w.stream.stream import Stream, open_set

SHAPE, PER_SHARD = (64, 128, 128), 32
PEERS = {"npy": "DataLoader over .npy map", "arrow": "DataLoader over Arrow map", "webdataset": "webdataset",
         "mosaicml": "mosaicml-streaming", "litdata": "litdata", "grain": "grain, ArrayRecord"}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What to measure."""

    samples: int = 512  # sub-scans of 2 MiB
    batch: int = 16
    rounds: int = 7
    peers: str = sys.executable  # the Python of the peers' environment
    folder: str = ""  # where the sets are, or go; default: a temporary folder
    write: bool = False
    out: str = os.fspath(RESULTS / "stream.json")


def write_set(folder: str, form: str, wholes: np.ndarray) -> None:
    """Cut `wholes` (N, D, H, W) into a data set of p2w."""
    os.makedirs(folder)
    rows, shards = [], []
    fixed = {
        "spacing_z": 1.0,
        "spacing_y": 1.0,
        "spacing_x": 1.0,
        "mean_hu": 0.0,
        "std_hu": 0.0,
        "split": "train",
    }
    for number in range(len(wholes) // PER_SHARD):
        uid = f"scan{number:03d}"
        shard = open_shard(f"{folder}/{uid}.{form}", SHAPE)
        for tile in range(PER_SHARD):
            place = {"scan_uid": uid, "subset": -1, "z": tile, "y": 0, "x": 0, "shard": f"{uid}.{form}"}
            one = {"key": f"{uid}/z{tile:04d}_y0000_x0000", **place, **fixed}
            rows.append(shard.add(one, wholes[number * PER_SHARD + tile]))
        done = shard.close()
        shards.append({"name": f"{uid}.{form}", "nbytes": done.nbytes, "crc32c": done.crc32c})
    meta = {
        "schema": MANIFEST_VERSION,
        "format": form,
        "shape": list(SHAPE),
        "dtype": "int16",
        "shards": shards,
    }
    Path(f"{folder}/{MANIFEST_NAME}").write_bytes(manifest_bytes(rows, meta))


class Peer:
    """A process of bench/peers/loaders.py."""

    def __init__(self, name: str, folder: str, options: Options) -> None:
        script = os.fspath(Path(__file__).parent / "peers" / "loaders.py")
        line = [options.peers, script, name, folder, str(options.batch)]
        self.name, self.options = name, options
        self.process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, line: str) -> dict[str, Any]:
        """Raises RuntimeError with what the peer says is wrong."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        found: dict[str, Any] = json.loads(reply) if reply else {"error": "its process has ended"}
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def epoch(self, workers: int) -> Callable[[], float]:
        """A function that runs an epoch in the peer's process and gives its samples a second."""

        def run() -> float:
            found = self.ask(f"epoch {workers}")
            assert found["count"] >= self.options.samples // self.options.batch * self.options.batch, found
            return float(found["rate"])

        return run

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


def write(folder: str, options: Options) -> None:
    """All sets below `folder`, and what came out of each; `peers.json` says which peers gave the right samples."""
    wholes = np.random.default_rng(0).integers(-1000, 1001, (options.samples, *SHAPE), dtype=np.int16)
    np.save(f"{folder}/all.npy", wholes)
    for form in ("tar", "arrow"):
        write_set(f"{folder}/{form}", form, wholes)
        checked(Stream(open_set(f"{folder}/{form}"), batch=options.batch), wholes)
    right, found = sorted(crc32c(whole.tobytes()) for whole in wholes), {}
    for name in PEERS:
        peer = Peer(name, folder, options)
        try:
            peer.ask("write")
            same = all(peer.ask(f"check {workers}")["checksums"] == right for workers in (1, 2))
            found[name] = "" if same else "gives other samples than were written"
        except RuntimeError as error:
            found[name] = str(error)
        peer.close()
    Path(f"{folder}/peers.json").write_text(json.dumps(found))


# A stream of its own for each case; one map of the shards for all, as a training run has.
def ours(
    shards: ShardSet, options: Options, readers: int, held: DeviceCache | None = None
) -> Callable[[], float]:
    """A function that runs an epoch of our stream and gives its samples a second."""
    stream = Stream(shards, batch=options.batch, readers=readers, cache=held)
    epochs = itertools.count()

    def epoch() -> float:  # begins with threads not yet started: nothing has been read ahead
        began = time.perf_counter()
        batches = stream.batches(next(epochs))
        count = sum(len(batch.voxels) for batch in itertools.islice(batches, stream.steps_per_epoch))
        seconds = time.perf_counter() - began
        stream.close()  # what the readers have read ahead counts for nothing
        return count / seconds

    return epoch


def by_package(run: Callable[[], float]) -> Callable[[], float]:
    """The same with checksums by the crc32c package, as where awscrt is not installed."""

    def other() -> float:
        kept, local.crc32c = files_crc32c, crc32c
        try:
            return run()
        finally:
            local.crc32c = kept

    return other


def bound(wholes: np.ndarray, options: Options) -> Callable[[], float]:
    """A function that copies all samples in memory, in random order, and gives its samples a second."""
    out = np.zeros((options.batch, *SHAPE), np.int16)

    def epoch() -> float:
        began = time.perf_counter()
        for count, index in enumerate(np.random.default_rng(0).permutation(len(wholes))):
            np.copyto(out[count % options.batch], wholes[index])
        return len(wholes) / (time.perf_counter() - began)

    return epoch


def checked(stream: Stream, wholes: np.ndarray) -> None:
    """Every sample of an epoch is the one that its id says."""
    for batch in itertools.islice(stream.batches(), stream.steps_per_epoch):
        for sub_scan, voxels in zip(batch.ids.tolist(), batch.voxels.numpy(), strict=True):
            assert np.array_equal(voxels, wholes[sub_scan]), sub_scan
    stream.close()


def cases(folder: str, options: Options) -> tuple[dict[str, Callable[[], float]], list[Peer], list[str]]:
    """Ways, the peers' processes, and lines on peers that are not there."""
    wholes = np.load(f"{folder}/all.npy", mmap_mode="r")[: options.samples]
    found: dict[str, Callable[[], float]] = {"np.copyto, one thread": bound(wholes, options)}
    for form in ("tar", "arrow"):
        for verify in (True, False):
            shards = open_set(f"{folder}/{form}", verify)
            for readers in (0, 1, 2):
                what = "checksum" if verify else "unchecked"
                found[f"p2w {form}, readers {readers}, {what}"] = ours(shards, options, readers)
    if LIBRARY != "crc32c":
        slower = ours(open_set(f"{folder}/tar"), options, 2)
        found["p2w tar, readers 2, checksum by the crc32c package"] = by_package(slower)
    held = DeviceCache(open_set(f"{folder}/tar"), "train", torch.device("cpu"))
    found["p2w, set held in memory"] = ours(open_set(f"{folder}/tar"), options, 2, held)
    wrong = json.loads(Path(f"{folder}/peers.json").read_text())
    peers = [Peer(name, folder, options) for name in PEERS if not wrong[name]]
    for peer in peers:
        for workers in (1, 2):
            found[f"{PEERS[peer.name]}, {workers} workers"] = peer.epoch(workers)
    absent = [f"{PEERS[name]}: {why}" for name, why in wrong.items() if why]
    return found, peers, absent


def goals(rates: dict[str, list[float]]) -> list[Goal]:
    """The goals, of rates in samples a second by name."""
    names = [name for name in rates if not name.startswith(("p2w", "np."))]
    best = max(names, key=lambda name: sorted(rates[name])[len(rates[name]) // 2])
    on, off = (
        [rate for form in ("tar", "arrow") for rate in rates[f"p2w {form}, readers 2, {what}"]]
        for what in ("checksum", "unchecked")
    )
    default = rates["p2w tar, readers 2, checksum"]
    return [
        Goal(f"samples/s, times the best peer ({best})", over(default, rates[best]), 3.0),
        Goal(
            f"the checksum's share of the time, two readers, {LIBRARY}",
            1 - over(on, off),
            0.15,
            at_least=False,
        ),
        Goal("np.copyto is faster by", over(rates["np.copyto, one thread"], default), 2.0, at_least=False),
    ]


def main(options: Options) -> None:
    """Time all readers in turns, and write the result."""
    torch.set_num_threads(1)
    folder = options.folder or tempfile.mkdtemp()
    os.makedirs(folder, exist_ok=True)
    try:
        if options.write or not os.path.exists(f"{folder}/peers.json"):
            write(folder, options)
        if options.write:
            return
        ways, peers, absent = cases(folder, options)
        try:
            rates = rotate(ways, options.rounds)
        finally:
            for peer in peers:
                peer.close()
    finally:
        if not options.folder:
            shutil.rmtree(folder)
    kinds = {"p2w": "ours", "np.": "bound"}
    rows: list[Row] = []
    for name, found in rates.items():
        rows.append(row("reading 2 MiB sub-scans", name, found, "samples/s", kinds.get(name[:3], "peer")))
    question = f"samples/s of reading {options.samples} sub-scans of 2 MiB, warm page cache"
    command = "python bench/stream.py --peers .peers/bin/python"
    show(
        save(
            Path(options.out),
            question,
            command,
            rows,
            goals(rates),
            rates=rates,
            absent=absent,
            checksum=LIBRARY,
        )
    )
    for line in absent:
        print(f"  not here: {line}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
