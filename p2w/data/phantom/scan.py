"""One synthetic chest CT from a seed: `make_scan`."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from p2w.data.phantom.body import Body
from p2w.data.phantom.bones import paint_bones
from p2w.data.phantom.canvas import Canvas
from p2w.data.phantom.frame import Frame
from p2w.data.phantom.labels import Label
from p2w.data.phantom.lungs import paint_lungs
from p2w.data.phantom.mediastinum import lay_tubes
from p2w.data.phantom.nodules import distractors, paint_nodules
from p2w.data.phantom.noise import Scanner, finish, paint_table
from p2w.data.phantom.organs import layers
from p2w.data.phantom.tubes import Balls
from p2w.errors import UserError

NEGATIVES = 40  # candidates a scan that are no nodules
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Nodule:
    """A nodule: `centre_voxel` and `centre_mm` (world, LPS) in z, y, x; `kind` one of nodules.KINDS."""

    centre_voxel: Triple
    centre_mm: Triple
    diameter_mm: float
    kind: str


@dataclass(frozen=True)
class Candidate:
    """A place a detector would propose: `centre_mm` world z, y, x; `positive`: it is a nodule."""

    centre_mm: Triple
    positive: bool


@dataclass(frozen=True)
class PhantomScan:
    """A synthetic chest CT in LPS orientation (z up, y to the back, x to the patient's left)."""

    seed: int
    voxels: NDArray[np.int16]  # HU [z, y, x]
    labels: NDArray[np.uint8]  # labels.Label [z, y, x]
    spacing_mm: Triple  # z, y, x
    origin_mm: Triple  # world position of voxel (0, 0, 0), z, y, x
    nodules: tuple[Nodule, ...]
    candidates: tuple[Candidate, ...]


def make_scan(
    seed: int,
    shape: tuple[int, int, int] = (128, 256, 256),
    spacing_mm: Triple | None = None,
    contrast: float | None = None,
) -> PhantomScan:
    """A chest CT of `shape` (z, y, x); the same arguments give the same bytes, another seed another patient.

    Without `spacing_mm` (z, y, x) the voxels are sized so that the scan holds the whole chest: at 512 x 512
    that is 0.6 to 0.9 mm in the plane, at 256 x 256 twice that. `contrast`: HU above plain blood in vessels and heart;
    without, drawn, and none in most patients. Raises UserError for a shape or spacing
    that cannot be a chest CT.
    """
    check(seed, shape, spacing_mm)
    pose, patient, soft, tubes, lung, lesion, scanner_rng = (
        np.random.default_rng([seed, stage]) for stage in range(7)
    )
    body = Body.draw(patient)
    if contrast is not None:
        body = replace(body, contrast=contrast)
    side = body.cage_width + body.wall + body.fat + 6
    frame = Frame.draw(pose, shape, spacing_mm, (300.0, 2 * side * 0.86, 2 * side))
    scanner = Scanner.draw(scanner_rng)
    if spacing_mm is not None:  # the round field of view might cut through what such a scan still shows
        scanner = replace(scanner, pad_hu=None)
    canvas = Canvas(frame, scanner.edge * frame.spacing_mm[1])
    stack, cavity = layers(body, frame.coarse, soft)
    canvas.paint(stack)
    paint_bones(canvas, body, tubes)
    middle = lay_tubes(body, tubes)
    blood = body.blood + body.contrast
    canvas.balls(middle.oesophagus).paint(38.0, Label.OESOPHAGUS)
    canvas.balls(middle.vessels).paint(blood, Label.GREAT_VESSEL)
    canvas.balls(middle.aorta).paint(blood, Label.AORTA)
    rings = canvas.balls(Balls(middle.windpipe.points, middle.windpipe.radius + 1.4))
    rings.paint(25.0, Label.AIRWAY_WALL).paint(-990.0, Label.AIRWAY, inset=1.4)
    forks = paint_lungs(canvas, body, cavity, middle, lung)
    spots = paint_nodules(canvas, cavity, forks, lesion)
    skin = stack[0].distance
    paint_table(canvas, scanner, skin)
    origin = np.round(np.array([scanner_rng.uniform(-700, 0), *scanner_rng.uniform(-210, -120, 2)]), 3)
    voxels = finish(canvas, scanner, skin, scanner_rng)
    nodules = []
    for spot in spots:
        voxel = frame.to_voxel(spot.centre)
        nodules.append(
            Nodule(_triple(voxel), _triple(voxel * frame.spacing_mm + origin), 2 * spot.radius, spot.kind)
        )
    negatives = frame.to_voxel(distractors(canvas, cavity, forks, spots, count=NEGATIVES, rng=lesion))
    candidates = [Candidate(n.centre_mm, True) for n in nodules]
    candidates += [Candidate(_triple(v * frame.spacing_mm + origin), False) for v in negatives]
    return PhantomScan(
        seed, voxels, canvas.labels, frame.spacing_mm, _triple(origin), tuple(nodules), tuple(candidates)
    )


def _triple(values: np.ndarray) -> Triple:
    z, y, x = (float(v) for v in values)
    return z, y, x


def check(seed: int, shape: tuple[int, int, int], spacing_mm: Triple | None) -> None:
    """Raise UserError for arguments that `make_scan` cannot use."""
    if seed < 0:
        raise UserError(f"phantom: seed {seed} is negative; give 0 or more")
    if len(shape) != 3 or min(shape) < 16:
        raise UserError(
            f"phantom: shape {tuple(shape)} must be z y x, each at least 16 voxels; try 128 256 256"
        )
    if spacing_mm is not None and (len(spacing_mm) != 3 or min(spacing_mm) <= 0):
        raise UserError(
            f"phantom: spacing {spacing_mm} must be three positive numbers z y x in mm; try 2.4 1.4 1.4"
        )
