"""Every setting of a run, as frozen dataclasses: recipe -> dotted overrides -> these -> constructors.

Written beside the run as `config.json`, and a run can be started from that file. Fields marked [P] are in the paper
(Feng et al. 2020), [I] are inferred from its patent and code family, [?] are not published: our choice.
"""

import contextlib
import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from p2w import pretext_config as proxies
from p2w.errors import UserError

Amp = Literal["auto", "bf16", "fp16", "tf32", "fp32"]


@dataclass(frozen=True)
class DataConfig:
    """Which wholes, in which order."""

    batch: int = 16
    """Wholes a step, over all ranks together [P]. The order of samples depends on it, not on the number of ranks."""
    seed: int = 0
    """Seed of the order of wholes and of their parts."""
    reader_threads: int = 2
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


@dataclass(frozen=True)
class PretextConfig:
    """What is shown and what is asked."""

    name: str = "parts2whole"
    """Which proxy task."""
    size: tuple[int, int, int] = (32, 64, 64)
    """Size of part and whole at the network, voxels z y x [I]; multiples of the encoder's stride, 8 for the paper's."""
    volume_fraction: tuple[float, float] = (1 / 16, 1 / 4)
    """A part's volume as a share of its whole, uniform between the two [P]. `1 1` is an autoencoder."""
    aspect_range: tuple[float, float] = (0.5, 2.0)
    """How far a part's edges may depart from the whole's proportions [?]; see geometry.sample_boxes."""
    antialias: bool = True
    """Filter when a resize shrinks; without it, reconstruction can read aliasing [?]."""
    window_hu: tuple[float, float] = (-1000.0, 1000.0)
    """HU that become 0 and 1 [I]."""
    skips: bool = False
    """Skip connections from encoder to decoder; the paper's ablation, off in its method [P]."""


@dataclass(frozen=True)
class ModelConfig:
    """The encoder."""

    name: str = "unet3d"
    """Which encoder."""
    width: int = 32
    """Channels of the first convolution; 32 is the paper's network (16.75 M parameters) [I], and others' published size."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule; none of it is published [?]."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-3
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's two averages; the first is SGD's momentum."""
    weight_decay: float = 0.0
    fused: Literal["torch", "apex", "none"] = "torch"
    """Whose fused optimizer: torch's, NVIDIA apex's (must be installed), or none."""
    clip_norm: float = 0.0
    """Largest gradient norm; 0 does not clip."""
    sync_batchnorm: Literal["auto", "on", "off"] = "auto"
    """Batch norm over the samples of all ranks; auto where a rank has fewer than 16 of them a pass, the paper's batch: so 8
    GPUs train what one does [?]."""
    accumulate: int = 1
    """Split each rank's share of a batch into this many passes, to save memory; contrastive pretexts take their negatives
    from a pass, over all ranks."""
    schedule: Literal["constant", "cosine", "plateau"] = "plateau"
    """After warm-up: hold; fall as a cosine to 1 % at the last step; or halve when validation stops improving."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    plateau_patience: int = 10
    """Validations without improvement before `plateau` halves the rate."""


@dataclass(frozen=True)
class TrainConfig:
    """Length, precision, and how often to look."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    seed: int = 0
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
    channels_last: bool = True
    """Memory layout with channels innermost (faster with batch norm)."""
    compile: bool = False
    """torch.compile the network: minutes at the start, a few percent a step."""
    validate_every: int = 500
    """Steps between validations."""
    probe_every: int = 500
    """Steps between looks at similarity, contrastive loss and pictures of a few wholes; 0 looks only when validating."""
    early_stop: int = 0
    """Stop after this many validations without improvement; 0 never."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    checkpoint_minutes: float = 0.5
    """Also save when this long has passed since the last save, so that a slow machine loses no more; 0 never. What a kill
    costs grows with it, see bench/goodput.py; training goes on beside the writing."""
    keep: int = 3
    """Newest checkpoints kept, besides the best."""
    keep_every: int = 0
    """Save at multiples of this many steps, and keep those for good; 0 none."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    max_nonfinite: int = 20
    """Stop after this many steps in a row whose gradient was not finite."""
    hang_minutes: float = 10.0
    """End with the name of the rank that hangs when none gets further for this long; one that gives no sign of life at all
    is named after a minute, or a quarter of this. A first step, which may compile, has three times as long."""


@dataclass(frozen=True)
class Config:
    """A run."""

    data: DataConfig = field(default_factory=DataConfig)
    pretext: PretextConfig = field(default_factory=PretextConfig)
    intensity: proxies.IntensityConfig = field(default_factory=proxies.IntensityConfig)
    contrast: proxies.ContrastConfig = field(default_factory=proxies.ContrastConfig)
    position: proxies.PositionConfig = field(default_factory=proxies.PositionConfig)
    genesis: proxies.GenesisConfig = field(default_factory=proxies.GenesisConfig)
    rubik: proxies.RubikConfig = field(default_factory=proxies.RubikConfig)
    mae: proxies.MaeConfig = field(default_factory=proxies.MaeConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


# Settings that may change when a run folder is continued: they do not touch the steps already done. `train.steps` does touch
# the ones to come under a cosine schedule, whose rates follow from the last step.
MAY_CHANGE = frozenset(
    {
        "data.reader_threads",
        "data.cache_on_device",
        "data.on_bad_sample",
        "data.max_bad_share",
        "train.steps",
        "train.checkpoint_every",
        "train.checkpoint_minutes",
        "train.early_stop",
        "train.keep",
        "train.keep_every",
        "train.log_every",
        "train.probe_every",
        "train.max_nonfinite",
        "train.deterministic",
        "train.cuda_graph",
        "train.kernels",
        "train.hang_minutes",
    }
)


def check_config(config: Config) -> Config:
    """Return `config` when its numbers make sense together. Raises UserError naming value, rule and remedy."""
    at_least = {
        "data.batch": 1, "data.reader_threads": 0, "optim.accumulate": 1, "train.steps": 0, "train.validate_every": 1,
        "train.probe_every": 0, "train.checkpoint_every": 1, "train.keep": 1, "train.log_every": 1, "train.max_nonfinite": 1,
        "model.width": 1, "optim.warmup_steps": 0, "optim.plateau_patience": 0, "train.early_stop": 0,
        "optim.lr": 0, "optim.clip_norm": 0, "optim.weight_decay": 0, "train.seed": 0,
        "train.checkpoint_minutes": 0, "train.keep_every": 0,
    }  # fmt: skip
    flat = flatten(config)
    for name, least in at_least.items():
        if not flat[name] >= least:
            raise UserError(f"{name}={flat[name]}: must be at least {least}; pass --{name.replace('_', '-')}")
    for name, value in flat.items():
        if isinstance(value, int) and value >= 2**63:
            raise UserError(f"{name}={str(value)[:20]}…: must be below 2^63; pass --{name.replace('_', '-')}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}={value}: must be finite; pass --{name.replace('_', '-')}")
    proxies.check_pretexts(flat)
    if not 0 <= config.data.max_bad_share <= 1:
        raise UserError(
            f"data.max_bad_share={config.data.max_bad_share}: a share, from 0 to 1; pass --data.max-bad-share 0.01"
        )
    if not config.train.hang_minutes > 0:
        raise UserError(f"train.hang_minutes={config.train.hang_minutes}: must be above 0; the usual is 10")
    if config.train.seed >= 2**63:
        raise UserError(f"train.seed={config.train.seed}: must be below 2^63; pass --train.seed 0")
    if not all(0 <= beta < 1 for beta in config.optim.betas):
        raise UserError(f"optim.betas={config.optim.betas}: needs 0 <= beta < 1; the usual is 0.9 0.999")
    low, high = config.pretext.volume_fraction
    if not 0 < low <= high <= 1:
        raise UserError(
            f"pretext.volume_fraction={low} {high}: needs 0 < low <= high <= 1; the paper has 0.0625 0.25"
        )
    narrow, wide = config.pretext.aspect_range
    if not 0 < narrow <= wide < math.inf:
        raise UserError(
            f"pretext.aspect_range={narrow} {wide}: needs 0 < low <= high, finite; the usual is 0.5 2"
        )
    floor, ceiling = config.pretext.window_hu
    if not -math.inf < floor < ceiling < math.inf:
        raise UserError(
            f"pretext.window_hu={floor} {ceiling}: the first must be below the second; the usual is -1000 1000"
        )
    return config


def flatten(config: Config) -> dict[str, Any]:
    """Config -> {"data.batch": 16, …}."""
    groups = dataclasses.asdict(config)
    return {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}


def config_to_json(config: Config) -> str:
    """Config -> JSON text with two levels, as `from_json` reads it."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def read_config(path: Path) -> Config:
    """Config from a `config.json`. Raises UserError for a missing file, broken JSON, an unknown key or a bad value."""
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a recipe or a config.json of a run") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); copy a config.json written by a run") from error
    return check_config(_build(Config, tree, str(path)))


# Settings under the names that older runs wrote into their config.json.
RENAMED = {
    "readers": "reader_threads",
    "on_device": "cache_on_device",
    "look_every": "probe_every",
    "amp": "precision",
    "max_skipped": "max_nonfinite",
}


def _build(kind: type, tree: Any, where: str) -> Any:
    """Fill the dataclass `kind` from parsed JSON, refusing what does not fit."""
    if not isinstance(tree, dict):
        raise UserError(f"{where}: must be an object of settings, got {type(tree).__name__}")
    hints = typing.get_type_hints(kind)
    tree = {RENAMED[name] if RENAMED.get(name) in hints else name: value for name, value in tree.items()}
    unknown = sorted(set(tree) - set(hints))
    if unknown:
        raise UserError(f"{where}: unknown setting {unknown[0]}; known are {', '.join(hints)}")
    values = {}
    for name, value in tree.items():
        hint, place = hints[name], f"{where}: {name}"
        nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        values[name] = _build(hint, value, place) if nested else _fit(hint, value, place)
    return kind(**values)


def _fit(hint: Any, value: Any, where: str) -> Any:
    """A JSON value as the field's type wants it."""
    origin = typing.get_origin(hint)
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
