"""Encoders by name. A new network is one file here, one line in ENCODERS, one test file."""

import functools
from collections.abc import Callable

from p2w.errors import UserError
from p2w.model.dense_vnet import DenseVNet
from p2w.model.encoder import Encoder, Network, Output
from p2w.model.i3d import I3D
from p2w.model.resencl import ResEncL
from p2w.model.resnet3d import ResNet3d
from p2w.model.unet3d import UNet3dEncoder
from p2w.model.vit3d import ViT3d

__all__ = ["ENCODERS", "Encoder", "Network", "Output", "build_encoder"]


ENCODERS: dict[str, Callable[[int, int], Encoder]] = {  # (width, in_channels) -> encoder
    "unet3d": UNet3dEncoder,
    "resencl": ResEncL,
    "vit3d": ViT3d,
    "resnet10": functools.partial(ResNet3d, 10),
    "resnet18": functools.partial(ResNet3d, 18),
    "resnet34": functools.partial(ResNet3d, 34),
    "resnet50": functools.partial(ResNet3d, 50),
    "resnet101": functools.partial(ResNet3d, 101),
    "resnet152": functools.partial(ResNet3d, 152),
    "resnet200": functools.partial(ResNet3d, 200),
    "i3d": I3D,
    "dense_vnet": DenseVNet,
}


def build_encoder(name: str, width: int, in_channels: int = 1) -> Encoder:
    """Make the encoder `name`. Raises UserError when the table has no such network."""
    if name not in ENCODERS:
        raise UserError(f"model.name={name}: unknown; one of {', '.join(sorted(ENCODERS))}")
    if width < 1 or in_channels < 1:
        raise UserError(f"model.width={width}, input channels {in_channels}: both must be at least 1")
    return ENCODERS[name](width, in_channels)
