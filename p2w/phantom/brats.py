"""Phantoms of task bms: brains as BraTS_0001/BraTS_0001_{flair,t1,t1ce,t2,seg}.nii.gz, without a skull, 0 outside.

Labels as in BraTS: 1 necrotic core, 4 enhancing tumour, 2 oedema. On FLAIR, white matter lesions and caps of the ventricles
are as bright as oedema, but have no label.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from p2w.phantom.image_files import write_image

Shape = tuple[int, int, int]
Floats = NDArray[np.float32]
EXTENT_MM = (155.0, 200.0, 200.0)  # z, y, x that the image shows
MODALITIES = ("flair", "t1", "t1ce", "t2")
TISSUES = {  # flair, t1, t1ce, t2
    "csf": (0.15, 0.25, 0.25, 1.0),
    "grey": (0.62, 0.55, 0.57, 0.66),
    "white": (0.5, 0.8, 0.82, 0.48),
    "lesion": (0.88, 0.62, 0.62, 0.8),
    "oedema": (0.86, 0.55, 0.56, 0.84),
    "core": (0.42, 0.34, 0.34, 0.88),
    "rim": (0.74, 0.55, 1.0, 0.7),
}


@dataclass(frozen=True)
class Brain:
    """Tissue by number (0 outside, then the order of TISSUES), tumour labels, and the voxel size."""

    tissue: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    spacing_mm: tuple[float, float, float]


def write_brats_patient(folder: Path, seed: int, number: int, shape: Shape) -> None:
    """Write the four modalities and the segmentation of one patient."""
    rng = np.random.default_rng([seed, number, 5])
    brain = make_brain(rng, (shape[0] * 3 // 4, shape[1] * 3 // 4, shape[2] * 3 // 4))
    name = f"BraTS_{number + 1:04d}"
    (folder / name).mkdir()
    origin = tuple(-mm / 2 for mm in EXTENT_MM)
    for at, modality in enumerate(MODALITIES):
        path = folder / name / f"{name}_{modality}.nii.gz"
        write_image(path, _contrast(brain, at, rng), brain.spacing_mm, origin)
    write_image(folder / name / f"{name}_seg.nii.gz", brain.labels, brain.spacing_mm, origin)


def make_brain(rng: np.random.Generator, shape: Shape) -> Brain:
    """Draw a brain with one tumour."""
    spacing = tuple(mm / n for mm, n in zip(EXTENT_MM, shape, strict=True))
    axes = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing, strict=True)]
    z, y, x = (part.astype(np.float32) for part in np.meshgrid(*axes, indexing="ij", sparse=True))
    step = np.array(spacing)
    slow, mid, fine = (_field(rng, shape, mm / step) for mm in (22.0, 6.0, 3.0))
    half = np.array([62.0, 82.0, 66.0]) * rng.uniform(0.93, 1.05, 3)
    round_ = np.sqrt((z / half[0]) ** 2 + (y / half[1]) ** 2 + (x / half[2]) ** 2)
    depth = (1 - round_) * half.min() + 3 * slow  # mm under the surface
    inside = depth > 0
    cleft = (np.abs(x + 1.5 * slow) < 1.6) & (depth < 26) & (z > -20)
    sulci = (np.abs(mid) < 0.16) & (depth < 13)
    cortex = depth < 4.5 + 2.2 * mid + 1.2 * fine
    ribbon = (np.abs(mid) < 0.55) & (depth < 15)
    ventricle = _ventricles(z, y, np.abs(x) + 0 * y + 0 * z, rng, slow)
    nuclei = ((z + 4) / 13) ** 2 + ((y - 2) / 19) ** 2 + ((np.abs(x) - 22) / 9) ** 2 < 1 + 0.3 * mid
    tissue = np.zeros(shape, np.uint8)
    number = {name: i + 1 for i, name in enumerate(TISSUES)}
    tissue[inside] = number["white"]
    tissue[inside & (cortex | ribbon | nuclei)] = number["grey"]
    tissue[inside & (sulci | cleft)] = number["csf"]
    _lesions(tissue, ventricle, depth, step, number, rng)
    tissue[inside & (ventricle < 0)] = number["csf"]
    labels = _tumour(tissue, ventricle, depth, step, number, rng)
    return Brain(tissue, labels, (float(spacing[0]), float(spacing[1]), float(spacing[2])))


def _field(rng: np.random.Generator, shape: Shape, sigma: NDArray) -> Floats:
    """Smooth noise of mean 0 and standard deviation 1."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), sigma, mode="wrap")
    return (noise - noise.mean()) / noise.std()


def _ventricles(z: Floats, y: Floats, side: Floats, rng: np.random.Generator, slow: Floats) -> Floats:
    """Distance in mm, approximately, to the ventricles; negative inside."""
    wide = rng.uniform(5, 11)
    bend = 9 + 0.12 * np.abs(y) + 0.004 * y * y
    gap = np.sqrt(((z - 12) / 1.4) ** 2 + (side - bend) ** 2 + (np.maximum(np.abs(y + 4) - 26, 0)) ** 2)
    return (gap - wide - 0.8 * slow).astype(np.float32)


def _balls(
    shape: Shape, step: NDArray, centre: NDArray, bumps: Floats, radius: float, rough: float
) -> NDArray:
    """Depth in mm inside an irregular lump around a voxel, on the whole grid."""
    parts = [((np.arange(n) - c) * mm) ** 2 for n, c, mm in zip(shape, centre, step, strict=True)]
    gap = np.sqrt(parts[0][:, None, None] + parts[1][None, :, None] + parts[2][None, None, :])
    return radius - gap + rough * bumps


def _lesions(
    tissue: NDArray, ventricle: Floats, depth: Floats, step: NDArray, number: dict, rng: np.random.Generator
) -> None:
    """Paint caps of the ventricles and white matter lesions, some as large as a small tumour."""
    bumps = _field(rng, tissue.shape, 5 / step)
    white = tissue == number["white"]
    caps = white & (ventricle < rng.uniform(0.5, 4.0) + 2.5 * bumps)
    tissue[caps] = number["lesion"]
    positions = np.argwhere(white & (depth > 9) & (ventricle > 3))
    for _ in range(int(rng.integers(3, 9)) if len(positions) else 0):
        radius = float(np.clip(rng.lognormal(np.log(4.5), 0.45), 2.0, 11.0))
        centre = positions[rng.integers(len(positions))]
        tissue[(_balls(tissue.shape, step, centre, bumps, radius, 1.5) > 0) & white] = number["lesion"]


def _tumour(
    tissue: NDArray, ventricle: Floats, depth: Floats, step: NDArray, number: dict, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Paint a tumour into the tissue; returns its labels."""
    labels = np.zeros(tissue.shape, np.uint8)
    core = float(rng.uniform(5, 14))
    positions = np.argwhere((tissue == number["white"]) & (depth > core * 0.8 + 4) & (ventricle > 2))
    if not len(positions):
        positions = np.argwhere(depth > 0.6 * depth.max())
    centre = positions[rng.integers(len(positions))]
    bumps, wide = _field(rng, tissue.shape, 7 / step), _field(rng, tissue.shape, 11 / step)
    body = _balls(tissue.shape, step, centre, bumps, core, 0.22 * core)
    rim = float(rng.uniform(1.5, 4.0))
    free = (tissue > 0) & (ventricle > 0)
    reach = rng.uniform(4, 14)
    slack = np.where(tissue == number["grey"], -0.45 * reach, 0) - np.where(tissue == number["csf"], 99, 0)
    swollen = free & (body + reach + 0.35 * reach * wide + slack > 0)
    for name, label, where in (
        ("oedema", 2, swollen),
        ("rim", 4, free & (body > 0)),
        ("core", 1, free & (body > rim)),
    ):
        tissue[where], labels[where] = number[name], label
    return labels


def _contrast(brain: Brain, modality: int, rng: np.random.Generator) -> NDArray[np.int16]:
    """One modality: the patient's tissue values with partial volume, bias field, noise and a random scale."""
    step = np.array(brain.spacing_mm)
    values = np.array([0.0, *(row[modality] * rng.normal(1, 0.04) for row in TISSUES.values())], np.float32)
    image = ndimage.gaussian_filter(values[brain.tissue], 0.6)
    image *= np.exp(0.1 * _field(rng, brain.tissue.shape, 45 / step))
    image += 0.06 * _field(rng, brain.tissue.shape, 4 / step) * (brain.tissue > 0)
    noise = rng.normal(0, 0.03, (2, *image.shape))
    image = np.hypot(image + noise[0], noise[1]) * (brain.tissue > 0)
    return np.rint(image * rng.uniform(300, 1500)).astype(np.int16)
