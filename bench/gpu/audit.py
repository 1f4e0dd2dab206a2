"""Which operations would run on a GPU? Every proxy task with fake CUDA tensors: needs no GPU, but a CUDA build of torch.

    python bench/gpu/audit.py                      all tasks
    python bench/gpu/audit.py parts2whole mae      some

Fake tensors have shapes and devices and no numbers. For sampling views, and for the forward pass with the loss, it counts
operations, and names each place where the host would wait for the GPU or tensors of two devices would meet. Backward passes
cannot be had so. Exit code 1 where something raises, or sampling, forward pass or loss would wait.
"""

import sys
import traceback
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from rows import REPO
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from p2w import geometry
from p2w.kernels import sample_triton
from p2w.pretext import PRETEXTS, build_pretext_and_network
from p2w.recipes import named
from p2w.rng import SampleKeys

CARD = torch.device("cuda:0")
WHOLES = (4, 64, 128, 128)
VIEWS = (
    "view",
    "expand",
    "unsqueeze",
    "slice",
    "select",
    "permute",
    "detach",
    "alias",
    "squeeze",
    "transpose",
    "t.default",
    "unbind",
    "split",
    "empty",
    "as_strided",
)  # fmt: skip  (operations that launch nothing)


class Watch(TorchDispatchMode):
    """Counts operations, and records those for which the host waits: a number read, or a copy between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, str(func)
        self.counts[name] += 1
        if "_local_scalar_dense" in name:
            if args[0].device.type == "cuda":
                self.waits.append(f"{name} at {_place()}")
            return 1.0 if args[0].dtype.is_floating_point else 1
        found = func(*args, **kwargs)
        if "_to_copy" in name or "copy_" in name or "lift_fresh" in name:
            devices = {one.device.type for one in (*args, found) if isinstance(one, torch.Tensor)}
            if len(devices) > 1 and not kwargs.get("non_blocking"):
                self.waits.append(
                    f"{name} from {args[-1].device if 'copy_' in name else args[0].device} at {_place()}"
                )
        return found

    @property
    def launches(self) -> int:
        """Operations that launch something, about."""
        return sum(count for name, count in self.counts.items() if not any(view in name for view in VIEWS))


def _place() -> str:
    """File and line of the newest call in this project."""
    inside = str(REPO / "p2w")
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(inside)]
    return " < ".join(
        f"{frame.filename.removeprefix(str(REPO) + '/')}:{frame.lineno}" for frame in frames[:-3:-1]
    )


def audit(name: str) -> list[str]:
    """Print the operations of one task, and the lines where the host waits, or the error."""
    config = named("paper")
    config = replace(
        config, pretext=replace(config.pretext, name=name), data=replace(config.data, batch=WHOLES[0]),
        model=replace(config.model, width=8, **({"name": "vit3d"} if name == "mae" else {})),
    )  # fmt: skip
    pretext, model = build_pretext_and_network(config)
    with FakeTensorMode(allow_non_fake_inputs=False):
        for module in model.modules():
            for key, weight in list(module._parameters.items()):
                if weight is not None:
                    empty = torch.empty(weight.shape, dtype=weight.dtype, device=CARD)
                    module._parameters[key] = torch.nn.Parameter(empty, requires_grad=weight.requires_grad)
            for key, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CARD)
        voxels = torch.empty(WHOLES, dtype=torch.int16, device=CARD)
        ids = torch.empty(WHOLES[0], dtype=torch.int64, device=CARD)
        try:
            # Tables that stay on the device are copied there once
            pretext.sample(voxels, SampleKeys(0, 0, ids))
            with Watch() as sampling:
                views = pretext.sample(voxels, SampleKeys(0, 0, ids))
            with Watch() as passing, torch.autocast("cuda", torch.bfloat16):
                output = model(views.input, *views.extra_inputs)
            with Watch() as losing:
                loss, extras = pretext.loss(output, views)
        except Exception as error:
            traceback.print_exc(limit=-4)
            print(f"{name:22} {type(error).__name__}: {str(error)[:200]}")
            return [str(error)]
        elsewhere = [key for key, value in {"loss": loss, **extras}.items() if value.device != CARD]
    launches = ", ".join(f"{what} {one.launches}" for what, one in
                         (("sampling", sampling), ("forward", passing), ("loss", losing)))  # fmt: skip
    waits = [*sampling.waits, *passing.waits, *losing.waits]
    print(
        f"{name:22} operations: {launches}; waits: {len(waits)}{f'; on the host: {elsewhere}' if elsewhere else ''}"
    )
    for place, count in Counter(waits).items():
        print(f"{'':22} {count} x {place}")
    return waits


def main() -> int:
    """Audit the tasks of the command line, else all."""
    if torch.version.cuda is None:
        print(
            "error: this torch was built without CUDA; take PyPI's build for Linux: pip install torch",
            file=sys.stderr,
        )
        return 2
    # Two kernels need a card: they fill what was allocated for them. Nothing else is left out.
    geometry._run = lambda *_, **__: None  # type: ignore[assignment]
    sample_triton.local_shuffle = lambda volumes, *_: torch.empty_like(volumes)  # type: ignore[assignment]
    names = sys.argv[1:] or sorted(PRETEXTS)
    return int(any([audit(name) for name in names]))


if __name__ == "__main__":
    sys.exit(main())
