"""The step on the CPU and on a GPU: every precision and form, a skipped step, compiling, the CUDA graph."""

from dataclasses import replace

import pytest
import torch
from ct_sets import structured_hu
from devices import CPU_AND_GPU, GPU, NEEDS_GPU, on_gpu, settle

from p2w.config import Config, ModelConfig, OptimConfig, PretextConfig, TrainConfig
from p2w.model.forms import PLAIN, formed_modules, set_forms
from p2w.pretext import build_pretext, build_pretext_and_network
from p2w.rng import SampleKeys
from p2w.train.optim import Precision, Schedule, build_optimizer, choose_precision, set_float32
from p2w.train.step import Stepper

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WHOLES = torch.stack([torch.from_numpy(structured_hu(scan, 0)) for scan in range(4)])
CONFIG = Config(
    pretext=PretextConfig(size=(8, 16, 16)),
    model=ModelConfig(width=2),
    optim=OptimConfig(lr=1e-3, schedule="constant"),
)
PRECISIONS = [
    (CPU, "fp32"),
    (CPU, "bf16"),
    *(on_gpu(CUDA, name) for name in ("fp32", "tf32", "bf16", "fp16")),
]
WITHIN = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 3e-2, "fp16": 1e-2}  # of a loss, after some steps


@pytest.fixture(autouse=True)
def usual_arithmetic():
    """Torch's switches as they were, whatever a precision has set."""
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before


def sampled(device, step, config=CONFIG):
    """Views of four wholes of (16, 32, 32) voxels at a step."""
    return build_pretext(config).sample(
        WHOLES.to(device), SampleKeys(0, step, torch.arange(4, device=device))
    )


def stepper(device, precision, config=CONFIG, forms=None):
    """A stepper of the small U-Net in channels-last, weights drawn on the CPU."""
    torch.manual_seed(0)
    pretext, model = build_pretext_and_network(config)
    model.to(device).to(memory_format=torch.channels_last_3d)
    set_forms(model, forms or {})
    network = torch.compile(model) if config.train.compile else model
    optimizer, _ = build_optimizer(config.optim, model)
    return Stepper(config, pretext, network, optimizer, Schedule(config.optim, 100), precision, device)


def losses(one, device, steps, config=CONFIG):
    found = [one.step(sampled(device, step, config), step).loss for step in range(steps)]
    settle(device)
    return [float(loss) for loss in found]


def state(one):
    """Every tensor that a step changes: weights, statistics, averages of the optimizer."""
    return [value.detach().clone() for value in one._state()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def reference():
    """Losses of six steps in float32 on the CPU."""
    return losses(stepper(CPU, Precision("fp32", None, "")), CPU, 6)


@pytest.mark.parametrize(("device", "name"), PRECISIONS)
def test_a_step_in_every_precision_trains_as_float32_on_the_cpu_does(reference, device, name):
    precision = Precision(name, torch.bfloat16, "") if (device, name) == (CPU, "bf16") else None
    precision = (precision or choose_precision(name, device)).apply()
    one = stepper(device, precision)
    before = state(one)
    found = losses(one, device, 6)
    assert found == pytest.approx(reference, rel=WITHIN[name])
    assert found != reference or (device, name) == (CPU, "fp32")
    assert not same(before[:4], state(one)[:4])
    assert all(weight.dtype == torch.float32 for weight in one.parameters)


@pytest.mark.parametrize("name", [pytest.param(name, marks=GPU) for name in ("fp32", "tf32")])
def test_float32_is_ieee_and_tf32_is_not(name):
    """A convolution against float64: the first rounds to 24 bits, the second to 11."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(*shape, generator=generator) for shape in ((2, 64, 8, 16, 16), (64, 64, 3, 3, 3))
    )
    right = torch.nn.functional.conv3d(x.double(), weight.double(), padding=1)
    choose_precision(name, CUDA).apply()
    found = torch.nn.functional.conv3d(x.cuda(), weight.cuda(), padding=1).cpu().double()
    error = float((found - right).abs().max() / right.abs().max())
    assert error < 1e-5 if name == "fp32" else 1e-5 < error < 1e-2


def every_form(device):
    """(module kind, form) pairs that the small U-Net has on a device."""
    _, model = build_pretext_and_network(CONFIG)
    found = []
    for _, module in formed_modules(model):
        forms = module.forms(device, torch.bfloat16, 4)
        found += [form for form in forms if form != PLAIN]
    return list(dict.fromkeys(found))


@CPU_AND_GPU
def test_steps_in_every_form_are_those_of_plain_layers(device):
    """In float32 forms differ by rounding, which Adam's first steps amplify."""
    set_float32("ieee")
    precision = Precision("fp32", None, "")
    plain = losses(stepper(device, precision), device, 4)
    forms = every_form(device)
    assert {"flat", "folded"} <= set(forms) and (device.type == "cpu" or "fused" in forms)
    _, model = build_pretext_and_network(CONFIG)
    for form in forms:
        taken = {name: form for name, module in formed_modules(model) if form in module.possible_forms()}
        assert losses(stepper(device, precision, forms=taken), device, 4) == pytest.approx(plain, rel=1e-3)


@CPU_AND_GPU
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_a_gradient_that_is_not_finite_is_skipped_and_the_scale_halved(device, name):
    """On the CPU the scaler works on float32: there is no fp16 there, and the scale is what is tested."""
    dtype = torch.float16 if (device.type, name) == ("cuda", "fp16") else None
    one = stepper(device, Precision(name, dtype, ""))
    assert one.step(sampled(device, 0), 0).applied
    scale = one.scaler.get_scale()
    before = state(one)[:-2] if name == "fp16" else state(one)
    bad = sampled(device, 1)
    bad.input[2, 0, 1, 2, 3] = float("inf")
    result = one.step(bad, 1)
    assert not result.applied and not torch.isfinite(torch.tensor(result.grad_norm))
    after = state(one)[:-2] if name == "fp16" else state(one)
    assert same(before, after)
    if name == "fp16":
        assert one.scaler.get_scale() == scale / 2
    good = one.step(sampled(device, 2), 2)
    assert good.applied and torch.isfinite(good.loss)


@NEEDS_GPU
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_cuda_graph_takes_the_steps_that_the_host_takes_one_by_one(name):
    """The same losses and the same weights, bit for bit, also across a step that is skipped."""
    torch.backends.cudnn.deterministic, before = True, torch.backends.cudnn.deterministic
    try:
        steppers = [stepper(CUDA, choose_precision(name, CUDA)) for _ in range(2)]
        said = []
        steppers[0].use_graph(said.append, forced=True)
        found = [[], []]
        for step in range(9):
            for at, one in enumerate(steppers):
                views = sampled(CUDA, step)
                if step == 6:
                    views.input[0] = float("nan")
                found[at].append(one.step(views, step))
        settle(CUDA)
        assert len(said) == 1 and said[0].startswith("CUDA graph: on")
        assert [result.applied for result in found[0]] == [step != 6 for step in range(9)]
        for graph, usual in zip(*found, strict=True):
            assert torch.equal(graph.loss, usual.loss) or not usual.applied
        weights = [one.network.state_dict() for one in steppers]
        assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    finally:
        torch.backends.cudnn.deterministic = before


@NEEDS_GPU
def test_a_step_waits_for_nothing():
    """No copy back to the host and no synchronisation between the views and the updated weights."""
    one = stepper(CUDA, choose_precision("bf16", CUDA))
    pretext, voxels, ids = build_pretext(CONFIG), WHOLES.cuda(), torch.arange(4, device=CUDA)
    batches = [pretext.sample(voxels, SampleKeys(0, step, ids)) for step in range(4)]  # compiles the kernel
    one.step(batches[0], 0)
    settle(CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [one.step(views, step) for step, views in enumerate(batches[1:], 1)]
        again = pretext.sample(voxels, SampleKeys(0, 1, ids))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    settle(CUDA)
    assert all(result.applied for result in results)
    assert torch.equal(again.input, batches[1].input)


@NEEDS_GPU
def test_a_compiled_network_trains_as_an_eager_one(reference):
    config = replace(CONFIG, train=TrainConfig(compile=True))
    found = losses(stepper(CUDA, choose_precision("bf16", CUDA), config), CUDA, 3, config)
    assert found == pytest.approx(reference[:3], rel=WITHIN["bf16"])
