"""What do layout, precision and a fused optimizer bring to one training step of the paper's network?

    python bench/step.py                         # CPU: 2 samples, 5 rounds, some minutes
    python bench/step.py --batch 16 --rounds 20  # on a GPU
    python bench/step.py --compile               # adds torch.compile: half a minute of compiling, once

Forward, backward and update at 64x64x32, the input already on the device. The floor is a plain loop: contiguous float32,
eager, unfused Adam. Ways take turns, one step each a round, and are compared within a round: read `times_faster`.
argparse and torch alone, so that it runs on bare GPU machines.
"""

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from p2w.model.decoder import EncoderDecoder
from p2w.model.unet3d import UNet3dDecoder, UNet3dEncoder

SIZE = (32, 64, 64)


@dataclass(frozen=True)
class Way:
    """One way to take a step."""

    bf16: bool = False
    channels_last: bool = False
    fused: bool = False
    compile: bool = False

    def __str__(self) -> str:
        return ", ".join(name for name, on in asdict(self).items() if on) or "plain: fp32, contiguous, eager"


class Step:
    """A network of its own, and one step of it."""

    def __init__(self, way: Way, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        encoder = UNet3dEncoder()
        self.model = EncoderDecoder(encoder, UNet3dDecoder(encoder.channels, encoder.strides)).to(device)
        if way.channels_last:
            self.model.to(memory_format=torch.channels_last_3d)
        self.network = torch.compile(self.model) if way.compile else self.model
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3, fused=way.fused)
        self.way, self.device = way, device
        self.part, self.whole = (torch.rand(batch, 1, *SIZE, device=device) for _ in range(2))

    def __call__(self) -> float:
        began = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.way.bf16):
            output = self.network(self.part)
        F.mse_loss(output.float(), self.whole).backward()
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step.json")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ways = [Way(), Way(fused=True), Way(channels_last=True, fused=True), Way(bf16=True, fused=True)]
    ways += [Way(bf16=True, channels_last=True, fused=True)]
    ways += [Way(bf16=True, channels_last=True, fused=True, compile=True)] if args.compile else []
    steps = [Step(way, args.batch, device) for way in ways]
    rounds = [[step() for step in steps] for _ in range(args.rounds + 1)][1:]  # the first one warms up
    results = {}
    for column, way in enumerate(ways):
        seconds = median(row[column] for row in rounds) / args.batch
        faster = median(row[0] / row[column] for row in rounds)
        results[str(way)] = {"seconds_per_sample": round(seconds, 4), "times_faster": round(faster, 2)}
        print(f"{way!s:42} {seconds:8.3f} s a sample  {faster:5.2f}x  {'#' * round(8 * faster)}")
    what = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    )
    machine = {"device": what, "system": platform.platform(), "torch": torch.__version__}
    args.out.write_text(
        json.dumps({"machine": machine, "batch": args.batch, "ways": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
