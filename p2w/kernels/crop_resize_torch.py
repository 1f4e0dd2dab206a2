"""Crop-resize-normalise in plain torch: the CPU's path, and a GPU's where Triton is missing.

Per sample, three steps (bench/crop_resize.py times them against the usual ways):
1. the crop, and only it, becomes float32 and is clipped, in a scratch buffer that stays in the cache;
2. slices and rows: an output row is a weighted sum of a few crop rows: `embedding_bag`, in one pass;
3. columns: products with the banded weights, 16 output columns at a time, so that few zeros are multiplied.
Each sample is computed alone, in shapes that depend on its own box only, so its bits do not depend on the batch.

The convention is p2w.geometry's. Positions are computed in float64: in float32 a position near voxel 128 would be off by
1e-5 voxels, and a value could be off by 1e-5 of the window.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

BLOCK = 16  # output columns a product, row padding of the scratch buffer: floats of one AVX-512 register


@dataclass(frozen=True)
class Taps:
    """Voxels and weights of the outputs, for boxes of a batch and axes k = 0, 1, 2 (z, y, x); on the CPU."""

    first: list[list[int]]  # [b][k] first voxel that the box touches
    last: list[list[int]]  # [b][k] one past the last
    count: list[list[int]]  # [b][k] taps an output has; the tensors below hold the most of any b and k
    index: Tensor  # (B, 3, longest size, taps) int64: voxel of the whole, inside the box
    weight: Tensor  # (B, 3, longest size, taps) float32: sum 1 over taps


def axis_taps(boxes: Tensor, size: torch.Size, antialias: bool) -> Taps:
    """Taps of boxes (B, 6) resized to `size` (d, h, w); outputs past the size of an axis are undefined."""
    start, end = boxes.to("cpu", torch.float64).view(-1, 2, 3).unbind(1)
    scale = (end - start) / torch.tensor(size)
    reach = scale.clamp(min=1.0) if antialias else torch.ones_like(scale)
    count = (2 * reach).ceil().long()  # an open interval 2 r long holds at most ceil(2 r) voxel centres
    first, last = start.floor().long(), end.ceil().long()
    centre = start[..., None] + (torch.arange(max(size)) + 0.5) * scale[..., None]
    lowest = (centre - reach[..., None] + 0.5).floor().long()
    distance = (lowest + 0.5 - centre).float()  # small by now
    tap = torch.arange(int(count.max()))
    voxel = lowest[..., None] + tap
    index = voxel.clamp(first[..., None, None], last[..., None, None] - 1)
    weight = 1 - (distance[..., None] + tap).abs_().div_(reach.float()[..., None, None])
    weight.clamp_(min=0).mul_((index == voxel) & (tap < count[..., None, None]))
    # One tap after another: the order of a reduction, and so its last bit, may depend on the number of taps, which is the
    # same for the whole batch; zeros at the end change nothing.
    total = weight[..., 0].clone()
    for k in range(1, len(tap)):
        total += weight[..., k]
    weight /= total[..., None]
    return Taps(first.tolist(), last.tolist(), count.tolist(), index, weight)


class _Resize:
    """Resizes a batch of boxes into `out` (B, 1, d, h, w); what does not depend on voxels is computed once."""

    def __init__(self, boxes: Tensor, out: Tensor, window_hu: tuple[float, float], antialias: bool):
        self.out, self.window = out, window_hu
        self.taps = taps = axis_taps(boxes, out.shape[2:], antialias)
        self.index, self.weight = taps.index.int(), taps.weight
        width, window = out.shape[4], window_hu[1] - window_hu[0]
        columns = taps.index[:, 2, :width].transpose(1, 2)  # (B, taps, w)
        band = torch.zeros(len(boxes), max(last[2] for last in taps.last), width)
        band.scatter_add_(1, columns, taps.weight[:, 2, :width].transpose(1, 2) / window)
        self.band = band.to(out.device)  # (B, W or less, w)
        self.lowest, self.highest = columns[:, 0].tolist(), columns.amax(1).tolist()
        self.lines = self._lines(0) if len(boxes) == 1 else None

    def _lines(self, b: int) -> tuple[Tensor, Tensor]:
        """Crop rows (d h, taps) int32 and their weights float32, whose sums are the output rows of box b."""
        (z, y, _), (n, m, _) = self.taps.first[b], self.taps.count[b]
        d, h = self.out.shape[2:4]
        rows = self.taps.last[b][1] - y  # of a slice of the crop
        # Taps are arranged as n x m before both axes are combined: inner loops of n m instead of m are 3 times faster.
        index_z = ((self.index[b, 0, :d, :n, None] - z) * rows).expand(d, n, m).reshape(d, 1, n * m)
        index_y = (self.index[b, 1, :h, None, :m] - y).expand(h, n, m).reshape(1, h, n * m)
        weight_z = self.weight[b, 0, :d, :n, None].expand(d, n, m).reshape(d, 1, n * m)
        weight_y = self.weight[b, 1, :h, None, :m].expand(h, n, m).reshape(1, h, n * m)
        index, weight = (index_z + index_y).view(d * h, -1), (weight_z * weight_y).view(d * h, -1)
        return index.to(self.out.device), weight.to(self.out.device)

    def fill(self, i: int, whole: Tensor, scratch: Tensor) -> None:
        """Fill out[i] with box i, or with the only box, of whole (D, H, W)."""
        b = i if self.lines is None else 0
        (z, y, x), (z1, y1, x1) = self.taps.first[b], self.taps.last[b]
        pitch = -(-(x1 - x) // BLOCK) * BLOCK
        crop = scratch[: (z1 - z) * (y1 - y) * pitch].view(z1 - z, y1 - y, pitch)
        crop[:, :, : x1 - x].copy_(whole[z:z1, y:y1, x:x1])
        # The padding too, whose values nothing reads. From 0 up nothing cancels: air comes out as 0 exactly.
        crop.clamp_(*self.window).sub_(self.window[0])
        index, weight = self.lines or self._lines(b)
        lines = embedding_bag(index, crop.view(-1, pitch), mode="sum", per_sample_weights=weight)
        out = self.out[i].view(-1, self.out.shape[4])
        result = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
        band, lowest, highest = self.band[b], self.lowest[b], self.highest[b]
        for start in range(0, out.shape[1], BLOCK):
            end = min(start + BLOCK, out.shape[1])
            low, high = lowest[start], highest[end - 1] + 1
            torch.mm(lines[:, low - x : high - x], band[low:high, start:end], out=result[:, start:end])
        result.clamp_(max=1)
        if result is not out:
            out.copy_(result)


def run(
    whole: Tensor,
    boxes: Tensor,
    part: Tensor,
    target: Tensor | None,
    *,
    window_hu: tuple[float, float],
    antialias: bool,
) -> None:
    """Fill part (B, 1, d, h, w), and target when there is one, from whole (B, D, H, W) and boxes (B, 6)."""
    jobs = [_Resize(boxes, part, window_hu, antialias)]
    if target is not None:
        everything = torch.tensor([[0, 0, 0, *whole.shape[1:]]])
        jobs.append(_Resize(everything, target, window_hu, antialias))
    d, h, w = whole.shape[1:]
    scratch = torch.empty(d * h * (w + BLOCK), dtype=torch.float32, device=whole.device)
    for i, sample in enumerate(whole):
        for job in jobs:
            job.fill(i, sample, scratch)
