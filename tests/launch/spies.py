"""Put into a rank before it starts to train: who watches it at work, kills it at a step, or signals it in a look.

The rank runs the real program; a spy wraps one of its methods.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import zlib
from pathlib import Path

import torch

from p2w import pretrain, report
from p2w.analysis import features, plots
from p2w.analysis.monitors import VALIDATION_SEED, SimilarityMonitor, Validation
from p2w.analysis.qualitative import Pictures
from p2w.finetune.samples import Samples
from p2w.finetune.trials import FineTuning
from p2w.log import Log
from p2w.pretext.parts2whole import Parts2Whole
from p2w.stream.local import ShardSet
from p2w.stream.stream import Stream
from p2w.train import checkpoint, preflight
from p2w.train.step import Stepper
from p2w.train.watchdog import InterruptibleStream

TRAINS_ON = 24  # samples of the sets in target_sets.py that are trained on, and of no other split
OTHERS: list[socket.socket] = []  # kept open


def record(rank: int, path: str) -> None:
    """Append a line for each training step: which sub-scans it trains on, and a checksum of each one's part."""
    sample, step_of = Parts2Whole.sample, Stepper.step
    keys = []

    def sampled(self, voxels, given, at=0):
        keys[:] = [given]
        return sample(self, voxels, given, at)

    def stepped(self, views, step):
        parts = [zlib.crc32(part.contiguous().numpy().tobytes()) for part in views.input]
        line = {
            "step": step,
            "rank": rank,
            "epoch": keys[0].epoch,
            "ids": keys[0].ids.tolist(),
            "parts": parts,
        }
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
        return step_of(self, views, step)

    Parts2Whole.sample, Stepper.step = sampled, stepped


def begin_elsewhere(rank: int, which: int) -> None:
    """One rank draws other initial weights."""
    if rank == which:
        FineTuning.seed = lambda self, index: 77 + index


def read_in_another_order(rank: int, victim: int) -> None:
    """Rank `victim` reads the set in another order than it says."""
    if rank == victim:
        order = ShardSet.train_order
        ShardSet.train_order = lambda self, ids, batch, seed, epoch: order(self, ids, batch, seed + 1, epoch)


def draw_nothing(rank: int) -> None:
    """Neither pictures nor report.html: most of what a tiny run takes."""
    Log.picture = Pictures.figure = lambda self, *_: None
    plots.save_figure = pretrain._summary = report.write_report = lambda *_: None
    if finetune := sys.modules.get("p2w.commands.finetune"):  # a fork has imported it
        finetune.draw_test_samples = lambda *_: None


def recalibrate_on_few(rank: int) -> None:
    """Before features are measured, have batch norm see 8 training wholes instead of 128: a third of a tiny run's time."""
    features.WHOLES, features.BATCHES, features.ROWS = 8, 2, 4


def die(rank: int, at_step: int, victim: int) -> None:
    """SIGKILL rank `victim` as it begins the step after `at_step` steps."""
    step_of = Stepper.step

    def stepped(self, views, step):
        if (step, rank) == (at_step, victim):
            os.kill(os.getpid(), signal.SIGKILL)
        return step_of(self, views, step)

    Stepper.step = stepped


def stop_writing(rank: int, at_step: int, function: str, path: str) -> None:
    """Rank 0 stops for ever as `function` of the checkpoint module is to touch the unfinished checkpoint of `at_step`.

    The file `path` appears then; the thread that trains goes on until it needs the one that writes.
    """
    whole = getattr(checkpoint, function)

    def stopped(*args):
        if any(isinstance(one, Path) and f".step-{at_step:08d}.tmp" in one.parts for one in args):
            Path(path).touch()
            threading.Event().wait()
        return whole(*args)

    if rank == 0:
        setattr(checkpoint, function, stopped)


def tell(rank: int, at_step: int, victim: int, name: str) -> None:
    """SIGTERM rank `victim` while it looks at its first batch of validation or similarity after `at_step` steps."""
    kind = {"validation": Validation, "similarity": SimilarityMonitor}[name]
    look, batches, pooled = kind.__call__, InterruptibleStream.batches, SimilarityMonitor._pooled
    looking = [False]

    def called(self, step):
        looking[0] = (step, rank) == (at_step, victim)
        yield from look(self, step)
        looking[0] = False

    def handed(self, *place):
        for count, batch in enumerate(batches(self, *place)):
            if looking[0] and count == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    def encoded(self, encoder, index):
        if looking[0] and kind is SimilarityMonitor:
            looking[0] = False
            os.kill(os.getpid(), signal.SIGTERM)
        return pooled(self, encoder, index)

    kind.__call__, InterruptibleStream.batches, SimilarityMonitor._pooled = called, handed, encoded


def starve(rank: int, at_step: int, victim: int) -> None:
    """Have rank `victim` wait for ever for the batch after `at_step` steps."""
    batches = Stream.batches

    def handed(self, *place):
        for count, batch in enumerate(batches(self, *place)):
            if rank == victim and self.sampler.training and count == at_step:
                threading.Event().wait()
            yield batch

    Stream.batches = handed


def dawdle(rank: int, seconds: float) -> None:
    """Look slowly: each batch of a look takes this long on top."""
    loss_of_one = Validation._loss_of_one

    def slow(self, output, views, index):
        if index == 0:
            time.sleep(seconds)
        return loss_of_one(self, output, views, index)

    Validation._loss_of_one = slow


def fail(rank: int, at_step: int, victim: int) -> None:
    """Raise in the pretext of rank `victim` at the step after `at_step` steps."""
    sample, calls = Parts2Whole.sample, []

    def sampled(self, voxels, given, at=0):
        if rank == victim and given.seed != VALIDATION_SEED:
            calls.append(1)
            if len(calls) > at_step:
                raise LookupError("no such part")
        return sample(self, voxels, given, at)

    Parts2Whole.sample = sampled


def poison(rank: int, at_step: int, victim: int, path: str) -> None:
    """Make the loss of rank `victim` not a number at the step after `at_step` steps; note the state before and after."""
    step_of, loss_of, now = Stepper.step, Parts2Whole.loss, [-1]

    def state(stepper):
        tensors = [*stepper.network.state_dict().values()]
        tensors += [v for one in stepper.optimizer.state_dict()["state"].values() for v in one.values()]
        return zlib.crc32(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors))

    def stepped(self, views, step):
        now[0], before = step, state(self)
        result = step_of(self, views, step)
        if step == at_step:
            with open(f"{path}.{rank}", "w") as file:
                json.dump([before, state(self), result.applied], file)
        return result

    def lost(self, output, views):
        loss, extras = loss_of(self, output, views)
        return loss * float("nan" if (now[0], rank) == (at_step, victim) else "1"), extras

    Stepper.step, Parts2Whole.loss = stepped, lost


def skew_clock(rank: int, victim: int, seconds: float) -> None:
    """The clock of rank `victim` is wrong."""
    if rank == victim:
        now = time.time
        time.time = lambda: now() + seconds


def lag(rank: int, victim: int, seconds: float) -> None:
    """Rank `victim` is slow."""
    step_of = Stepper.step

    def stepped(self, views, step):
        time.sleep(seconds * (rank == victim))
        return step_of(self, views, step)

    Stepper.step = stepped


def be_another(rank: int, victim: int, what: str) -> None:
    """Rank `victim` runs another version of something."""
    if rank == victim:
        setattr(
            *{"torch": (torch, "__version__", "2.11.0"), "p2w": (preflight, "__version__", "0.0.9")}[what]
        )


def take_port(rank: int, path: str) -> None:
    """Another program has the port at which rank 0 is to serve; what rank 0 tells torchrun goes to `path`. It is alone."""
    if rank:
        os._exit(0)
    OTHERS.append(socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))))
    os.environ["TORCHELASTIC_ERROR_FILE"] = path


def stop_epoch(rank: int, epoch: int, victim: int, name: str) -> None:
    """Send rank `victim` a signal in the middle of the epoch after `epoch` epochs of fine-tuning."""
    batches = Samples.batches
    seen = [0]

    def handed(self, places):
        for count, batch in enumerate(batches(self, places)):
            if len(self) == TRAINS_ON and count == 1:
                seen[0] += 1
                if (seen[0], rank) == (epoch + 1, victim):
                    os.kill(os.getpid(), getattr(signal, name))
            yield batch

    Samples.batches = handed


def lag_epochs(rank: int, seconds: float) -> None:
    """Each epoch of fine-tuning takes this long on top."""
    batches = Samples.batches

    def handed(self, places):
        time.sleep(seconds * (len(self) == TRAINS_ON))
        yield from batches(self, places)

    Samples.batches = handed


def cut_network(rank: int, at_step: int) -> None:
    """End every TCP connection of each rank after `at_step` steps, as a switch that fails would; no process dies."""
    step_of = Stepper.step

    def stepped(self, views, step):
        if step == at_step:
            for name in os.listdir("/proc/self/fd"):
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as one:
                    if one.family in (socket.AF_INET, socket.AF_INET6) and one.getpeername():
                        one.shutdown(socket.SHUT_RDWR)
        return step_of(self, views, step)

    Stepper.step = stepped
