"""Whose weights a torch or safetensors file holds, told by its names, and the same under our names.

Models Genesis   {"state_dict": {"module.down_tr64.ops.0.conv1.weight": …}}
MedicalNet       {"state_dict": {"module.layer3.22.conv3.weight": …}}
I3D              {"Mixed_3b.b0.conv3d.weight": …}
dense V-Net      model.ckpt-3000.index and .data-00000-of-00001, a TensorFlow checkpoint (`p2w.weights.niftynet`)
"""

import pickle
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from p2w.errors import UserError
from p2w.model.blocks import PUBLISHED_WIDTH, scaled
from p2w.model.genesis_keys import DECODER_PREFIX
from p2w.model.resnet3d import BASIC, BLOCKS
from p2w.weights import niftynet
from p2w.weights.fit import State
from p2w.weights.tf_bundle import Bundle, prefix_of

KNOWN = "Models Genesis, MedicalNet, I3D, NiftyNet's dense V-Net, or a run or file of p2w"
CHEST = {"what": "LUNA16, 623 scans of subsets 0-6, as published"}  # FACTS 1, 4
UNREADABLE = (  # what torch and safetensors make of files that are none
    SafetensorError, OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError, AttributeError,
)  # fmt: skip
FIRST = {  # the first convolution and its published number of outputs
    "unet3d": ("down_tr64.ops.0.conv1.weight", 32),
    "i3d": ("Conv3d_1a_7x7.conv3d.weight", 64),
    "dense_vnet": ("initial.conv.weight", 24),
} | {f"resnet{depth}": ("conv1.weight", 64) for depth in BLOCKS}


@dataclass(frozen=True)
class Published:
    """An encoder's weights as somebody published them."""

    format: str
    network: str
    state: State
    head: tuple[str, ...] = ()
    decoder: State | None = None
    notes: tuple[str, ...] = ()
    data: dict[str, str] = field(default_factory=dict)


def read(path: Path) -> Published:
    """Recognise and read a file of others. Raises UserError when it is none of them, damaged, or would run code."""
    prefix = prefix_of(path)
    if prefix is not None:
        bundle = Bundle(prefix)
        if not niftynet.recognised(bundle):
            some = ", ".join(list(bundle.entries)[:3])
            raise UserError(
                f"{prefix}: a TensorFlow checkpoint, but not of NiftyNet's dense V-Net; it has {some}, …"
            )
        state, head = niftynet.read(bundle)
        note = "kernels turned from anterior, right, superior to z, y, x"
        return Published("NiftyNet", "dense_vnet", state, tuple(head), notes=(note,))
    whole = _file(path)
    tensors = _tensors(whole, path)
    for recognise in (_genesis, _medicalnet, _i3d):
        if found := recognise(tensors, whole, path):
            return found
    some = ", ".join(list(tensors)[:3])
    raise UserError(f"{path}: weights of an unknown network ({some}, …); known are {KNOWN}")


def widths(found: Published) -> list[int]:
    """Widths at which the network's first convolution has as many outputs as the file's; published weights have 32."""
    name, published = FIRST[found.network]
    outputs = found.state[name].shape[0] if name in found.state else 0
    return [w for w in range(1, 4 * PUBLISHED_WIDTH + 1) if scaled(published, w) == outputs]


def _file(path: Path) -> dict[str, Any]:
    """What a torch or safetensors file holds; only plain types and tensors, never code."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; name {KNOWN}") from error
    try:
        if start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < path.stat().st_size:
            return dict(load_file(path))
        whole = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if called := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"{path}: is not read, since reading it would run {called[1]}; where you trust it, save its state_dict alone"
            ) from error
        raise UserError(f"{path}: no file of tensors; name {KNOWN}") from error
    except UNREADABLE as error:
        why = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"{path}: cannot be read as weights ({why}); name {KNOWN}") from error
    if not isinstance(whole, dict):
        raise UserError(f"{path}: holds a {type(whole).__name__}, not tensors by name; name {KNOWN}")
    return whole


def _tensors(whole: dict[str, Any], path: Path) -> State:
    """The tensors by name, without `module.`: of a state dict, or of what has one inside."""
    inside = whole.get("state_dict", whole.get("network_weights", whole))  # the second is nnU-Net's
    if not isinstance(inside, dict):
        raise UserError(f"{path}: its state_dict is a {type(inside).__name__}, not tensors by name")
    tensors = {str(k).removeprefix("module."): v for k, v in inside.items() if isinstance(v, Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no tensors; name {KNOWN}")
    if any(v.layout != torch.strided or v.is_quantized for v in tensors.values()):
        raise UserError(f"{path}: holds sparse or quantized tensors; save it dense, in float")
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def _genesis(tensors: State, whole: dict[str, Any], path: Path) -> Published | None:
    """Models Genesis; its arrays are x, y, z [C], so kernels are turned, but not those of a file that we exported."""
    if "down_tr64.ops.0.conv1.weight" not in tensors:
        return None
    ours = "p2w" in whole
    turned = tensors if ours else {k: _zyx(v) for k, v in tensors.items()}
    encoder = {k: v for k, v in turned.items() if not k.startswith(DECODER_PREFIX)}
    decoder = {k: v for k, v in turned.items() if k.startswith(DECODER_PREFIX)}
    notes = () if ours else ("kernels turned from x, y, z to z, y, x",)
    head = () if ours else tuple(decoder)
    return Published(
        "Models Genesis' names, written by p2w" if ours else "Models Genesis",
        "unet3d", encoder, head, decoder or None, notes, {} if ours else CHEST,
    )  # fmt: skip


def _zyx(value: Tensor) -> Tensor:
    return value.permute(0, 1, 4, 3, 2).contiguous() if value.ndim == 5 else value


def _medicalnet(tensors: State, whole: dict[str, Any], path: Path) -> Published | None:
    """MedicalNet's ResNets: the depth shows in the number of blocks, and in whether these have a third convolution."""
    if "conv1.weight" not in tensors or "layer4.0.conv1.weight" not in tensors:
        return None
    names = [re.match(r"layer([1-4])\.(\d+)\.", k) for k in tensors]
    seen = {(int(n[1]), int(n[2])) for n in names if n}
    blocks = tuple(1 + max((block for layer, block in seen if layer == i), default=-1) for i in (1, 2, 3, 4))
    basic = "layer1.0.conv3.weight" not in tensors
    depth = next((d for d, b in BLOCKS.items() if b == blocks and (d in BASIC) == basic), None)
    if depth is None:
        kind = "basic blocks" if basic else "bottlenecks"
        raise UserError(
            f"{path}: a ResNet of {blocks} {kind}, which is none of MedicalNet's depths {', '.join(map(str, BLOCKS))}"
        )
    head = tuple(k for k in tensors if k.startswith(("conv_seg.", "fc.")))
    state = {k: v for k, v in tensors.items() if k not in head}
    return Published("MedicalNet", f"resnet{depth}", state, head)


def _i3d(tensors: State, whole: dict[str, Any], path: Path) -> Published | None:
    """I3D, with its classifier or without."""
    if "Conv3d_1a_7x7.conv3d.weight" not in tensors:
        return None
    head = tuple(k for k in tensors if k.startswith("logits."))
    return Published("I3D", "i3d", {k: v for k, v in tensors.items() if k not in head}, head)
