"""Where voxels lie in the patient: a grid in mm, and its canonical order LPS."""

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from p2w.errors import UserError

CANONICAL = "LPS"  # x to the patient's left, y to posterior, z to superior: ITK's and DICOM's axes
OPPOSITE = {"R": "L", "A": "P", "I": "S"}


class BadScan(UserError):
    """Why a scan cannot be cut: one line, without the scan's name."""


@dataclass(frozen=True)
class Grid:
    """An image's grid, axes x, y, z as ITK has them; direction is 3x3, row by row, its columns the axes."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]  # mm
    origin: tuple[float, ...]  # mm
    direction: tuple[float, ...]

    def canonical(self) -> tuple["Grid", list[int], list[bool]]:
        """The same grid in LPS order, and how to get there.

        The permutation names, for new x, y, z, the stored axis; the flags say which of the new axes run
        backwards. The same as SimpleITK's DICOMOrient, but a view of the array does, where that copies it.
        """
        letters = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(self.direction)
        plain = [OPPOSITE.get(letter, letter) for letter in letters]
        volume = abs(
            np.linalg.det(np.array(self.direction).reshape(3, 3))
        )  # 1 where the axes are at right angles
        if (
            volume < 0.1
            or sorted(plain) != sorted(CANONICAL)
            or not np.isfinite([*self.spacing, *self.origin]).all()
        ):
            raise BadScan(f"no place in space: direction {self.direction}, spacing {self.spacing} mm")
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
    """The view of a stored array [z,y,x] that `Grid.canonical` describes; nothing is copied."""
    view = array.transpose([2 - axis for axis in reversed(order)])
    steps = tuple(slice(None, None, -1 if flip else 1) for flip in reversed(flips))
    return view[steps]
