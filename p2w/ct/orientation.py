"""The grid of an image in the patient's space (mm), and its canonical orientation LPS."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from p2w.errors import UserError

CANONICAL = "LPS"  # x to the patient's left, y to posterior, z to superior: ITK's and DICOM's axes
OPPOSITE = {"R": "L", "A": "P", "I": "S"}
TOLERANCE_MM = 0.2  # a slice may be so far off its place in a volume: headers round positions


class BadScan(UserError):
    """A scan cannot be used. The message is one line without the scan's name."""

    ends_build = False
    """Whether no other scan is to be cut either, since what is wrong is the command and not the scan."""


def reason_of(error: Exception) -> str:
    """Why a scan cannot be read, without the absolute path that errors of the system name."""
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or type(error).__name__}"
    return str(error)


class ShearedAxes(BadScan):
    """The axes of a grid are not at right angles."""


@dataclass(frozen=True)
class Grid:
    """The grid of an image, axes in ITK's order x, y, z. `direction` is a 3x3 matrix by rows, whose columns are the axes."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]  # mm
    origin: tuple[float, ...]  # mm
    direction: tuple[float, ...]

    def canonical(self) -> tuple["Grid", list[int], list[bool]]:
        """The same grid in LPS orientation, with the permutation and flips that lead to it. Raises BadScan.

        `order[i]` is the stored axis that becomes axis i of x, y, z; `flips[i]` tells whether new axis i is reversed. The
        result is that of SimpleITK's DICOMOrient, which copies the array, while `to_canonical` makes a view.
        """
        letters = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(self.direction)
        plain = [OPPOSITE.get(letter, letter) for letter in letters]
        # 1 where the axes are at right angles
        volume = abs(np.linalg.det(np.array(self.direction).reshape(3, 3)))
        if (
            volume < 0.1
            or sorted(plain) != sorted(CANONICAL)
            or not np.isfinite([*self.spacing, *self.origin]).all()
        ):
            raise BadScan(f"invalid orientation: direction {self.direction}, spacing {self.spacing} mm")
        order = [plain.index(letter) for letter in CANONICAL]
        flips = [letters[axis] in OPPOSITE for axis in order]
        matrix = np.array(self.direction).reshape(3, 3)
        origin = np.array(self.origin)
        columns = []
        for axis, flip in zip(order, flips, strict=True):
            if flip:
                origin = origin + matrix[:, axis] * self.spacing[axis] * (self.size[axis] - 1)
            columns.append(-matrix[:, axis] if flip else matrix[:, axis])
        grid = Grid(
            size=tuple(self.size[axis] for axis in order),
            spacing=tuple(self.spacing[axis] for axis in order),
            origin=tuple(origin.tolist()),
            direction=tuple((np.stack(columns, axis=1) + 0.0).ravel().tolist()),  # + 0.0: no minus zero
        )
        return grid, order, flips


def to_canonical(array: np.ndarray, order: list[int], flips: list[bool]) -> np.ndarray:
    """A view of a stored array [z,y,x] in the canonical orientation, for `order` and `flips` of `Grid.canonical`."""
    view = array.transpose([2 - axis for axis in reversed(order)])
    steps = tuple(slice(None, None, -1 if flip else 1) for flip in reversed(flips))
    return view[steps]


VOXEL_MM = (0.01, 100.0)  # smallest and largest voxel of a scan of a person: beyond, the unit is not mm
SHEAR_MM = 0.5  # most that the far end of an axis may be off its right angle to another


def check_voxel_size(spacing_xyz: Sequence[float]) -> None:
    """Raise BadScan unless these are sizes in mm that voxels of a scan can have."""
    sizes = [float(f"{mm:.4g}") for mm in spacing_xyz]
    if min(spacing_xyz) <= 0:
        raise BadScan(f"voxel sizes {sizes} mm (x, y, z): have to be above 0")
    low, high = VOXEL_MM
    if not all(low <= mm <= high for mm in spacing_xyz):
        raise BadScan(
            f"voxel sizes {sizes} mm (x, y, z): have to be from {low:g} to {high:g}; are they in another unit than mm?"
        )


def leaning_slices(grid: Grid) -> tuple[Grid, tuple[tuple[float, ...], ...]]:
    """Slices of a grid whose third axis leans: the grid of the first with its normal, and the place (x, y, z in mm) of each.

    Raises BadScan where the other two axes are at no right angle, or the third lies in their plane.
    """
    axes = np.array(grid.direction).reshape(3, 3)
    normal = np.cross(axes[:, 0], axes[:, 1])
    normal *= np.sign(normal @ axes[:, 2]) / max(float(np.linalg.norm(normal)), 1e-6)
    step = float(normal @ axes[:, 2]) * grid.spacing[2]
    direction = tuple(np.stack([axes[:, 0], axes[:, 1], normal], axis=1).ravel().tolist())
    straight = Grid(grid.size, (*grid.spacing[:2], step), grid.origin, direction)
    check_axes(straight)
    along = axes[:, 2] * grid.spacing[2]
    return straight, tuple(tuple((np.array(grid.origin) + k * along).tolist()) for k in range(grid.size[2]))


def check_axes(grid: Grid) -> None:
    """Raise BadScan unless the axes are unit vectors at right angles, and spacing and origin are finite numbers of mm."""
    matrix = np.array(grid.direction).reshape(3, 3)
    if not np.isfinite([*grid.direction, *grid.spacing, *grid.origin]).all():
        raise BadScan(f"invalid orientation: direction {grid.direction}, spacing {grid.spacing} mm")
    check_voxel_size(grid.spacing)
    lengths = np.linalg.norm(matrix, axis=0)
    if np.abs(lengths - 1).max() > 1e-3 or abs(np.linalg.det(matrix)) < 0.1:
        raise BadScan(f"invalid orientation: direction {grid.direction} has axes that are no unit vectors")
    extent = np.array(grid.size) * grid.spacing
    cosines = np.abs(matrix.T @ matrix - np.eye(3))
    off = cosines * np.maximum(extent[:, None], extent[None, :])
    if off.max() > SHEAR_MM:
        i, j = np.unravel_index(int(off.argmax()), off.shape)
        angle = np.degrees(np.arcsin(min(1.0, float(cosines[i, j]))))
        raise ShearedAxes(
            f"sheared axes: {'xyz'[i]} and {'xyz'[j]} are {angle:.1f} degrees off a right angle, {off.max():.1f} mm at the "
            f"far end ({SHEAR_MM:g} mm are tolerated), as of a gantry tilt: resample it to a straight grid (--resample-tilt)"
        )
