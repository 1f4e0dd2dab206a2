"""Does the pipeline keep the network busy? Real steps against the same steps on data that lies in memory.

    python bench/end_to_end.py                        # the `paper` network, batch 4, two threads: some minutes on CPUs
    python bench/end_to_end.py --batch 16 --rounds 50 # on a GPU
    python bench/end_to_end.py --shards shards        # a data set of yours

Three trainers, built as `launch/train.py` builds one, take steps in turn through its loop: data from shards, checksums and
crops and all; wholes that lie in memory, cropped; part and whole that lie in memory, so that only the network works.
Each has readers of its own, which go on while the others' steps are timed: they fill their ring, three batches, and wait.
"""

import argparse
import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, Goal, over, rotate, row, save, show

from p2w.config import Config
from p2w.log import Log
from p2w.model.encoder import set_memory_format
from p2w.pretext import build_pretext_and_network
from p2w.pretext.parts2whole import Parts2Whole
from p2w.pretext.protocol import Views
from p2w.recipes import named
from p2w.resources import usable_cores
from p2w.rng import SampleKeys
from p2w.stream.local import ShardSet
from p2w.stream.stream import Batch, Stream, open_set
from p2w.train.checkpoint import Checkpoints
from p2w.train.form_choice import choose_run_forms
from p2w.train.loop import Trainer
from p2w.train.optim import choose_precision
from p2w.train.step import WARM_UP_STEPS
from p2w.world import World

WAYS = ("wholes from shards", "wholes in memory", "parts and wholes in memory")


class InMemory(Stream):
    """One batch, read before the clock runs, at every step."""

    def batches(self, epoch: int = 0, step: int = 0) -> Iterator[Batch]:  # type: ignore[override]
        """The first batch of the epoch, again and again."""
        first = next(super().batches(epoch, step))
        kept = replace(first, voxels=first.voxels.clone())
        self.close()
        return itertools.repeat(kept)


class Ready(Parts2Whole):
    """Views cut once."""

    kept: Views | None = None

    def sample(self, batch_BDHW: torch.Tensor, keys: SampleKeys, step: int = 0) -> Views:
        """The views of the first batch, again and again."""
        self.kept = self.kept or super().sample(batch_BDHW, keys)
        return self.kept


class Said(Log):
    """A log whose lines go to the terminal, and nothing to the disk: what forms and graph the run has chosen."""

    def __init__(self, folder: Path, steps: int) -> None:
        super().__init__(folder, False, steps)

    def line(self, text: str, style: str | None = None) -> None:
        """Print the line."""
        print(text, flush=True)


class Way:
    """A trainer of its own; called, it takes `steps` steps and returns samples a second."""

    def __init__(self, name: str, config: Config, shards: ShardSet, folder: Path, steps: int) -> None:
        world = World.start()  # as a run starts: on a GPU, cuDNN tries its algorithms and keeps the fastest
        precision = choose_precision(config.train.precision, world.device).apply()
        torch.manual_seed(0)
        pretext, model = build_pretext_and_network(config)
        if name == WAYS[2]:
            pretext = Ready(config.pretext)
        model.to(world.device)
        set_memory_format(model, config.train.channels_last)
        kind = Stream if name == WAYS[0] else InMemory
        self.stream = kind(
            shards, "train", config.data.batch, readers=config.data.reader_threads, device=world.device
        )
        log = Said(folder, config.train.steps)
        choice = choose_run_forms(config, model, folder, world, precision, log)
        choice.write(folder)  # the other ways take the same forms
        checkpoints = Checkpoints(folder / "checkpoints", 1, print)
        self.trainer = Trainer(config, world, pretext, model, self.stream, checkpoints, log, precision)
        self.cpu_s: list[float] = []  # of all threads, a sample
        self.batches, self.steps, self.samples = self.stream.batches(), steps, config.data.batch * steps
        # A CUDA graph is captured, timed and taken or not before anything is measured
        if world.device.type == "cuda":
            for _ in range(WARM_UP_STEPS + 1):
                self.trainer.train_step(next(self.batches))

    def __call__(self) -> float:
        began, busy = time.perf_counter(), time.process_time()
        for _ in range(self.steps):
            self.trainer.train_step(next(self.batches))  # the loop's own step: views, update, accounts
        if self.trainer.world.device.type == "cuda":
            torch.cuda.synchronize()
        self.cpu_s.append((time.process_time() - busy) / self.samples)
        return self.samples / (time.perf_counter() - began)


def shards_in(folder: str, count: int) -> str:
    """A data set of noise."""
    from stream import SHAPE, write_set  # noqa: PLC0415  a bare GPU machine brings shards of its own

    wholes = np.random.default_rng(0).integers(-1000, 1001, (count, *SHAPE), dtype=np.int16)
    write_set(f"{folder}/set", "tar", wholes)
    return f"{folder}/set"


def main() -> None:
    """Time real steps and steps on data in memory in turns, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="paper")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=1, help="steps a round")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--shards", default="")
    parser.add_argument("--small", action="store_true", help="width 4 at 16x16x16 voxels, to rehearse")
    parser.add_argument("--out", type=Path, default=RESULTS / "end_to_end.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = named(args.recipe)
    config = replace(config, data=replace(config.data, batch=args.batch))
    if args.small:
        config = replace(
            config, model=replace(config.model, width=4), pretext=replace(config.pretext, size=(16, 16, 16))
        )
    folder = tempfile.mkdtemp()
    try:
        shards = open_set(args.shards or shards_in(folder, max(64, 2 * args.batch // 32 * 32)))
        ways = {name: Way(name, config, shards, Path(folder), args.steps) for name in WAYS}
        waited = ways[WAYS[0]].stream.wait_seconds
        rates = rotate(dict(ways), args.rounds)
        waited = ways[WAYS[0]].stream.wait_seconds - waited
        for way in ways.values():
            way.stream.close()
    finally:
        shutil.rmtree(folder)
    kinds = ("ours", "bound", "bound")
    where = ways[WAYS[0]].trainer.world
    group = f"steps of {args.recipe}, batch {args.batch}, on {where.device_reason if where.device.type == 'cuda' else 'CPU'}"
    rows = [row(group, name, rates[name], "samples/s", kind) for name, kind in zip(WAYS, kinds, strict=True)]
    cpu = {name: way.cpu_s[1:] for name, way in ways.items()}
    goals = [
        Goal("of the speed with views in memory", over(rates[WAYS[0]], rates[WAYS[2]]), 0.98),
        Goal("of the speed with wholes in memory", over(rates[WAYS[0]], rates[WAYS[1]]), 0.98),
        Goal("of the processor time, that of views in memory", over(cpu[WAYS[2]], cpu[WAYS[0]]), 0.98),
    ]
    command = f"python bench/end_to_end.py --recipe {args.recipe} --batch {args.batch} --rounds {args.rounds}"
    command += " --small" * args.small
    question = "the loop of launch/train.py against the same loop on data in memory"
    show(
        save(
            args.out,
            question,
            command,
            rows,
            goals,
            rates=rates,
            cpu_s=cpu,
            threads=args.threads,
            waited_s=waited,
        )
    )


if __name__ == "__main__":
    main()
