"""How long does training stand still for a checkpoint, and how much do the steps beside the writing slow down?

    python bench/checkpoint.py                                  # the paper's network at 16x32x32: some minutes on two cores
    python bench/checkpoint.py --size 32 64 64 --batch 16       # on a GPU

Three ways take turns, one span of steps each a round, on one network: no checkpoint, one at the first step of the span
written by the loop itself, one written beside it (p2w.train.checkpoint). A span ends with the checkpoint durable, so nothing
is hidden. Read `stall_ms` (the loop stands still), `slower` (steps beside the writing, times those without), and
`share`: the time a checkpoint costs in all, of the span without one. `held_ms`: the
longest that Python's lock was out of the loop's reach. argparse and torch alone, so that it runs on bare GPU machines.
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from p2w.config import TrainConfig
from p2w.model.decoder import EncoderDecoder
from p2w.model.unet3d import UNet3dDecoder, UNet3dEncoder
from p2w.train.checkpoint import AsyncCheckpointer, Checkpoints, Snapshot

WAYS = ("none", "the loop writes", "written beside")


class Training:
    """A network, its optimizer and its checkpoints."""

    def __init__(self, size: list[int], batch: int, device: torch.device, folder: Path) -> None:
        torch.manual_seed(0)
        encoder = UNet3dEncoder()
        self.model = EncoderDecoder(encoder, UNet3dDecoder(encoder.channels, encoder.strides)).to(device)
        self.model.to(memory_format=torch.channels_last_3d)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3, fused=True)
        self.device, self.at = device, 0
        self.part, self.whole = (torch.rand(batch, 1, *size, device=device) for _ in range(2))
        self.checkpoints = Checkpoints(folder, keep=2)
        self.checkpointer = AsyncCheckpointer(self.checkpoints, TrainConfig(), print)

    def step(self) -> None:
        """Take a training step; returns when the device has done it."""
        self.at += 1
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16):
            output = self.model(self.part)
        F.mse_loss(output.float(), self.whole).backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def snapshot(self) -> Snapshot:
        """What a checkpoint of this step would hold."""
        state = {"optimizer": self.optimizer.state_dict(), "owed": False}
        return Snapshot(self.at, self.model.state_dict(), state, None)

    def span(self, way: str, steps: int) -> dict[str, float]:
        """Steps with a checkpoint after the first: seconds in all, stood still, and of the steps beside the writing."""
        began = time.perf_counter()
        self.step()
        stalled = time.perf_counter()
        if way == "the loop writes":
            self.checkpoints.save(self.snapshot())
        elif way == "written beside":
            self.checkpointer.save(self.snapshot())
        stall = time.perf_counter() - stalled
        beside, writing = [], 0.0
        for _ in range(steps - 1):
            one = time.perf_counter()
            self.step()
            if way != "written beside" or self.checkpointer._thread is not None:
                beside.append(time.perf_counter() - one)
            self.checkpointer.poll()
            writing = writing or (0.0 if self.checkpointer._thread else time.perf_counter() - stalled)
        self.checkpointer.wait()
        return {
            "seconds": time.perf_counter() - began, "stall": stall, "beside": median(beside or [0.0]),
            "writing": writing or time.perf_counter() - stalled,
        }  # fmt: skip


def lock_held(training: Training) -> float:
    """The longest for which another thread, that does nothing but look at the clock, did not get Python's lock."""
    worst, done = [0.0], threading.Event()

    def look() -> None:
        last = time.perf_counter()
        while not done.is_set():
            now = time.perf_counter()
            worst[0], last = max(worst[0], now - last), now

    looking = threading.Thread(target=look)
    looking.start()
    training.checkpoints.save(training.snapshot())
    done.set()
    looking.join()
    return worst[0]


def main() -> None:
    """Measure the stall and the slow-down of steps, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, nargs=3, default=[16, 32, 32])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="of a span")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where checkpoints go; default: a temporary folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "checkpoint.json")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=args.folder))
    try:
        training = Training(args.size, args.batch, device, folder)
        spans = [[training.span(way, args.steps) for way in WAYS] for _ in range(args.rounds + 1)][1:]
        held = median(lock_held(training) for _ in range(3))
        kept = sum(file.stat().st_size for file in (folder / "latest").resolve().iterdir())
    finally:
        shutil.rmtree(folder)
    results = {}
    for column, way in enumerate(WAYS):
        mine, plain = [row[column] for row in spans], [row[0] for row in spans]
        results[way] = {
            "step_ms": round(1e3 * median(one["beside"] for one in mine), 1),
            "stall_ms": round(1e3 * median(one["stall"] for one in mine), 1),
            "stall_steps": round(median(a["stall"] / b["beside"] for a, b in zip(mine, plain, strict=True)), 3),
            "slower": round(median(a["beside"] / b["beside"] for a, b in zip(mine, plain, strict=True)), 3),
            "share": round(median(a["seconds"] / b["seconds"] - 1 for a, b in zip(mine, plain, strict=True)), 3),
            "writing_s": round(median(one["writing"] for one in mine), 2),
        }  # fmt: skip
        print(f"{way:16} {results[way]}")
    what = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    )
    machine = {"device": what, "system": platform.platform(), "torch": torch.__version__}
    machine["load"] = os.getloadavg()[1]
    facts = {"size": args.size, "batch": args.batch, "steps": args.steps, "rounds": args.rounds}
    facts |= {"checkpoint_mib": round(kept / 2**20), "held_ms": round(1e3 * held, 1)}
    print(facts)
    args.out.write_text(json.dumps({"machine": machine, **facts, "ways": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
