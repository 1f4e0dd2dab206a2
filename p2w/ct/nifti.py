"""NIfTI-1 and -2 headers: where the voxels are, and where they lie in the patient. As in nifti1.h and nifti2.h.

The file may be packed by gzip or not, whatever its name says. Geometry that two readers would read in two ways is refused:
no orientation code, a qform and an sform that disagree, voxel sizes that are not those of the matrix, sheared axes.
"""

import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2w.ct.orientation import BadScan, Grid
from p2w.ct.voxel_files import GZIP, HEADER, MAGIC_GZIP, VoxelLayout

NIFTI_TYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
MANY = {128: 3, 2304: 4, 32: 2, 1792: 2, 2048: 2}  # types of several values a voxel: RGB, RGBA, complex
UNITS_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # unknown, m, mm, micrometre
SPACING_SHARE = 1e-2  # by which voxel sizes of pixdim and of the matrix may differ
NEAR = 1e-4  # share by which they may differ and are the same but for rounding
APART_VOXELS = 0.5  # most that qform and sform may put a corner of the volume apart


@dataclass(frozen=True)
class _Header:
    """The fields that are used, of either version."""

    dims: tuple[int, ...]
    kind: int
    pixdim: tuple[float, ...]
    offset: float
    slope: float
    intercept: float
    units: int
    codes: tuple[int, int]  # qform, sform
    quatern: tuple[float, ...]  # b, c, d, then x, y, z
    srow: tuple[float, ...]  # 12 numbers by rows
    magic: bytes
    size: int  # bytes of the header and the flag of extensions
    order: str


# Bytes of the header of either version -> where its magic is, and format and first byte of each field.
LAYOUTS: dict[int, tuple[int, dict[str, tuple[str, int]]]] = {
    348: (344, {
        "dims": ("8h", 40), "kind": ("h", 70), "pixdim": ("8f", 76), "offset": ("f", 108), "slope": ("f", 112),
        "intercept": ("f", 116), "units": ("B", 123), "codes": ("2h", 252), "quatern": ("6f", 256), "srow": ("12f", 280),
    }),
    540: (4, {
        "dims": ("8q", 16), "kind": ("h", 12), "pixdim": ("8d", 104), "offset": ("q", 168), "slope": ("d", 176),
        "intercept": ("d", 184), "units": ("i", 500), "codes": ("2i", 344), "quatern": ("6d", 352), "srow": ("12d", 400),
    }),
}  # fmt: skip


def _parse(head: bytes) -> _Header:
    """Raises BadScan for what is no NIfTI header, and struct.error for one that ends early."""
    for order in "<>":
        size = struct.unpack_from(order + "i", head)[0]
        if size in LAYOUTS:
            magic, fields = LAYOUTS[size]
            found = {name: struct.unpack_from(order + form, head, at) for name, (form, at) in fields.items()}
            values: dict[str, Any] = {name: one[0] if len(one) == 1 else one for name, one in found.items()}
            values["offset"] = float(values["offset"])
            return _Header(**values, magic=head[magic : magic + 4], size=size + 4, order=order)
    raise BadScan("is no NIfTI file: its header has another length than 348 or 540 bytes")


def read_nifti(path: str) -> tuple[VoxelLayout, Grid]:
    """The layout of the voxels and the stored grid of a `.nii` or `.nii.gz`, whose axes may be sheared. Raises BadScan."""
    with open(path, "rb") as file:
        head = file.read(HEADER)
    packed = head[:2] == MAGIC_GZIP
    try:
        head = zlib.decompressobj(GZIP).decompress(head, HEADER) if packed else head
        header = _parse(head)
        if len(head) < header.size:
            raise struct.error("it ends within its header")
        _check_offset(header, head)
    except (struct.error, zlib.error) as error:
        raise BadScan(f"the NIfTI header cannot be read ({error}): copy it again") from error
    dims = _size(header)
    slope, intercept = header.slope, header.intercept
    if slope not in (0, 1) and math.isfinite(slope) and not math.isfinite(intercept):
        raise BadScan(f"scl_slope is {slope:g}, but scl_inter is {intercept}: set it, 0 for none")
    if slope == 0 or not np.isfinite([slope, intercept]).all():  # the standard says: no scaling
        slope, intercept = 1.0, 0.0
    dtype = np.dtype(header.order + NIFTI_TYPES[header.kind])
    layout = VoxelLayout(
        path, int(header.offset), dtype, math.prod(dims), packed, unpack_first=packed, slope=slope,
        intercept=intercept,
    )  # fmt: skip
    return layout, _grid(header, dims)


def _size(header: _Header) -> tuple[int, int, int]:
    """Number of voxels along x, y, z. Raises BadScan unless the image is one volume of single values."""
    dims = header.dims
    damaged = f"the NIfTI header is damaged (dimensions {dims}, voxels at {header.offset}): copy it again"
    if not 1 <= dims[0] <= 7 or min(dims[1 : dims[0] + 1]) < 1:
        raise BadScan(damaged)
    if header.kind in MANY:
        raise BadScan(f"has {MANY[header.kind]} values a voxel (RGB or a vector), not one CT value")
    if header.kind not in NIFTI_TYPES:
        raise BadScan(f"holds voxels of the NIfTI type {header.kind}, which is not read: convert it to int16")
    size = list(dims[1 : dims[0] + 1])
    while len(size) > 3 and size[-1] == 1:
        size.pop()
    if len(size) != 3:
        raise BadScan(
            f"{len(size)}-D, of size {'x'.join(map(str, size))}: one volume of 3 dimensions is needed"
        )
    return size[0], size[1], size[2]


def _check_offset(header: _Header, head: bytes) -> None:
    """Raise BadScan unless the voxels begin behind the header and its extensions."""
    if header.magic[:2] == b"ni":
        raise BadScan("the header of a pair (.hdr, .img) under the name of a single file: convert it to .nii")
    if header.magic[:2] != b"n+":
        raise BadScan(
            "no NIfTI but Analyze, which has no orientation: convert it with a program that knows it"
        )
    at, offset = header.size, header.offset
    if not math.isfinite(offset) or offset != int(offset) or not at <= offset < 1 << 62:
        raise BadScan(
            f"the NIfTI header is damaged (voxels at byte {offset:g}, its header takes {at}): vox_offset has to be at "
            f"least {at}"
        )
    if head[at - 4] == 0:
        return
    while at + 8 <= min(offset, len(head)):
        size = struct.unpack_from(header.order + "i", head, at)[0]
        if size < 8:
            break
        at += size
    if at > offset:
        raise BadScan(
            f"the NIfTI header is damaged (voxels at byte {offset:g}, inside an extension that ends at {at}): copy it again"
        )


def _grid(header: _Header, size: tuple[int, int, int]) -> Grid:
    """The stored grid, in LPS mm. Raises BadScan where the header does not say it, or in two ways."""
    qcode, scode = header.codes
    if qcode <= 0 and scode <= 0:
        raise BadScan(
            "no orientation (qform_code and sform_code are 0), so nothing says where left, front and head are: set one, "
            "with nibabel: image.set_sform(affine, 1)"
        )
    sform = np.array(header.srow).reshape(3, 4) if scode > 0 else None
    qform = _qform(header) if qcode > 0 else None
    if sform is not None and not np.isfinite(sform).all():
        raise BadScan("its sform has values that are not finite: set it again")
    if sform is not None and qform is not None:
        _check_equal(qform, sform, size)
    matrix = sform if sform is not None else qform
    if matrix is None:
        raise BadScan(
            f"voxel sizes {[float(mm) for mm in header.pixdim[1:4]]} (pixdim): have to be above 0 for its qform"
        )
    lengths = np.linalg.norm(matrix[:, :3], axis=0)
    if not (lengths > 0).all():
        raise BadScan("its sform has an axis of length 0: set it again")
    given = np.array(header.pixdim[1:4])
    stated = np.isfinite(given) & (given != 0)
    off = np.abs(np.abs(given) / lengths - 1)
    if (off[stated] > SPACING_SHARE).any():
        sizes = [[round(float(mm), 4) for mm in three] for three in (given, lengths)]
        raise BadScan(
            f"voxel sizes {sizes[0]} (pixdim), but {sizes[1]} by its sform: make them equal, with nibabel: "
            "image.set_sform(affine, 1)"
        )
    scale = UNITS_MM.get(header.units & 7)
    if scale is None:
        raise BadScan(
            f"unit of length {header.units & 7} (xyzt_units), which the standard does not have: set mm"
        )
    spacing = np.where(stated & (off <= NEAR), np.abs(given), lengths) * scale
    lps = np.array([-1.0, -1.0, 1.0])
    direction = lps[:, None] * matrix[:, :3] / lengths
    grid = Grid(
        size, tuple(spacing.tolist()), tuple((lps * matrix[:, 3] * scale).tolist()), tuple(direction.ravel().tolist())
    )  # fmt: skip
    return grid


def _qform(header: _Header) -> NDArray[np.float64] | None:
    """The matrix (3, 4) of the quaternion; None where voxel sizes are missing. Raises BadScan."""
    b, c, d, *origin = (float(value) for value in header.quatern)
    pixdim = [float(value) for value in header.pixdim[:4]]
    rest = 1 - (b * b + c * c + d * d)
    if not np.isfinite([*header.quatern]).all() or rest < -1e-3:
        raise BadScan("its qform is no rotation (quaternion longer than 1): set it again")
    if not all(math.isfinite(mm) and mm > 0 for mm in pixdim[1:]):
        return None
    a = math.sqrt(rest) if rest > 1e-7 else 0.0
    if a == 0:
        b, c, d = np.array([b, c, d]) / math.sqrt(b * b + c * c + d * d)
    rotation = np.array([
        [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
        [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
        [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - c * c - b * b],
    ])  # fmt: skip
    handed = -1.0 if pixdim[0] < 0 else 1.0
    return np.hstack(
        [rotation * [pixdim[1], pixdim[2], pixdim[3] * handed], np.array(origin, float)[:, None]]
    )


def _check_equal(qform: NDArray[np.float64], sform: NDArray[np.float64], size: tuple[int, ...]) -> None:
    """Raise BadScan where qform and sform put a corner of the volume at two places."""
    last = np.array(size) - 1
    corners = np.stack(np.meshgrid(*[[0, n] for n in last], indexing="ij"), -1).reshape(-1, 3)
    gap = np.linalg.norm(corners @ (qform - sform)[:, :3].T + (qform - sform)[:, 3], axis=1).max()
    if gap > APART_VOXELS * np.linalg.norm(sform[:, :3], axis=0).min():
        raise BadScan(
            f"qform and sform put it at two places, up to {gap:.1f} mm apart, and readers differ in which they take: set "
            "the code of the wrong one to 0, with nibabel: image.set_qform(None, 0)"
        )
