"""Encoders by name. A new network is one file here, one line in ENCODERS, one test file."""

from collections.abc import Callable

from p2w.errors import UserError
from p2w.model.protocol import Encoder, Network, Output
from p2w.model.unet3d import UNet3dEncoder

__all__ = ["ENCODERS", "Encoder", "Network", "Output", "build_encoder"]

ENCODERS: dict[str, Callable[[int, int], Encoder]] = {
    "unet3d": UNet3dEncoder
}  # (width, in_channels) -> encoder


def build_encoder(name: str, width: int, in_channels: int = 1) -> Encoder:
    """Make the encoder `name`. Raises UserError when the table has no such network."""
    if name not in ENCODERS:
        raise UserError(f"model.name={name}: unknown; one of {', '.join(sorted(ENCODERS))}")
    if width < 1 or in_channels < 1:
        raise UserError(f"model.width={width}, input channels {in_channels}: both must be at least 1")
    return ENCODERS[name](width, in_channels)
