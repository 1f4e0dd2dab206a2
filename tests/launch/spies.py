"""Put into a rank before it starts to train: who watches it at work, kills it at a step, or signals it in a look.

The rank runs the real program; a spy wraps one of its methods.
"""

import json
import os
import signal
import zlib

import p2w.pretrain
from p2w.analysis.looks import Similarity
from p2w.analysis.pictures import Pictures
from p2w.analysis.validation import Validation
from p2w.log import Log
from p2w.pretext.parts2whole import Parts2Whole
from p2w.train.interruptible import Interruptible
from p2w.train.step import Stepper


def record(rank: int, path: str) -> None:
    """Append a line for each training step: which sub-scans it trains on, and a checksum of each one's part."""
    sample, step_of = Parts2Whole.sample, Stepper.step
    keys = []

    def sampled(self, voxels, given):
        keys[:] = [given]
        return sample(self, voxels, given)

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


def draw_nothing(rank: int) -> None:
    """Three of the four seconds that a tiny run takes."""
    Log.picture = Pictures.figure = lambda self, *_: None
    p2w.pretrain.figures.save = p2w.pretrain._summary = lambda *_: None


def die(rank: int, at_step: int, victim: int) -> None:
    """SIGKILL rank `victim` as it begins the step after `at_step` steps."""
    step_of = Stepper.step

    def stepped(self, views, step):
        if (step, rank) == (at_step, victim):
            os.kill(os.getpid(), signal.SIGKILL)
        return step_of(self, views, step)

    Stepper.step = stepped


def tell(rank: int, at_step: int, victim: int, name: str) -> None:
    """SIGTERM rank `victim` while it looks at its first batch of validation or similarity after `at_step` steps."""
    kind = {"validation": Validation, "similarity": Similarity}[name]
    look, batches, pooled = kind.__call__, Interruptible.batches, Similarity._pooled
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

    def encoded(self, index):
        if looking[0] and kind is Similarity:
            looking[0] = False
            os.kill(os.getpid(), signal.SIGTERM)
        return pooled(self, index)

    kind.__call__, Interruptible.batches, Similarity._pooled = called, handed, encoded
