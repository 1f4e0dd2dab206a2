"""How fast are wholes cut at random places of stored scans, against reading the sub-scans of a set of sub-scans?

    python bench/store_scans.py                 # a synthetic scan of LUNA16's size
    python bench/store_scans.py --scans DIR     # every scan below DIR

Both sets are cut from the same scans. Ways take turns, ratios are taken within a round; pages are in memory, and every byte
that is read is checked. Times are of the processor where nothing is read ahead. How many chunks and bytes a whole takes is
counted, and compared with the arithmetic of `p2w.shards.scan_store`. Results go to bench/results/store_scans.json.
"""

import itertools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from common import RESULTS, Goal, over, rotate, row, save, show
from shard import synthetic

from p2w.ct.discover import find_scans
from p2w.ct.scan import quiet_itk
from p2w.shards.build import cut_source
from p2w.shards.build_folder import JobShare
from p2w.shards.scan_shards import ScanFolder, ShardingSettings, build_shards
from p2w.stream.local import ShardSet
from p2w.stream.random_crops import ScanStoreSet
from p2w.stream.stream import Stream, open_set

GROUP = "reading 2 MiB wholes"


@dataclass(frozen=True)
class Options:
    """What to measure."""

    scans: str = ""
    """Folder of scans; a synthetic one where it is empty."""
    batch: int = 8
    rounds: int = 7


def cut(where: str, out: str, settings: ShardingSettings) -> tuple[ShardSet, float]:
    """The set of the scans below `where`, and the seconds of the processor that cutting took."""
    folder, found = ScanFolder(out, settings), find_scans([where], out)
    with folder.share_lock(JobShare()):
        folder.prepare(JobShare())
        began = time.process_time()
        for source in found.sources:
            cut_source(source, folder, JobShare())
        seconds = time.process_time() - began
    build_shards(found, out, settings)
    return open_set(out), seconds


class Counted:
    """The set of chunks, with a count of those that were read."""

    def __init__(self, chunks: ShardSet) -> None:
        self.chunks, self.count = chunks, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.chunks, name)

    def read_into(self, chunk: int, out: Any) -> None:
        """Read and count."""
        self.count += 1
        self.chunks.read_into(chunk, out)


def reading(shards: ShardSet, options: Options, readers: int, training: bool = True) -> Callable[[], float]:
    """A function that reads an epoch and gives its samples a second."""
    split, batch = "train", min(options.batch, len(shards.ids("train")))
    stream = Stream(shards, split, batch, readers=readers, training=training)
    epochs = itertools.count()

    def epoch() -> float:
        clock = time.perf_counter if readers else time.process_time
        began = clock()
        steps = itertools.islice(stream.batches(next(epochs) if training else 0), stream.steps_per_epoch)
        count = sum(len(batch.voxels) for batch in steps)
        seconds = clock() - began
        stream.close()
        return count / seconds

    return epoch


def main() -> None:
    """Cut both sets, read them in turns, and write the result."""
    options = tyro.cli(Options, description=__doc__)
    quiet_itk(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        where = options.scans
        if not where:
            where = f"{name}/scans"
            os.mkdir(where)
            synthetic(Path(where) / "plain.mhd", 275)
        plain, plain_s = cut(where, f"{name}/sub_scans", ShardingSettings(val_fraction=0))
        stored, stored_s = cut(where, f"{name}/scans_set", ShardingSettings(val_fraction=0, store="scans"))
        assert isinstance(stored, ScanStoreSet)
        ways = {
            "sub-scans, readers 0": reading(plain, options, 0),
            "whole scans, random places, readers 0": reading(stored, options, 0),
            "whole scans, fixed places, readers 0": reading(stored, options, 0, training=False),
            "sub-scans, readers 2": reading(plain, options, 2),
            "whole scans, random places, readers 2": reading(stored, options, 2),
        }
        rates = rotate(ways, options.rounds)
        counted, wholes = Counted(stored.chunks), 0
        stored.chunks = counted  # type: ignore[assignment]
        whole = torch.empty(stored.shape, dtype=torch.int16)
        for epoch in range(4):
            with stored.reader(stored.ids("train"), (0, epoch)) as reader:
                for number in stored.ids("train").tolist():
                    reader.read_into(number, whole)
                    wholes += 1
        chunks = counted.count / wholes
        share = 2 * float(torch.tensor(stored.store.chunk).prod()) / stored.nbytes
    found = list(rates)
    rows = [row(GROUP, way, values, "samples/s", "ours") for way, values in rates.items()]
    goals = [
        Goal(
            "a whole at a random place, times a sub-scan, no reader",
            over(rates[found[0]], rates[found[1]]),
            8,
            False,
        ),
        Goal("the same, two readers", over(rates[found[3]], rates[found[4]]), 8, False),
        Goal(
            "a whole at its fixed place, times a sub-scan", over(rates[found[0]], rates[found[2]]), 3, False
        ),
        Goal("chunks read for a whole, boxes drawn again included", chunks, 40, False),
        Goal("bytes read for a byte of a whole", chunks * share, 5, False),
        Goal("processor time of storing scans, times cutting sub-scans", stored_s / plain_s, 2, False),
    ]
    command = " ".join(["python bench/store_scans.py", *(["--scans DIR"] if options.scans else [])])
    question = "wholes cut at random places of stored scans against sub-scans, warm page cache"
    show(save(RESULTS / "store_scans.json", question, command, rows, goals, rates=rates, chunks=chunks))


if __name__ == "__main__":
    main()
