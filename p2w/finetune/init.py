"""Where a fine-tuning starts: the network built from a starting point, and what is known of how that was pretrained."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from p2w.errors import UserError
from p2w.finetune.task_types import TaskType
from p2w.log import read_metrics
from p2w.model import Network
from p2w.pretext import build_pretext
from p2w.shards.training_scans import SEEN
from p2w.tasks.leak import check_run, check_shards
from p2w.tasks.reader import TargetSet
from p2w.weights.card import Trained
from p2w.weights.hub import download, is_hub_name
from p2w.weights.load import exported, find_checkpoint, hashed_scans_of
from p2w.weights.start import RANDOM, StartingPoint, load_decoder, load_start, load_up_path


@dataclass(frozen=True)
class InitRecord:
    """A starting point, resolved once for all trials: `source` names one checkpoint or file, not the newest of a run."""

    source: str
    step: int | None = None
    run: Path | None = None  # the run that it is a checkpoint of; None for other files
    val_loss: float | None = None
    val_mse: float | None = None  # the same, where the pretext is a reconstruction
    pretext: str | None = None
    volume_fraction: tuple[float, float] | None = None
    skips: bool | None = None

    def plain(self) -> dict[str, Any]:
        """The record as JSON writes it."""
        return {name: value for name, value in asdict(self).items() if name != "run"}


def resolve_init(init: str) -> InitRecord:
    """`random`, a run (its best checkpoint, else the newest), RUN@STEP, or any file that `load_start` reads.

    Raises UserError for a run without checkpoints, a step that it does not have, or a name that the Hub does not know.
    """
    if init == RANDOM:
        return InitRecord(RANDOM)
    if is_hub_name(init):
        file, pinned = download(init)
        return _of_file(str(pinned), file)
    name, at, step = init.rpartition("@")
    if at and not Path(init).exists():
        if not step.isdecimal():
            raise UserError(
                f"--init {init}: no such file; of a run, RUN@STEP names a step, such as {name}@1000"
            )
        return _of_run(Path(name), int(step))
    path = Path(init)
    if (path / "checkpoints").is_dir():
        return _of_run(path, None)
    if (path / "meta.json").is_file():
        path = path.resolve()
        return _of_run(path.parent.parent, int(path.name.removeprefix("step-")))
    return _of_file(str(path), path)


def _of_file(where: str, file: Path) -> InitRecord:
    """The record of a file of weights, which may have a card."""
    with contextlib.suppress(UserError):
        return _of_card(where, exported(file)[1])
    return InitRecord(where)


def _of_run(run: Path, step: int | None) -> InitRecord:
    trained = find_checkpoint(run, step)
    metrics: dict[str, Any] = {}
    for one in read_metrics(run):
        if one["step"] == trained.step:
            metrics |= one
    return _record(trained, metrics.get("val/loss"), metrics.get("val/mse"))


def _of_card(where: str, card: dict[str, Any]) -> InitRecord:
    """The record of an exported file, from its card. A file whose card says nothing is still a starting point."""
    try:
        training, pretext = card["training"], card["training"]["config"]["pretext"]
        loss = training["figures"].get("val/loss")
        low, high = pretext["volume_fraction"]
        return InitRecord(
            where, int(training["step"]), None, loss, loss, pretext["name"], (low, high),
            bool(pretext["skips"]),
        )  # fmt: skip
    except (LookupError, TypeError, ValueError, AttributeError):
        return InitRecord(where)


def _record(trained: Trained, loss: float | None, mse: float | None) -> InitRecord:
    """The record of a checkpoint. `mse` is the error of the reconstruction, where the loss has further terms."""
    pretext = trained.config.pretext
    mse = (loss if mse is None else mse) if build_pretext(trained.config).reconstructs else None
    source = str(trained.folder)
    return InitRecord(
        source, trained.step, trained.run, loss, mse, pretext.name, pretext.volume_fraction, pretext.skips
    )


def network_of(
    kind: TaskType,
    start: StartingPoint,
    classes: Sequence[str],
    pretrained_decoder: bool,
    up_path: bool = False,
) -> Network:
    """The network to fine-tune; what is new in it draws from torch's generator.

    A decoder starts from scratch and has skips, as in the paper, or it is the one that was pretrained with the encoder, with
    the skips that it was pretrained with. `up_path`: it has skips, and takes all values that skips do not concern from
    a decoder that was pretrained without them. Raises UserError when the starting point has no decoder.
    """
    if up_path:
        network = kind.network(start.encoder, classes)
        load_up_path(network.get_submodule("decoder"), start)
        return network
    if not pretrained_decoder:
        return kind.network(start.encoder, classes)
    if start.decoder_state is None:
        raise UserError(
            f"{start.source}: holds no decoder (an export of the encoder alone?); name the run, or pass --decoder scratch"
        )
    for skips in (True,) if start.encoder.only_skips else (False, True):
        network = kind.network(start.encoder, classes, skips)
        decoder = network.get_submodule("decoder")
        wanted = {name: tuple(value.shape) for name, value in decoder.state_dict().items()}
        shared = [n for n, v in start.decoder_state.items() if wanted.get(n) == tuple(v.shape)]
        if len(shared) >= len(wanted) - 2:  # all but the last convolution, which may be of other classes
            break
    load_decoder(decoder, start)
    return network


def init_leak(init: InitRecord, target: TargetSet, allow: bool, fold: int | None) -> str:
    """One line on whether pretraining has seen scans that are tested on. Raises UserError when it has, unless allowed."""
    if init.source == RANDOM or init.run is not None:
        return check_run(target, init.run, allow, fold)
    data: dict[str, Any] = {**load_start(init.source).pretrained_on}
    if (hashes := hashed_scans_of(init.source)) is not None:
        data[SEEN] = hashes
    if not {"shards", SEEN} & set(data):
        return f"not checked whether pretraining saw test scans: weights of others ({data.get('what', 'data unknown')})"
    return check_shards(target, init.source, data, allow, fold)
