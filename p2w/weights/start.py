"""Where a target task starts from: `--init random`, a run of ours, or weights that others published.

--init random                     a fresh network
--init runs/paper                 a run, a checkpoint, an exported file or a hub folder
--init Genesis_Chest_CT.pt        Models Genesis, encoder and decoder
--init resnet_101.pth             MedicalNet, any depth
--init rgb_imagenet.pt            I3D
--init models/model.ckpt-3000     NiftyNet's dense V-Net, read without TensorFlow
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from p2w.errors import UserError
from p2w.model import Encoder, build_encoder
from p2w.model.blocks import PUBLISHED_WIDTH
from p2w.weights import formats, load
from p2w.weights.fit import COUNTER, Report, fit, refuse

RANDOM = "random"


@dataclass(frozen=True)
class Start:
    """An encoder in training mode, float32, on the CPU, and where its values come from."""

    encoder: Encoder
    network: str
    width: int
    decoder_state: dict[str, Tensor] | None
    """Of the decoder trained with it, under the names of `build_decoder`'s; None when there is none."""
    report: Report
    source: str
    """Where the values were read, or "random"."""
    pretrained_on: dict[str, str]
    """What is known of the data: `fingerprint` and `shards` of a set of ours, `what` of others'; empty when nothing is."""


def load_start(
    init: str, network: str | None = None, width: int | None = None, in_channels: int = 1
) -> Start:
    """The starting point `init` for inputs of `in_channels`. Executes no code from a file; draws from torch's generator.

    `network` and `width` choose what is built at random (unet3d at 32); with a file they must be its own, or None.
    Raises UserError when the file is unknown, damaged or of another network, and when a part of the encoder would keep
    random values: only heads may be missing or left over.
    """
    start = examine(init, network, width, in_channels)
    refuse(start.report, start.source)
    return start


def examine(init: str, network: str | None = None, width: int | None = None, in_channels: int = 1) -> Start:
    """As `load_start`, but a report of a part is returned, not refused."""
    if init == RANDOM:
        network, width = network or "unet3d", PUBLISHED_WIDTH if width is None else width
        encoder = build_encoder(network, width, in_channels)
        return Start(encoder, network, width, None, Report(f"{network}, width {width}: random"), RANDOM, {})
    path = Path(init)
    if _is_ours(path):
        return _from_ours(load.read(path), network, width, in_channels)
    found = formats.read(path)
    _same(init, network, found.network)
    widths = formats.widths(found)
    if not widths or (width is not None and width not in widths):
        its = f"width {widths[0]}" if widths else "no width that this network has"
        raise UserError(f"{init}: weights of {found.network} of {its}; leave --model.width to the file")
    at = next((w for w in (width, PUBLISHED_WIDTH) if w in widths), widths[0])
    assert at is not None
    encoder = build_encoder(found.network, at, in_channels)
    what = f"{found.format}: {found.network}, width {at}"
    report = fit(encoder, found.state, what, found.head, found.notes)
    return Start(encoder, found.network, at, found.decoder, report, init, found.data)


def load_decoder(decoder: nn.Module, start: Start) -> None:
    """Give a decoder the values that were trained with the encoder; its last convolution may be of other classes.

    Raises UserError when there are none, or when they are of a decoder of another shape (with skips, or without).
    """
    if start.decoder_state is None:
        raise UserError(f"{start.source}: holds no decoder; transfer the encoder alone")
    wanted = decoder.state_dict()
    given = {k: v for k, v in start.decoder_state.items() if k in wanted and v.shape == wanted[k].shape}
    absent = [k for k in wanted if k not in given and not k.endswith(COUNTER) and not k.startswith("out_tr.")]
    unknown = [k for k in start.decoder_state if k not in wanted and not k.startswith("out_tr.")]
    if absent or unknown:
        raise UserError(
            f"{start.source}: its decoder has another shape, first at {(absent + unknown)[0]}; was it trained without the "
            "skips that this one has, or with? Transfer the encoder alone, or choose the same"
        )
    decoder.load_state_dict(given, strict=False)


def _is_ours(path: Path) -> bool:
    """A folder, or a file with our card in it or beside it; a path that is not there is left to the readers."""
    if path.is_dir():
        return True
    try:
        load.exported(path)
    except UserError:
        return False
    return True


def _from_ours(held: load.Held, network: str | None, width: int | None, in_channels: int) -> Start:
    _same(held.where, network, held.name)
    if width is not None and width != held.width:
        raise UserError(
            f"{held.where}: {held.name} of width {held.width}, not {width}; leave the width to the file"
        )
    encoder = build_encoder(held.name, held.width, in_channels)
    encoder.feeding = held.feeding
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    head = []
    for key, value in held.state.items():
        part, _, name = key.partition(".")
        if part in parts:
            parts[part][name] = value
        else:
            head.append(key)
    what = f"p2w: {held.name}, width {held.width}"
    report = fit(encoder, parts["encoder"], what, tuple(head))
    return Start(encoder, held.name, held.width, parts["decoder"] or None, report, held.where, held.data)


def _same(where: str, asked: str | None, found: str) -> None:
    if asked is not None and asked != found:
        raise UserError(
            f"{where}: weights of {found}, and {asked} was asked for; leave the network to the file"
        )
