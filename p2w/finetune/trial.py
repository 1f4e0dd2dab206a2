"""One trial in its folder: fine-tune, judge on the test samples, leave a result. Finished ones are skipped, others continue.

RUN/trial-00/
    result.json         seed, metrics, intervals; written last: a folder without it is unfinished
    predictions.npz     what was predicted for each test sample: key, patient; probability and label, or counts of voxels;
                        of a fold also all that metrics need, `records`
    test.png            how good they are, of kinds of several classes: Dice by patient, ROC curves, true over predicted
    model.safetensors   the weights of the best epoch by validation, and a card that says what they are
    metrics.jsonl       a line an epoch; trackers.json, trackers.log where `--log.to` names a tracker
    checkpoints/        while it is unfinished: what it continues from
"""

import io
import json
import math
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from p2w import __version__
from p2w.errors import UserError
from p2w.files import FileLock, write_atomic, write_remedy
from p2w.finetune.samples import Samples
from p2w.finetune.task_types import TaskType
from p2w.finetune.trainer import EpochResult, FineTuner, StopRequested
from p2w.log import Log, hours_minutes_seconds
from p2w.train.checkpoint import Checkpoints, Snapshot
from p2w.world import World

LINE_EVERY_S = 10.0
RESULT, MODEL, PREDICTIONS = "result.json", "model.safetensors", "predictions.npz"
PICTURE = "test.png"


def folder_of(run: Path, index: int) -> Path:
    """The folder of trial `index` of a run."""
    return run / f"trial-{index:02d}"


def is_finished(folder: Path) -> bool:
    """Whether its result is there. Raises UserError for a result that is damaged."""
    path = folder / RESULT
    try:
        return json.loads(path.read_text())["state"] == "finished"
    except FileNotFoundError:
        return False
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it, and the trial is done again") from error


class TrialLock:
    """The lock of a trial's folder: one process at a time works in it (rank 0 of its ranks)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / ".lock")

    def take(self) -> bool:
        """Make the folder and lock it; False while another process has it. Raises UserError when it cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self._lock.acquire()
        except OSError as error:
            raise UserError(
                f"{self.folder}: {error.strerror}; name a folder you may write with --run-dir"
            ) from error

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()


@dataclass
class TrialRun:
    """One trial on one rank. `card` is written into the file of its weights."""

    index: int
    seed: int
    folder: Path
    tuner: FineTuner
    kind: TaskType
    train: Samples
    val: Samples
    test: Samples
    keys: list[str]  # of the test samples
    patients: list[str]
    card: dict[str, Any]
    log: Log
    world: World
    keep_records: bool = False  # in predictions.npz, for metrics over several folds

    def run(self) -> dict[str, Any]:
        """Train to the end, judge, write the result and return it. Raises StopRequested, on all ranks, at a stop request."""
        state = "failed"
        try:
            result = self._run()
            state = "finished"
        except StopRequested:
            state = "told to stop"
            raise
        finally:
            self.log.close(state)
        return result

    def _run(self) -> dict[str, Any]:
        began = time.monotonic()
        self.checkpoints = Checkpoints(self.folder / "checkpoints", keep=1, warn=self.log.warn)
        self._resume()
        self._train()
        self.tuner.take_best()
        records = self.tuner.records(self.test, test=True)
        metrics, intervals = self.tuner.kind.judge(records, self.patients)
        result = {
            "trial": self.index,
            "seed": self.seed,
            "state": "finished",
            "metrics": metrics,
            "ci95": {name: _numbers(interval) for name, interval in intervals.items()},
            "epochs": self.tuner.number,
            "best_val_loss": self.tuner.best_val_loss,
            "seconds": round(time.monotonic() - began, 1),
            "n_train": len(self.train),
            "n_val": len(self.val),
            "n_test": len(self.test),
            "test_patients": len(set(self.patients)),
            "test_predictions": PREDICTIONS,
            **self.tuner.best_metric(),
            "device": self.world.device.type,
            "ranks": self.world.size,
            "p2w": __version__,
            "torch": torch.__version__,
        }
        if self.world.is_main:
            self._write(result, records)
            test = {f"test/{name}": float(value) for name, value in metrics.items()}
            self.log.send(self.tuner.number, test)
        self.world.barrier()
        return result

    def _resume(self) -> None:
        """Load the last checkpoint that is whole; rank 0 says what is wrong with any that is not."""
        snapshot = self.checkpoints.load_latest()
        epoch = torch.tensor([0 if snapshot is None else snapshot.step])
        if (self.world.gather(epoch) != epoch).any():
            raise UserError(
                f"{self.folder}: ranks see different checkpoints; the run folder must be one all nodes share"
            )
        if snapshot is not None:
            self.tuner.load_state_dict(snapshot.step, snapshot.model, snapshot.state)
            self.log.line(f"trial {self.index}  continues after epoch {snapshot.step}")
        self.log.rewind(self.tuner.number)

    def _train(self) -> None:
        """Epochs until the trial ends, with checkpoints in between and at a stop request."""
        saved = self._said = time.monotonic()
        self.tuner.on_step = self._progress
        every = 60 * self.tuner.recipe.checkpoint_minutes
        while not self.tuner.ended:
            try:
                epoch = self.tuner.epoch(self.train, self.val)
            except UserError as error:
                raise type(error)(f"{self.folder}: {error}") from error
            facts = {
                name: value for name, value in vars(epoch).items() if name != "number" and value is not None
            }
            self.log.metrics(epoch.number, facts)
            now = time.monotonic()
            if now - self._said >= LINE_EVERY_S or self.tuner.ended:
                self._said = now
                self.log.line(self._line(epoch))
            if now - saved >= every and not self.tuner.ended:
                self._save()
                saved = time.monotonic()

    def _progress(self, done: int, steps: int) -> None:
        """Say how far a long epoch is."""
        now = time.monotonic()
        if now - self._said >= LINE_EVERY_S:
            self._said = now
            self.log.line(f"trial {self.index}  epoch {self.tuner.number + 1}  step {done} of {steps}")

    def _line(self, epoch: EpochResult) -> str:
        recipe = self.tuner.recipe
        left = min(recipe.patience - epoch.idle, recipe.max_epochs - epoch.number)
        tail = "ends"
        if left:
            tail = f"ends in {left} epochs ({hours_minutes_seconds(left * epoch.seconds)}) unless it improves"
        speed, best = epoch.samples / epoch.seconds, self.tuner.plateau.best
        said = f"{epoch.val_loss:.4f} (best {best:.4f})"
        if epoch.val_metric is not None:
            said = f"{epoch.val_loss:.4f}, {self.kind.compared} {epoch.val_metric:.4f} (best {-best:.4f})"
        return (
            f"trial {self.index}  epoch {epoch.number}  loss {epoch.train_loss:.4f}  validation {said}  rate "
            f"{epoch.lr:.1e}  {speed:.1f} samples/s  {tail}"
        )

    def _save(self) -> None:
        """Rank 0 writes a checkpoint. A full disk is a warning, and the trial goes on."""
        if not self.world.is_main:
            return
        weights, state = self.tuner.state_dict()
        try:
            self.checkpoints.save(Snapshot(self.tuner.number, weights, state, None))
        except UserError as error:
            self.log.warn(f"{error}; the trial goes on")

    def _write(self, result: dict[str, Any], records: Tensor) -> None:
        """Write weights and predictions, then the result; then delete the checkpoints."""
        arrays = {"key": np.array(self.keys), "patient": np.array(self.patients), **self.kind.keep(records)}
        if self.keep_records:
            arrays["records"] = records.numpy()
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)  # type: ignore[arg-type]  # its stub takes names for flags
        try:
            if self.tuner.recipe.keep_weights:
                card = {**self.card, "metrics": result["metrics"], "best_val_loss": result["best_val_loss"]}
                data = save(self.tuner.best, {"format": "pt", "p2w": json.dumps(card, sort_keys=True)})
                write_atomic(self.folder / MODEL, data)
            write_atomic(self.folder / PREDICTIONS, packed.getvalue())
            if png := self.kind.picture(records, self.patients):
                write_atomic(self.folder / PICTURE, png)
            write_atomic(self.folder / RESULT, json.dumps(result, indent=2))
        except OSError as error:
            raise UserError(
                f"{self.folder}: not written ({error.strerror}); {write_remedy(error)}, then repeat the command"
            ) from error
        with suppress(OSError):
            shutil.rmtree(self.folder / "checkpoints")


def _numbers(interval: tuple[float, float]) -> list[float | None]:
    """An interval as JSON writes it, with null for NaN."""
    return [None if math.isnan(value) else value for value in interval]
