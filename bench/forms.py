"""Which memory layout is the faster one for each network, and which form of each up-sampling and batch norm?

    python bench/forms.py                           # CPU: 1 sample at 64x64x32, some minutes
    python bench/forms.py --batch 16 --rounds 20    # on a GPU
    python bench/forms.py --networks resencl --no-forms      # the layout of one network
    python bench/forms.py --networks                         # forms alone

A forward and a backward pass in the precision asked for. Ways take turns, one pass each a round, and are compared within a
round. `Encoder.channels_last` follows the layouts; forms are chosen on the machine where a run trains.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from common import RESULTS, Goal, over, rotate, row, save, show
from torch import Tensor, nn

from p2w.model import build_encoder
from p2w.model.decoder import EncoderDecoder, build_decoder
from p2w.model.forms import Formed, formed_modules

DTYPES = {"bf16": torch.bfloat16, "fp32": None}
NETWORKS = ("unet3d", "resencl", "vit3d", "resnet18", "i3d")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last_3d}


class Pass:
    """A forward and a backward pass; called, it returns passes a second."""

    def __init__(
        self, run: Callable[[Tensor], Tensor], x: Tensor, used: list[nn.Parameter], dtype: torch.dtype | None
    ) -> None:
        self.run, self.x, self.dtype, self.used = run, x.requires_grad_(), dtype, used

    def __call__(self) -> float:
        began = time.perf_counter()
        with torch.autocast(self.x.device.type, self.dtype) if self.dtype else nullcontext():
            out = self.run(self.x)
        torch.autograd.grad(out, [self.x, *self.used], torch.ones_like(out))
        if self.x.is_cuda:
            torch.cuda.synchronize()
        return 1 / (time.perf_counter() - began)


def network(name: str) -> nn.Module:
    """Encoder and decoder at their published width."""
    torch.manual_seed(0)
    encoder = build_encoder(name, 32)
    return EncoderDecoder(encoder, build_decoder(encoder, skips=False))


def trained(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that take gradients."""
    return [weight for weight in module.parameters() if weight.requires_grad]


def reached(module: Formed, x: Tensor) -> list[nn.Parameter]:
    """Those that `formed` depends on."""
    weights = trained(module)
    with torch.autocast(x.device.type, x.dtype, enabled=x.dtype == torch.bfloat16):
        gradients = torch.autograd.grad(module.formed(x).sum(), weights, allow_unused=True)
    return [weight for weight, gradient in zip(weights, gradients, strict=True) if gradient is not None]


def layouts(name: str, x: Tensor, dtype: torch.dtype | None) -> dict[str, Callable[[], float]]:
    """One network in both layouts."""
    found: dict[str, Callable[[], float]] = {}
    for label, layout in LAYOUTS.items():
        model = network(name).to(x.device).to(memory_format=layout)  # type: ignore[call-overload]
        found[label] = Pass(model, x.clone(), trained(model), dtype)
    return found


def inputs(model: nn.Module, x: Tensor) -> dict[str, tuple[Formed, tuple[int, ...]]]:
    """Each module with several forms that can run here, by the first name of its kind and size; what it is fed."""
    found: dict[str, tuple[Formed, tuple[int, ...]]] = {}
    seen: set[tuple[object, ...]] = set()
    for name, module in formed_modules(model):

        def note(module: Formed, given: tuple[Tensor, ...], name: str = name) -> None:
            kind = (type(module), module.extra_repr(), tuple(given[0].shape))
            if kind not in seen:
                seen.add(kind)
                found[name] = (module, tuple(given[0].shape))

        module.register_forward_pre_hook(note)  # type: ignore[arg-type]
    with torch.no_grad():
        model(x)
    return found


def in_form(module: Formed, form: str) -> Callable[[Tensor], Tensor]:
    """`formed` of the module with its form set for the call."""

    def run(x: Tensor) -> Tensor:
        module.form = form
        return module.formed(x)

    return run


def main() -> None:
    """Time every network in both layouts and all forms, and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, nargs=3, default=[32, 64, 64])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--networks", choices=NETWORKS, nargs="*", default=NETWORKS)
    parser.add_argument("--forms", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=RESULTS / "forms.json")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    rows, goals = [], []

    def measure(group: str, ways: dict[str, Callable[[], float]], base: str) -> None:
        rates = rotate(ways, args.rounds)
        for name in ways:
            rows.append(row(group, name, rates[name], "passes/s", "ours" if name != base else "peer"))
            if name != base:
                goals.append(Goal(f"{group}: {name} over {base}", over(rates[name], rates[base]), 1.0))
                print(goals[-1].text, f"{goals[-1].value:.3f}", flush=True)

    for label in args.dtype:
        dtype = DTYPES[label]
        x = torch.rand(args.batch, 1, *args.size, device=device)
        for name in args.networks:
            measure(f"{name}, {label}", layouts(name, x, dtype), "contiguous")
        if not args.forms:
            continue
        model = network("unet3d").to(device).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        for name, (module, shape) in inputs(model, x).items():
            given = torch.randn(shape, device=device).to(dtype or torch.float32)
            given = given.contiguous(memory_format=torch.channels_last_3d)
            ways: dict[str, Callable[[], float]] = {
                form: Pass(in_form(module, form), given.clone(), reached(module, given[:1]), dtype)
                for form in module.forms(device, dtype, args.batch)
            }
            measure(f"{name} {tuple(shape)}, {label}", ways, "plain")
    command = f"python bench/forms.py --batch {args.batch} --rounds {args.rounds}"
    show(save(args.out, "passes/s, forward and backward", command, rows, goals))


if __name__ == "__main__":
    main()
