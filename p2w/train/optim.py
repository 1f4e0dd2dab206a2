"""Precision, optimizer and learning-rate schedule; each choice carries its reason for the log."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from p2w.config import OptimConfig
from p2w.errors import UserError
from p2w.pretext.protocol import ParameterGroup


@dataclass(frozen=True)
class Precision:
    """Arithmetic of the network: `dtype` for autocast (None: float32), and the `reason` of the choice for the log.

    On a GPU, fp32 is IEEE float32. With tf32, matrix products and convolutions of float32 tensors round their inputs to 10
    bits of mantissa. With bf16 and fp16, tf32 applies to what autocast leaves in float32.
    """

    name: str
    dtype: torch.dtype | None
    reason: str

    @property
    def float32(self) -> str:
        """How this process computes matrix products and convolutions of float32 tensors on a GPU: "ieee" or "tf32"."""
        return "ieee" if self.name == "fp32" else "tf32"

    def apply(self) -> "Precision":
        """Set this process's float32 mode on the GPU; returns itself."""
        set_float32(self.float32)
        return self


def set_float32(how: str) -> None:
    """Set "ieee" or "tf32" for matrix products and convolutions of float32 tensors on a GPU.

    PyTorch's defaults differ: tf32 for convolutions, ieee for matrix products.
    """
    torch.backends.cudnn.conv.fp32_precision = how  # type: ignore[attr-defined]  # torch's stub lacks it
    torch.backends.cuda.matmul.fp32_precision = how


def choose_precision(amp: str, device: torch.device) -> Precision:
    """The precision for `train.precision`; `auto` is bf16 on a device that computes in it, else fp32.

    It takes effect with `Precision.apply`. Raises UserError for a precision that the device lacks.
    """
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    has = f"{device.type} {'computes' if bf16 else 'does not compute'} in bf16"
    if amp == "auto":
        return Precision("bf16", torch.bfloat16, has) if bf16 else Precision("fp32", None, has)
    if amp == "bf16" and not bf16:
        raise UserError(
            f"train.precision=bf16: {has}; pass --train.precision fp16 on a GPU or --train.precision fp32"
        )
    if amp == "fp16" and device.type == "cpu":
        raise UserError("train.precision=fp16: float16 needs a GPU; pass --train.precision auto")
    if amp == "tf32" and (device.type == "cpu" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise UserError(
            "train.precision=tf32: needs a GPU of compute capability 8.0 (A100) or newer; pass --train.precision fp32"
        )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None, "tf32": None}[amp]
    return Precision(amp, dtype, "asked for")


def build_optimizer(
    config: OptimConfig, model: nn.Module, groups: Sequence[ParameterGroup] | None = None
) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer, and one phrase for the log that says which implementation it is.

    Without `groups` all parameters are treated alike. Raises UserError when apex is asked for and is
    not there, ValueError when a trainable parameter is in no group or in two.
    """
    parameters = _torch_groups(model, groups)
    if config.fused == "apex":
        return _apex(config, parameters), "NVIDIA apex, fused"
    fused = config.fused == "torch"
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": fused}
    whose = "torch, fused" if fused else "torch"
    if config.name == "sgd":
        return _sgd(parameters, config.sgd_momentum, common), whose
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(parameters, betas=config.betas, **common), whose


def _torch_groups(model: nn.Module, groups: Sequence[ParameterGroup] | None) -> list[dict[str, Any]]:
    """Parameter groups as torch's optimizers take them; `lr_factor`, which `Stepper` reads, only where it is not 1."""
    groups = [ParameterGroup(list(model.parameters()))] if groups is None else groups
    grouped = [id(parameter) for group in groups for parameter in group.parameters]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and grouped.count(id(parameter)) != 1:
            raise ValueError(
                f"{name} is in {grouped.count(id(parameter))} parameter groups: each trainable parameter must be in exactly "
                "one; mend the pretext's parameter_groups"
            )
    made: list[dict[str, Any]] = []
    for group in groups:
        factor = {} if group.lr_factor == 1 else {"lr_factor": group.lr_factor}
        decay = {} if group.weight_decay is None else {"weight_decay": group.weight_decay}
        made.append({"params": group.parameters, **factor, **decay})
    return made


def _sgd(groups: list[dict[str, Any]], momentum: float, common: dict[str, Any]) -> torch.optim.Optimizer:
    """SGD that starts with averages of zero, which gives the same first step bit for bit as torch's own beginning.

    Torch's fused SGD makes its averages at the first step, and leaves them unwritten when that step is skipped.
    """
    optimizer = torch.optim.SGD(groups, momentum=momentum, **common)
    if common["fused"] and momentum:
        for parameter in (parameter for group in groups for parameter in group["params"]):
            if parameter.requires_grad:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `optimizer_state` gave into an optimizer on any device, whichever of torch's implementations it uses.

    Only the averages and counts are taken: rate, betas and the like are this run's own. Raises UserError where the
    parameters were grouped otherwise.
    """
    own = optimizer.state_dict()["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (own, state["param_groups"])]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"optimizer state: its groups hold {sizes[1]} parameters, those of this run's pretext {sizes[0]}; continue with "
            "the version of p2w that began the run, or begin a new one"
        )
    saved = [group["params"] for group in state["param_groups"]]  # which torch compares with its own
    groups = [group | {"params": params} for group, params in zip(own, saved, strict=True)]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state for a checkpoint, with plain numbers where a CUDA graph needs tensors."""
    state = optimizer.state_dict()
    groups = [dict(group) for group in state["param_groups"]]
    for group in groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"], group["capturable"] = float(group["lr"]), False
    return {"state": state["state"], "param_groups": groups}


def _apex(config: OptimConfig, parameters: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """NVIDIA apex's fused optimizer. PyPI's `apex` is a web toolkit of that name, and is told apart by its folders."""
    remedy = "build NVIDIA's from source (github.com/NVIDIA/apex), or pass --optim.fused torch"
    spec = importlib.util.find_spec("apex")
    if spec is None:
        raise UserError(f"optim.fused=apex: apex is not installed; {remedy}")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        raise UserError(
            f"optim.fused=apex: the apex at {spec.origin} is PyPI's web toolkit, not NVIDIA's; {remedy}"
        )
    if not torch.cuda.is_available():
        raise UserError(
            "optim.fused=apex: apex's fused optimizers need a CUDA device; pass --optim.fused torch"
        )
    optimizers = importlib.import_module("apex.optimizers")
    if config.name == "sgd":
        return optimizers.FusedSGD(
            parameters, lr=config.lr, momentum=config.sgd_momentum, weight_decay=config.weight_decay
        )
    return optimizers.FusedAdam(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay,
        adam_w_mode=config.name == "adamw",
    )  # fmt: skip


class Schedule:
    """Learning rate as a function of the step and, for `plateau`, of the validation losses so far.

    A pure function rather than torch's chained schedulers, so that a resumed run computes the same rate.
    """

    FLOOR = 0.01  # last rate of `cosine`, as a share of `lr`
    MIN_DELTA = 1e-4  # a validation counts as better only by at least this share of the best

    def __init__(self, config: OptimConfig, steps: int) -> None:
        self.config, self.steps = config, steps
        self.factor, self.best, self.bad = 1.0, math.inf, 0

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`; 0 is the first."""
        config = self.config
        if step < config.warmup_steps:
            return config.lr * (step + 1) / config.warmup_steps
        if config.schedule == "cosine":
            done = (step - config.warmup_steps) / max(1, self.steps - config.warmup_steps)
            return config.lr * (
                self.FLOOR + (1 - self.FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
            )
        if config.schedule not in ("constant", "plateau"):
            raise ValueError(f"no schedule {config.schedule!r}")
        return config.lr * self.factor

    def observe(self, validation: float) -> None:
        """Add a validation loss; `bad` counts how many in a row were no improvement."""
        if validation < self.best * (1 - self.MIN_DELTA):
            self.best, self.bad = validation, 0
        else:
            self.bad += 1
            patience = self.config.plateau_patience + 1
            if self.config.schedule == "plateau" and self.bad % patience == 0:
                self.factor *= 0.5

    def state_dict(self) -> dict[str, float]:
        """The state as plain numbers."""
        return {"factor": self.factor, "best": self.best, "bad": self.bad}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned."""
        self.factor, self.best, self.bad = state["factor"], state["best"], int(state["bad"])
