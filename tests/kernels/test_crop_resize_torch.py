import numpy as np
import pytest
import torch
import torch.nn.functional as F
from crop_resize_oracle import bf16_step, resize, resize_batch, weights

from p2w.geometry import crop_resize, part_and_whole, sample_boxes
from p2w.kernels.crop_resize_torch import axis_taps
from p2w.rng import SampleKeys

SHAPE, SIZE = (64, 128, 128), (32, 64, 64)


def volumes(count, shape=SHAPE, seed=0, low=-1000, high=1000):
    """White noise: neighbours differ by up to the whole window, so any wrong weight shows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (count, *shape), dtype=torch.int16, generator=generator)


def boxes_of(count, shape=SHAPE, part=0, **ranges):
    return sample_boxes(SampleKeys(3, 1, torch.arange(count)), part, shape, **ranges)


def test_oracle_separates_as_the_triple_sum_does():
    whole, box, size = (
        np.random.default_rng(0).integers(-1000, 1000, (4, 5, 6)),
        [0.3, 1, 0, 3.9, 5, 5.5],
        (3, 2, 4),
    )
    z, y, x = (weights(box[k], box[k + 3], size[k], whole.shape[k], True) for k in range(3))
    naive = np.zeros(size)
    for out in np.ndindex(size):
        for v in np.ndindex(whole.shape):
            naive[out] += z[out[0], v[0]] * y[out[1], v[1]] * x[out[2], v[2]] * (whole[v] + 1000) / 2000
    np.testing.assert_allclose(resize(whole, box, size), naive, atol=1e-12)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    "ranges", [{}, {"volume_fraction": (1 / 32, 1 / 16)}, {"volume_fraction": (1 / 4, 1)}]
)
def test_float32_is_within_1e5_of_the_oracle(antialias, ranges):
    whole, boxes = volumes(3), boxes_of(3, **ranges)
    part, target = part_and_whole(whole, boxes, SIZE, antialias=antialias)
    full = [[0, 0, 0, *SHAPE]] * 3
    np.testing.assert_allclose(part, resize_batch(whole, boxes, SIZE, antialias=antialias), rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        target, resize_batch(whole, full, SIZE, antialias=antialias), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("shape, size", [
    ((9, 13, 17), (4, 6, 5)),  # odd everything, shrinking
    ((9, 13, 17), (20, 30, 40)),  # growing, columns not a multiple of the block
    ((64, 40, 40), (2, 3, 1)),  # many taps
    ((1, 1, 1), (3, 2, 5)),
    ((5, 40, 70), (5, 40, 70)),
])  # fmt: skip
def test_any_shape_and_size(shape, size):
    whole, boxes = volumes(2, shape), boxes_of(2, shape, volume_fraction=(1 / 64, 1), max_aspect=25)
    for antialias in (True, False):
        got = crop_resize(whole, boxes, size, antialias=antialias)
        np.testing.assert_allclose(
            got, resize_batch(whole, boxes, size, antialias=antialias), rtol=0, atol=1e-5
        )


def test_bfloat16_and_float16_are_within_one_step():
    whole, boxes = volumes(2), boxes_of(2)
    expected = resize_batch(whole, boxes, SIZE)
    error = np.abs(crop_resize(whole, boxes, SIZE, dtype=torch.bfloat16).double().numpy() - expected)
    assert (error <= bf16_step(expected)).all()
    half = crop_resize(whole, boxes, SIZE, dtype=torch.float16)
    np.testing.assert_allclose(half, expected, rtol=2**-11 + 1e-6, atol=2**-25)


def test_integer_boxes_are_slice_and_interpolate():
    whole = volumes(2)
    box = torch.tensor([[3, 5, 7, 60, 100, 88], [10, 20, 30, 30, 60, 70]]).float()
    got = crop_resize(whole, box, SIZE, antialias=False)
    for b, (z, y, x, z1, y1, x1) in enumerate(box.long().tolist()):
        crop = ((whole[b, z:z1, y:y1, x:x1].float() + 1000) / 2000)[None, None]
        expected = F.interpolate(crop, size=SIZE, mode="trilinear", align_corners=False)[0]
        torch.testing.assert_close(got[b], expected, rtol=0, atol=1e-5)


def test_antialiasing_is_pils_triangle_filter():
    """torch has PIL's filter in 2D alone; the filter is separable, so slice planes of it say it all."""
    whole = volumes(1, (40, 50, 60))
    got = crop_resize(whole, torch.tensor([[4.0, 3, 5, 38, 47, 59]]), (40, 13, 24))  # z: 34 -> 40 grows
    planes = ((whole[0, 4:38, 3:47, 5:59].float() + 1000) / 2000)[:, None]
    small = F.interpolate(planes, size=(13, 24), mode="bilinear", antialias=True)[:, 0]
    expected = F.interpolate(small[None, None], size=(40, 13, 24), mode="trilinear")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    got = crop_resize(whole, torch.tensor([[4.0, 3, 5, 38, 47, 59]]), (11, 44, 54))  # z: 34 -> 11 shrinks
    columns = ((whole[0, 4:38, 3:47, 5:59].float() + 1000) / 2000).flatten(1)[None, None]
    expected = F.interpolate(columns, size=(11, columns.shape[3]), mode="bilinear", antialias=True)
    torch.testing.assert_close(got, expected.view(1, 1, 11, 44, 54), rtol=0, atol=1e-5)


def test_values_are_clipped_before_they_are_interpolated():
    whole = volumes(1, (12, 12, 12), low=-3000, high=3000)
    box = torch.tensor([[0.5, 1.25, 2, 11.5, 10, 12]])
    for data in (whole, whole.float() + 0.25):
        got = crop_resize(data, box, (6, 5, 4), window_hu=(-160, 240.5))
        np.testing.assert_allclose(
            got, resize_batch(data, box, (6, 5, 4), window_hu=(-160, 240.5)), rtol=0, atol=1e-5
        )


def test_nothing_outside_the_box_leaks_in():
    whole = volumes(1, (16, 16, 16))
    box = torch.tensor([[2.5, 3.0, 4.75, 9.5, 12.0, 13.25]])
    other = volumes(1, (16, 16, 16), seed=9)
    other[:, 2:10, 3:12, 4:14] = whole[:, 2:10, 3:12, 4:14]
    assert torch.equal(crop_resize(whole, box, (4, 4, 4)), crop_resize(other, box, (4, 4, 4)))


def test_air_is_exactly_0_and_output_stays_within_0_and_1():
    boxes = boxes_of(1, volume_fraction=(1 / 16, 1))
    assert not crop_resize(torch.full((1, *SHAPE), -1000, dtype=torch.int16), boxes, SIZE).any()
    full = crop_resize(torch.full((1, *SHAPE), 1000, dtype=torch.int16), boxes, SIZE)
    assert full.max() <= 1 and full.min() >= 1 - 1e-6


@pytest.mark.slow
def test_bits_do_not_depend_on_the_batch_nor_on_threads():
    whole, boxes = volumes(16), boxes_of(16)
    part, target = part_and_whole(whole, boxes, SIZE)
    threads = torch.get_num_threads()
    try:
        for count in {1, 2, threads}:
            torch.set_num_threads(count)
            for ids in ([0], [15], [4, 5, 6, 7], [9, 2, 11, 0, 5]):
                some_part, some_target = part_and_whole(whole[ids], boxes[ids], SIZE)
                assert torch.equal(some_part, part[ids]) and torch.equal(some_target, target[ids])
            assert torch.equal(crop_resize(whole, boxes, SIZE), part)
    finally:
        torch.set_num_threads(threads)


def test_taps_do_not_depend_on_the_batch():
    """The batch's longest filter must not reach into another's weights, least of all at exact ratios."""
    size = (32, 64, 64)
    boxes = torch.cat([boxes_of(300), torch.tensor([[0.0, 0, 0, *SHAPE], [3, 7, 11, 35, 71, 75]])])
    for extra in ([0.0, 0, 0, 64, 128, 128], [0.0, 0, 0, 640, 1280, 1280]):
        together = axis_taps(torch.cat([boxes, torch.tensor([extra])]), torch.Size(size), True)
        for b in range(0, len(boxes), 7):
            alone = axis_taps(boxes[b : b + 1], torch.Size(size), True)
            most = alone.weight.shape[3]
            for k in range(3):
                mine = together.weight[b, k, : size[k]]
                assert torch.equal(mine[:, :most], alone.weight[0, k, : size[k]])
                assert not mine[:, most:].any()


def test_wholes_far_apart_in_memory_and_strided_ones():
    """Offsets pass 2^31; 4 GiB are reserved, and only what is written is touched."""
    memory = torch.empty(2**31 + 12**3, dtype=torch.int16)
    apart = memory.as_strided((2, 12, 12, 12), (2**31, 144, 12, 1))
    apart.copy_(volumes(2, (12, 12, 12)))
    boxes = boxes_of(2, (12, 12, 12))
    expected = crop_resize(volumes(2, (12, 12, 12)), boxes, (5, 6, 7))
    assert torch.equal(crop_resize(apart, boxes, (5, 6, 7)), expected)
    transposed = volumes(2, (12, 12, 12)).transpose(1, 3).contiguous().transpose(1, 3)
    assert torch.equal(crop_resize(transposed, boxes, (5, 6, 7)), expected)
    one_whole = volumes(1, (12, 12, 12)).expand(2, -1, -1, -1)
    assert torch.equal(crop_resize(one_whole, boxes, (5, 6, 7))[:1], expected[:1])
