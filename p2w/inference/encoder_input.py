"""A pretrained encoder with what its input must be: size, spacing and window, as the card of its weights says.

Shapes: B, C, D, H, W = batch, channel, slice, row, column.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from p2w.ct.resample import check_spacing
from p2w.errors import UserError
from p2w.files import type_mismatch
from p2w.finetune.trial import MODEL
from p2w.inference.finetuned_model import load_finetuned
from p2w.model import Encoder
from p2w.model.encoder import normalise_input
from p2w.tasks.task import WINDOW_HU
from p2w.weights.card import model_card
from p2w.weights.load import exported, find_checkpoint, load
from p2w.weights.start import RANDOM, load_start

CARD = {"input": {"size_zyx": [int], "window_hu": [float], "spacing_mm_zyx": {"network": (None, [float])}}}
Triple = tuple[float, float, float]
Size = tuple[int, int, int]


@dataclass(frozen=True)
class EncoderOptions:
    """The input of an encoder, where its card does not say it, or another input is wanted."""

    size: Size | None = None
    """Voxels z y x of a window; default: as the card says."""
    spacing: Triple | None = None
    """mm z y x of a window's voxels; default: as the card says."""
    native_spacing: bool = False
    """Do not resample: windows have the voxels of the scan."""
    window_hu: tuple[float, float] | None = None
    """HU that become 0 and 1; default: as the card says."""
    network: str | None = None
    """Which encoder, for ENCODER `random`; default unet3d."""
    width: int | None = None
    """Width of the encoder, for ENCODER `random`; default the published one."""
    seed: int = 0
    """Seed of the weights, for ENCODER `random`."""


@dataclass(frozen=True)
class EncoderInput:
    """An encoder in evaluation mode, and how its input is made."""

    encoder: Encoder
    where: str
    size: Size
    """Voxels z, y, x of a window."""
    spacing_mm: Triple | None
    """mm z, y, x of a window's voxels; None: those of the scan."""
    window: tuple[float, float]
    """Stored values that become 0 and 1."""
    modality: str
    """CT, MR or PT; of the latter two, each scan's percentiles are scaled to the window of shards, as sharding does."""
    weights: str
    """First 16 digits of a SHA-256 over all tensors."""

    @property
    def channels(self) -> int:
        """Number of features of each kind."""
        return self.encoder.channels[-1]

    def settings(self) -> dict[str, Any]:
        """What the features depend on, as plain JSON values."""
        return {
            "weights": self.weights,
            "encoder": type(self.encoder).__name__,
            "channels": self.channels,
            "input_norm": self.encoder.input_norm,
            "size_zyx": list(self.size),
            "spacing_mm_zyx": None if self.spacing_mm is None else list(self.spacing_mm),
            "window": list(self.window),
            "modality": self.modality,
        }

    @torch.no_grad()
    def pooled(self, crops: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Stored values (B, 1, D, H, W) -> mean, largest value and deviation over space of the coarsest features, (B, 3, C)
        float32 on the CPU; the deviation is that of the values themselves (n in the denominator)."""
        low, high = self.window
        x = crops.float().sub_(low).div_(high - low).clamp_(0, 1)
        x = normalise_input(x, self.encoder.input_norm, self.encoder.in_channels)
        with torch.autocast(x.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            features: list[Tensor] = self.encoder(x)
        coarsest = features[-1].float().flatten(2)
        pooled = (coarsest.mean(2), coarsest.amax(2), coarsest.std(2, correction=0))
        return torch.stack(pooled, 1).cpu()


def load_encoder_input(name: str, options: EncoderOptions, device: torch.device) -> EncoderInput:
    """The encoder `name` on `device`: a run, RUN@STEP, a checkpoint, an exported file, a fine-tuned trial, a file of weights
    that others published, or `random`.

    Raises UserError where its card does not say a size, spacing or window and `options` does not either: nothing is guessed.
    """
    if options.spacing is not None and options.native_spacing:
        raise UserError("--spacing and --native-spacing exclude each other; pass one of them")
    stated = _read_card_input(name, device)
    if stated is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            stated = _CardInput(load_start(name, options.network, options.width).encoder)
    elif options.network is not None or options.width is not None:
        raise UserError(f"{name}: names its own network; leave --network and --width out")
    size, window = options.size or stated.size, options.window_hu or stated.window
    native = options.native_spacing or (stated.native and options.spacing is None)
    spacing = None if native else options.spacing or stated.spacing_mm
    wanted = (
        (size is None, "--size D H W (voxels)"),
        (spacing is None and not native, "--spacing Z Y X (mm) or --native-spacing"),
        (window is None, "--window-hu LOW HIGH"),
    )
    if missing := [text for lacking, text in wanted if lacking]:
        raise UserError(f"{name}: does not say what it is fed; pass {', '.join(missing)}")
    assert size is not None and window is not None
    _check(stated.encoder, size, spacing, window)
    encoder = stated.encoder.to(device).eval()
    return EncoderInput(encoder, name, size, spacing, window, stated.modality, _checksum(encoder))


@dataclass(frozen=True)
class _CardInput:
    """An encoder, and its input as its card says it; a field is None where the card does not say it."""

    encoder: Encoder
    size: Size | None = None
    spacing_mm: Triple | None = None
    native: bool = False
    window: tuple[float, float] | None = None
    modality: str = "CT"


def _read_card_input(name: str, device: torch.device) -> _CardInput | None:
    """An encoder that has a card of p2w, with its input; None for `random`, and for a file that others published."""
    if name == RANDOM:
        return None
    run, _, step = name.rpartition("@")
    path = Path(name)
    if step.isdecimal() and Path(run, "checkpoints").is_dir():
        path = find_checkpoint(Path(run), int(step)).folder
    if any(path.glob(f"trial-*/{MODEL}")):
        return _of_finetuned(path, device)
    if path.is_dir() and (path / "checkpoints").is_dir():
        path = find_checkpoint(path).folder
    if path.is_dir() and (path / "meta.json").is_file():
        path = path.resolve()
        number = path.name.removeprefix("step-")
        encoder = load(path)
        return _of_card(
            path, encoder, model_card(find_checkpoint(path.parent.parent, int(number)), encoder, "encoder")
        )
    try:
        file, card = exported(path)
    except UserError:
        if path.is_dir():
            raise
        return None
    return _of_finetuned(file, device) if "task" in card else _of_card(file, load(path), card)


def _of_card(where: Path, encoder: Encoder, card: dict[str, Any]) -> _CardInput:
    if said := type_mismatch(card, CARD, "its card"):
        raise UserError(f"{where}: {said}; export the run again")
    described = card["input"]
    size, spacing, window = (
        described["size_zyx"],
        described["spacing_mm_zyx"]["network"],
        described["window_hu"],
    )
    modality = str(described.get("modality", "ct")).upper()
    if len(size) != 3 or len(window) != 2 or (spacing is not None and len(spacing) != 3):
        raise UserError(
            f"{where}: its card has size {size}, spacing {spacing}, window {window}; export the run again"
        )
    mm = None if spacing is None else (float(spacing[0]), float(spacing[1]), float(spacing[2]))
    return _CardInput(
        encoder, (size[0], size[1], size[2]), mm, False, (float(window[0]), float(window[1])), modality
    )


def _of_finetuned(where: Path, device: torch.device) -> _CardInput:
    """The encoder of a fine-tuned network, whose input is made as the samples of its task were."""
    model = load_finetuned(where, device)
    if model.channels != 1 or not (model.in_hu or model.by_percentiles):
        raise UserError(
            f"{model.file}: its task has {model.channels} channels, scaled by each image's smallest and largest value; "
            "embeddings are of one image in HU, or scaled by percentiles"
        )
    window = model.window if model.in_hu else WINDOW_HU
    spacing = model.spacing_mm
    fields = (model.size, spacing, spacing is None, window, "CT" if model.in_hu else "MR")
    return _CardInput(model.network.encoder, *fields)


def _check(encoder: Encoder, size: Size, spacing: Triple | None, window: tuple[float, float]) -> None:
    """Raise UserError for a size, spacing or window that cannot be."""
    edges = " ".join(map(str, size))
    if any(edge < 1 or edge % divisor for edge, divisor in zip(size, encoder.divisor, strict=True)):
        raise UserError(
            f"--size {edges}: edges have to be multiples of {' '.join(map(str, encoder.divisor))} (z, y, x) for this network"
        )
    if (
        math.prod(edge // divisor for edge, divisor in zip(size, encoder.divisor, strict=True))
        < encoder.least_voxels
    ):
        raise UserError(
            f"--size {edges}: too small, its coarsest features need {encoder.least_voxels} voxels"
        )
    if spacing is not None:
        check_spacing(spacing)
    low, high = window
    if not -32768 <= low < high <= 32767:
        raise UserError(
            f"--window-hu {low:g} {high:g}: the first has to be below the second, both HU of 16 bits"
        )


def _checksum(encoder: Encoder) -> str:
    """The first 16 digits of a SHA-256 over names and values of all tensors."""
    digest = hashlib.sha256()
    for key, value in sorted(encoder.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
