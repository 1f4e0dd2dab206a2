"""Every setting of a run, as frozen dataclasses: recipe -> dotted overrides -> these -> constructors.

Written beside the run as `config.json`, and a run can be started from that file. Fields marked [P] are in the paper
(Feng et al. 2020), [I] are inferred from its patent and code family, [?] are not published: our choice.
"""

import contextlib
import dataclasses
import functools
import json
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from p2w.errors import UserError
from p2w.files import no_duplicate_keys
from p2w.pretext import pretext_groups
from p2w.pretext.settings import Bounds, PretextConfig, check_bounds
from p2w.trackers import LogConfig

Amp = Literal["auto", "bf16", "fp16", "tf32", "fp32"]


@dataclass(frozen=True)
class DataConfig:
    """The data: batch, order, how it is read, and what happens at a bad sample."""

    batch: Annotated[int, Bounds(1)] = 16
    """Wholes a step, over all ranks together [P]. The order of samples depends on it, not on the number of ranks."""
    seed: int = 0
    """Seed of the order of wholes and of their parts."""
    reader_threads: Annotated[int, Bounds(0)] = 2
    """Threads a rank that read ahead, at least 8 from a URL with byte ranges where the batch has so many rows; 0 reads in
    the training thread. No effect on the result."""
    cache_on_device: bool = False
    """Hold the training sub-scans in the device's memory, 2 MiB each and all of them on every rank, from when each is first
    read: the same results bit for bit, and nothing is read again. A set below a URL gains most. No effect on validation."""
    on_bad_sample: Literal["stop", "skip"] = "stop"
    """About a sub-scan whose checksum differs, or whose shard can no longer be read: stop; or name it, count it and
    train on another one in its place, which (data.seed, epoch, sub-scan) decides."""
    max_bad_share: float = 0.01
    """With skip: stop when more than this share of an epoch's samples could not be used."""
    retry_minutes: Annotated[float, Bounds(0)] = 10.0
    """How long a web server that fails (5xx, no connection, no answer) is asked again before the run stops. What it refuses
    (403, 404), and wrong bytes, stop the run at once."""
    audit_ids: bool = True
    """Compare a checksum of the sub-scans that all ranks train on with the plan of the epoch, several times a second."""


@dataclass(frozen=True)
class ModelConfig:
    """The encoder."""

    name: str = "unet3d"
    """Which encoder."""
    width: Annotated[int, Bounds(1)] = 32
    """Channels of the first convolution; 32 is the paper's network (16.75 M parameters) [I], and others' published size."""
    init: str = ""
    """What training starts from: a run, a checkpoint, an exported file, or weights of others; empty: at random."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule; none of it is published [?]."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Annotated[float, Bounds(0)] = 1e-3
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's two averages."""
    sgd_momentum: float = 0.9
    """SGD's momentum; 0 is none."""
    weight_decay: Annotated[float, Bounds(0)] = 0.0
    fused: Literal["torch", "apex", "none"] = "torch"
    """Whose fused optimizer: torch's, NVIDIA apex's (must be installed), or none."""
    clip_norm: Annotated[float, Bounds(0)] = 0.0
    """Largest gradient norm; 0 does not clip."""
    sync_batchnorm: Literal["auto", "on", "off"] = "auto"
    """Batch norm over the samples of all ranks; auto where a rank has fewer than 16 of them a pass, the paper's batch: so 8
    GPUs train what one does [?]."""
    accumulate: Annotated[int, Bounds(1)] = 1
    """Split each rank's share of a batch into this many passes, to save memory; contrastive pretexts take their negatives
    from a pass, over all ranks."""
    schedule: Literal["constant", "cosine", "plateau"] = "plateau"
    """After warm-up: hold; fall as a cosine to 1 % at the last step; or halve when validation stops improving."""
    warmup_steps: Annotated[int, Bounds(0)] = 0
    """Steps of linear warm-up from 0."""
    plateau_patience: Annotated[int, Bounds(0)] = 10
    """Validations without improvement before `plateau` halves the rate."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, precision, and how often to validate, probe, log and save."""

    steps: Annotated[int, Bounds(0)] = 1000
    """Optimizer steps of the whole run."""
    seed: Annotated[int, Bounds(0)] = 0
    """Seed of the initial weights."""
    precision: Amp = "auto"
    """Precision of the network's arithmetic; auto takes bf16 where the device computes in it, else fp32. On a GPU fp32 is
    IEEE float32; tf32 rounds the inputs of its convolutions and matrix products to 10 bits."""
    deterministic: bool = False
    """On a GPU: only kernels that give the same bits every time, and none chosen by a race, so that a resumed run is
    bit-equal to one that was never stopped. Slower. On the CPU runs are bit-equal without it."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """On one GPU: replay the whole step as one CUDA graph; auto where that is faster and gives the same bits twice."""
    kernels: Literal["auto", "plain"] = "auto"
    """On a GPU: auto times every way that a layer can be computed in, at the sizes of this run, and takes the fastest; plain
    takes PyTorch's usual one. The log says which; they differ by rounding."""
    channels_last: Literal["auto", "on", "off"] = "auto"
    """Memory layout with channels innermost; auto: where the encoder is faster with it (`Encoder.channels_last`)."""
    compile: bool = False
    """torch.compile the network: minutes at the start, a few percent a step."""
    validate_every: Annotated[int, Bounds(1)] = 500
    """Steps between validations."""
    probe_every: Annotated[int, Bounds(0)] = 500
    """Steps between measurements of similarity and contrastive loss, with pictures, of a few wholes; 0: when validating."""
    early_stop: Annotated[int, Bounds(0)] = 0
    """Stop after this many validations without improvement; 0 never."""
    checkpoint_every: Annotated[int, Bounds(1)] = 500
    """Steps between checkpoints."""
    checkpoint_minutes: Annotated[float, Bounds(0)] = 0.5
    """Also save when this long has passed since the last save, so that a slow machine loses no more; 0 never. What a kill
    costs grows with it, see bench/goodput.py; training goes on beside the writing."""
    keep: Annotated[int, Bounds(1)] = 3
    """Newest checkpoints kept, besides the best."""
    keep_every: Annotated[int, Bounds(0)] = 0
    """Save at multiples of this many steps, and keep those for good; 0 none."""
    log_every: Annotated[int, Bounds(1)] = 10
    """Steps between lines in metrics.jsonl."""
    max_nonfinite: Annotated[int, Bounds(1)] = 20
    """Stop after this many steps in a row whose gradient was not finite."""
    elastic: bool = False
    """Continue with any number of ranks, such as those of 3 nodes of 4. What divides the batch trains, the last ranks leave.
    Steps keep their sub-scans, and a pass keeps its size for batch norm, or for losses that compare wholes, where it can."""
    hang_minutes: float = 10.0
    """End with the name of the rank that hangs when none gets further for this long; one that gives no sign of life at all
    is named after a minute, or a quarter of this. A first step, which may compile, has three times as long."""


@dataclass(frozen=True)
class BaseConfig:
    """The groups of a run's settings that hold for every pretext."""

    data: DataConfig = field(default_factory=DataConfig)
    pretext: PretextConfig = field(default_factory=PretextConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)


if TYPE_CHECKING:

    class Config(BaseConfig):
        """A run: `BaseConfig`, and a group of settings for each that a pretext's file brings, such as `mae`."""

        def __init__(
            self, data: DataConfig = ..., pretext: PretextConfig = ..., model: ModelConfig = ...,
            optim: OptimConfig = ..., train: TrainConfig = ..., log: LogConfig = ..., **groups: Any,
        ) -> None: ...  # fmt: skip


@functools.cache
def config_class() -> type:
    """`Config`: the groups of `BaseConfig`, and those that the pretexts' files bring, which import torch."""
    groups = [(group, kind, field(default_factory=kind)) for group, kind in pretext_groups().items()]
    namespace = {"__doc__": "A run.", "__module__": __name__}
    return dataclasses.make_dataclass("Config", groups, bases=(BaseConfig,), namespace=namespace, frozen=True)


def __getattr__(name: str) -> Any:
    """`Config` is made when it is first asked for, so that this module alone is cheap to import."""
    if name == "Config":
        return config_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Settings that may change when a run folder is continued: they do not touch the steps already done. `train.steps` does touch
# the ones to come under a cosine schedule, whose rates follow from the last step.
MAY_CHANGE = frozenset({
    "data.reader_threads", "data.cache_on_device", "data.on_bad_sample", "data.max_bad_share",
    "data.retry_minutes", "data.audit_ids", "train.steps", "train.checkpoint_every",
    "train.checkpoint_minutes", "train.early_stop", "train.elastic", "train.keep", "train.keep_every",
    "train.log_every", "train.probe_every", "train.max_nonfinite", "train.deterministic", "train.cuda_graph",
    "train.kernels", "train.hang_minutes", "log.to", "log.pictures",
})  # fmt: skip


def check_config(config: "Config") -> "Config":
    """Return `config` when its numbers make sense together. Raises UserError naming value, rule and remedy."""
    for group in dataclasses.fields(config):
        check_bounds(group.name, getattr(config, group.name))
    if not 0 <= config.data.max_bad_share <= 1:
        raise UserError(
            f"data.max_bad_share={config.data.max_bad_share}: a share, from 0 to 1; pass --data.max-bad-share 0.01"
        )
    if not config.train.hang_minutes > 0:
        raise UserError(f"train.hang_minutes={config.train.hang_minutes}: must be above 0; the usual is 10")
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        raise UserError(f"optim.betas={config.optim.betas}: needs 0 <= beta < 1; the usual is 0.9 0.999")
    if not 0 <= config.optim.sgd_momentum < 1:
        raise UserError(
            f"optim.sgd_momentum={config.optim.sgd_momentum}: needs 0 <= momentum < 1; the usual is 0.9"
        )
    if config.optim.name == "sgd" and config.optim.betas != OptimConfig.betas:
        raise UserError(
            f"optim.betas={config.optim.betas}: is Adam's, and optim.name=sgd; pass --optim.sgd-momentum "
            f"{config.optim.betas[0]}"
        )
    config.pretext.check()
    config.log.trackers()
    return config


def flatten(config: "Config") -> dict[str, Any]:
    """Config -> {"data.batch": 16, …}."""
    groups = dataclasses.asdict(config)
    return {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}


def changed_from(config: "Config") -> dict[str, Any]:
    """The default of each setting of `config` that has another value, by its dotted name."""
    defaults = flatten(config_class()())
    return {name: defaults[name] for name, value in flatten(config).items() if value != defaults[name]}


def config_to_json(config: "Config") -> str:
    """Config -> JSON text with two levels, as `from_json` reads it."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def read_config(path: Path) -> "Config":
    """Config from a `config.json`. Raises UserError for a missing file, broken JSON, an unknown key or a bad value."""
    try:
        tree = json.loads(path.read_text(), object_pairs_hook=no_duplicate_keys)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a recipe or a config.json of a run") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); copy a config.json written by a run") from error
    return config_of_tree(tree, str(path))


def config_of_tree(tree: Any, where: str) -> "Config":
    """Config from the parsed JSON of any version. Raises UserError, which begins with `where`."""
    if isinstance(tree, dict):
        tree = {
            group: current_settings(group, values) if isinstance(values, dict) else values
            for group, values in tree.items()
        }
        match tree:  # what was called mae fills hidden patches; the group had no decoder then
            case {"pretext": {"name": "mae"} as own, "mae": {"ratio": _} as mae} if (
                "decoder_depth" not in mae
            ):
                tree["pretext"] = own | {"name": "simmim"}
    return check_config(_build(config_class(), tree, where))


def refuse_edited_config(run: Path, config: "Config") -> None:
    """Raise UserError where `config`, read from a run's config.json, is not what the run began with, as its run.json says.

    Settings that may change while a run continues, and `model.init`, which only the first step needs, are not compared; nor
    are runs of earlier versions, whose run.json does not hold the settings.
    """
    try:
        recorded = json.loads((run / "run.json").read_text())["starts"][-1]["config"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    began = flatten(config_of_tree(recorded, f"{run / 'run.json'}: config"))
    for name, value in flatten(config).items():
        if name not in MAY_CHANGE and name != "model.init" and began.get(name, value) != value:
            raise UserError(
                f"{run / 'config.json'}: {name} is {value}, but the run began with {began[name]}: the file was edited; put "
                "that value back, or begin another run with the file: p2w train CONFIG.json --run-dir NEW"
            )


# Settings under the names that older runs wrote into their config.json.
RENAMED = {
    "data.readers": "reader_threads",
    "data.on_device": "cache_on_device",
    "train.look_every": "probe_every",
    "train.amp": "precision",
    "train.max_skipped": "max_nonfinite",
}


# What the contrastive methods did before these settings existed.
BEFORE_CONTRAST = {
    "momentum_schedule": "constant",
    "teacher_norm": "batch",
    "jigsaw": False,
    "swav_queue": 0,
    "small_parts": 0,
}


def current_settings(group: str, values: dict[str, Any]) -> dict[str, Any]:
    """The settings of one group, as a config.json of any version has them, under the names that they have now.

    What does not fit stays as it is, for the caller to refuse.
    """
    values = {RENAMED.get(f"{group}.{name}", name): value for name, value in values.items()}
    largest = sys.float_info.max
    match group, values:
        case "pretext", {"aspect_range": [int() | float() as low, int() | float() as high]}:
            if 0 < low <= high <= largest:  # only their ratio counted
                del values["aspect_range"]
                values["max_aspect"] = min(high / low, largest)
        case "optim", {"name": "sgd", "betas": [momentum, _]} if "sgd_momentum" not in values:
            del values["betas"]
            values["sgd_momentum"] = momentum
        case "contrast", {
            "temperature": _,
            "bank_momentum": _,
            "sinkhorn_epsilon": _,
        }:  # a run's, which has them all
            values = BEFORE_CONTRAST | values
        case "train", {"channels_last": bool() as on}:
            values["channels_last"] = "auto" if on else "off"  # every encoder of that time was faster with it
    return values


def _build(kind: type, tree: Any, where: str) -> Any:
    """Fill the dataclass `kind` from parsed JSON, refusing what does not fit."""
    if not isinstance(tree, dict):
        raise UserError(f"{where}: must be an object of settings, got {type(tree).__name__}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(tree) - set(hints))
    if unknown:
        raise UserError(f"{where}: unknown setting {unknown[0]}; known are {', '.join(hints)}")
    values = {}
    for name, value in tree.items():
        hint, setting = hints[name], f"{where}: {name}"
        nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        values[name] = _build(hint, value, setting) if nested else _fit(hint, value, setting)
    return kind(**values)


def _fit(hint: Any, value: Any, where: str) -> Any:
    """A JSON value as the field's type wants it."""
    origin = typing.get_origin(hint)
    if origin is types.UnionType and type(None) in typing.get_args(hint):  # a setting that may be left open
        return None if value is None else _fit(typing.get_args(hint)[0], value, where)
    if origin is Literal and value in typing.get_args(hint):
        return value
    if origin is tuple and isinstance(value, list) and len(value) == len(typing.get_args(hint)):
        return tuple(_fit(part, item, where) for part, item in zip(typing.get_args(hint), value, strict=True))
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) and type(value) is hint:
        return value
    raise UserError(f"{where}: {value!r} does not fit {getattr(hint, '__name__', hint)}")
