"""What do layout, precision, forms of layers, compiling, CUDA graphs and a fused optimizer bring to a training step?

    python bench/step.py                          # CPU: 1 sample, 3 rounds, a minute or more
    python bench/step.py --compile                # adds torch.compile: half a minute of compiling, once
    python bench/step.py --batch 16 --rounds 20 --compile            # on a GPU, at 64x64x32
    python bench/step.py --batch 16 --rounds 10 --size 64 128 128    # and at 128x128x64

Forward, backward and update, the input already on the device. The floor is a plain loop: contiguous, eager, unfused Adam; in
float32 on a CPU, under fp16 autocast with a loss scaler on a GPU. Ways take turns, one step each a round, and are compared
within a round. The defaults (p2w.config) follow the fastest row that keeps the numbers right: bf16 is compared with
float32, convolution by convolution, in every layout that is timed, before that. Torch, NumPy and p2w alone: it runs on
bare GPU machines.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from common import RESULTS, Goal, over, rotate, row, save, show
from torch import nn

from p2w.model.decoder import EncoderDecoder
from p2w.model.forms import FOLDED, PLAIN, Formed, formed_modules, set_forms
from p2w.model.norm import FLAT, FUSED
from p2w.model.unet3d import UNet3dDecoder, UNet3dEncoder
from p2w.train.form_choice import choose_forms
from p2w.train.optim import Precision
from p2w.train.preflight import convolution_error
from p2w.world import World

PEAK_SAMPLES = {(32, 64, 64): 680, (64, 128, 128): 85}  # half the roofline of an H200; goals there
CHOSEN = "chosen"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


@dataclass(frozen=True)
class Way:
    """One way to take a step."""

    dtype: str = "fp32"
    channels_last: bool = False
    fused: bool = False
    forms: str = PLAIN  # of the layers that have it; "chosen": those that a run would choose for itself
    compiled: bool = False
    graph: bool = False

    def __str__(self) -> str:
        parts = {
            "channels-last": self.channels_last, "fused Adam": self.fused, f"forms {self.forms}": self.forms != PLAIN,
            "compiled": self.compiled, "CUDA graph": self.graph,
        }  # fmt: skip
        return ", ".join([self.dtype, *(name for name, on in parts.items() if on)])


DEFAULT = {
    "cpu": Way("bf16", channels_last=True, fused=True),  # where layers keep PyTorch's usual forms
    "cuda": Way("bf16", channels_last=True, fused=True, forms=CHOSEN, graph=True),
}


class Step:
    """A network of its own, and one step of it: called, it returns samples a second."""

    def __init__(
        self, way: Way, batch: int, size: tuple[int, ...], device: torch.device, width: int = 32
    ) -> None:
        torch.manual_seed(0)
        self.way, self.device, self.batch = way, device, batch
        self.model = network(width).to(device)
        if way.channels_last:
            self.model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        take_forms(self.model, way, (batch, 1, *size), device)
        self.forward = torch.compile(self.model) if way.compiled else self.model
        options = {"capturable": True} if way.graph else {}
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3, fused=way.fused, **options)
        self.scaler = torch.amp.GradScaler(device.type, enabled=way.dtype == "fp16")
        self.part, self.whole = (torch.rand(batch, 1, *size, device=device) for _ in range(2))
        self.once: Callable[[], None] = self.captured() if way.graph else self.step

    def step(self) -> None:
        """Take an optimizer step."""
        self.optimizer.zero_grad(set_to_none=True)
        dtype = DTYPES[self.way.dtype]
        cast = (
            torch.autocast(self.device.type, dtype, cache_enabled=not self.way.graph)
            if dtype
            else nullcontext()
        )
        with cast:
            output = self.forward(self.part)
        self.scaler.scale(F.mse_loss(output.float(), self.whole)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def captured(self) -> Callable[[], None]:
        """The step as one CUDA graph: no launches from Python."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def __call__(self) -> float:
        began = time.perf_counter()
        self.once()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.batch / (time.perf_counter() - began)


def network(width: int = 32) -> nn.Module:
    """The paper's network at this width."""
    encoder = UNet3dEncoder(width)
    return EncoderDecoder(encoder, UNet3dDecoder(encoder.channels, encoder.strides))


def take_forms(model: nn.Module, way: Way, shape: tuple[int, ...], device: torch.device) -> None:
    """Put the layers into the forms of a way; `shape` (B, C, D, H, W) is what the network is given."""
    dtype = DTYPES[way.dtype]
    if way.forms == CHOSEN:
        precision = Precision(way.dtype, dtype, "this row")
        choice = choose_forms(model, shape, precision, World.from_env(), print, rule="measure")
        print(choice.line)
        set_forms(model, choice.forms)
        return
    wanted = way.forms.split(" and ")
    for name, module in formed_modules(model):
        assert isinstance(module, Formed)
        possible = module.forms(device, dtype, shape[0])
        set_forms(model, {name: next((form for form in wanted if form in possible), PLAIN)})


def ways(device: torch.device, compiled: bool) -> list[Way]:
    """The floor first, then what it gains, one thing at a time."""
    cuda = device.type == "cuda"
    found = [Way("fp16")] if cuda else [Way()]
    found += [Way("fp32", fused=True), Way("fp32", channels_last=True, fused=True)]
    for dtype in ("bf16", "fp16") if cuda else ("bf16",):
        found += [Way(dtype, fused=True), Way(dtype, channels_last=True, fused=True)]
    forms = [FLAT, FOLDED, f"{FLAT} and {FOLDED}"]
    if cuda:
        forms += [FUSED, f"{FUSED} and {FOLDED}", CHOSEN]
    found += [Way("bf16", channels_last=True, fused=True, forms=form) for form in forms]
    if compiled:
        found += [
            Way("bf16", fused=True, compiled=True),
            Way("bf16", channels_last=True, fused=True, compiled=True),
        ]
    if cuda:
        found += [
            Way("bf16", fused=True, graph=True),
            Way("bf16", channels_last=True, fused=True, graph=True),
            Way("bf16", channels_last=True, fused=True, forms=CHOSEN, graph=True),
        ]
    return found


def main() -> None:
    """Time a step in all variants, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, nargs=3, default=[32, 64, 64])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = tuple(args.size)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as World.start sets it
    shape = (args.batch if device.type == "cuda" else 1, 1, *size)
    check = ""
    for layout in (torch.contiguous_format, torch.channels_last_3d):  # those that are timed
        model = network().to(device).to(memory_format=layout)  # type: ignore[call-overload]
        said = convolution_error(model, Precision("bf16", torch.bfloat16, ""), shape, device)
        print(f"bf16 against float32, {layout}: {said or 'every convolution within rounding'}")
        check = check or said
    steps = {str(way): Step(way, args.batch, size, device) for way in ways(device, args.compile)}
    rates = rotate(dict(steps), args.rounds)
    floor, default = next(iter(steps)), str(DEFAULT["cuda" if device.type == "cuda" else "cpu"])
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} threads"
    group = f"a step at {'x'.join(map(str, size[::-1]))}, batch {args.batch}, {where}"
    rows = [
        row(group, name, values, "samples/s", "ours" if name == default else "peer",
            f"{over(values, rates[floor]):.2f}x" + (" the floor" if name == floor else ""))
        for name, values in rates.items()
    ]  # fmt: skip
    best = max(rates, key=lambda name: over(rates[name], rates[floor]))
    goals = [Goal(f"defaults, of the fastest way ({best})", over(rates[default], rates[best]), 0.95)]
    middle = sorted(rates[default])[args.rounds // 2]
    skipped = [] if args.compile else ["torch.compile: pass --compile"]
    if device.type == "cuda":
        goals.append(Goal("times the plain loop, defaults", over(rates[default], rates[floor]), 1.5))
        goals.append(Goal("samples/s, defaults", middle, PEAK_SAMPLES.get(size, 0)))
    else:
        skipped.append("no CUDA device: fp16, CUDA graphs, the goals of an H200")
    name = "step_gpu" if device.type == "cuda" else "step"
    out = args.out or RESULTS / (f"{name}.json" if size == (32, 64, 64) else f"{name}_large.json")
    command = f"python bench/step.py --batch {args.batch} --rounds {args.rounds}{' --compile' * args.compile}"
    more = {"bf16_check": check or "sound", "skipped": skipped, "ms_of_16": 16e3 / middle}
    show(save(out, "samples/s of forward, backward and update", command, rows, goals, **more))
    for line in skipped:
        print(f"  skipped: {line}")


if __name__ == "__main__":
    main()
