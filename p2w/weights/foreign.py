"""Weights that others published, in torch, safetensors or TensorFlow files: recognised by tensor names, renamed to ours.

Models Genesis   {"state_dict": {"module.down_tr64.ops.0.conv1.weight": …}}
MedicalNet       {"state_dict": {"module.layer3.22.conv3.weight": …}}
I3D              {"Mixed_3b.b0.conv3d.weight": …}
nnssl            {"network_weights": {"encoder.stem.convs.0.conv.weight": …}, "nnssl_adaptation_plan": …}, ResEncL
dense V-Net      model.ckpt-3000.index and .data-00000-of-00001, a TensorFlow checkpoint (`p2w.weights.tf_bundle`)

A format whose tensors need at most other names is declared in the encoder's own file (`Encoder.published`, as I3D's is); one
that takes more has a function in READERS here. docs/add_a_backbone.md is the recipe.

Models Genesis' names are flat (`down_tr64…`, `up_tr256…`, `out_tr…`); ours say which half of the network a tensor is of.

The names of the dense V-Net's variables are those that NiftyNet 0.6.0 itself makes (its graph was built and its variables
listed): layers of one kind are numbered where they stand side by side, and a `ConvolutionalLayer` holds `conv_` and `bn_`.

    DenseVNet/batch_norm/                                                   image_bn
    DenseVNet/conv_bn/                                                      initial
    DenseVNet/dense_feature_stack_block[_I]/dense_feature_stack_block/conv_bn_relu[_J]/  blocks.I.stack.J
    DenseVNet/dense_feature_stack_block[_I]/conv_bn_relu/                   blocks.I.skip
    DenseVNet/dense_feature_stack_block[_I]/conv_bn_relu_1/                 blocks.I.down
    DenseVNet/conv/                                                         head (as many classes as it was trained on)

Kernels are stored (A, R, S, in, out): its configuration turns volumes to anterior, right, superior [C]. Ours are
(out, in, z, y, x) with y towards posterior and x towards left, so rows and columns are mirrored too. TensorFlow pads layers
of stride 2 behind where edges are even, which is in front of a mirrored axis: the network is `dense_vnet:mirrored=True`.
"""

import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from p2w.errors import UserError, first_line
from p2w.model import ENCODERS, build_encoder, factory_class
from p2w.model.conv import PUBLISHED_WIDTH, scale_channels
from p2w.model.encoder import InputNorm, PublishedFormat
from p2w.model.resnet3d import BASIC, BLOCKS
from p2w.weights.prepare_nnunet import ZYX, turn_kernels
from p2w.weights.tf_bundle import Bundle, prefix_of

State = dict[str, Tensor]

ENCODER_PREFIX, DECODER_PREFIX = "down_tr", ("up_tr", "out_tr")
COUNTER = "num_batches_tracked"  # of batch norms; no result depends on it, and old files lack it


def to_genesis(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An EncoderDecoder's state dict under Models Genesis' names, kernels x, y, z as its arrays are.

    Raises UserError for a name of another network.
    """
    return {_strip(name, ("encoder.", "decoder.")): turn_axes(value) for name, value in state.items()}


def from_genesis(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Models Genesis state dict (with or without `module.`) under EncoderDecoder's names, kernels z, y, x.

    Raises UserError for a name that is not Models Genesis'.
    """
    named = {}
    for key, value in state.items():
        name = key.removeprefix("module.")
        if name.startswith(ENCODER_PREFIX):
            named[f"encoder.{name}"] = turn_axes(value)
        elif name.startswith(DECODER_PREFIX):
            named[f"decoder.{name}"] = turn_axes(value)
        else:
            raise UserError(f"{key}: not a Models Genesis parameter; expected down_tr…, up_tr… or out_tr…")
    return named


def genesis_state(whole: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file that p2w wrote for Models Genesis, under EncoderDecoder's names, kernels z, y, x.

    Kernels of early versions of p2w were not turned. Raises UserError for other names.
    """
    named = from_genesis(whole["state_dict"])
    return named if whole.get(AXIS_ORDER) == "xyz" else {k: turn_axes(v) for k, v in named.items()}


def not_for_genesis_class(state: dict[str, Tensor]) -> str:
    """Why Models Genesis' own class, UNet3D, cannot load these weights of a unet3d; "" where it can.

    The class has one input channel, the published width, and a decoder with skips.
    """
    first = state["encoder.down_tr64.ops.0.conv1.weight"]
    if not any(name.startswith("decoder.") for name in state):
        return "this is the encoder alone; pass --what all"
    if tuple(first.shape[:2]) != (PUBLISHED_WIDTH, 1):
        return f"its first convolution has {PUBLISHED_WIDTH} kernels of 1 channel, and this one {tuple(first.shape[:2])}"
    joined = state["decoder.up_tr64.ops.0.conv1.weight"].shape[1]
    if joined != state["decoder.up_tr64.up_conv.weight"].shape[1] + 2 * PUBLISHED_WIDTH:
        return "its decoder has skips, and this one has none; train with --pretext.skips, or recipe genesis"
    return ""


def _strip(name: str, prefixes: tuple[str, ...]) -> str:
    for prefix in prefixes:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    raise UserError(f"{name}: not a parameter of the U-Net; expected encoder.… or decoder.…")


NIFTYNET = "dense_vnet:mirrored=True"
NIFTYNET_BLOCK = r"dense_feature_stack_block(?:_(\d+))?"
LAYERS = (
    (rf"DenseVNet/{NIFTYNET_BLOCK}/dense_feature_stack_block/conv_bn_relu(?:_(\d+))?/", "blocks.{0}.stack.{1}."),
    (rf"DenseVNet/{NIFTYNET_BLOCK}/conv_bn_relu/", "blocks.{0}.skip."),
    (rf"DenseVNet/{NIFTYNET_BLOCK}/conv_bn_relu_1/", "blocks.{0}.down."),
    (r"DenseVNet/conv_bn/", "initial."),
)  # fmt: skip
LEAVES = {
    "conv_/w": "conv.weight",
    "bn_/gamma": "bn.weight",
    "bn_/beta": "bn.bias",
    "bn_/moving_mean": "bn.running_mean",
    "bn_/moving_variance": "bn.running_var",
}
IMAGE = {
    f"DenseVNet/batch_norm/{k.removeprefix('bn_/')}": f"image_{v}" for k, v in LEAVES.items() if "bn" in k
}
NIFTYNET_HEAD = re.compile(r"DenseVNet/conv(_1)?/conv_/[wb]$")
# Variables of training beside the weights: corrections of moving averages, averages of weights, Adam's slots, counters.
BESIDE = re.compile(
    r"/(biased|local_step|Adam(_\d+)?|Momentum|RMSProp(_\d+)?|ExponentialMovingAverage)$"
    r"|(^|/)(beta[12]_power|global_step)$"
)


def is_niftynet(bundle: Bundle) -> bool:
    """Whether this is a dense V-Net's checkpoint."""
    return "DenseVNet/conv_bn/conv_/w" in bundle.entries


def read_niftynet(bundle: Bundle) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under our names, and the names of the head's. Raises UserError for a variable that the table does not know."""
    state, head, unknown = {}, [], []
    for name in bundle.entries:
        if BESIDE.search(name):
            continue
        if NIFTYNET_HEAD.match(name):
            head.append(name)
        elif ours := _ours(name):
            state[ours] = _turned(bundle.tensor(name).float())
        else:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{bundle.prefix}: {len(unknown)} variables that NiftyNet's dense V-Net does not have, first {unknown[0]}; "
            "weights of another network, or of another version of it"
        )
    return state, head


def _ours(name: str) -> str | None:
    if name in IMAGE:
        return IMAGE[name]
    for pattern, layer in LAYERS:
        if found := re.match(pattern, name):
            leaf = LEAVES.get(name[found.end() :])
            return leaf and layer.format(*(number or 0 for number in found.groups())) + leaf
    return None


def _turned(value: Tensor) -> Tensor:
    """(A, R, S, in, out) -> (out, in, z, y, x); a norm's values stay."""
    return value.permute(4, 3, 2, 0, 1).flip(3, 4).contiguous() if value.ndim == 5 else value


CHEST = {"what": "LUNA16, 623 scans of subsets 0-6, as published"}
UNREADABLE = (  # what torch and safetensors raise for files that they cannot read
    SafetensorError, OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError, AttributeError,
)  # fmt: skip


@dataclass(frozen=True)
class PublishedWeights:
    """An encoder's weights as somebody published them."""

    format: str
    network: str
    state: State
    head: tuple[str, ...] = ()
    decoder: State | None = None
    notes: tuple[str, ...] = ()
    data: dict[str, str] = field(default_factory=dict)
    input_norm: InputNorm | None = None
    """How these weights' input is normalised, where it is not as the encoder says."""


def read_published(path: Path) -> PublishedWeights:
    """Recognise and read published weights. Raises UserError for an unknown or damaged file, and one that would run code."""
    prefix = prefix_of(path)
    if prefix is not None:
        bundle = Bundle(prefix)
        if not is_niftynet(bundle):
            some = ", ".join(list(bundle.entries)[:3])
            raise UserError(
                f"{prefix}: a TensorFlow checkpoint, but not of NiftyNet's dense V-Net; it has {some}, …"
            )
        state, head = read_niftynet(bundle)
        check_tensors(state, str(prefix))
        note = "kernels turned from anterior, right, superior to z, y, x, y and x mirrored, and so is the padding of strides"
        return PublishedWeights("NiftyNet", NIFTYNET, state, tuple(head), notes=(note,))
    whole = _file(path)
    tensors = _tensors(whole, path)
    for recognise in READERS.values():
        if found := recognise(tensors, whole, path):
            return found
    for network, format in _declared():
        if format.known_by in tensors:
            return _renamed(tensors, network, format)
    some = ", ".join(list(tensors)[:3])
    raise UserError(f"{path}: weights of an unknown network ({some}, …); known are {_known()}")


def _declared() -> list[tuple[str, PublishedFormat]]:
    """The formats that encoders declare in their own files, with the network's name in ENCODERS."""
    return [(name, format) for name in ENCODERS for format in getattr(factory_class(name), "published", ())]


def _renamed(tensors: State, network: str, format: PublishedFormat) -> PublishedWeights:
    """The tensors under the network's names."""
    state: State = {}
    for key, value in tensors.items():
        name = key
        for pattern, replacement in format.rename:
            name = re.sub(pattern, replacement, name)
        state[name] = value
    head = tuple(name for name in state if name.startswith(format.head)) if format.head else ()
    encoder = {name: value for name, value in state.items() if name not in head}
    return PublishedWeights(format.title, network, encoder, head)


def _known() -> str:
    """The names of all formats that can be read, as the end of a sentence."""
    declared = dict.fromkeys(format.title for _, format in _declared())
    return ", ".join([*READERS, *declared, "NiftyNet's dense V-Net"]) + ", or a run or file of p2w"


def widths(found: PublishedWeights) -> list[int]:
    """Widths at which the network's first convolution has as many outputs as the file's; published weights have 32."""
    with torch.device("meta"):
        encoder = build_encoder(found.network, PUBLISHED_WIDTH)
    name = encoder.input_convs[0]
    published = encoder.state_dict()[name].shape[0]
    outputs = found.state[name].shape[0] if name in found.state else 0
    return [w for w in range(1, 4 * PUBLISHED_WIDTH + 1) if scale_channels(published, w) == outputs]


def _file(path: Path) -> dict[str, Any]:
    """Read a torch or safetensors file, which may hold plain types and tensors, but no code."""
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; name {_known()}") from error
    try:
        if start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < path.stat().st_size:
            return dict(load_file(path))
        whole = torch.load(path, map_location="cpu", weights_only=True)
        check_archive(path)
    except pickle.UnpicklingError as error:
        if called := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise UserError(
                f"{path}: is not read, since reading it would run {called[1]}; where you trust it, save its state_dict alone"
            ) from error
        raise UserError(f"{path}: no file of tensors; name {_known()}") from error
    except UserError:
        raise
    except UNREADABLE as error:
        why = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise UserError(f"{path}: cannot be read as weights ({why}); name {_known()}") from error
    if not isinstance(whole, dict):
        raise UserError(f"{path}: holds a {type(whole).__name__}, not tensors by name; name {_known()}")
    return whole


# Keys that a state dict is saved under: of PyTorch's examples and Lightning, of nnU-Net, of PyTorch's tutorials.
CONTAINERS = ("state_dict", "network_weights", "model_state_dict")


def check_archive(path: Path) -> None:
    """Raise UserError where a record of a torch file, a zip archive, does not have its checksum; torch does not look.

    Files of other forms are not looked at.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(record.CRC for record in archive.infolist()):
                return  # saved after torch.serialization.set_crc32_options(False): it has no checksums
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, OSError, EOFError) as error:
        raise UserError(f"{path}: the archive is damaged ({first_line(error)}); copy it again") from error
    if damaged is not None:
        raise UserError(f"{path}: damaged, the checksum of {damaged} differs; copy it again")


def check_checkpoint(state: State, where: str) -> None:
    """As `check_tensors`, for a checkpoint of a run: a pretext may keep ids, flags and counters of whole numbers in it."""
    weights = ("encoder.", "decoder.")
    check_tensors(
        {
            name: value
            for name, value in state.items()
            if value.is_floating_point() or name.startswith(weights)
        },
        where,
    )


def check_tensors(state: State, where: str) -> None:
    """Raise UserError for tensors that are no weights: not finite, complex, of whole numbers, without values, or only zeros.

    Counters of batch norms are whole numbers; other integers are quantized values whose scales are lost. `where` names the
    file in the message.
    """
    for name, value in state.items():
        why = ""
        if value.is_meta:
            why = "has a shape but no values"
        elif value.is_complex():
            why = "holds complex numbers"
        elif not value.is_floating_point() and not name.endswith(COUNTER):
            why = f"holds {str(value.dtype).removeprefix('torch.')}, as quantized weights do"
        elif not value.isfinite().all():
            why = "holds NaN or infinite values"
        elif name.endswith("running_var") and (value < 0).any():
            why = "is a variance below 0"
        if why:
            raise UserError(
                f"{where}: {name} {why}; these are no weights to start from: save sound ones in float"
            )
    kernels = [value for value in state.values() if value.ndim > 1]
    if kernels and not any(value.any() for value in kernels):
        raise UserError(f"{where}: every kernel is 0; was the file copied in part? copy it again")


def _tensors(whole: dict[str, Any], path: Path) -> State:
    """The tensors of a state dict, or of what has one inside, by name. Raises UserError.

    Names are without the `module.` of DistributedDataParallel in front, and the `_orig_mod.` of torch.compile anywhere.
    """
    containers = [key for key in CONTAINERS if key in whole]
    if len(containers) > 1:
        raise UserError(
            f"{path}: holds weights twice, as {' and '.join(containers)}; save the right ones alone"
        )
    inside = whole[containers[0]] if containers else whole
    if not isinstance(inside, dict):
        raise UserError(f"{path}: its state_dict is a {type(inside).__name__}, not tensors by name")
    tensors: State = {}
    for key, value in inside.items():
        name = ".".join(part for part in str(key).split(".") if part != "_orig_mod").removeprefix("module.")
        if not isinstance(value, Tensor):
            continue
        if name in tensors:
            raise UserError(
                f"{path}: holds {name} twice, with and without module. or _orig_mod.; save the right ones alone"
            )
        tensors[name] = value
    if not tensors:
        raise UserError(f"{path}: holds no tensors; name {_known()}")
    if any(v.layout != torch.strided or v.is_quantized for v in tensors.values()):
        raise UserError(f"{path}: holds sparse or quantized tensors; save it dense, in float")
    floats = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
    check_tensors(floats, str(path))
    return floats


def _genesis(tensors: State, whole: dict[str, Any], path: Path) -> PublishedWeights | None:
    """Models Genesis. Its arrays are x, y, z, so kernels are turned, but not those that early versions of p2w exported."""
    if "down_tr64.ops.0.conv1.weight" not in tensors:
        return None
    ours = "p2w" in whole  # with a card that names no encoder, else `p2w.weights.load` has read it
    as_ours = ours and whole.get(AXIS_ORDER) != "xyz"
    turned = tensors if as_ours else {k: turn_axes(v) for k, v in tensors.items()}
    encoder = {k: v for k, v in turned.items() if not k.startswith(DECODER_PREFIX)}
    decoder = {k: v for k, v in turned.items() if k.startswith(DECODER_PREFIX)}
    notes = () if as_ours else ("kernels turned from x, y, z to z, y, x",)
    head = () if ours else tuple(decoder)
    return PublishedWeights(
        "Models Genesis' names, written by p2w" if ours else "Models Genesis",
        "unet3d", encoder, head, decoder or None, notes, {} if ours else CHEST,
    )  # fmt: skip


AXIS_ORDER = "axis_order"  # key of an exported file that says that its kernels are x, y, z


def turn_axes(value: Tensor) -> Tensor:
    """A kernel (out, in, x, y, z) as (out, in, z, y, x), and the other way round; a norm's values stay."""
    return value.permute(0, 1, 4, 3, 2).contiguous() if value.ndim == 5 else value


def _medicalnet(tensors: State, whole: dict[str, Any], path: Path) -> PublishedWeights | None:
    """MedicalNet's ResNets. The depth shows in the number of blocks, and in whether these have a third convolution."""
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
    return PublishedWeights("MedicalNet", f"resnet{depth}", state, head)


NNSSL_HEAD = ("decoder.", "seg_layers.", "mask_token", "projector.")


def _nnssl(tensors: State, whole: dict[str, Any], path: Path) -> PublishedWeights | None:
    """nnssl's ResEncL, such as OpenMind's: `encoder.stem`, `encoder.stages`, each tensor under two names, and a decoder.

    Kernels are in the axes that `transpose_forward` of its plan says; its images are z-scored. A file that p2w wrote for
    nnU-Net and that lost its card is of the same form, and its input is in [0, 1].
    """
    if "encoder.stem.convs.0.conv.weight" not in tensors:
        return None
    pretrain = _pretrain_plan(whole, path)
    axes = [int(axis) for axis in pretrain.get("transpose_forward") or ZYX]
    notes: tuple[str, ...] = ()
    if axes != ZYX:
        tensors = turn_kernels(tensors, [axes.index(axis) for axis in ZYX])
        notes = (f"kernels turned from the axes {axes} of its plan to z, y, x",)
    state = {
        name.removeprefix("encoder."): value
        for name, value in tensors.items()
        if name.startswith("encoder.") and ".all_modules." not in name
    }
    head = tuple(name for name in tensors if name.startswith(NNSSL_HEAD))
    unknown = {n: v for n, v in tensors.items() if not n.startswith(("encoder.", *NNSSL_HEAD))}
    ours = pretrain.get("plans_name") == "p2w"
    title = "nnU-Net's names, written by p2w" if ours else "nnssl"
    input_norm: InputNorm = "unit" if ours else "z"
    return PublishedWeights(title, "resencl", {**state, **unknown}, head, notes=notes, input_norm=input_norm)


def _pretrain_plan(whole: dict[str, Any], path: Path) -> dict[str, Any]:
    """The plan of the training in the file, of nnssl or of nnU-Net itself; {} where it has none.

    Raises UserError for one of another form.
    """
    arguments = whole.get("init_args", {})  # of nnU-Net's trainer
    adaptation = whole.get("nnssl_adaptation_plan", {})
    try:
        plan = dict(adaptation.get("pretrain_plan", {}) or arguments.get("plans", {}))
        if sorted(int(axis) for axis in plan.get("transpose_forward") or ZYX) != ZYX:
            raise ValueError(f"transpose_forward is {plan['transpose_forward']}")
        return plan
    except (AttributeError, TypeError, ValueError) as error:
        which = "nnssl_adaptation_plan is not nnssl's" if adaptation else "plan is not nnU-Net's"
        raise UserError(f"{path}: its {which} ({error}); copy the file again") from error


READERS: dict[str, Callable[[State, dict[str, Any], Path], PublishedWeights | None]] = {
    # title of a format that takes more than renaming -> (tensors, all that the file holds, path) -> its weights, or None
    "Models Genesis": _genesis,
    "MedicalNet": _medicalnet,
    "nnssl's ResEncL": _nnssl,
}
