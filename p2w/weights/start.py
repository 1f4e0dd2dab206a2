"""Where a target task or a pretraining starts: `--init random`, a run of p2w, or weights that others published.

--init random                     a fresh network
--init runs/paper                 a run, a checkpoint, an exported file or a hub folder
--init Genesis_Chest_CT.pt        Models Genesis, encoder and decoder
--init resnet_101.pth             MedicalNet, any depth
--init rgb_imagenet.pt            I3D
--init models/model.ckpt-3000     NiftyNet's dense V-Net, read without TensorFlow
--init checkpoint_final.pth       nnssl's ResEncL, such as OpenMind's
--init hf://org/name              any of these on the Hugging Face Hub, see p2w.weights.hub

Tensors of a file are loaded into an encoder with a report: what matched, what was adapted, what is missing, what is left
over. `p2w inspect` says which weights a file holds, and how many of their tensors fit.

Pretraining takes the same files (`p2w train --init FILE`; `read_init`, `initialise`). The encoder must be there whole; a
decoder or heads are loaded where they fit. A run that has a checkpoint continues from that and does not read the file again.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from p2w.config import Config
from p2w.errors import UserError
from p2w.model import Encoder, Network, build_encoder
from p2w.model.conv import PUBLISHED_WIDTH
from p2w.model.decoder import build_decoder
from p2w.pretext.protocol import Pretext
from p2w.train.checkpoint import Checkpoints
from p2w.weights import foreign, load
from p2w.weights.foreign import COUNTER, State
from p2w.weights.hub import download, is_hub_name

INSPECT_USAGE = """\
Which weights a file holds, and how many of their tensors fit: what `--init FILE` would do, without training.

    p2w inspect Genesis_Chest_CT.pt
    p2w inspect models/model.ckpt-3000 --in-channels 4

It says "whole" for an encoder with its decoder, and "encoder whole" if the file holds no decoder or only a part of one. Exit
code 1 when a part of the encoder would be missing, 2 when the file cannot be read.
"""


@dataclass(frozen=True)
class LoadReport:
    """How tensors of a file fit a network, as lists of the network's names (`unexpected` and `head`: the file's names)."""

    what: str
    """Which format, network and width."""
    matched: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    """Tensors that were fitted to another number of input channels."""
    missing: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    """Tensors of the file's own decoder or classifier, which a target task replaces."""
    notes: tuple[str, ...] = field(default=())

    @property
    def whole(self) -> bool:
        """Whether every tensor of the encoder has its value and none of the file's is left unexplained."""
        return not (self.missing or self.misshapen or self.unexpected)

    def table(self) -> str:
        """The report as text, a line for each group of tensors: how many, and the first names."""
        rows = [f"{self.what}"]
        for kind in ("matched", "adapted", "missing", "misshapen", "unexpected", "head"):
            names: tuple[str, ...] = getattr(self, kind)
            if names:
                shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
                rows.append(f"  {kind:10} {len(names):5}  {shown}")
        return "\n".join(rows + [f"  {note}" for note in self.notes])


def load_state(
    encoder: Encoder, state: State, what: str, head: tuple[str, ...] = (), notes: tuple[str, ...] = ()
) -> LoadReport:
    """Load `state` (names of `encoder`) where names and shapes agree, input channels adapted, and say what happened.

    The encoder takes the values as float32 on its own device; its other tensors keep their values.
    """
    wanted = encoder.state_dict()
    taken: State = {}
    adapted, misshapen = [], []
    for name, value in state.items():
        if name not in wanted:
            continue
        if value.shape != wanted[name].shape:
            fitted = adapt(encoder, name, value, wanted[name].shape)
            if fitted is None:
                misshapen.append(f"{name} {tuple(value.shape)} for {tuple(wanted[name].shape)}")
                continue
            adapted.append(name)
            taken[name] = fitted
        else:
            taken[name] = value
    encoder.load_state_dict(taken, strict=False)
    return LoadReport(
        what,
        matched=tuple(name for name in taken if name not in adapted),
        adapted=tuple(adapted),
        missing=tuple(name for name in wanted if name not in state and not name.endswith(COUNTER)),
        misshapen=tuple(misshapen),
        unexpected=tuple(name for name in state if name not in wanted),
        head=head,
        notes=notes,
    )


def adapt(encoder: Encoder, name: str, value: Tensor, shape: torch.Size) -> Tensor | None:
    """`value` for the encoder's number of input channels, or None when that is not what differs.

    Convolutions: the weights of the file's image channels are summed and shared out evenly, so that equal channels give what
    one channel gave: 1 -> n repeats and divides by n, 3 -> 1 sums. Norms of the image take the mean.
    """
    n = encoder.in_channels
    if name in encoder.norms_input and value.ndim == 1:
        return value.mean().expand(n).clone()
    if name not in encoder.input_convs or value.ndim != 5:
        return None
    image = value.shape[1] - (shape[1] - n)  # channels after those of the image have a number of their own
    if image < 1 or value.shape[:1] + value.shape[2:] != shape[:1] + shape[2:]:
        return None
    shared = value[:, :image].sum(1, keepdim=True) / n
    return torch.cat((shared.expand(-1, n, -1, -1, -1), value[:, image:]), dim=1)


def refuse_report(report: LoadReport, where: str) -> None:
    """Raise UserError when the encoder would keep random values, or tensors of the file would be lost."""
    if report.whole:
        return
    total = len(report.matched) + len(report.adapted) + len(report.missing) + len(report.misshapen)
    first = (*report.missing, *report.misshapen, *report.unexpected)[0]
    raise UserError(
        f"{where}: {report.what}: of {total} tensors {len(report.missing)} are missing, {len(report.misshapen)} have "
        f"another shape, and the file has {len(report.unexpected)} unknown ones, first {first}; a part of a network is "
        f"not loaded: p2w inspect {where}"
    )


RANDOM = "random"


@dataclass(frozen=True)
class StartingPoint:
    """An encoder in training mode, float32, on the CPU, and where its values come from."""

    encoder: Encoder
    network: str
    width: int
    decoder_state: dict[str, Tensor] | None
    """The decoder that was trained with it, under the names of `p2w.model.decoder.build_decoder`'s; None without one."""
    report: LoadReport
    source: str
    """The file or folder that the values were read from, or "random"."""
    pretrained_on: dict[str, str]
    """The data it was trained on: `fingerprint` and `shards` of a set of p2w, or `what`, a description; empty if unknown."""
    other_state: dict[str, Tensor] = field(default_factory=dict)
    """Weights that a pretext of p2w trained besides encoder and decoder, under the names of its network."""


def load_start(
    init: str, network: str | None = None, width: int | None = None, in_channels: int = 1
) -> StartingPoint:
    """The starting point `init` for inputs of `in_channels`. Executes no code from a file; draws from torch's generator.

    `network` and `width` choose what is built at random (unet3d at 32); with a file they must be its own, or None.
    Raises UserError when the file is unknown, damaged or of another network, and when a part of the encoder would keep
    random values: only heads may be missing or left over.
    """
    start = examine_weights(init, network, width, in_channels)
    refuse_report(start.report, start.source)
    return start


def examine_weights(
    init: str, network: str | None = None, width: int | None = None, in_channels: int = 1
) -> StartingPoint:
    """As `load_start`, but weights that fit only in part are returned with their report, not refused."""
    if init == RANDOM:
        network, width = network or "unet3d", PUBLISHED_WIDTH if width is None else width
        encoder = build_encoder(network, width, in_channels)
        return StartingPoint(
            encoder, network, width, None, LoadReport(f"{network}, width {width}: random"), RANDOM, {}
        )
    if is_hub_name(init):
        file, name = download(init)
        return replace(examine_weights(str(file), network, width, in_channels), source=str(name))
    path = Path(init)
    if _is_ours(path):
        return _from_ours(load.read_weights(path), network, width, in_channels)
    found = foreign.read_published(path)
    # Settings of the network that belong to the file, such as dense_vnet:mirrored=True, need not be asked for.
    _same(init, network, found.network.partition(":")[0] if network and ":" not in network else found.network)
    widths = foreign.widths(found)
    if not widths or (width is not None and width not in widths):
        its = f"width {widths[0]}" if widths else "no width that this network has"
        raise UserError(f"{init}: weights of {found.network} of {its}; leave --model.width to the file")
    at = next((w for w in (width, PUBLISHED_WIDTH) if w in widths), widths[0])
    assert at is not None
    encoder = build_encoder(found.network, at, in_channels)
    if found.input_norm is not None:
        encoder.input_norm = found.input_norm
    what = f"{found.format}: {found.network}, width {at}"
    report = load_state(encoder, found.state, what, found.head, found.notes)
    return StartingPoint(encoder, found.network, at, found.decoder, report, init, found.data)


def load_decoder(decoder: nn.Module, start: StartingPoint) -> None:
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


def load_up_path(decoder: nn.Module, start: StartingPoint) -> None:
    """Give a decoder with skips the values of one that was trained without, in the channels that both have.

    The first convolution of a level reads what was up-sampled, then the skip. Its weights for the former are the trained
    ones, those for the skip become zero: the network begins as the pretrained one, and learns from the skips. The last
    convolution may be of other classes. Raises UserError where there is no decoder, or one that does not fit that way.
    """
    if start.decoder_state is None:
        raise UserError(f"{start.source}: holds no decoder; transfer the encoder alone")
    given: State = {}
    for name, wanted in decoder.state_dict().items():
        value = start.decoder_state.get(name)
        if name.startswith("out_tr.") and (value is None or value.shape != wanted.shape):
            continue
        if value is None and name.endswith(COUNTER):
            continue
        if value is None or not _fits_first_channels(value.shape, wanted.shape):
            raise UserError(
                f"{start.source}: its decoder has no {name} that fits the first channels of one with skips; transfer the "
                "encoder alone: --decoder scratch"
            )
        if value.shape != wanted.shape:
            added = torch.zeros_like(wanted[:, value.shape[1] :])
            value = torch.cat((value.to(wanted), added), 1)
        given[name] = value
    decoder.load_state_dict(given, strict=False)


def _fits_first_channels(found: torch.Size, wanted: torch.Size) -> bool:
    """Whether a tensor is of the wanted shape, or a convolution's weight with fewer input channels."""
    if found == wanted:
        return True
    return (
        len(found) == len(wanted) == 5
        and found[:1] + found[2:] == wanted[:1] + wanted[2:]
        and found[1] < wanted[1]
    )


def _is_ours(path: Path) -> bool:
    """Whether a path is a folder, or a file with p2w's card in it or beside it; False for a path that does not exist."""
    if path.is_dir():
        return True
    try:
        load.exported(path)
    except UserError:
        return False
    return True


def _from_ours(
    weights: load.LoadedWeights, network: str | None, width: int | None, in_channels: int
) -> StartingPoint:
    _same(weights.where, network, weights.name)
    if width is not None and width != weights.width:
        raise UserError(
            f"{weights.where}: {weights.name} of width {weights.width}, not {width}; leave the width to the file"
        )
    encoder = build_encoder(weights.name, weights.width, in_channels)
    encoder.input_norm = weights.input_norm
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    head = []
    for key, value in weights.state.items():
        part, _, name = key.partition(".")
        if part in parts:
            parts[part][name] = value
        else:
            head.append(key)
    what = f"p2w: {weights.name}, width {weights.width}"
    report = load_state(encoder, parts["encoder"], what, tuple(head))
    return StartingPoint(
        encoder, weights.name, weights.width, parts["decoder"] or None, report, weights.where, weights.data,
        {name: weights.state[name] for name in head},
    )  # fmt: skip


def _same(where: str, asked: str | None, found: str) -> None:
    if asked is not None and asked != found:
        raise UserError(
            f"{where}: weights of {found}, and {asked} was asked for; leave the network to the file"
        )


@dataclass(frozen=True)
class InspectOptions:
    """The options of `p2w inspect`."""

    init: tyro.conf.Positional[str]
    """A run, a checkpoint, a hub folder, or a file of weights, as `--init` takes it."""
    network: str | None = None
    """Refuse weights of another network."""
    width: int | None = None
    """Refuse weights of another width."""
    in_channels: int = 1
    """Channels of the volumes that the network will see."""


def main_inspect(argv: list[str]) -> int:
    """Read the weights, fit them, print the report."""
    options = tyro.cli(InspectOptions, args=argv, prog="p2w inspect", description=INSPECT_USAGE)
    start = examine_weights(options.init, options.network, options.width, options.in_channels)
    encoder = start.encoder
    print(start.report.table())
    parameters = sum(p.numel() for p in encoder.parameters())
    print(
        f"  encoder    {parameters / 1e6:.2f} M parameters, channels {encoder.channels}, strides {encoder.strides}"
    )
    print(f"  input      {encoder.input_norm}, {encoder.in_channels} channels")
    decoder = "none" if start.decoder_state is None else _decoder_of(start)
    print(f"  decoder    {decoder or 'a part, or that of another network'}")
    for key, value in start.pretrained_on.items():
        print(f"  {key:10} {value}")
    if not start.report.whole:
        print("not whole: --init refuses it")
        return 1
    what = "" if start.decoder_state and decoder else "encoder "
    print(f"{what}whole: --init takes it")
    return 0


def _decoder_of(start: StartingPoint) -> str:
    """Which decoder the weights hold besides the encoder, in words; "" where a tensor of it is missing or left over."""
    for skips in (True,) if start.encoder.only_skips else (False, True):
        with contextlib.suppress(UserError):
            load_decoder(build_decoder(start.encoder, skips), start)
            return "with skips" if skips else "without skips"
    return ""


def read_init(config: Config, run: Path) -> StartingPoint | None:
    """The weights of `config.model.init`; None where the run starts at random, or has a checkpoint to continue from.

    Raises UserError when they are not whole, or of another network or width than the run's.
    """
    init, model = config.model.init, config.model
    if init in ("", RANDOM) or Checkpoints(run / "checkpoints").steps():
        return None
    with torch.random.fork_rng(devices=[]):  # a run that continues draws the same numbers without the file
        start = load_start(init)
    if (start.network, start.width) != (model.name, model.width):
        raise UserError(
            f"--init {init}: weights of {start.network}, width {start.width}, and the run is of {model.name}, width "
            f"{model.width}; pass --model.name {start.network} --model.width {start.width}"
        )
    return start


def initialise(
    pretext: Pretext, network: Network, config: Config, run: Path, say: Callable[[str], None]
) -> Network:
    """The pretext's network with the weights of `config.model.init`, or `network` where there are none to load.

    The network is built round the loaded encoder, so that copies of it, such as MoCo's, are copies of these weights. A part
    behind it (decoder, heads) is loaded where all of its tensors are there in its shapes, and is new otherwise. `say` is
    given the report, a line at a time. Raises UserError as `read_init` does.
    """
    start = read_init(config, run)
    if start is None:
        return network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        made = pretext.build(start.encoder)
    for line in start.report.table().splitlines():
        say(line)
    given = {
        f"decoder.{name}": value for name, value in (start.decoder_state or {}).items()
    } | start.other_state
    wanted = made.state_dict()
    taken: dict[str, Tensor] = {}
    for part in sorted({name.partition(".")[0] for name in wanted} - {"encoder"}):
        its = {name: value for name, value in wanted.items() if name.partition(".")[0] == part}
        fits = all(name in given and given[name].shape == value.shape for name, value in its.items())
        taken |= {name: given[name] for name in its} if fits else {}
        say(f"  {part:10} {len(its):5}  {'loaded' if fits else 'new'}")
    made.load_state_dict(taken, strict=False)
    if start.encoder.input_norm != "unit":
        say(
            f"  note: pretraining feeds [0, 1]; the input of these weights was normalised as {start.encoder.input_norm}"
        )
    return made
