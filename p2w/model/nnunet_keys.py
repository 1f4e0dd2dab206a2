"""nnU-Net's parameter names of ResEncL <-> ours.

nnU-Net's convolution module holds its layers by name (`conv`, `norm`) and in a list (`all_modules.0`, `.1`), so its state
dict names each tensor twice, and is loaded strictly. Ours names each once, as safetensors wants it.
"""

from torch import Tensor

from p2w.errors import UserError

LISTED = {"conv": "all_modules.0", "norm": "all_modules.1"}


def to_nnunet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor `….conv.x` and `….norm.x` under its second name too; the two share memory.

    Raises UserError for a name of another network.
    """
    named = {}
    for name, value in state.items():
        where, layer, kind = _parts(name)
        named[name] = value
        named[f"{where}.{LISTED[layer]}.{kind}"] = value
    return named


def from_nnunet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their first names. Raises UserError for a name that is neither a convolution's nor a norm's."""
    named = {name: value for name, value in state.items() if ".all_modules." not in name}
    for name in named:
        _parts(name)
    return named


def _parts(name: str) -> tuple[str, str, str]:
    """`encoder.stem.convs.0.conv.weight` -> encoder.stem.convs.0, conv, weight."""
    where, _, kind = name.rpartition(".")
    where, _, layer = where.rpartition(".")
    if layer not in LISTED or not where:
        raise UserError(
            f"{name}: not a parameter of nnU-Net's residual encoder; expected ….conv.… or ….norm.…"
        )
    return where, layer, kind
