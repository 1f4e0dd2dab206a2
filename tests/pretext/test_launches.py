"""How many kernels a pretext's `sample` launches on a GPU, and that it never waits for the GPU; counted without one.

PyTorch's operations are counted as they are dispatched, less those that only make a view or reserve memory. What is one
launch of a kernel of our own (draws, boxes resized, blocks shuffled) counts as one.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from p2w import geometry, rng
from p2w.kernels import sample_triton
from p2w.pretext import PRETEXTS, build_pretext
from p2w.recipes import named
from p2w.rng import SampleKeys

pytest.importorskip("triton")


LIMIT = {"models_genesis": 100, "pirl": 200, "swav": 200, "dino": 200}  # these two cut further views
OTHERS = 120
NO_KERNEL = (
    "view", "expand", "unsqueeze", "slice", "select", "permute", "detach", "alias", "squeeze", "transpose",
    "unbind", "split", "empty", "as_strided",
)  # fmt: skip
WAITS = (
    "_local_scalar_dense",  # .item(), float(), if
    "lift_fresh",  # torch.tensor of Python's numbers: a copy to the device
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal.default",
)


class Counting(TorchDispatchMode):
    """Counts operations by name, and notes those that a GPU's host waits for."""

    def __init__(self):
        super().__init__()
        self.kernels, self.waits = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if not name.removeprefix("_").startswith(NO_KERNEL):
            self.kernels[name] += 1
        chosen = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else ()
        if name.startswith(WAITS) or any(one is not None and one.dtype == torch.bool for one in chosen):
            self.waits[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """Counts launches of our own kernels by name, on the path that CUDA tensors take; their work is torch's, or not done."""
    count, backend = Counter(), ["triton"]
    monkeypatch.setattr(rng, "backend", lambda device: (backend[0], "as on a GPU"))

    def one_launch(module, name):
        plain = getattr(module, name)

        def wrapped(*args, **kwargs):
            count[name] += 1
            backend[0] = "torch"
            try:
                with _disable_current_modes():
                    return plain(*args, **kwargs)
            finally:
                backend[0] = "triton"

        monkeypatch.setattr(module, name, wrapped)

    class Kernel:
        """Leaves its output as it is."""

        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: count.update([self.name])

    one_launch(rng, "uniforms")
    for name in ("sample_boxes", "crop_resize", "part_and_whole"):
        one_launch(geometry, name)
    for name in ("last_block_kernel", "shuffle_kernel"):
        monkeypatch.setattr(sample_triton, name, Kernel(name))
    return count


def prepared(name, device="cpu"):
    """A pretext of the paper's recipe, made small, and what it samples from."""
    config = named("paper")
    config = replace(
        config,
        pretext=replace(config.pretext, name=name, size=(16, 32, 32)),
        data=replace(config.data, batch=4),
        intensity=replace(config.intensity, strength=1.0),
        rubik=replace(config.rubik, adversary=0.1),
    )
    wholes = torch.zeros(4, 32, 64, 64, dtype=torch.int16, device=device)
    return build_pretext(config), wholes, SampleKeys(0, 0, torch.arange(4, device=device))


@pytest.mark.parametrize("name", PRETEXTS)
def test_a_sample_is_few_launches_and_waits_for_nothing(name, launches):
    pretext, wholes, keys = prepared(name)
    pretext.sample(wholes, keys)  # what is made once a device is made here
    launches.clear()
    with Counting() as counted:
        pretext.sample(wholes, keys)
    assert not counted.waits
    assert launches["uniforms"] and (launches["shuffle_kernel"] == 1) == (name == "models_genesis")
    total = counted.kernels.total() + launches.total()
    print(f"{name}: {total} launches, {launches.total()} of them of our own kernels")
    assert total < LIMIT.get(name, OTHERS), (total, counted.kernels, launches)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", PRETEXTS)
def test_on_a_gpu(name):
    pretext, wholes, keys = prepared(name, "cuda")
    pretext.sample(wholes, keys)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pretext.sample(wholes, keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        pretext.sample(wholes, keys)
        torch.cuda.synchronize()
    events = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(events) < LIMIT.get(name, OTHERS), Counter(events)
