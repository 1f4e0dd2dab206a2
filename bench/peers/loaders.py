"""What a user would read 2 MiB samples with instead: one process a peer, which `bench/stream.py` asks for epochs.

    python bench/peers/loaders.py webdataset FOLDER 16    # answers lines on stdin: write, check N, epoch N (N workers)

Each peer gets its own format, its own way to shuffle, and its documented loader; a batch of 16 int16 volumes arrives
as one array. None of them verifies what it reads but ArrayRecord, whose container has checksums. `check` answers with
the checksums of all samples that come out; `epoch` counts only, and its clock starts with the first batch: workers start
at no cost. Runs in the environment of `make bench-peers`, without p2w.
"""

import json
import os
import shutil
import sys
import time
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import psutil
import torch
from crc32c import crc32c
from torch.utils.data import DataLoader, Dataset

SHAPE = (64, 128, 128)


def as_volume(data: bytes) -> np.ndarray:
    """Bytes -> int16 (z, y, x)."""
    return np.frombuffer(data, np.int16).reshape(SHAPE)


class Peer:
    """A loader: `write` puts the samples into its format once, `epoch` gives batches with so many workers."""

    def __init__(self, folder: str, batch: int) -> None:
        self.source, self.batch = f"{folder}/all.npy", batch
        self.folder = f"{folder}/peer-{type(self).__name__.lower()}"
        self.built: dict[int, Any] = {}

    def samples(self) -> np.ndarray:
        """All samples, int16 (N, z, y, x), mapped into memory."""
        return np.load(self.source, mmap_mode="r")

    def write(self) -> None:
        """Nothing to write: reads all.npy, or the data set of p2w."""

    def build(self, workers: int) -> Iterable[Any]:
        """The loader with so many workers."""
        raise NotImplementedError

    def epoch(self, workers: int) -> Iterable[Any]:
        """Batches of one epoch; the loader is built at the first call."""
        if workers not in self.built:
            self.built[workers] = self.build(workers)
        return self.built[workers]

    def loader(self, data: Any, workers: int, **more: Any) -> DataLoader:
        """Torch's loader of this data set."""
        return DataLoader(data, self.batch, num_workers=workers, persistent_workers=workers > 0, **more)


class Npy(Peer):
    """One .npy, mapped, under a shuffling DataLoader: the usual way without a library."""

    class Data(Dataset):
        def __init__(self, array: np.ndarray) -> None:
            self.array = array

        def __len__(self) -> int:
            return len(self.array)

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.from_numpy(np.array(self.array[index]))

    def build(self, workers: int) -> DataLoader:
        return self.loader(self.Data(self.samples()), workers, shuffle=True)


class Arrow(Peer):
    """p2w's Arrow shards, mapped with stock pyarrow, under a shuffling DataLoader."""

    class Data(Dataset):
        def __init__(self, folder: str) -> None:
            import pyarrow as pa  # noqa: PLC0415

            names = sorted(name for name in os.listdir(folder) if name.endswith(".arrow"))
            files = [pa.ipc.open_file(pa.memory_map(f"{folder}/{name}")) for name in names]
            batches = [file.get_batch(k) for file in files for k in range(file.num_record_batches)]
            columns = [batch.column(batch.schema.get_field_index("voxels")) for batch in batches]
            self.rows = [row for column in columns for row in column.to_numpy_ndarray()]

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.from_numpy(np.array(self.rows[index]))

    def build(self, workers: int) -> DataLoader:
        return self.loader(self.Data(os.path.dirname(self.folder) + "/arrow"), workers, shuffle=True)


class Webdataset(Peer):
    """p2w's tar shards through stock webdataset, shards and a buffer of 64 shuffled: it has no global shuffle."""

    def build(self, workers: int) -> Iterable[Any]:
        import webdataset as wds  # noqa: PLC0415

        folder = os.path.dirname(self.folder) + "/tar"
        shards = sorted(f"{folder}/{name}" for name in os.listdir(folder) if name.endswith(".tar"))
        data = wds.WebDataset(shards, shardshuffle=len(shards)).shuffle(64).decode().to_tuple("npy")
        return wds.WebLoader(data.batched(self.batch), batch_size=None, num_workers=workers,
                             persistent_workers=workers > 0)  # fmt: skip


class Mosaicml(Peer):
    """MDS shards of 64 MiB through mosaicml-streaming, shuffled."""

    def module(self) -> Any:
        """The package `streaming`, also where its import of torchvision fails."""
        try:
            import streaming  # noqa: PLC0415
        except (RuntimeError, ImportError):  # PyPI's torchvision does not load beside a CPU build of torch:
            for name in [
                name for name in sys.modules if name.partition(".")[0] in ("torchvision", "streaming")
            ]:
                del sys.modules[name]
            # Of which streaming's own picture sets want a base class
            vision = types.ModuleType("torchvision")
            vision.datasets = types.ModuleType("torchvision.datasets")  # type: ignore[attr-defined]
            vision.datasets.VisionDataset = object  # type: ignore[attr-defined]
            vision.transforms = types.ModuleType("torchvision.transforms")  # type: ignore[attr-defined]
            functional = types.ModuleType("torchvision.transforms.functional")
            functional.to_tensor = None  # type: ignore[attr-defined]
            sys.modules |= {"torchvision": vision, "torchvision.datasets": vision.datasets,
                            "torchvision.transforms": vision.transforms,
                            "torchvision.transforms.functional": functional}  # fmt: skip
            import streaming  # noqa: PLC0415
        return streaming

    def write(self) -> None:
        columns, limit = {"voxels": f"ndarray:int16:{','.join(map(str, SHAPE))}"}, 1 << 26
        with self.module().MDSWriter(out=self.folder, columns=columns, size_limit=limit) as writer:
            for voxels in self.samples():
                writer.write({"voxels": np.array(voxels)})

    def build(self, workers: int) -> Iterable[Any]:
        streaming = self.module()
        streaming.base.util.clean_stale_shared_memory()
        data = streaming.StreamingDataset(
            local=self.folder, shuffle=True, batch_size=self.batch, num_canonical_nodes=1
        )
        return self.loader(data, workers)


def litdata_sample(place: tuple[str, int]) -> dict[str, np.ndarray]:
    """The record of sample `place`, (file, number)."""
    return {"voxels": np.array(np.load(place[0], mmap_mode="r")[place[1]])}


class Litdata(Peer):
    """Chunks of 64 MB through litdata's streaming loader, shuffled."""

    def write(self) -> None:
        import litdata  # noqa: PLC0415

        places = [(self.source, index) for index in range(len(self.samples()))]
        litdata.optimize(litdata_sample, places, self.folder, chunk_bytes="64MB", num_workers=1)

    def build(self, workers: int) -> Iterable[Any]:
        import litdata  # noqa: PLC0415

        data = litdata.StreamingDataset(self.folder, shuffle=True)
        return litdata.StreamingDataLoader(
            data, batch_size=self.batch, num_workers=workers, persistent_workers=True
        )


class Grain(Peer):
    """ArrayRecord files, one record a group, through grain, globally shuffled; `workers` are its reading threads."""

    def write(self) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter  # noqa: PLC0415

        os.makedirs(self.folder)
        samples = self.samples()
        for number in range(0, len(samples), 32):
            writer = ArrayRecordWriter(f"{self.folder}/{number:05d}.arrayrecord", "group_size:1,uncompressed")
            for voxels in samples[number : number + 32]:
                writer.write(voxels.tobytes())
            writer.close()

    def epoch(self, workers: int) -> Iterable[Any]:
        import grain  # noqa: PLC0415

        files = sorted(f"{self.folder}/{name}" for name in os.listdir(self.folder))
        if workers not in self.built:
            self.built[workers] = grain.sources.ArrayRecordDataSource(files)
        data = grain.MapDataset.source(self.built[workers]).shuffle(seed=0).map(as_volume).batch(self.batch)
        return data.to_iter_dataset(grain.ReadOptions(num_threads=workers, prefetch_buffer_size=4 * workers))


PEERS = {kind.__name__.lower(): kind for kind in (Npy, Arrow, Webdataset, Mosaicml, Litdata, Grain)}


def volumes(batches: Iterable[Any]) -> Iterator[np.ndarray]:
    """Batches of any peer as arrays (b, D, H, W)."""
    for batch in batches:
        inner = batch["voxels"] if isinstance(batch, dict) else batch
        yield np.asarray(inner[0] if isinstance(inner, list | tuple) else inner)


def cpu_seconds() -> float:
    """CPU time of this process and of its running workers."""
    process = psutil.Process()
    times = [process.cpu_times(), *(child.cpu_times() for child in process.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def answer(peer: Peer, word: str, workers: int) -> dict[str, Any]:
    """Do what the command `word` says (write, check, or an epoch) and give its result as plain JSON types."""
    if word == "write":
        shutil.rmtree(peer.folder, ignore_errors=True)
        peer.write()
        return {}
    if word == "check":
        found = sorted(crc32c(row.tobytes()) for batch in volumes(peer.epoch(workers)) for row in batch)
        return {"checksums": found}
    busy, began = cpu_seconds(), time.perf_counter()
    count, first, first_at = 0, 0, began
    for batch in volumes(peer.epoch(workers)):
        count += len(batch)
        if not first:
            first, first_at = count, time.perf_counter()
    ended = time.perf_counter()
    rate = (count - first) / (ended - first_at)
    return {"count": count, "rate": rate, "whole_rate": count / (ended - began), "cpu": cpu_seconds() - busy}


def main() -> None:
    """Build the loader of the command line and answer requests for epochs."""
    name, folder, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    out, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr  # what libraries print is not an answer
    os.dup2(2, 1)
    peer = PEERS[name](folder, batch)
    for line in sys.stdin:
        word, _, workers = line.strip().partition(" ")
        try:
            reply = answer(peer, word, int(workers or 0))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
        out.write(json.dumps(reply) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
