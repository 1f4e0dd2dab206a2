"""Encoders by name. A new network is one file here and one line in ENCODERS: see docs/add_a_backbone.md."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from p2w.errors import UserError
from p2w.model.dense_vnet import DenseVNet
from p2w.model.encoder import Encoder, Network, Output
from p2w.model.i3d import I3D
from p2w.model.primus import Primus
from p2w.model.resencl import ResEncL
from p2w.model.resnet3d import ResNet3d
from p2w.model.unet3d import UNet3dEncoder
from p2w.model.vit3d import ViT3d

__all__ = ["ENCODERS", "Encoder", "Network", "Output", "build_encoder"]


# (width, in_channels, and as keywords with a default whatever settings are the network's own) -> encoder
ENCODERS: dict[str, Callable[..., Encoder]] = {
    "unet3d": UNet3dEncoder,
    "resencl": ResEncL,
    "vit3d": ViT3d,
    "primus": Primus,
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
    """Make the encoder `name`, or `name:setting=value,setting=value` with settings of its own, such as "vit3d:depth=6".

    Raises UserError when the table has no such network, or the network no such setting.
    """
    base, _, settings = name.partition(":")
    if base not in ENCODERS:
        raise UserError(f"model.name={name}: unknown; one of {', '.join(sorted(ENCODERS))}")
    if width < 1 or in_channels < 1:
        raise UserError(f"model.width={width}, input channels {in_channels}: both must be at least 1")
    factory = ENCODERS[base]
    return factory(width, in_channels, **_own_settings(name, factory, settings))


def factory_class(name: str) -> Any:
    """The class, or the function, behind a line of ENCODERS."""
    factory = ENCODERS[name]
    return factory.func if isinstance(factory, functools.partial) else factory


def _own_settings(name: str, factory: Callable[..., Encoder], text: str) -> dict[str, Any]:
    """`setting=value,…` as keyword arguments of `factory`, each of the type of its default."""
    parameters = inspect.signature(factory).parameters.values()
    known = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
    found: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        setting, _, value = pair.partition("=")
        if setting not in known:
            has = f"its settings are {', '.join(known)}" if known else "it has no settings of its own"
            raise UserError(f"model.name={name}: no setting {setting!r}; {has}")
        try:
            found[setting] = _value(known[setting], value)
        except ValueError as error:
            kind = type(known[setting]).__name__
            raise UserError(f"model.name={name}: {setting} is {value!r}, must be of type {kind}") from error
    return found


def _value(default: Any, text: str) -> Any:
    """The text as a value of the default's type. Raises ValueError."""
    if isinstance(default, bool):
        if text not in ("True", "False"):
            raise ValueError(text)
        return text == "True"
    return type(default)(text)
