"""A toy kind of task and a toy task, added by the recipe in docs/add_a_task.md: how bright is the ball, of three grades?"""

import os
import re
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from p2w import stats
from p2w.ct.scan import read_scan
from p2w.errors import UserError
from p2w.finetune.task_types import TaskType
from p2w.model.decoder import Classifier
from p2w.tasks import crops, source_files
from p2w.tasks.task import (
    SAMPLE_KINDS,
    SPLITS,
    WINDOW_HU,
    CandidatePoint,
    Case,
    Cases,
    CutSamples,
    SampleKind,
    Split,
)

# Step 1 of the second recipe. Here and not in a test, so that the processes that cut samples know it too.
SAMPLE_KINDS["grades"] = SampleKind("grades", masks=False, labels=(0, 1, 2))


class Grades(TaskType):
    """One of several classes a sample: cross-entropy, accuracy."""

    name = "grades"
    compared = "accuracy"
    per_voxel = False
    needed_labels = (0, 1, 2)

    def network(self, encoder, classes=(), skips=True):
        return Classifier(encoder, len(classes))

    def problem_of(self, labels):
        return "hold one grade alone" if len(np.unique(labels)) < 2 else ""

    def loss(self, logits, target, batch, world):
        return cross_entropy(logits, target.long(), reduction="sum") * (world.size / batch)

    def record(self, logits, target):
        return torch.cat((logits.double(), target.double()[:, None]), 1)

    def loss_of(self, records):
        return float(cross_entropy(records[:, :-1], records[:, -1].long()))

    def judge(self, records, patients):
        right = (records[:, :-1].argmax(1) == records[:, -1]).double().numpy()
        return {"accuracy": float(right.mean())}, {"accuracy": stats.mean_interval(right, patients)}

    def keep(self, records):
        return {"probability": torch.softmax(records[:, :-1], 1).numpy(), "label": records[:, -1].numpy()}

    def predict(self, logits):
        return torch.softmax(logits.float(), 1)

    def columns(self, classes):
        return tuple(classes)


@dataclass(frozen=True)
class BallTask:
    """ball: --source holds PATIENT_gG.nii.gz with a ball of grade G in the middle; the last patients are tested on."""

    train: int = 6
    """Patients to train on."""
    val: int = 3
    """Patients to validate on."""

    name: ClassVar[str] = "ball"
    kind: ClassVar[str] = "grades"
    size: ClassVar[tuple[int, int, int]] = (8, 16, 16)
    classes: ClassVar[tuple[str, ...]] = ("faint", "grey", "bright")
    channel_names: ClassVar[tuple[str, ...]] = ("ct",)
    window: ClassVar[tuple[float, float]] = WINDOW_HU

    def check(self):
        if self.train < 1 or self.val < 1:
            raise UserError(f"--train {self.train} --val {self.val}: at least 1 each")

    def find(self, source, out):
        cases = Cases()
        for name, path in source_files.files_below(source, out).items():
            patient, grade = re.fullmatch(r"(\w+)_g(\d)\.nii\.gz", os.path.basename(name)).groups()
            scan = source_files.as_source(name, path)
            candidate = CandidatePoint(name, (8.0, 8.0, 4.0), int(grade))
            cases.cases.append(Case(scan.uid, name, patient, (("ct", scan),), candidates=(candidate,)))
        return cases

    def split(self, cases):
        names = sorted({case.patient for case in cases})
        part = {name: (i >= self.train) + (i >= self.train + self.val) for i, name in enumerate(names)}
        return Split("by name", {name: SPLITS[number] for name, number in part.items()})

    def cut(self, case, size):
        scan = read_scan(case.source("ct"))
        files = [crops.file_record("ct", case.name, scan.nbytes, scan.checksum)]
        return CutSamples(
            files, crops.crop_candidates(scan.voxels, scan.grid, case.candidates, size, None, in_voxels=True)
        )
