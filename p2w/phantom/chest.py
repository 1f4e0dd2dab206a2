"""One synthetic chest CT from a seed (`make_scan`), with nodules, and noise, streaks, padding and table of a scanner."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from p2w.errors import UserError
from p2w.phantom.body import Balls, Body, Floats, Frame, Label, smoothstep
from p2w.phantom.canvas import Canvas
from p2w.phantom.lungs import Mediastinum, lay_tubes, look_up, paint_lungs, plaques
from p2w.phantom.organs import Cavity, anatomy, layers, paint_bones

_SLAB = 16


@dataclass(frozen=True)
class Scanner:
    """Settings of a CT scanner: noise, reconstruction and field of view."""

    noise_hu: float  # standard deviation in the middle of the body
    cutoff: float  # of the kernel, relative to Nyquist: low = soft tissue kernel, high = lung kernel
    edge: float  # width of an edge in voxels
    slice_blend: float  # share of the neighbouring slices
    streaks: float
    pad_hu: int | None  # value outside the round field of view; None: no padding
    table: float  # curvature, 1/mm; 0: flat
    table_hu: float
    sharpen: float = 0.0  # of edges within a slice, as lung and bone kernels do; below 0 they are smoothed

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Scanner":
        """Draw a scanner and its settings."""
        cutoff = rng.uniform(0.35, 0.95)
        return cls(
            noise_hu=float(rng.uniform(8, 23) * (1 + 1.3 * max(0, cutoff - 0.55) / 0.4)),
            cutoff=float(cutoff),
            edge=float(1.5 - 0.55 * cutoff),
            slice_blend=float(rng.uniform(0.1, 0.4)),
            streaks=float(rng.uniform(0.3, 1.2)),
            pad_hu=int(rng.choice([-2000, -3024])) if rng.random() < 0.25 else None,
            table=float(rng.uniform(0, 1 / 700)),
            table_hu=float(rng.uniform(-150, 250)),
        )

    @classmethod
    def varied(cls, rng: np.random.Generator) -> "Scanner":
        """Draw a kernel (soft, medium, lung) and a dose (low, usual, high), which have a texture of their own."""
        scanner = cls.draw(rng)
        cutoff, edge, sharpen = [(0.4, 1.6, -0.35), (0.6, 1.2, 0.0), (0.95, 0.95, 0.9)][int(rng.integers(3))]
        dose_hu = (42.0, 18.0, 8.0)[int(rng.integers(3))]
        return replace(
            scanner,
            cutoff=cutoff * float(rng.uniform(0.92, 1.08)),
            edge=edge,
            sharpen=sharpen * float(rng.uniform(0.7, 1.0)),
            noise_hu=dose_hu * float(rng.uniform(0.8, 1.25)) * (0.7 + 0.9 * max(0.0, cutoff - 0.4)),
            slice_blend=float(rng.uniform(0.05, 0.5)),
            streaks=float(rng.uniform(0.3, 1.2)) * (1.5 if dose_hu > 40 else 1.0),
        )


def paint_table(canvas: Canvas, scanner: Scanner, skin: Floats) -> None:
    """Two thin curved shells with foam between, under the patient, the same in every slice; the patient
    hides it."""
    frame = canvas.frame
    rows = np.flatnonzero((skin < 0).any(axis=(0, 2)))
    if not rows.size:
        return
    _, dy, dx = frame.spacing_mm
    back = rows[-1] * frame.steps[1] * dy + 2
    y = np.arange(frame.shape[1], dtype=np.float32)[:, None] * dy
    x = np.arange(frame.shape[2], dtype=np.float32)[None] * dx - frame.centre_mm[2]
    below = (y - back + scanner.table * x * x).astype(np.float32)
    plane = np.full(below.shape, -1000, np.float32)
    for at, thick, value in (
        (12.0, 22.0, -955.0),
        (0.0, 2.6, scanner.table_hu),
        (24.0, 2.6, scanner.table_hu),
    ):
        cover = np.clip((thick / 2 - np.abs(below - at)) / canvas.edge_mm + 0.5, 0, 1) * (np.abs(x) < 215)
        plane += cover * (value - plane)
    hit = (plane > -990) & (below > -4)
    empty = (canvas.labels == Label.AIR) & hit
    np.copyto(canvas.hu, np.maximum(canvas.hu, plane), where=empty)
    canvas.labels[empty] = Label.TABLE


def finish(canvas: Canvas, scanner: Scanner, skin: Floats, rng: np.random.Generator) -> np.ndarray:
    """Add noise, round to int16 HU [z, y, x], clip at -1024, pad outside the field of view."""
    depth, height, width = canvas.frame.shape
    kernel, streak = _kernels(scanner, height, width)
    level = _level(canvas, scanner, skin)
    shoulders = scanner.streaks * smoothstep((canvas.frame.coarse[0].mean(axis=(1, 2)) - 45) / 40)
    shoulders = np.interp(np.arange(depth) / canvas.frame.steps[0], np.arange(len(shoulders)), shoulders)
    shoulders = shoulders.astype(np.float32)
    out = np.empty(canvas.frame.shape, np.int16)
    before: Floats | None = None
    for z0 in range(0, depth, _SLAB):
        n = min(_SLAB, depth - z0)
        white = rng.standard_normal((n, height, width // 2 + 1, 2), np.float32).view(np.complex64)[..., 0]
        white *= kernel + streak * shoulders[z0 : z0 + n, None, None]
        noise = fft.irfft2(white, s=(height, width), overwrite_x=True)
        shifted = np.concatenate([noise[:1] if before is None else before, noise[:-1]])
        before = noise[-1:].copy()
        noise = (1 - scanner.slice_blend) * noise + scanner.slice_blend * shifted
        noise *= canvas.full(level, (slice(z0, z0 + n), slice(0, height), slice(0, width)))
        noise += canvas.hu[z0 : z0 + n]
        if scanner.sharpen:
            noise += scanner.sharpen * _detail(canvas.hu[z0 : z0 + n])
        np.rint(np.clip(noise, -1024, 3071, out=noise), out=noise)
        out[z0 : z0 + n] = noise
    if scanner.pad_hu is not None:
        y, x = (np.arange(n) - (n - 1) / 2 for n in (height, width))
        outside = np.hypot(y[:, None], x[None]) > max(height, width) / 2
        out[:, outside] = scanner.pad_hu
        canvas.labels[:, outside] = Label.AIR
    return out


def _detail(slices: Floats) -> Floats:
    """Voxels (n, y, x) less the mean of their four neighbours within the slice; 0 at the border."""
    detail = np.zeros_like(slices)
    inner = detail[:, 1:-1, 1:-1]
    inner += slices[:, 1:-1, 1:-1]
    for y, x in ((0, 1), (2, 1), (1, 0), (1, 2)):
        inner -= np.float32(0.25) * slices[:, y : y + inner.shape[1], x : x + inner.shape[2]]
    return detail


def _kernels(scanner: Scanner, height: int, width: int) -> tuple[Floats, Floats]:
    """Frequency responses, scaled so that the noise of the first has standard deviation 1."""
    fy, fx = fft.fftfreq(height)[:, None] * 2, fft.rfftfreq(width)[None] * 2
    f = np.hypot(fy, fx)
    response = (0.08 + f) * np.exp(-((f / scanner.cutoff) ** 2) * 1.5)
    twice = np.where((np.arange(width // 2 + 1) == 0) | (2 * np.arange(width // 2 + 1) == width), 1, 2)
    # complex white noise has variance 2 a coefficient, irfft2 divides by the number of voxels
    scale = height * width / np.sqrt(2 * (response**2 * twice).sum())
    streak = response * 6 * np.exp(-((fx / 0.02) ** 2))
    return (response * scale).astype(np.float32), (streak * scale).astype(np.float32)


def _level(canvas: Canvas, scanner: Scanner, skin: Floats) -> Floats:
    """Standard deviation of the noise on the coarse grid: lowest in air, highest in the middle and at the shoulders."""
    z = canvas.frame.coarse[0]
    middle = (
        0.5
        + 0.5 * smoothstep(-skin / 110)
        + 0.55 * smoothstep((z - 50) / 40)
        + 0.2 * smoothstep((-80 - z) / 40)
    )
    return (scanner.noise_hu * middle * np.where(skin > 8, 0.7, 1.0)).astype(np.float32)


KINDS = ("solid", "ground-glass", "part-solid", "juxta-vascular", "juxta-pleural", "spiculated")


@dataclass(frozen=True)
class Spot:
    """A nodule in body mm, before conversion to the scan's coordinates."""

    centre: Floats  # (3,)
    radius: float
    kind: str


def paint_nodules(canvas: Canvas, cavity: Cavity, forks: Balls, rng: np.random.Generator) -> list[Spot]:
    """One to five nodules, 4 to 30 mm across, inside the lungs and apart from one another."""
    spots: list[Spot] = []
    for _ in range(int(min(5, 1 + rng.poisson(1.4)))):
        kind = str(rng.choice(KINDS, p=[0.27, 0.15, 0.1, 0.2, 0.18, 0.1]))
        radius = float(np.clip(rng.lognormal(np.log(4.2), 0.5), 2.0, 15.0))
        if kind in ("ground-glass", "part-solid", "spiculated"):
            radius = max(radius, 4.0)
        centre = _place(canvas, cavity, forks, kind=kind, radius=radius, taken=spots, rng=rng)
        if centre is not None:
            spots.append(Spot(centre, radius, kind))
            _paint_nodule(canvas, spots[-1], rng)
    return spots


def _place(
    canvas: Canvas,
    cavity: Cavity,
    forks: Balls,
    *,
    kind: str,
    radius: float,
    taken: list[Spot],
    rng: np.random.Generator,
) -> Floats | None:
    """A point in body mm at which such a nodule fits; None when there is none."""
    frame = canvas.frame
    points: Floats
    if kind == "juxta-vascular" and len(forks.points):
        usable = forks.points[(forks.radius > 0.9) & (forks.radius < 2.5)]
        points = usable[rng.permutation(len(usable))[:200]] + rng.normal(
            0, 0.5 * radius, (min(200, len(usable)), 3)
        )
    else:
        nodes = np.argwhere(cavity.lungs < -1)
        if not len(nodes):
            return None
        chosen = nodes[rng.integers(0, len(nodes), 600)] + rng.uniform(-0.5, 0.5, (600, 3))
        points = frame.to_body(chosen * np.array(frame.steps, float))
    if not len(points):
        return None
    depth = -look_up(frame, cavity.lungs, points)
    wall = -look_up(frame, cavity.cage, points)
    if kind == "juxta-pleural":
        fits = (depth > 0.5 * radius) & (depth < 0.95 * radius) & (wall < depth + 2)
    else:
        fits = depth > radius + 2
    for point in points[fits]:
        voxel = frame.to_voxel(point)
        rim = (radius + 1) / np.array(frame.spacing_mm)
        inside = bool(((voxel > rim) & (voxel < np.array(frame.shape) - 1 - rim)).all())
        if not inside or canvas.labels[tuple(np.rint(voxel).astype(int))] not in (Label.LUNG, Label.VESSEL):
            continue  # cut off by the scan's edge, or where a rib or a bronchus lies
        if all(np.linalg.norm(point - t.centre) > radius + t.radius + 8 for t in taken):
            return point
    return None


def _paint_nodule(canvas: Canvas, spot: Spot, rng: np.random.Generator) -> None:
    """Paint a ball with bumps; it replaces only lung, vessels and small airways."""
    frame = canvas.frame
    spacing = np.array(frame.spacing_mm)
    centre = frame.to_voxel(spot.centre)
    low = np.maximum(np.floor(centre - (1.9 * spot.radius + 3) / spacing), 0).astype(int)
    high = np.minimum(np.ceil(centre + (1.9 * spot.radius + 3) / spacing) + 1, frame.shape).astype(int)
    box = (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
    grid = np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)), indexing="ij")
    offset = (np.stack(grid, axis=-1) - centre) * spacing
    gap = np.linalg.norm(offset, axis=-1)
    way = offset / (gap[..., None] + 1e-6)
    rough = {"spiculated": 0.12, "ground-glass": 0.12}.get(spot.kind, 0.06)
    bumps = sum(np.cos(way @ (rng.normal(size=3) * f) + rng.uniform(0, 6)) for f in (1.5, 2.5, 4.0))
    surface = spot.radius * (1 + rough * np.asarray(bumps))
    if spot.kind == "spiculated":
        spikes = rng.normal(size=(14, 3))
        spikes /= np.linalg.norm(spikes, axis=1, keepdims=True)
        surface = surface * (1 + 0.6 * np.clip((way @ spikes.T).max(axis=-1) - 0.9, 0, 1) / 0.1)
    cover = np.clip((surface - gap) / canvas.edge_mm + 0.5, 0, 1)
    cover[np.unravel_index(gap.argmin(), gap.shape)] = 1  # however small: the voxel of its centre is nodule
    cover *= np.isin(canvas.labels[box], (Label.LUNG, Label.VESSEL, Label.AIRWAY, Label.AIRWAY_WALL))
    here = canvas.hu[box]
    solid = float(rng.normal(35, 15) if rng.random() > 0.12 else rng.uniform(200, 500))
    value: Floats | float = solid
    if spot.kind in ("ground-glass", "part-solid"):
        glass = float(rng.uniform(-680, -480))
        core = (
            np.clip((0.5 * surface - gap) / canvas.edge_mm + 0.5, 0, 1) if spot.kind == "part-solid" else 0.0
        )
        value = np.maximum(here, glass + core * (20 - glass))
    canvas.blend(box, cover.astype(np.float32), np.asarray(value, np.float32), Label.NODULE)


def distractors(
    canvas: Canvas, cavity: Cavity, forks: Balls, spots: list[Spot], *, count: int, rng: np.random.Generator
) -> Floats:
    """Body points (N, 3) away from all nodules: forks of vessels, points on the pleura, plain lung."""
    nodes = np.argwhere(cavity.lungs < -1)
    if not len(nodes):
        return np.zeros((0, 3))
    anywhere = canvas.frame.to_body(
        nodes[rng.integers(0, len(nodes), 8 * count)] * np.array(canvas.frame.steps, float)
    )
    near_wall = anywhere[look_up(canvas.frame, cavity.lungs, anywhere) > -6]
    thick = forks.points[forks.radius > 0.8]
    thick = thick[rng.permutation(len(thick))]
    points = np.concatenate([thick[: count * 6 // 10], near_wall[: count * 3 // 10], anywhere[:count]])
    voxel = canvas.frame.to_voxel(points)
    keep = ((voxel > 1) & (voxel < np.array(canvas.frame.shape) - 2)).all(axis=1)
    for spot in spots:
        keep &= np.linalg.norm(points - spot.centre, axis=1) > 1.3 * spot.radius + 6
    return points[keep][:count]


NEGATIVES = 40  # candidates a scan that are no nodules
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Nodule:
    """A nodule: `centre_voxel` and `centre_mm` (world, LPS) in z, y, x; `kind` is one of KINDS."""

    centre_voxel: Triple
    centre_mm: Triple
    diameter_mm: float
    kind: str


@dataclass(frozen=True)
class Candidate:
    """A candidate of a nodule detector: `centre_mm` in world z, y, x; `positive` if it is a nodule."""

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
    regions: NDArray[np.uint8] | None = None  # anatomy.Region [z, y, x], where asked for


def make_scan(
    seed: int,
    shape: tuple[int, int, int] = (128, 256, 256),
    spacing_mm: Triple | None = None,
    contrast: float | None = None,
    equal_hu: float | None = None,
    regions: bool = False,
    varied: bool = False,
) -> PhantomScan:
    """A chest CT of `shape` (z, y, x); the same arguments give the same bytes, another seed another patient.

    Without `spacing_mm` (z, y, x) the voxels are sized so that the scan holds the whole chest: at 512 x 512
    that is 0.6 to 0.9 mm in the plane, at 256 x 256 twice that. `contrast`: HU above plain blood in vessels and heart;
    without, drawn, and none in most patients. `equal_hu`: HU of liver, spleen, heart, blood and oesophagus alike, without
    contrast agent, so that they are told apart by place and shape alone. `regions`: a map of organs, lobes and vertebrae.
    `varied`: a patient and a scanner from a population that differs more (`Body.varied`, `Scanner.varied`).
    Raises UserError for a shape or spacing that cannot be a chest CT.
    """
    check_phantom(seed, shape, spacing_mm)
    pose, patient, soft, tubes, lung, lesion, scanner_rng = (
        np.random.default_rng([seed, stage]) for stage in range(7)
    )
    body = _draw_body(patient, contrast, equal_hu, varied)
    side = body.cage_width + body.wall + body.fat + 6
    frame = Frame.draw(pose, shape, spacing_mm, (300.0, 2 * side * 0.86, 2 * side))
    scanner = Scanner.varied(scanner_rng) if varied else Scanner.draw(scanner_rng)
    if spacing_mm is not None:  # the round field of view might cut through what such a scan still shows
        scanner = replace(scanner, pad_hu=None)
    canvas = Canvas(frame, scanner.edge * frame.spacing_mm[1])
    stack, cavity = layers(body, frame.coarse, soft)
    canvas.paint(stack)
    paint_bones(canvas, body, tubes)
    middle = lay_tubes(body, tubes)
    _paint_mediastinum(canvas, body, middle, lesion)
    forks = paint_lungs(canvas, body, cavity, middle, lung)
    spots = paint_nodules(canvas, cavity, forks, lesion)
    areas = anatomy(canvas, body, cavity) if regions else None
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
        seed, voxels, canvas.labels, frame.spacing_mm, _triple(origin), tuple(nodules), tuple(candidates),
        areas,
    )  # fmt: skip


def _draw_body(
    rng: np.random.Generator, contrast: float | None, equal_hu: float | None, varied: bool
) -> Body:
    """Draw a patient, and set the HU that `make_scan` was asked for."""
    body = Body.varied(rng) if varied else Body.draw(rng)
    if contrast is not None:
        body = replace(body, contrast=contrast, aorta_contrast=None)
    if equal_hu is not None:
        body = replace(
            body, contrast=0.0, aorta_contrast=None, liver=equal_hu, spleen=equal_hu, oesophagus=equal_hu, blood=equal_hu,
            myocardium=equal_hu,
        )  # fmt: skip
    return body


def _paint_mediastinum(canvas: Canvas, body: Body, tubes: Mediastinum, rng: np.random.Generator) -> None:
    """Paint oesophagus, great vessels, aorta with its plaques, and windpipe."""
    blood = body.blood + body.contrast
    canvas.balls(tubes.oesophagus).paint(body.oesophagus, Label.OESOPHAGUS)
    canvas.balls(tubes.vessels).paint(blood, Label.GREAT_VESSEL)
    aortic = blood if body.aorta_contrast is None else body.blood + body.aorta_contrast
    canvas.balls(tubes.aorta).paint(aortic, Label.AORTA)
    if body.plaques:
        canvas.balls(plaques(body, tubes.aorta, rng)).paint(480.0, Label.AORTA)
    rings = canvas.balls(Balls(tubes.windpipe.points, tubes.windpipe.radius + 1.4))
    rings.paint(25.0, Label.AIRWAY_WALL).paint(-990.0, Label.AIRWAY, inset=1.4)


def _triple(values: np.ndarray) -> Triple:
    z, y, x = (float(v) for v in values)
    return z, y, x


def check_phantom(seed: int, shape: tuple[int, int, int], spacing_mm: Triple | None) -> None:
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
