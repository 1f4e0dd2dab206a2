"""Uniforms and boxes as GPU kernels: their arithmetic in Triton's interpreter, and, on a card, themselves.

As in test_crop_resize_triton.py, interpreted tests run in a process of their own, see test_interpreted.py.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import processes
import pytest
import torch
from test_crop_resize_triton import INTERPRETING, gpu, interpreted

from p2w import rng
from p2w.geometry import sample_boxes
from p2w.rng import SampleKeys, try_triton, uniforms

IDS = torch.cat([torch.arange(-3, 4) * 2**50, torch.arange(34)])  # one more than a block of boxes, and some
KEYS = [SampleKeys(5, -3, IDS), SampleKeys(2**63 + 1, 7, IDS), SampleKeys(0, 0, IDS[::2])]
NEEDS_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


@interpreted
@pytest.mark.parametrize("keys", KEYS)
def test_uniforms_are_torchs_bit_for_bit(keys):
    from p2w.kernels import sample_triton

    for ids, part, count in ((keys.ids[::4], 0, 1), (keys.ids[::3], 3, 7), (keys.ids[:2], 2**40, 1500)):
        expected = uniforms(SampleKeys(keys.seed, keys.epoch, ids), part, count)
        assert torch.equal(sample_triton.uniforms(ids, rng._state(keys, part), count), expected)
    assert sample_triton.uniforms(keys.ids[:0], 1, 7).shape == (0, 7)


@interpreted
@pytest.mark.parametrize("keys", KEYS)
def test_boxes_are_torchs_to_float32_rounding(keys):
    from p2w.kernels import sample_triton

    for shape, fraction, aspect in (
        ((64, 128, 128), (1 / 16, 1 / 4), 4.0),
        ((33, 7, 250), (0.1, 1.0), 5.0 / 0.3),
        ((1, 9, 9), (1.0, 1.0), 1.0),
    ):
        got = sample_triton.boxes(keys.ids, rng._state(keys, 2), shape, fraction, aspect)
        expected = sample_boxes(keys, 2, shape, fraction, aspect)
        torch.testing.assert_close(got, expected, rtol=2.0**-22, atol=1e-6)
        assert (got[:, :3] >= 0).all() and (got[:, 3:] <= torch.tensor(shape)).all()


@interpreted
def test_a_triton_that_works_is_used():
    name, reason = try_triton(torch.device("cpu"))  # the interpreter runs where the tensors are
    assert name == "triton" and "works here" in reason


@NEEDS_TRITON
@pytest.mark.skipif(INTERPRETING, reason="the interpreter needs no card")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_triton_without_a_driver_is_a_reason_in_one_line():
    name, reason = try_triton(torch.device("cpu"))
    assert name == "torch" and "does not work here" in reason and "\n" not in reason


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="a process of its own, whether Triton interprets or not")
@pytest.mark.parametrize("source, words", [
    ("raise ImportError('libcuda is from another planet\\nsecond line')", "libcuda is from another planet"),
    ("", "AttributeError|ModuleNotFoundError"),  # an empty package, as a half-removed one leaves behind
])  # fmt: skip
def test_a_broken_triton_is_a_reason_in_one_line(tmp_path, source, words):
    package = tmp_path / "triton"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    script = (  # torch may have imported the sound one
        "import sys\nfor name in [one for one in sys.modules if one.partition('.')[0] == 'triton']: del sys.modules[name]\n"
        "import torch; from p2w import rng; print(*rng.try_triton(torch.device('cpu')), sep='|')"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-c", script]
    run = processes.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 1 and "Traceback" not in run.stderr
    name, reason = lines[0].split("|", 1)
    assert name == "torch" and "plain torch" in reason and re.search(words, reason)


@pytest.mark.slow
@pytest.mark.gpu
@gpu
def test_without_a_c_compiler_torch_is_used_on_the_gpu(tmp_path):
    """Triton compiles its launcher with the system's C compiler, unless its cache has it."""
    script = (
        "import torch; from p2w import geometry as g, rng; print(*rng.backend('cuda'), sep='|'); "
        "ids = torch.arange(4); a = g.sample_boxes(rng.SampleKeys(0, 0, ids.cuda()), 0, (8, 8, 8)).cpu(); "
        "torch.testing.assert_close(a, g.sample_boxes(rng.SampleKeys(0, 0, ids), 0, (8, 8, 8)))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "CC"}
    environment |= {"PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=False, capture_output=True, text=True, timeout=230,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("torch|") and len(run.stdout.splitlines()) == 1


@pytest.mark.gpu
@gpu
def test_on_a_gpu_as_torch_and_in_one_launch():
    assert rng.backend("cuda")[0] == "triton"
    keys, there = SampleKeys(5, -3, IDS), SampleKeys(5, -3, IDS.cuda())
    assert torch.equal(uniforms(there, 3, 1500).cpu(), uniforms(keys, 3, 1500))
    shape = (64, 128, 128)
    torch.testing.assert_close(
        sample_boxes(there, 0, shape).cpu(), sample_boxes(keys, 0, shape), rtol=2.0**-22, atol=2e-5
    )
    for draw, name in (
        (lambda: uniforms(there, 3, 1500), "uniforms_kernel"),
        (lambda: sample_boxes(there, 0, shape), "boxes_kernel"),
    ):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            draw()
            torch.cuda.synchronize()
        cuda = torch.autograd.DeviceType.CUDA
        assert [event.name for event in profile.events() if event.device_type == cuda] == [name]
