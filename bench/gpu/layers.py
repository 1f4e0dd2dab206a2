"""Times of single layers of the paper's network on this GPU, compared with the GPU's limits.

    python3 bench/gpu/layers.py ceilings norms upsampling convolutions_bf16 convolutions_fp16

`ceilings`: a copy, a matrix product. `convolutions`: each convolution's forward pass and both gradients, in TFLOP/s.
`norms`: batch norm and ReLU in each form. `upsampling`: the decoder's transposed convolution and the convolution after it,
as two and folded into one. All at batch 16, channels-last, as a step has them; rows as in rows.py.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from harness import BATCH, network_of
from rows import CUDA, DEVICE, attempt, milliseconds, needs_card, say, stages
from torch import Tensor, nn

from p2w.model.forms import PLAIN
from p2w.model.norm import BatchNorm3d
from p2w.model.unet3d import UpBlock

LAST = torch.channels_last_3d
CONVOLUTIONS = (nn.Conv3d, nn.ConvTranspose3d)


def ceilings() -> None:
    """TB/s of a copy, bytes read and written; TFLOP/s of a matrix product of 8192 x 8192 random numbers."""
    count, edge = (1 << 31, 8192) if CUDA else (1 << 22, 256)
    source, target = (torch.empty(count, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    source.random_()
    say("copy", tb_s=2 * count / milliseconds(lambda: target.copy_(source)) / 1e9)
    for dtype in (torch.bfloat16, torch.float16) if CUDA else (torch.bfloat16,):
        a, b = (torch.randn(edge, edge, device=DEVICE, dtype=dtype) for _ in range(2))
        took = milliseconds(lambda a=a, b=b: a @ b)
        say("matrix product", dtype=str(dtype), tflop_s=2 * edge**3 / took / 1e9)


def met(
    model: nn.Module, shape: tuple[int, ...], kinds: tuple[type, ...]
) -> list[tuple[str, Any, tuple[int, ...]]]:
    """Name, module and input shape of each module of these kinds, in the order of a pass over `shape` (B, C, D, H, W)."""
    ghost, found = copy.deepcopy(model).to("meta"), []
    real = dict(model.named_modules())
    for name, module in ghost.named_modules():
        if isinstance(module, kinds):

            def note(_: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                found.append((name, real[name], tuple(given[0].shape)))

            module.register_forward_pre_hook(note)
    with torch.no_grad():
        ghost(torch.zeros(shape, device="meta"))
    return found


def flop(module: Any, shape: tuple[int, ...]) -> float:
    """Multiplications and additions of one pass of a convolution over an input (B, C, D, H, W)."""
    spots = shape[0] * math.prod(shape[2:])
    if isinstance(module, nn.Conv3d):
        spots //= math.prod(module.stride)
    return 2.0 * module.weight.numel() * spots


def convolutions(dtype: torch.dtype) -> None:
    """Each convolution of the network in a 16-bit type: forward, gradient of the input, gradient of the weights."""
    if dtype == torch.float16 and not CUDA:  # oneDNN has no fast ones: half a minute of nothing learnt
        needs_card("convolutions in fp16")
        return
    config, model = network_of()
    shape = (BATCH, 1, *config.pretext.size)
    totals, flops = [0.0] * 3, 0.0
    for name, module, size in met(model, shape, CONVOLUTIONS):

        def one(name: str = name, module: Any = module, size: tuple[int, ...] = size) -> None:
            nonlocal flops
            x = torch.randn(size, device=DEVICE).to(dtype).contiguous(memory_format=LAST)
            weight = module.weight.detach().to(dtype).contiguous(memory_format=LAST)
            up = isinstance(module, nn.ConvTranspose3d)
            how = (list(module.stride), list(module.padding), [1] * 3, up, [0] * 3, 1)
            forward = lambda: torch.ops.aten.convolution(x, weight, None, *how)  # noqa: E731
            by = torch.randn_like(forward())

            def gradient(mask: list[bool]) -> Callable[[], Any]:
                return lambda: torch.ops.aten.convolution_backward(by, x, weight, [0], *how, mask)

            took = [milliseconds(forward), 0.0, milliseconds(gradient([False, True, False]))]
            if size[1] > 1:  # the first layer's input has no gradient
                took[1] = milliseconds(gradient([True, False, False]))
            work = flop(module, size)
            flops += work * sum(ms > 0 for ms in took)
            for at in range(3):
                totals[at] += took[at]
            say(
                "convolution", name=name, dtype=str(dtype), input=size, gflop=work / 1e9, ms=took,
                tflop_s=[work / ms / 1e9 if ms else None for ms in took],
            )  # fmt: skip

        attempt(f"convolution {name}", one)
    say("convolutions", dtype=str(dtype), ms=totals, tflop_s=flops / max(1e-9, sum(totals)) / 1e9)


def norms() -> None:
    """Batch norm and ReLU at the network's finest level, 64 channels: forward, and forward and backward, in each form."""
    config, _ = network_of()
    size = config.pretext.size
    for dtype in (torch.bfloat16, torch.float16) if CUDA else (torch.bfloat16,):
        x = (
            torch.randn(BATCH, 64, *size, device=DEVICE)
            .to(dtype)
            .contiguous(memory_format=LAST)
            .requires_grad_()
        )
        by = torch.randn_like(x)
        norm = BatchNorm3d(64, relu=True).to(DEVICE)
        weights = list(norm.parameters())
        ways: dict[str, Callable[[Tensor], Tensor]] = dict.fromkeys(norm.forms(DEVICE, dtype, BATCH), norm)
        if CUDA:
            ways["compiled"] = torch.compile(norm)
        else:
            needs_card("norm, fused and compiled")
        for name, way in ways.items():

            def one(
                name: str = name, way: Callable[[Tensor], Tensor] = way, norm: BatchNorm3d = norm,
                weights: list[nn.Parameter] = weights, x: Tensor = x, by: Tensor = by,
            ) -> None:  # fmt: skip
                norm.form = PLAIN if name == "compiled" else name
                forward = milliseconds(lambda: way(x))
                both = milliseconds(lambda: torch.autograd.grad(way(x), [x, *weights], by))
                say(
                    "norm", name=name, dtype=str(x.dtype), forward_ms=forward, both_ms=both,
                    tensor_gb=x.nbytes / 1e9,
                )  # fmt: skip

            attempt(f"norm {name}", one)


def upsampling() -> None:
    """The up-sampling of each level of the decoder and the convolution after it: as two, and folded into one."""
    config, model = network_of()
    for name, block, given in met(model, (BATCH, 1, *config.pretext.size), (UpBlock,)):
        for form in block.forms(DEVICE, torch.bfloat16, BATCH):

            def one(
                name: str = name, block: Any = block, given: tuple[int, ...] = given, form: str = form
            ) -> None:
                own = copy.deepcopy(block)
                own.form = form
                x = torch.randn(given, device=DEVICE).contiguous(memory_format=LAST).requires_grad_()
                with torch.autocast(DEVICE.type, torch.bfloat16):
                    by = torch.randn_like(own.formed(x))
                first = (own.up_conv, own.first.conv1)
                weights = [
                    weight for module in first for weight in module.parameters() if weight.requires_grad
                ]

                def passes() -> None:
                    with torch.autocast(DEVICE.type, torch.bfloat16):
                        y = own.formed(x)
                    torch.autograd.grad(y, [x, *weights], by)

                say("upsampling", name=name, form=form, both_ms=milliseconds(passes), input=given)

            attempt(f"upsampling {name} {form}", one)


if __name__ == "__main__":
    stages({
        "ceilings": ceilings, "norms": norms, "upsampling": upsampling,
        "convolutions_bf16": lambda: convolutions(torch.bfloat16),
        "convolutions_fp16": lambda: convolutions(torch.float16),
    })  # fmt: skip
