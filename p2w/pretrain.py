"""One pretraining run: build data, pretext, network, trainer and monitors from the configuration, train, draw figures."""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from p2w import __version__, report
from p2w import config as settings
from p2w.analysis import plots
from p2w.analysis.features import TrainingWholes
from p2w.analysis.monitors import Monitors, SimilarityMonitor, Validation
from p2w.analysis.qualitative import Pictures
from p2w.analysis.similarity import similarity_file
from p2w.config import Config
from p2w.errors import UserError, command_line, first_line
from p2w.files import write_atomic
from p2w.log import Log, read_metrics
from p2w.model.encoder import set_memory_format
from p2w.model.norm import synchronise_batch_norm
from p2w.pretext import build_pretext_and_network, pretext_class
from p2w.shards.manifest import data_fingerprint
from p2w.stream.local import RANDOM_CROPS, ShardSet
from p2w.stream.prefetch import DeviceCache
from p2w.stream.staging import StagedCopy
from p2w.stream.stream import Stream
from p2w.train.checkpoint import Checkpoints
from p2w.train.form_choice import RECORD, Choice, choose_run_forms
from p2w.train.loop import Outcome, Trainer
from p2w.train.optim import Precision
from p2w.train.preflight import check_numerics, check_rank_consistency
from p2w.train.run_dir import RunDir, describe_data
from p2w.train.watchdog import EvaluationInterrupted, InterruptibleStream, Watchdog
from p2w.weights.start import initialise
from p2w.world import World

STAGING_LINE_S = 15.0  # between lines on how far the copies are
ENOUGH_FOR_BATCH_NORM = 16  # samples: the batch of the paper


def shares_batch_norm(config: Config, ranks: int) -> bool:
    """Whether batch norm averages over all ranks: as `optim.sync_batchnorm` says; with `auto`, if a rank has few samples."""
    if config.optim.sync_batchnorm != "auto":
        return config.optim.sync_batchnorm == "on"
    return ranks > 1 and config.data.batch // ranks // config.optim.accumulate < ENOUGH_FOR_BATCH_NORM


def ranks_that_train(config: Config, ranks: int) -> int:
    """How many of `ranks` train: all of them; with `train.elastic` as many as divide the batch evenly."""
    if not config.train.elastic:
        return ranks
    return next(count for count in range(ranks, 0, -1) if config.data.batch % count == 0)


def elastic_settings(config: Config, began: int, ranks: int) -> Config:
    """The settings with which `ranks` ranks continue a run that `began` ranks began.

    Without `train.elastic`, or at the same number of ranks, those of the run. Else batch norm is shared by the ranks if it
    was, and what belongs together in a step keeps its size: with shared batch norm, or a loss that compares wholes, the
    wholes that all ranks have in a pass; else those that one rank has, by more passes or fewer.
    """
    optim, batch = config.optim, config.data.batch
    if not config.train.elastic or began == ranks or batch % began or batch % ranks:
        return config
    shared = shares_batch_norm(config, began)
    accumulate = optim.accumulate
    if not shared and not pretext_class(config.pretext.name).compares_wholes:
        rows, most = batch // ranks, max(1, batch // began // accumulate)
        accumulate = next(
            passes for passes in range(1, rows + 1) if not rows % passes and rows // passes <= most
        )
    together: Literal["on", "off"] = "on" if shared and ranks > 1 else "off"
    return replace(config, optim=replace(optim, accumulate=accumulate, sync_batchnorm=together))


@dataclass(frozen=True)
class Staging:
    """Where on each node's own disk the set is copied to before training (None: nowhere), and whether it is removed then."""

    folder: Path | None = None
    remove: bool = False


def pretrain(
    config: Config, shards: ShardSet, run: Path, world: World, precision: Precision,
    staging: Staging = Staging(),
) -> Outcome:  # fmt: skip
    """Train in the folder `run`, or continue the run in it. Every rank calls this; rank 0 writes.

    No reference to the network is left when it returns, as World.close needs. Raises UserError for settings, data or a
    folder that do not go together.
    """
    folder, data = RunDir(run), data_fingerprint(shards.meta)
    given = {f"--{name.replace('_', '-')}": value for name, value in settings.flatten(config).items()}
    streaming = agree_on_order(shards, world)
    check_rank_consistency(world, given, precision, data, "--train.precision")
    with Watchdog(world, 60 * config.train.hang_minutes) as watchdog:
        shards.call_while_waiting(watchdog.count)  # a server that is down for a while is no hang
        shards_path = shards.where
        with staged(shards, staging, world, watchdog) as read_from:
            return _run(config, read_from, shards_path, folder, data, world, precision, watchdog, streaming)


@contextlib.contextmanager
def staged(shards: ShardSet, staging: Staging, world: World, watchdog: Watchdog) -> Iterator[ShardSet]:
    """The set, read from copies on each node's own disk that one rank of the node makes; the set itself without `staging`.

    A collective. Raises SharedError on all ranks where one node could not copy.
    """
    if staging.folder is None:
        yield shards
        return
    copies, leads = StagedCopy(shards, staging.folder.absolute()), world.local_rank == 0
    nodes = int(world.sum(torch.tensor([int(leads)])))
    said = time.monotonic()

    def progress(done: int, total: int, there: int) -> None:
        nonlocal said
        watchdog.count()
        if world.is_main and time.monotonic() - said > STAGING_LINE_S:
            said = time.monotonic()
            world.report(f"staged          {done / 2**30:.2f} of {total / 2**30:.2f} GiB to {copies.folder}")

    error = ""
    if leads:
        try:
            copies.copy(progress)
        except UserError as found:
            error = f"{world.host}: {found}"
    world.wait_for_nodes("staged", nodes, error if leads else None)
    try:
        yield copies.open(check_shards=leads)
    finally:
        if leads and staging.remove and not copies.remove():
            world.report(f"{copies.folder}: not removed, another job reads or copies the set")


def agree_on_order(shards: ShardSet, world: World) -> list[int]:
    """Give the set the same order on all ranks: the streamed one if any of them must stream. Returns those ranks.

    Ranks that read by ranges can do so in either order. A collective.
    """
    streaming = world.gather(torch.tensor([shards.order == "streamed"])).nonzero().flatten().tolist()
    shards.order = "streamed" if streaming else "shuffled"
    return [int(rank) for rank in streaming]


def _run(
    config: Config, shards: ShardSet, shards_path: str, folder: RunDir, data: str, world: World, precision: Precision,
    watchdog: Watchdog, streaming: list[int],
) -> Outcome:  # fmt: skip
    """Build and train. Rank 0 locks the folder meanwhile, and writes there how the run ended. `shards_path` is the
    set's own path, for the records; `shards` may read a copy of it."""
    log = Log(folder.path, world.is_main, config.train.steps, config.log)
    asked, began = config, folder.ranks_of_first_start() or world.size
    config = elastic_settings(asked, began, world.size)
    if began != world.size and config.train.elastic:
        log.line(
            f"elastic         began with {began} ranks, goes on with {world.size}: a rank has "
            f"{config.data.batch // world.size} wholes of each step, in {config.optim.accumulate} pass(es)"
        )
    log_order(shards, shards_path, streaming, world, log)
    # Errors raised here leave no folder behind.
    parts = _build(config, shards, folder, world, precision, log, watchdog)
    choice, trainer, validation, monitors, pictures = parts
    if world.is_main:
        _open_folder(folder, asked, data, shards_path, shards, trainer, precision, log)
        if world.device.type == "cuda":
            with log.tolerate(RECORD):
                choice.write(folder.path)
    world.barrier()
    watchdog.on_exit = lambda reason, step: _record_failure(folder, reason, step)
    outcome = Outcome("failed", 0)
    try:
        outcome = _fit(trainer, validation, monitors, pictures, folder, log)
    except BaseException as error:
        outcome = Outcome("failed", trainer.step, first_line(error))
        raise
    finally:
        if world.is_main:
            with log.tolerate("status.json"):
                folder.write_status(outcome.state, outcome.step, outcome.why)
            with log.tolerate("report.html"):
                log.line(f"report          {report.write_report(folder.path)}")
            folder.close()
        log.close(outcome.state)
    return outcome


def log_order(shards: ShardSet, shards_path: str, streaming: list[int], world: World, log: Log) -> None:
    """Say why the set has the order of a streamed one, if it has; `streaming` are the ranks that get no byte ranges."""
    if 0 < len(streaming) < world.size:
        names = ", ".join(map(str, streaming[:8]))
        log.warn(
            f"{shards.where}: rank(s) {names} get no byte ranges, so all ranks take the order of a streamed set"
        )
    elif streaming:
        on_s3 = shards_path.startswith("s3:")
        needs = "botocore is not installed" if on_s3 else "the server gives no byte ranges"
        log.line(f"order           of a streamed set, not that of a folder, since {needs} (docs/data.md)")


def _open_folder(
    folder: RunDir, config: Config, data: str, shards_path: str, shards: ShardSet, trainer: Trainer, precision: Precision,
    log: Log,
) -> None:  # fmt: skip
    """Rank 0: create or continue the folder, record this start in it, and watch that it stays this process's own."""
    world = trainer.world
    facts = {
        "parameters": sum(weight.numel() for weight in trainer.model.parameters()),
        "changed_from": settings.changed_from(config),
    }
    start = {
        **world.machine(),
        "command": command_line(),
        "cwd": os.getcwd(),
        "precision": precision.name,
        **facts,
        "order": shards.order,
        "order_version": trainer.stream.sampler.order_version,
        "data_set": describe_data(shards),
    }
    folder.open(config, data, shards_path, start)
    versions = {"p2w": __version__, "torch": torch.__version__}
    about = {"data_set": data, "ranks": world.size, "precision": precision.name, **versions}
    log.describe(
        folder.path.absolute().name, settings.flatten(config) | {"parameters": facts["parameters"]} | about
    )
    trainer.checkpointer.checkpoints.guard = folder.check_owner
    folder.watch(
        lambda: trainer.step, log.warn,
        lambda why: world.abort(1, f"error: {why}; it leaves without saving", at_once=True),
    )  # fmt: skip


def _record_failure(folder: RunDir, reason: str, step: int) -> None:
    """Write into status.json why all ranks leave, if the folder can still be written."""
    with contextlib.suppress(OSError):
        folder.write_status("failed", step, reason)
    folder.owner.release()  # on rank 0, so that a start on another node need not wait until this mark is stale


def _build(
    config: Config, shards: ShardSet, folder: RunDir, world: World, precision: Precision, log: Log,
    watchdog: Watchdog,
) -> tuple[Choice, Trainer, Validation | None, Monitors, Pictures]:  # fmt: skip
    """Build the choice of kernels, the trainer, the validation (None without validation scans), monitors and pictures."""
    torch.manual_seed(config.train.seed)
    pretext, model = build_pretext_and_network(config)
    model = initialise(pretext, model, config, folder.path, log.line)
    if shares_batch_norm(config, world.size):
        synchronise_batch_norm(model, world.size)
        log.line(f"batch norm      over all {world.size} ranks' samples ({config.optim.sync_batchnorm})")
    model.to(world.device)
    memory_format = set_memory_format(model, config.train.channels_last)
    batch, readers, device = config.data.batch, config.data.reader_threads, world.device
    share: dict[str, Any] = {
        "rank": world.rank, "world_size": world.size, "readers": readers, "device": device,
    }  # fmt: skip
    cache = _device_cache(config, shards, world, precision) if config.data.cache_on_device else None
    stream = Stream(shards, "train", batch, seed=config.data.seed, cache=cache, **share)
    precision = check_numerics(config, precision, model, world, log.warn).apply()
    choice = choose_run_forms(config, model, folder.path, world, precision, log)
    checkpoints = Checkpoints(
        folder.path / "checkpoints", config.train.keep, log.warn, config.train.keep_every
    )
    trainer = Trainer(
        config, world, pretext, model, stream, checkpoints, log, precision, watchdog, shards.key
    )

    def validation() -> Stream:
        """A pass over the validation set; it ends when the run is stopped."""
        stream = InterruptibleStream.validation(shards, batch, **share)
        stream.stop_requested = trainer.stop_requested
        return stream

    def leave_if_stopped() -> None:
        if trainer.stop_requested():
            raise EvaluationInterrupted

    val_count = len(shards.ids("val"))
    split = "val" if val_count else "train"
    pictures = Pictures(pretext, model, shards, split, world.device, log)
    wholes = TrainingWholes(shards, world)
    similarity = SimilarityMonitor(
        config, model.encoder, shards, split, world, log, leave_if_stopped,
        lambda encoder: wholes.recalibrate(encoder, pretext, leave_if_stopped),
    )  # fmt: skip
    monitors = Monitors(similarity, pictures, every=config.train.probe_every, log=log)
    # After all that may refuse the run, so that a refusal is one line alone
    _log_splits(shards, val_count, log)
    log.line(f"memory format   {memory_format}")
    judged = Validation(pretext, model, validation, world) if val_count else None
    return choice, trainer, judged, monitors, pictures


def _log_splits(shards: ShardSet, val_count: int, log: Log) -> None:
    """Log the sizes of the splits, with a warning where no scan is set aside."""
    if not val_count:
        log.warn(f"{shards.where}: no scan is set aside, so there is no validation, early stop or plateau")
    log.line(
        f"{shards.where}: {len(shards.ids('train'))} sub-scans to train, {val_count} to validate"
        f"{RANDOM_CROPS * shards.random_crops}"
    )


def _device_cache(config: Config, shards: ShardSet, world: World, precision: Precision) -> DeviceCache:
    """Memory on the device for all training sub-scans. Raises UserError if that leaves too little for the network."""
    from p2w.train.estimate import run_cost  # noqa: PLC0415  (torch's FLOP counter imports triton: only where it is needed)

    passes = config.data.batch // world.size // config.optim.accumulate
    facts = run_cost(
        config, lambda: build_pretext_and_network(config), passes, 4 if precision.dtype is None else 2
    )
    sharers = world.local_size if world.device.type == "cpu" else 1
    # A CUDA graph needs memory of its own, besides that of the first steps, and a copy of the weights.
    times = 2 if world.device.type == "cuda" and config.train.cuda_graph != "off" else 1
    reserve = times * (facts.activation_bytes + facts.state_bytes)
    return DeviceCache(shards, "train", world.device, reserve=reserve, sharers=sharers)


def _fit(
    trainer: Trainer,
    validation: Validation | None,
    monitors: Monitors,
    pictures: Pictures,
    folder: RunDir,
    log: Log,
) -> Outcome:
    """Continue from the folder's newest checkpoint, train, and draw the figures."""
    world, precision, steps = trainer.world, trainer.stepper.precision, trainer.config.train.steps

    def validate(step: int) -> Iterator[tuple[str, float]]:
        found = dict(validation(step)) if validation else {}
        if found:
            log.line(f"step {step}  {', '.join(f'{name} {value:.4f}' for name, value in found.items())}")
        yield from found.items()
        yield from monitors(step)
        monitors.similarity.save(step)

    before = max((int(record["step"]) for record in read_metrics(folder.path)), default=0)
    resumed = trainer.resume()
    log.line(
        f"{folder.path}: {world.describe()}; {precision.name} ({precision.reason}); {trainer.optimizer_reason}"
    )
    if resumed:
        left = steps - trainer.step
        log.line(
            f"continues after step {trainer.step} of {steps}"
            if left > 0
            else f"has its {trainer.step} steps already"
        )
    if world.is_main:
        with log.tolerate("status.json"):
            folder.write_status("running", trainer.step)
            folder.add_to_start(from_step=trainer.step, redone=max(0, before - trainer.step))
    with trainer.stream:
        outcome = trainer.fit(validate, monitors)
    if not world.is_main:
        return outcome
    why = f" ({outcome.why})" if outcome.why else ""
    log.line(f"{outcome.state} at step {outcome.step}{why}")
    if outcome.state == "told to stop":
        log.line("the same command continues it")
        return outcome
    trainer.watchdog.at(trainer.step, "drawing")
    trainer.model.eval()
    with torch.no_grad(), trainer.stepper.autocast():
        picture = pictures.figure()
        volumes = pictures.volumes() if pictures.pretext.reconstructs else b""
    with log.tolerate("figures"):
        # The similarity monitor makes the folder, unless there is only one volume to compare.
        (folder.path / "figures").mkdir(exist_ok=True)
        if volumes:
            write_atomic(folder.path / "figures" / "reconstruction.npz", volumes)
        drawn = plots.save_figure(picture, folder.path, "reconstruction" if volumes else "views")
        _summary(folder.path, drawn, log)
    return outcome


def _summary(run: Path, drawn: Path, log: Log) -> None:
    """Draw the curves, and log the results in a few lines."""
    log.line(f"pictures        {plots.save_figure(plots.loss_curve(run), run, 'loss')}")
    log.line(f"                {drawn}")
    records = [record for record in read_metrics(run) if "val/loss" in record]
    if not records:
        return
    steps = [int(r["step"]) for r in records if similarity_file(run, int(r["step"])).exists()]
    if len(steps) > 1:
        ends = (steps[0], steps[-1])
        log.line(
            f"                {plots.save_figure(plots.similarity_histogram(run, ends), run, 'similarity')}"
        )
    for line in before_and_after(records):
        log.line(line)


def before_and_after(records: Iterable[dict[str, float]]) -> list[str]:
    """First and last validation as lines of text, with the loss of predicting the mean image for comparison."""
    first, *_, last = [*records, *records]
    beside, loss = "", "val/mse" if "val/mse" in first else "val/loss"
    if "val/loss_mean_image" in first:
        beside = f"   (always the mean image: {first['val/loss_mean_image']:.4f})"
    name = "validation MSE " if beside else "validation loss"
    lines = [f"{name} {first[loss]:.4f} -> {last[loss]:.4f}{beside}"]
    if "similarity/auc" in first and "similarity/auc" in last:
        for name, title in (("positive", "of one image"), ("negative", "of two images")):
            key = f"similarity/{name}"
            lines.append(f"similarity      parts {title}: {first[key]:.4f} -> {last[key]:.4f}")
        lines.append(
            f"                told apart (AUC): {first['similarity/auc']:.3f} -> {last['similarity/auc']:.3f}"
        )
    if "similarity/rank" in first and "similarity/rank" in last:  # old runs lack it
        spread = f"{first['similarity/rank']:.1f} -> {last['similarity/rank']:.1f}"
        lines.append(f"                rank of features: {spread}")
    return lines
