"""What the scanner adds: noise with the texture of a reconstruction kernel, streaks at the shoulders,
padding, the table."""

from dataclasses import dataclass

import numpy as np
from scipy import fft

from p2w.data.phantom.body import smoothstep
from p2w.data.phantom.canvas import Canvas
from p2w.data.phantom.frame import Floats
from p2w.data.phantom.labels import Label

_SLAB = 16


@dataclass(frozen=True)
class Scanner:
    """How a scan was taken."""

    noise_hu: float  # standard deviation in the middle of the body
    cutoff: float  # of the kernel, relative to Nyquist: low = soft tissue kernel, high = lung kernel
    edge: float  # width of an edge in voxels
    slice_blend: float  # share of the neighbouring slices
    streaks: float
    pad_hu: int | None  # value outside the round field of view; None: no padding
    table: float  # curvature, 1/mm; 0: flat
    table_hu: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Scanner":
        """A scanner and its settings."""
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
        np.rint(np.clip(noise, -1024, 3071, out=noise), out=noise)
        out[z0 : z0 + n] = noise
    if scanner.pad_hu is not None:
        y, x = (np.arange(n) - (n - 1) / 2 for n in (height, width))
        outside = np.hypot(y[:, None], x[None]) > max(height, width) / 2
        out[:, outside] = scanner.pad_hu
        canvas.labels[:, outside] = Label.AIR
    return out


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
    """Standard deviation of the noise on the coarse grid: least in air, most in the middle and at the
    shoulders."""
    z = canvas.frame.coarse[0]
    middle = (
        0.5
        + 0.5 * smoothstep(-skin / 110)
        + 0.55 * smoothstep((z - 50) / 40)
        + 0.2 * smoothstep((-80 - z) / 40)
    )
    return (scanner.noise_hu * middle * np.where(skin > 8, 0.7, 1.0)).astype(np.float32)
