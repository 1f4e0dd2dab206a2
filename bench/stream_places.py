"""Reading what is not in memory: from a disk whose cache was dropped, from a web server; and what 20 epochs leave behind.

    python bench/stream_places.py --folder /data/bench    # sets that `bench/stream.py --folder … --write` has written
    python bench/stream_places.py                         # writes its own
    python bench/stream_places.py --web-only --out bench/results/http_ranges.json    # the web server alone

Cold: before each turn every file of the set leaves the page cache (posix_fadvise), with no map of it left, and what the disk
then gave is counted; peers' clocks run from the start here, since some read ahead before their first batch. HTTP: nginx
on this machine; ours by byte ranges, globally shuffled, or streamed through curl as from a server without ranges;
webdataset streams whole shards through curl; a set held in the device's memory crosses the wire once. curl gets whole
shards, and the very ranges of an epoch in its order, and throws both away. By the clock, server and client share the cores,
so the processor time of each client is recorded too, with that of its processes. A stream reads ahead, and at the end of an
epoch into the next one: what a set with random access has read counts, also beyond the epoch. Memory: what the process has
to itself (RssAnon) after each of 20 epochs.
"""

import gc
import itertools
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from common import RESULTS, Goal, over, rotate, row, save, show
from stream import SHAPE, Peer, write, write_set
from stream import Options as Sets

from p2w.shards.manifest import read_manifest
from p2w.shards.manifest_schema import MANIFEST_NAME
from p2w.stream.prefetch import DeviceCache
from p2w.stream.stream import Stream, open_set
from p2w.stream.tar import TarSet, fetch_manifest


@dataclass(frozen=True)
class Options:
    """What to measure."""

    peers: str = sys.executable  # the Python of the peers' environment
    folder: str = ""
    batch: int = 16
    rounds: int = 3
    epochs: int = 20
    web_only: bool = False  # leave out disk and memory
    out: str = os.fspath(RESULTS / "stream_places.json")


def drop(folder: str) -> None:
    """Have every file below `folder` leave the page cache; pages that someone has mapped stay."""
    gc.collect()
    for path in [Path(folder), *Path(folder).rglob("*")]:
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fdatasync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def from_disk() -> int:
    """Bytes that all disks have given since the machine started."""
    lines = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(lines["pgpgin"]) << 10


@dataclass(frozen=True)
class Turn:
    """What one turn of a way has read, and how long that took."""

    sub_scans: int
    seconds: float

    @property
    def rate(self) -> float:
        """Sub-scans a second."""
        return self.sub_scans / self.seconds


def epoch(stream: Stream, number: int = 0) -> Turn:
    """Run an epoch, and count what was read of it and, ahead, of the next one."""
    shards, read = stream.sampler.shards, list[int]()
    read_into = shards.read_into

    def counted_read(sub_scan: int, out: object) -> None:
        read_into(sub_scan, out)
        read.append(sub_scan)

    began = time.perf_counter()
    with patched(shards, "read_into", counted_read):
        batches = itertools.islice(stream.batches(number), stream.steps_per_epoch)
        used = sum(len(batch.voxels) for batch in batches)
        stream.close()
    return Turn(max(used, len(read)), time.perf_counter() - began)


@contextmanager
def patched(thing: object, name: str, value: object) -> Iterator[None]:
    """An attribute of one object, for the time of the block."""
    setattr(thing, name, value)
    try:
        yield
    finally:
        delattr(thing, name)


def cold(folder: str, options: Options, given: list[float]) -> dict[str, Callable[[], float]]:
    """Ways to read a set whose files have just left the cache."""

    def ours(form: str, readers: int) -> Callable[[], float]:
        def run() -> float:
            drop(f"{folder}/{form}")
            before = from_disk()
            stream = Stream(open_set(f"{folder}/{form}"), batch=options.batch, readers=readers)
            turn = epoch(stream)
            given.append((from_disk() - before) / (turn.sub_scans * stream.sampler.shards.nbytes))
            return turn.rate

        return run

    def peer(name: str, where: str) -> Callable[[], float]:
        # A process of its own each time: the last one's maps would keep pages in the cache
        def run() -> float:
            process = Peer(name, folder, Sets(peers=options.peers, batch=options.batch))
            drop(f"{folder}/{where}")
            try:
                return float(process.ask("epoch 2")["whole_rate"])
            finally:
                process.close()

        return run

    def plain() -> float:
        drop(f"{folder}/tar")
        began, nbytes, buffer = time.perf_counter(), 0, bytearray(1 << 21)
        for path in sorted(Path(f"{folder}/tar").glob("*.tar")):
            with open(path, "rb", buffering=0) as file:
                while got := file.readinto(buffer):
                    nbytes += got
        return nbytes / (1 << 21) / (time.perf_counter() - began)

    return {
        "plain read of all shards, front to back": plain,
        "p2w tar, readers 2": ours("tar", 2),
        "p2w tar, readers 8": ours("tar", 8),
        "p2w arrow, readers 2": ours("arrow", 2),
        "DataLoader over .npy map, 2 workers": peer("npy", "all.npy"),
        "DataLoader over Arrow map, 2 workers": peer("arrow", "arrow"),
        "webdataset, 2 workers": peer("webdataset", "tar"),
    }


@contextmanager
def served(folder: str) -> Iterator[str]:
    """The URL of a folder behind nginx."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as run:
        kinds = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        places = " ".join(f"{kind}_temp_path {run}/{kind};" for kind in kinds)
        root = "user root;" if os.geteuid() == 0 else ""
        Path(f"{run}/conf").write_text(
            f"{root} worker_processes 1; daemon off; pid {run}/pid; error_log {run}/error; events {{}} "
            f"http {{ access_log off; sendfile on; {places} server {{ listen 127.0.0.1:{port}; root {folder}; }} }}"
        )
        nginx = shutil.which("nginx") or "/usr/sbin/nginx"
        server = subprocess.Popen([nginx, "-p", run, "-e", f"{run}/error", "-c", f"{run}/conf"])
        try:
            time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


def processor_s() -> float:
    """Seconds of a core that this process has used, with the processes it started that have ended."""
    own, ended = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def counted(
    ways: dict[str, Callable[[], Turn]], used: dict[str, list[float]]
) -> dict[str, Callable[[], float]]:
    """The rates of these ways, each of which also adds the processor seconds of a sub-scan to `used`."""

    def count(name: str, way: Callable[[], Turn]) -> Callable[[], float]:
        def run() -> float:
            before = processor_s()
            turn = way()
            used.setdefault(name, []).append((processor_s() - before) / turn.sub_scans)
            return turn.rate

        return run

    return {name: count(name, way) for name, way in ways.items()}


CURL, CURL_RANGES, RANGES = (
    "curl to nowhere, one connection",
    "curl to nowhere, the same ranges",
    "p2w, byte ranges",
)


def remote(url: str, folder: str, options: Options) -> dict[str, Callable[[], Turn]]:
    """Ways to read tar shards from a web server."""
    shards = sorted(path.name for path in Path(f"{folder}/tar").glob("*.tar"))
    whole = open_set(url)
    held = DeviceCache(whole, "train", torch.device("cpu"))
    numbers = itertools.count()
    front = TarSet(read_manifest(fetch_manifest(f"{url}/{MANIFEST_NAME}")), url)
    streams = {
        RANGES: Stream(whole, batch=options.batch),
        "p2w, streamed, readers 2": Stream(front, batch=options.batch),
        "p2w, set held in memory, from the second epoch": Stream(whole, batch=options.batch, cache=held),
    }
    epoch(streams["p2w, set held in memory, from the second epoch"])

    def curl() -> Turn:
        began = time.perf_counter()
        subprocess.run(
            ["curl", "-sf", *(f"{url}/{name}" for name in shards)], check=True, stdout=subprocess.DEVNULL
        )
        return Turn(len(whole.ids("train")), time.perf_counter() - began)

    def curl_ranges() -> Turn:
        sampler = streams[RANGES].sampler
        ids = np.concatenate([sampler.step_ids(0, step) for step in range(sampler.steps)])
        starts = whole.offsets[ids]
        asked = [
            f'url = "{url}/{whole.shard(one)}"\nrange = "{start}-{start + whole.nbytes - 1}"\noutput = "/dev/null"\n'
            for one, start in zip(ids.tolist(), starts.tolist(), strict=True)
        ]
        began = time.perf_counter()
        subprocess.run(["curl", "-sf", "-K", "-"], input="next\n".join(asked), text=True, check=True)
        return Turn(len(ids), time.perf_counter() - began)

    def webdataset() -> Turn:
        import webdataset as wds  # noqa: PLC0415

        data = wds.WebDataset([f"{url}/{name}" for name in shards], shardshuffle=len(shards))
        loader = wds.WebLoader(
            data.shuffle(64).decode().to_tuple("npy").batched(options.batch), batch_size=None, num_workers=2
        )
        began = time.perf_counter()
        count = sum(len(batch[0]) for batch in loader)
        return Turn(count, time.perf_counter() - began)

    return {
        CURL: curl,
        CURL_RANGES: curl_ranges,
        **{name: lambda stream=stream: epoch(stream, next(numbers)) for name, stream in streams.items()},
        "webdataset, 2 workers": webdataset,
    }


def own_mib() -> float:
    """Memory of this process that no other one shares, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def memory(folder: str, options: Options) -> list[float]:
    """MiB after each epoch; the first ones fill buffers."""
    stream, found = Stream(open_set(f"{folder}/tar"), batch=options.batch), []
    for number in range(options.epochs):
        epoch(stream, number)
        found.append(own_mib())
    return found


def main(options: Options) -> None:
    """Time reading from disk and over HTTP, measure memory over epochs, and write the result."""
    torch.set_num_threads(1)
    folder = options.folder or tempfile.mkdtemp()
    try:
        if not options.folder and options.web_only:
            wholes = np.random.default_rng(0).integers(-1000, 1001, (256, *SHAPE), dtype=np.int16)
            write_set(f"{folder}/tar", "tar", wholes)
        elif not options.folder:
            write(folder, Sets(samples=256, peers=options.peers))
        given: list[float] = []
        disk = {} if options.web_only else rotate(cold(folder, options, given), options.rounds)
        used: dict[str, list[float]] = {}
        with served(f"{folder}/tar") as url:
            web = rotate(counted(remote(url, folder, options), used), options.rounds)
        kept = [] if options.web_only else memory(folder, options)
    finally:
        if not options.folder:
            shutil.rmtree(folder)
    kinds = {"pla": "bound", "cur": "bound", "p2w": "ours"}
    groups = {"from disk, page cache dropped": disk, "from nginx on this machine": web}
    rows = [
        row(group, name, rates, "samples/s", kinds.get(name[:3], "peer"))
        for group, found in groups.items()
        for name, rates in found.items()
    ]
    used = {name: seconds[1:] for name, seconds in used.items()}  # round 0 warms up
    goals = [
        Goal("HTTP, times webdataset", over(web[RANGES], web["webdataset, 2 workers"]), 1.0),
        Goal("HTTP, times curl for the same ranges", over(web[RANGES], web[CURL_RANGES]), 0.8),
        Goal(
            "HTTP, processor time of curl for the same ranges over ours",
            over(used[CURL_RANGES], used[RANGES]),
            0.8,
        ),
        Goal("HTTP, processor time of curl for whole shards over ours", over(used[CURL], used[RANGES]), 0.8),
    ]
    if not options.web_only:
        peer = max(
            (name for name in disk if "2 workers" in name), key=lambda name: statistics.median(disk[name])
        )
        slope = float(np.polyfit(range(len(kept) - 2), kept[2:], 1)[0])
        ratio = over(disk["p2w arrow, readers 2"], disk[peer])
        goals = [
            Goal(f"cold, times the best peer ({peer})", ratio, 1.0),
            *goals,
            Goal("MiB more each epoch", slope, 0.1, at_least=False),
        ]
    more = {
        "rates": {**disk, **web},
        "processor_ms_a_sub_scan": {
            name: [round(1000 * one, 3) for one in seconds] for name, seconds in used.items()
        },
        "bytes_from_disk_per_byte_of_the_set": given,
        "own_mib_after_each_epoch": kept,
    }
    question = "samples/s of reading what is not in memory yet, and memory over epochs"
    command = f"python bench/stream_places.py{' --web-only' * options.web_only}"
    show(save(Path(options.out), question, command, rows, goals, **more))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
