"""Encoders by name. A new network is one file here, one line in ENCODERS, one test file."""

from collections.abc import Callable

from p2w.errors import UserError
from p2w.model.protocol import Encoder, Network
from p2w.model.unet3d import UNet3dEncoder

__all__ = ["ENCODERS", "Encoder", "Network", "build_encoder"]

ENCODERS: dict[str, Callable[[int], Encoder]] = {"unet3d": UNet3dEncoder}


def build_encoder(name: str, width: int) -> Encoder:
    """Make the encoder `name`. Raises UserError when the table has no such network."""
    if name not in ENCODERS:
        raise UserError(f"model.name={name}: unknown; one of {', '.join(sorted(ENCODERS))}")
    return ENCODERS[name](width)
