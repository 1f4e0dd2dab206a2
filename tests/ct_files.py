"""Small CT scans as real files: every format the product reads, written by SimpleITK."""

import numpy as np
import SimpleITK as sitk

TAGS = {"0008|0060": "CT", "0028|1052": "-1024", "0028|1053": "1", "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL"}
# A small LUNA16: uid -> subset, slices
SCANS = {"1.3.1": (0, 130), "1.3.2": (0, 64), "1.3.3": (1, 70), "1.3.4": (2, 66), "1.3.5": (2, 64)}
KEEP_ALL = ("--min-std", "0")  # sub-scans of air too


def ct(shape, seed=0):
    """HU, int16 [z,y,x]: noisy air round an elliptic body with two lungs, padded at a corner."""
    rng = np.random.default_rng(seed)
    _, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    body = x**2 + (y * 1.4) ** 2 < 0.8
    lungs = ((abs(x) - 0.4) * 3) ** 2 + (y * 2) ** 2 < 0.5
    hu = np.where(body, np.where(lungs, -800, 40), -990) + rng.normal(0, 20, shape)
    hu[:: max(1, shape[0] // 3), : shape[1] // 4, : shape[2] // 8] = -3024  # outside the field of view
    return np.rint(hu).astype(np.int16)


def image(hu, spacing=(0.7, 0.8, 2.5), origin=(-10.0, -20.0, 30.0), direction=None):
    """A SimpleITK image of HU [z,y,x]; geometry in x, y, z."""
    made = sitk.GetImageFromArray(hu)
    made.SetSpacing(spacing)
    made.SetOrigin(origin)
    if direction is not None:
        made.SetDirection(np.asarray(direction, float).ravel().tolist())
    return made


def write(path, hu, **geometry):
    """One file of a whole volume, its format by its name; compressed where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = "packed" in path.name or path.name.endswith(".gz")
    sitk.WriteImage(image(hu, **geometry), str(path), packed)
    return path


def dicom(folder, hu, series, *, names=None, skip=(), compressor=None, tags=None, step=2.5):
    """A DICOM series, one file a slice; `names` in the order of z, `skip` leaves slices out."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetImageIO("GDCMImageIO")
    if compressor:
        writer.SetUseCompression(True)
        writer.SetCompressor(compressor)
    paths = []
    for z, values in enumerate(hu):
        if z in skip:
            continue
        one = image(values[None], spacing=(0.7, 0.8, step), origin=(-10.0, -20.0, 30.0 + step * z))
        own = {"0020|000e": series, "0008|0018": f"{series}.{z}", "0020|0013": str(z + 1)}
        for tag, value in {**TAGS, **own, **(tags or {})}.items():
            one.SetMetaData(tag, value)
        paths.append(folder / (names[z] if names else f"{z:04d}.dcm"))
        writer.SetFileName(str(paths[-1]))
        writer.Execute(one)
    return paths
