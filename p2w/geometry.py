"""Sample boxes in a sub-scan, and crop, resize and normalise them for the network.

A crop is called "part", the sub-scan that it is cut from "whole", as in the paper. Shapes: B, D, H, W = batch, slice, row,
column of the whole; d, h, w = slice, row, column of the network's input.
A box is [z0, y0, x0, z1, y1, x1] in voxel-edge coordinates: voxel i covers [i, i + 1], fractions are allowed,
and [0, 0, 0, D, H, W] is the whole.

Convention of the resize, the same for every backend: half-pixel centres, i.e. `align_corners=False`. On an axis
output i looks at c = z0 + (i + 1/2) s, s = (z1 - z0) / d, and voxel v weighs max(0, 1 - |v + 1/2 - c| / r):
r = max(1, s) when antialiasing (the triangle filter of PIL and of torch's `antialias=True`), r = 1 when not.
Only voxels that the box touches, floor(z0) .. ceil(z1) - 1, have a weight, and the weights are renormalised:
voxels outside the part do not contribute to it. For integer boxes this is slice + `F.interpolate(mode="trilinear")`.

Values are clipped to the HU window *before* they are interpolated. Shards have clipped HU already; other data may not, and
metal at 3000 HU would then brighten its neighbours.

Random numbers are counter-based: part p of sub-scan k in epoch e depends on (seed, e, k, p) alone, not on batch, rank or
restarts.
"""

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from p2w import rng
from p2w.errors import UserError
from p2w.kernels import crop_resize_torch
from p2w.rng import SampleKeys, _state

Size = tuple[int, int, int]  # d, h, w, voxel
Range = tuple[float, float]  # low, high
_REFUSED_BY_TRITON: set[tuple[object, ...]] = set()  # sizes and types of calls


def sample_boxes(
    keys: SampleKeys,
    part: int,
    shape_dhw: Sequence[int],
    volume_fraction: Range = (1 / 16, 1 / 4),
    max_aspect: float = 4.0,
) -> Tensor:
    """Sample one box (B, 6) float32 per sub-scan, of part number `part`, on the device of `keys.ids`; units as above.

    Volume: the fraction f of the whole is exactly uniform in `volume_fraction` (boxes are continuous).
    Shape: relative to the whole's, edge factors are f^(1/3) a_k; the a_k are log-uniform in a range whose ends have the
    ratio `max_aspect`, independent for z, y, x, then divided by their geometric mean, so that their product is 1. So the
    largest factor is at most `max_aspect` times the smallest. Where that is more than f^(-1/2), it is lowered to it: the
    largest ratio at which no edge can exceed the whole's, so nothing is rejected or cut off and f stays exact. The default
    of 4 is just allowed at f = 1/16; at f = 1/4 it is lowered to 2, at f = 1 to 1, which gives a single box, the whole.
    Position: uniform over all placements inside the whole, independent along the axes.

    Where `keys.real` says that a sub-scan was filled up with air, "the whole" is its real part: the same box, scaled to it.

    On a GPU with Triton it is one kernel launch, and equal to the CPU's boxes to float32 rounding (libraries round
    float64 logarithms differently). Nothing waits for the device.

    Raises UserError for a fraction that is not 0 < low <= high <= 1, and an aspect that is not finite and at least 1.
    """
    if len(volume_fraction) != 2 or not 0 < volume_fraction[0] <= volume_fraction[1] <= 1:
        raise UserError(
            f"volume_fraction: must be (low, high) with 0 < low <= high <= 1, got {tuple(volume_fraction)}; "
            "e.g. (0.0625, 0.25)"
        )
    low, high = map(float, volume_fraction)
    if not 1 <= max_aspect < math.inf:
        raise UserError(f"max_aspect: must be at least 1 and finite, got {max_aspect}; the usual is 4")
    if len(shape_dhw) != 3 or min(shape_dhw) < 1:
        raise UserError(f"shape: must be three positive numbers of voxels (D, H, W), got {tuple(shape_dhw)}")
    if keys.ids.is_cuda and rng.backend(keys.ids.device)[0] == "triton":
        from p2w.kernels import sample_triton  # noqa: PLC0415  triton is optional and slow to import

        depth, height, width = map(int, shape_dhw)
        drawn = sample_triton.boxes(
            keys.ids, _state(keys, part), (depth, height, width), (low, high), max_aspect
        )
        return boxes_in_real(drawn, shape_dhw, keys.real)
    u = rng.uniforms(keys, part, 7)
    log_f = (low + (high - low) * u[:, :1]).log()
    aspect = u[:, 1:4] - u[:, 1:4].mean(1, keepdim=True)
    edge = (log_f / 3 + aspect * (-log_f / 2).clamp(max=math.log(max_aspect))).exp().clamp(max=1.0)
    start = u[:, 4:7] * (1 - edge)
    # Lengths are Python numbers: a tensor of them would need a copy to the device, which waits for it.
    corners = [(c[:, k] * n).clamp(max=n) for c in (start, start + edge) for k, n in enumerate(shape_dhw)]
    return boxes_in_real(torch.stack(corners, 1).float(), shape_dhw, keys.real)


def boxes_in_real(boxes: Tensor, shape_dhw: Sequence[int], real: Tensor | None) -> Tensor:
    """Boxes (B, 6) of wholes of `shape_dhw`, scaled to the real part of each, `real` (B, 3) voxels; None: as they are."""
    if real is None:
        return boxes
    columns = [boxes[:, k] * (real[:, k % 3] / shape_dhw[k % 3]) for k in range(6)]
    return torch.minimum(torch.stack(columns, 1), real.repeat(1, 2))


def whole_boxes(whole: Tensor, real: Tensor | None = None) -> Tensor:
    """Boxes (B, 6) float32 of all of each whole (B, D, H, W); of its real part, where `real` (B, 3) says how large it is."""
    if real is not None:
        return torch.cat((torch.zeros_like(real), real), 1)
    boxes = torch.zeros(len(whole), 6, device=whole.device)
    for axis, edge in enumerate(whole.shape[1:]):
        boxes[:, 3 + axis].fill_(edge)
    return boxes


@torch.no_grad()
def crop_resize(
    whole: Tensor,
    boxes: Tensor,
    size_dhw: Size,
    *,
    window_hu: Range = (-1000.0, 1000.0),
    dtype: torch.dtype = torch.float32,
    antialias: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Cut `boxes` (B, 6) out of `whole` (B, D, H, W) and resize them: (B, 1, d, h, w) of `dtype` in [0, 1].

    HU are clipped to `window_hu` and scaled so that the window becomes [0, 1]. `whole` is int16 or float32
    HU. `out`, when given, is a contiguous tensor to fill (with one channel, channels_last_3d is the same
    order in memory). No gradient flows. A sample's result is the same, bit for bit, in whatever batch it is.
    Raises UserError for shapes, types and windows that break these rules and, on the CPU, for boxes; on a GPU
    reading the boxes would stall it, so the kernel limits its reads to the whole instead.
    """
    _check(whole, boxes, size_dhw, window_hu)
    part = _output(out, whole, size_dhw, dtype)
    _run(whole, boxes, part, None, window_hu=window_hu, antialias=antialias)
    return part


@torch.no_grad()
def part_and_whole(
    whole: Tensor,
    boxes: Tensor,
    size_dhw: Size,
    *,
    window_hu: Range = (-1000.0, 1000.0),
    dtype: torch.dtype = torch.float32,
    antialias: bool = True,
    out: tuple[Tensor, Tensor] | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(part, target), both (B, 1, d, h, w): `crop_resize` of boxes and of the whole; on a GPU, one kernel launch.

    Of wholes that were filled up with air, the target is the real part, `real` (B, 3) voxels.
    """
    _check(whole, boxes, size_dhw, window_hu)
    part, target = (_output(o, whole, size_dhw, dtype) for o in (out or (None, None)))
    if real is not None:
        for around, made in ((boxes, part), (whole_boxes(whole, real), target)):
            _run(whole, around, made, None, window_hu=window_hu, antialias=antialias)
        return part, target
    _run(whole, boxes, part, target, window_hu=window_hu, antialias=antialias)
    return part, target


def _run(
    whole: Tensor, boxes: Tensor, part: Tensor, target: Tensor | None, *, window_hu: Range, antialias: bool
) -> None:
    sizes = (whole.device, whole.dtype, whole.shape[1:], part.dtype, part.shape[2:], target is None)
    if rng.backend(whole.device)[0] == "triton" and sizes not in _REFUSED_BY_TRITON:
        from triton.errors import TritonError  # noqa: PLC0415  triton is optional and slow to import

        from p2w.kernels import crop_resize_triton  # noqa: PLC0415

        if crop_resize_triton.fits(whole.shape[3], part.shape[4]):
            try:
                crop_resize_triton.run(whole, boxes, part, target, window_hu=window_hu, antialias=antialias)
                return
            except TritonError as error:  # such as a GPU with too little shared memory
                _REFUSED_BY_TRITON.add(sizes)
                said = str(error).strip().partition("\n")[0]
                warnings.warn(
                    f"crop-resize of {tuple(whole.shape[1:])} to {tuple(part.shape[2:])} voxels is computed by torch, "
                    f"more slowly: triton gave up on it ({type(error).__name__}: {said})",
                    stacklevel=3,
                )
    crop_resize_torch.run(whole, boxes, part, target, window_hu=window_hu, antialias=antialias)


def _check(whole: Tensor, boxes: Tensor, size: Sequence[int], window: Range) -> None:
    if whole.ndim != 4 or whole.numel() == 0 or whole.dtype not in (torch.int16, torch.float32):
        raise UserError(
            f"whole: must be (B, D, H, W) int16 or float32 HU, got {tuple(whole.shape)} {whole.dtype}"
        )
    if boxes.shape != (len(whole), 6) or boxes.dtype != torch.float32 or boxes.device != whole.device:
        raise UserError(
            f"boxes: must be ({len(whole)}, 6) float32 on {whole.device}, "
            f"got {tuple(boxes.shape)} {boxes.dtype} on {boxes.device}; see sample_boxes"
        )
    if len(size) != 3 or min(size) < 1:
        raise UserError(f"size: must be three positive numbers of voxels (d, h, w), got {tuple(size)}")
    if not -math.inf < window[0] < window[1] < math.inf:
        raise UserError(
            f"window_hu: must be (low, high) with low < high, got {tuple(window)}; e.g. (-1000, 1000)"
        )
    if boxes.device.type == "cpu":
        low, high, shape = boxes[:, :3], boxes[:, 3:], torch.tensor(whole.shape[1:])
        bad = ~((low >= 0) & (low < high) & (high <= shape)).all(1)
        if bad.any():
            i = int(bad.nonzero()[0])
            raise UserError(
                f"boxes: row {i} is {boxes[i].tolist()}; the rule is 0 <= start < end <= "
                f"{tuple(whole.shape[1:])} along z, y, x"
            )


def _output(out: Tensor | None, whole: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    shape = (len(whole), 1, *size)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"dtype: must be float32, bfloat16 or float16, got {dtype}")
    if out is None:
        return torch.empty(shape, dtype=dtype, device=whole.device)
    if out.shape != shape or out.dtype != dtype or out.device != whole.device or not out.is_contiguous():
        raise UserError(
            f"out: must be contiguous {shape} {dtype} on {whole.device}, "
            f"got {tuple(out.shape)} {out.dtype} on {out.device}"
        )
    return out
