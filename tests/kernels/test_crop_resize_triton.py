"""The GPU kernel: its arithmetic in Triton's interpreter, its compilation for cards, and, on one, itself.

Triton decides when it is imported whether kernels are interpreted, so the tests marked `interpreted` run in a process
of their own, see test_interpreted.py. By hand:
`TRITON_INTERPRET=1 python -m pytest tests/kernels/test_crop_resize_triton.py`.
"""

import importlib.util
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from crop_resize_oracle import bf16_step, resize_batch

from p2w import rng
from p2w.geometry import crop_resize, part_and_whole, sample_boxes
from p2w.kernels import crop_resize_torch
from p2w.rng import SampleKeys

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def interpreter_is_broken():
    """Triton 3.6 turns one-element arrays into Python numbers, which NumPy refuses from 2.4 on."""
    try:
        triton = tuple(map(int, version("triton").split(".")[:2]))
    except PackageNotFoundError:
        return False
    return triton < (3, 7) and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)


interpreted = pytest.mark.skipif(
    not INTERPRETING or interpreter_is_broken(), reason="runs in the interpreter's own process"
)
compiled = pytest.mark.skipif(
    INTERPRETING or importlib.util.find_spec("triton") is None, reason="needs triton, not interpreting"
)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def volumes(count, shape, dtype=torch.int16):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-1300, 1301, (count, *shape), generator=generator).to(dtype)


def launch(
    whole, boxes, size, *, dtype=torch.float32, antialias=True, with_target=True, window_hu=(-1000, 1000)
):
    from p2w.kernels import crop_resize_triton

    part, target = (torch.full((len(whole), 1, *size), torch.nan, dtype=dtype) for _ in range(2))
    crop_resize_triton.run(
        whole, boxes, part, target if with_target else None, window_hu=window_hu, antialias=antialias
    )
    return part, target


@interpreted
@pytest.mark.parametrize("antialias, count, shape, size, dtype", [
    (True, 2, (4, 9, 16), (2, 5, 9), torch.int16),  # tiles hang over rows and columns
    (False, 2, (4, 9, 16), (2, 5, 9), torch.int16),
    (True, 2, (2, 12, 40), (1, 10, 66), torch.float32),  # several tiles down and across
    (True, 1, (7, 13, 17), (3, 6, 5), torch.int16),  # odd everything: voxels do not come in pairs
    (True, 1, (7, 13, 17), (9, 20, 30), torch.float32),  # growing
    (True, 1, (18, 4, 6), (9, 2, 3), torch.int16),  # shrinking by 2, slices in more than one program
    (True, 1, (14, 10, 20), (2, 2, 1), torch.int16),  # many taps
    (True, 1, (2, 4, 600), (1, 2, 40), torch.int16),  # wide: narrow tiles
    (True, 1, (3, 128, 64), (3, 128, 64), torch.int16),  # the large network's planes
    (True, 2, (1, 1, 1), (3, 2, 5), torch.int16),
])  # fmt: skip
def test_float32_is_within_1e5_of_the_oracle(antialias, count, shape, size, dtype):
    whole = volumes(count, shape, dtype)
    boxes = sample_boxes(SampleKeys(1, 1, torch.arange(count)), 0, whole.shape[1:], (1 / 8, 1 / 2))
    window = (-800.5, 900)
    part, target = launch(whole, boxes, size, antialias=antialias, window_hu=window)
    full = [[0, 0, 0, *shape]] * count
    for got, box in ((part, boxes), (target, full)):
        expected = resize_batch(whole, box, size, antialias=antialias, window_hu=window)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_boxes_of_one_voxel_and_of_less(dtype):
    whole = volumes(3, (6, 7, 8), dtype)
    boxes = torch.tensor([[2.0, 3, 4, 3, 4, 5], [5.0, 6, 7, 6, 7, 8], [1.25, 2.5, 3.75, 1.5, 2.75, 4.25]])
    part, _ = launch(whole, boxes, (3, 4, 5), with_target=False)
    np.testing.assert_allclose(part, resize_batch(whole, boxes, (3, 4, 5)), rtol=0, atol=1e-5)


@interpreted
@pytest.mark.parametrize("window", [(1000, 1010), (-1010.25, -1000), (-40000, 40000)])
def test_windows_far_from_0_narrow_and_wide(window):
    whole = volumes(2, (4, 6, 8))
    boxes = sample_boxes(SampleKeys(1, 1, torch.arange(2)), 0, whole.shape[1:], (1 / 8, 1 / 2))
    part, _ = launch(whole, boxes, (3, 4, 5), with_target=False, window_hu=window)
    expected = resize_batch(whole, boxes, (3, 4, 5), window_hu=window)
    np.testing.assert_allclose(part, expected, rtol=0, atol=1e-5)


@interpreted
def test_bfloat16_is_within_one_step_and_a_part_alone_leaves_the_target():
    whole = volumes(1, (6, 9, 11))
    boxes = torch.tensor([[0.25, 1.5, 2, 5.75, 8, 10.125]])
    part, target = launch(whole, boxes, (2, 4, 6), dtype=torch.bfloat16, with_target=False)
    expected = resize_batch(whole, boxes, (2, 4, 6))
    assert (np.abs(part.double().numpy() - expected) <= bf16_step(expected)).all()
    assert target.isnan().all()


@interpreted
def test_bits_do_not_depend_on_the_batch():
    whole = volumes(2, (18, 2, 8))
    boxes = sample_boxes(SampleKeys(1, 1, torch.arange(2)), 0, whole.shape[1:])
    part, target = launch(whole, boxes, (9, 1, 4))
    alone = launch(whole[1:], boxes[1:], (9, 1, 4))
    assert torch.equal(alone[0], part[1:]) and torch.equal(alone[1], target[1:])
    assert torch.equal(launch(whole[1:], boxes[1:], (9, 1, 4), with_target=False)[0], part[1:])


@interpreted
def test_offsets_past_2_to_the_31():
    memory = torch.empty(2**31 + 64, dtype=torch.int16)  # reserved, not touched
    whole = memory.as_strided((2, 4, 4, 4), (2**31, 16, 4, 1)).copy_(volumes(2, (4, 4, 4)))
    boxes = torch.tensor([[0.0, 0, 0, 4, 4, 4], [0.5, 1, 0, 3, 3.5, 4]])
    part, _ = launch(whole, boxes, (2, 2, 2), with_target=False)
    np.testing.assert_allclose(part, resize_batch(whole, boxes, (2, 2, 2)), rtol=0, atol=1e-5)


@interpreted
def test_a_broken_box_reads_nothing_outside_the_whole():
    """On a GPU nobody looks at the boxes; the whole lies between poison that would show. NaN may stay NaN."""
    memory = torch.full((3, 4, 4, 4), 1000, dtype=torch.int16)
    memory[1] = -1000
    for box in ([-50.0, 2, 1e9, 90, 2, -5], [float("nan")] * 6, [4.0, 4, 4, 5, 5, 5]):
        part, _ = launch(memory[1:2], torch.tensor([box]), (1, 2, 2), with_target=False)
        assert not part.nan_to_num(0).any()


@interpreted
def test_strided_wholes():
    whole = volumes(2, (4, 6, 8)).transpose(1, 3)
    boxes = sample_boxes(SampleKeys(1, 1, torch.arange(2)), 0, whole.shape[1:])
    part, _ = launch(whole, boxes, (2, 2, 2), with_target=False)
    np.testing.assert_allclose(part, resize_batch(whole, boxes, (2, 2, 2)), rtol=0, atol=1e-5)


@pytest.mark.slow
@compiled
def test_compiles_for_ampere_and_hopper_without_one_and_spills_nothing(tmp_path):
    run = processes.run(
        [sys.executable, Path(__file__).with_name("cubin.py")],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=230,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    if run.stdout.startswith("skip"):
        pytest.skip(run.stdout.strip())
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(kernels) == 12
    for kernel in kernels:
        assert kernel["stack"] == 0, f"registers spill: {kernel}"
        assert kernel["shared"] <= 96 << 10, f"fewer than two programs a multiprocessor: {kernel}"
        assert kernel["instructions"] > 100


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("antialias", [True, False])
def test_on_a_gpu_as_the_oracle_and_in_one_launch(antialias):
    assert rng.backend("cuda")[0] == "triton"
    size = (32, 64, 64)
    whole = volumes(4, (64, 128, 128))
    boxes = sample_boxes(SampleKeys(1, 1, torch.arange(4, device="cuda")), 0, whole.shape[1:])
    cpu_boxes = sample_boxes(SampleKeys(1, 1, torch.arange(4)), 0, whole.shape[1:])
    torch.testing.assert_close(
        boxes.cpu(), cpu_boxes, rtol=0, atol=2e-5
    )  # float64 logarithms differ in a bit
    on_gpu = whole.cuda()
    part, target = part_and_whole(on_gpu, boxes, size, antialias=antialias)
    full = [[0, 0, 0, 64, 128, 128]] * 4
    for got, box in ((part, boxes.cpu()), (target, full)):
        np.testing.assert_allclose(
            got.cpu(), resize_batch(whole, box, size, antialias=antialias), rtol=0, atol=1e-5
        )
    spare = torch.empty_like(part)
    options = {"window_hu": (-1000, 1000), "antialias": antialias}
    crop_resize_torch.run(on_gpu, boxes, spare, None, **options)  # what a GPU without Triton gets
    torch.testing.assert_close(spare, part, rtol=0, atol=2e-5)
    assert torch.equal(crop_resize(on_gpu[2:], boxes[2:], size, antialias=antialias), part[2:])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        part_and_whole(on_gpu, boxes, size, antialias=antialias, out=(part, target))
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert [event.name for event in kernels] == ["crop_resize_kernel"]
