"""NiftyNet's names for the variables of its dense V-Net -> ours.

The names are those that NiftyNet 0.6.0 itself makes (its graph was built and its variables listed): layers of one kind are
numbered where they stand side by side, and a `ConvolutionalLayer` holds `conv_` and `bn_`.

    DenseVNet/batch_norm/                                                   image_bn
    DenseVNet/conv_bn/                                                      initial
    DenseVNet/dense_feature_stack_block[_I]/dense_feature_stack_block/conv_bn_relu[_J]/  blocks.I.stack.J
    DenseVNet/dense_feature_stack_block[_I]/conv_bn_relu/                   blocks.I.skip
    DenseVNet/dense_feature_stack_block[_I]/conv_bn_relu_1/                 blocks.I.down
    DenseVNet/conv/                                                         head (as many classes as it was trained on)

Kernels are stored (A, R, S, in, out): its configuration turns volumes to anterior, right, superior [C]. Ours are
(out, in, z, y, x) with y towards posterior and x towards left, so rows and columns are mirrored too.
"""

import re

from torch import Tensor

from p2w.errors import UserError
from p2w.weights.tf_bundle import Bundle

BLOCK = r"dense_feature_stack_block(?:_(\d+))?"
LAYERS = (
    (rf"DenseVNet/{BLOCK}/dense_feature_stack_block/conv_bn_relu(?:_(\d+))?/", "blocks.{0}.stack.{1}."),
    (rf"DenseVNet/{BLOCK}/conv_bn_relu/", "blocks.{0}.skip."),
    (rf"DenseVNet/{BLOCK}/conv_bn_relu_1/", "blocks.{0}.down."),
    (r"DenseVNet/conv_bn/", "initial."),
)
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
HEAD = re.compile(r"DenseVNet/conv(_1)?/conv_/[wb]$")
# What training left beside the weights: corrections of moving averages, averages of weights, Adam's slots, counters.
BESIDE = re.compile(
    r"/(biased|local_step|Adam(_\d+)?|Momentum|RMSProp(_\d+)?|ExponentialMovingAverage)$"
    r"|(^|/)(beta[12]_power|global_step)$"
)


def recognised(bundle: Bundle) -> bool:
    """Whether this is a dense V-Net's checkpoint."""
    return "DenseVNet/conv_bn/conv_/w" in bundle.entries


def read(bundle: Bundle) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under our names, and the names of the head's. Raises UserError for a variable that the table does not know."""
    state, head, unknown = {}, [], []
    for name in bundle.entries:
        if BESIDE.search(name):
            continue
        if HEAD.match(name):
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
