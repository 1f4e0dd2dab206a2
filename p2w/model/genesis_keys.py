"""Models Genesis' parameter names <-> ours. Theirs are flat (`down_tr64…`, `up_tr256…`, `out_tr…`), ours say which half."""

from torch import Tensor

from p2w.errors import UserError

ENCODER_PREFIX, DECODER_PREFIX = "down_tr", ("up_tr", "out_tr")


def to_genesis(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop `encoder.` and `decoder.` from the names of an EncoderDecoder's state dict.

    Raises UserError for a name of another network.
    """
    return {_strip(name, ("encoder.", "decoder.")): value for name, value in state.items()}


def from_genesis(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name a Models Genesis state dict (with or without `module.`) as EncoderDecoder does.

    Raises UserError for a name that is not Models Genesis'.
    """
    named = {}
    for key, value in state.items():
        name = key.removeprefix("module.")
        if name.startswith(ENCODER_PREFIX):
            named[f"encoder.{name}"] = value
        elif name.startswith(DECODER_PREFIX):
            named[f"decoder.{name}"] = value
        else:
            raise UserError(f"{key}: not a Models Genesis parameter; expected down_tr…, up_tr… or out_tr…")
    return named


def _strip(name: str, prefixes: tuple[str, ...]) -> str:
    for prefix in prefixes:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    raise UserError(f"{name}: not a parameter of the U-Net; expected encoder.… or decoder.…")
