"""Preflight checks: a correct machine passes, a wrong result is found and named, and a passed check is cached."""

import threading
from collections import Counter
from dataclasses import replace

import pytest
import torch

from p2w.config import Config, DataConfig, PretextConfig
from p2w.kernels import crop_resize_torch
from p2w.model import build_encoder
from p2w.model.conv import Conv3d
from p2w.model.decoder import EncoderDecoder
from p2w.model.unet3d import UNet3dDecoder
from p2w.train import isolated_layer, preflight
from p2w.train.optim import Precision
from p2w.train.preflight import check_numerics, convolution_error, crop_resize_error
from p2w.world import World

CPU, BF16 = torch.device("cpu"), Precision("bf16", torch.bfloat16, "asked for")


def network(width=4):
    encoder = build_encoder("unet3d", width)
    return EncoderDecoder(encoder, UNet3dDecoder(encoder.channels, encoder.strides))


@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format])
def test_a_sound_machine_passes_and_nothing_is_touched(layout):
    model = network().to(memory_format=layout)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assert convolution_error(model, BF16, (2, 1, 16, 32, 32), CPU) == ""
    assert convolution_error(model, Precision("fp32", None, ""), (2, 1, 16, 32, 32), CPU) == ""
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("what", ["output", "weights' gradient"])
def test_a_convolution_that_is_wrong_in_bf16_is_named(monkeypatch, what):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x * 1.05 if what == "output" else x

        @staticmethod
        def backward(context, gradient):
            return gradient * 1.05 if what != "output" else gradient

    def forward(self, x, biased=True):
        weight = self.weight
        if torch.is_autocast_enabled("cpu") and x.shape[2] == 4:
            weight = Wrong.apply(weight)
        return torch.nn.functional.conv3d(x, weight, self.bias, padding=1)

    monkeypatch.setattr(Conv3d, "forward", forward)
    told = convolution_error(network(), BF16, (1, 1, 32, 16, 16), CPU)
    assert told.startswith(f"encoder.down_tr512.ops.0.conv1: {what} in bf16 differs from float32 by 0.0"), (
        told
    )


@pytest.mark.parametrize("antialias", [True, False])
def test_a_sound_crop_passes(antialias):
    assert crop_resize_error(PretextConfig(antialias=antialias), CPU) == ""


@pytest.mark.parametrize("fault", ["half a voxel", "nothing written", "window"])
def test_a_crop_that_is_wrong_is_found(monkeypatch, fault):
    run = crop_resize_torch.run

    def wrong(whole, boxes, part, target, *, window_hu, antialias):
        if fault == "half a voxel":
            boxes = boxes.clone()
            boxes[:, 2] += 0.5
        if fault == "window":
            window_hu = (window_hu[0], window_hu[1] + 1)
        run(
            whole,
            boxes,
            part,
            None if fault == "nothing written" else target,
            window_hu=window_hu,
            antialias=antialias,
        )

    monkeypatch.setattr(crop_resize_torch, "run", wrong)
    assert "differs from float64 by" in crop_resize_error(PretextConfig(), CPU)


def test_what_a_run_keeps_frozen_is_checked_too():
    model = network(2).requires_grad_(False)
    assert convolution_error(model, BF16, (1, 1, 16, 16, 16), CPU) == ""
    assert not any(parameter.requires_grad for parameter in model.parameters())


class Worse(torch.autograd.Function):
    """Multiplies the last entry by 1.1, of what goes forward or of the gradient that comes back."""

    @staticmethod
    def forward(context, x, backwards):
        context.backwards = backwards
        return x if backwards else Worse.spoilt(x)

    @staticmethod
    def backward(context, gradient):
        return Worse.spoilt(gradient) if context.backwards else gradient, None

    @staticmethod
    def spoilt(x):
        return torch.cat((x[:-1], x[-1:] * 1.1))


@pytest.mark.parametrize("what", ["", "output", "input's gradient", "weights' gradient"])
def test_of_a_large_batch_every_sample_is_compared_with_the_few_that_it_repeats(monkeypatch, what):
    """Of 6 samples 2 are drawn; the fault is in the last sample, or in the last filter's gradient."""
    monkeypatch.setattr(isolated_layer, "MAX_DRAWN_VALUES", 1)

    def forward(self, x, biased=True):
        weight = self.weight
        if what and torch.is_autocast_enabled("cpu"):
            x = Worse.apply(x, True) if what == "input's gradient" else x
            weight = Worse.apply(weight, True) if what == "weights' gradient" else weight
        output = torch.nn.functional.conv3d(x, weight, self.bias, padding=1)
        wrong = what == "output" and torch.is_autocast_enabled("cpu")
        return Worse.apply(output, False) if wrong else output

    monkeypatch.setattr(Conv3d, "forward", forward)
    told = convolution_error(torch.nn.Sequential(Conv3d(1, 4, 3, padding=1)), BF16, (6, 1, 8, 8, 8), CPU)
    assert told.startswith(f"0: {what} in bf16") if what else told == "", told


def test_each_distinct_convolution_is_computed_once_and_only_the_tested_pass_may_search(monkeypatch):
    seen = Counter()

    def forward(self, x, biased=True):
        kernels = torch.backends.cudnn
        seen[
            x.shape[2], torch.is_autocast_enabled("cpu"), kernels.benchmark, kernels.conv.fp32_precision
        ] += x.device.type == "cpu"
        return torch.nn.functional.conv3d(x, self.weight, self.bias, padding=1)

    monkeypatch.setattr(Conv3d, "forward", forward)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = torch.backends.cudnn.conv.fp32_precision
    alike = [Conv3d(4, 4, 3, padding=1) for _ in range(3)]
    model = torch.nn.Sequential(
        Conv3d(1, 4, 3, padding=1), *alike, torch.nn.MaxPool3d(2), Conv3d(4, 4, 3, padding=1)
    )
    assert convolution_error(model, BF16, (1, 1, 8, 8, 8), CPU) == ""
    counted = {key: count for key, count in seen.items() if count}
    assert counted == {
        (8, False, False, "ieee"): 2, (8, True, True, "tf32"): 2,
        (4, False, False, "ieee"): 1, (4, True, True, "tf32"): 1,
    }  # fmt: skip
    assert torch.backends.cudnn.benchmark and torch.backends.cudnn.conv.fp32_precision == before


WORLD = World(0, 1, 0, 1, "here", CPU, "test")
SMALL = Config(data=DataConfig(batch=2), pretext=PretextConfig(size=(8, 8, 8)))


@pytest.fixture
def checks(monkeypatch, tmp_path):
    """Start with an empty cache folder `tmp_path`; call it to get how many layers were compared and what was warned of."""
    warned, compared = [], []
    differences = preflight._differences
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(preflight, "_differences", lambda *given: compared.append(1) or differences(*given))

    def check(precision=BF16, config=SMALL, width=2):
        compared.clear()
        warned.clear()
        model = torch.nn.Sequential(Conv3d(1, width, 3, padding=1), Conv3d(width, 1, 3, padding=1))
        found = check_numerics(config, precision, model, WORLD, warned.append)
        return found, len(compared), list(warned)

    return check


def test_what_was_found_sound_is_not_computed_again_until_something_changes(checks, monkeypatch):
    _, first, warned = checks()
    assert first == 2 and warned == []
    assert checks() == (BF16, 0, [])
    assert checks(width=3)[1] == 2  # other layers
    assert checks(config=replace(SMALL, pretext=PretextConfig(size=(8, 16, 8))))[1] == 2  # other sizes
    assert checks() == (BF16, 0, [])
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert checks()[1] == 2 and checks()[1] == 0
    monkeypatch.setattr(preflight, "KERNEL_VARIABLES", ("P2W_TEST",))
    assert checks()[1] == 2
    monkeypatch.setattr(preflight, "_source_hash", lambda: "changed source")
    assert checks()[1] == 2
    assert checks(Precision("fp32", None, "")) == (Precision("fp32", None, ""), 0, [])


def test_a_cache_that_is_broken_or_in_the_way_is_a_warning(checks, tmp_path, monkeypatch):
    checks()
    (file,) = (tmp_path / "p2w").iterdir()
    for text in (b"", b"{", b"\xff", b"[" * 100_000, b'{"sound": {}}', b"7"):
        file.write_bytes(text)
        found, compared, warned = checks()
        assert (found, compared == 2) == (BF16, True)
        assert all(line.startswith(f"{file}: is broken (") for line in warned)
        assert len(warned) == (text not in (b'{"sound": {}}', b"7"))
        assert checks() == (BF16, 0, [])  # written anew
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_the_way))
    found, compared, warned = checks()
    assert (found, compared == 2, len(warned)) == (BF16, True, 1) and "cannot be written (" in warned[0]
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert checks()[1] == 2
    assert len(list((tmp_path / "home" / ".cache" / "p2w").iterdir())) == 1


def test_a_wrong_verdict_is_found_again_at_each_start(checks, monkeypatch, tmp_path):
    checks()

    def forward(self, x, biased=True):
        output = torch.nn.functional.conv3d(x, self.weight, self.bias, padding=1)
        return output * 1.1 if torch.is_autocast_enabled("cpu") else output

    monkeypatch.setattr(Conv3d, "forward", forward)
    checks(width=3)
    for _ in range(2):
        found, compared, warned = checks(width=3)
        assert found.name == "fp32" and compared == 1 and "differs from float32" in warned[0]
    assert len(list((tmp_path / "p2w").iterdir())) == 1


def test_ranks_may_remember_the_same_verdict_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    warned = []
    threads = [
        threading.Thread(
            target=lambda: [preflight.record_pass({"rank": [1, 2]}, warned.append) for _ in range(20)]
        )
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warned == [] and len(list((tmp_path / "p2w").iterdir())) == 1
    assert preflight.passed_before({"rank": (1, 2)}, warned.append) and warned == []
    assert not preflight.passed_before({"rank": [1, 3]}, warned.append)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["bf16", "fp16", "tf32"])
def test_on_a_gpu_the_papers_network_is_sound_and_a_layers_memory_is_enough(name, monkeypatch):
    """Batch 16 at the paper's size; searches for kernels as a run does, and leaves every setting as it was."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    device, settings = torch.device("cuda", 0), torch.backends.cudnn.conv.fp32_precision
    model = network(32).to(device, memory_format=torch.channels_last_3d)
    precision = Precision(name, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name), "")
    before = torch.cuda.get_rng_state()
    torch.cuda.reset_peak_memory_stats()
    assert convolution_error(model, precision, (16, 1, 32, 64, 64), device) == ""
    assert torch.cuda.max_memory_allocated() < 8 * 2**30
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert torch.backends.cudnn.benchmark and torch.backends.cudnn.conv.fp32_precision == settings
