"""Multi-frame CT (Enhanced CT and Legacy Converted Enhanced CT): frames as slices. Needs pydicom, of the extra `dicom`.

Frames carry their geometry and rescale in functional groups, shared or of each frame (DICOM PS3.3 C.7.6.16).
"""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2w.ct.dicom import Slice, not_a_scan
from p2w.ct.dicom_pixels import AIR, PixelForm, fill_padding
from p2w.ct.orientation import BadScan

MISSING = "needs pydicom: pip install 'parts2whole[dicom]'"


def frames_of(slices: Sequence[Slice], modality: str = "CT") -> list[Slice]:
    """The slices of a series, with every frame of a multi-frame file as a slice of its own. Raises BadScan."""
    if not any(one.frames > 1 for one in slices):
        return list(slices)
    found = []
    for one in slices:
        found += _frames(one) if one.frames > 1 else [one]
    usable = [one for one in found if not_a_scan(one, modality) is None]
    if not usable:
        raise BadScan("a multi-frame DICOM of localizers")
    return usable


def read_dataset(path: str, pixels: bool = True) -> Any:
    """A file as pydicom reads it. Raises BadScan when it cannot, or pydicom is not installed."""
    try:
        import pydicom  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise BadScan(f"a multi-frame DICOM {MISSING}") from error
    try:
        return pydicom.dcmread(path, stop_before_pixels=not pixels)
    except Exception as error:  # pydicom raises whatever its parsers do
        raise BadScan(f"cannot be read: {type(error).__name__}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _frames(one: Slice) -> list[Slice]:
    """A multi-frame file as slices. Raises BadScan where functional groups are missing."""
    data = read_dataset(one.path, pixels=False)
    shared = next(iter(getattr(data, "SharedFunctionalGroupsSequence", None) or [None]))
    own = list(getattr(data, "PerFrameFunctionalGroupsSequence", None) or [])
    if len(own) != one.frames:
        raise BadScan(
            f"a multi-frame DICOM of {one.frames} frames with {len(own)} functional groups, so nothing says where its "
            "frames lie: convert it to NIfTI (dcm2niix) first"
        )
    try:
        return [_frame(one, number, groups, shared) for number, groups in enumerate(own)]
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise BadScan(
            f"its functional groups are damaged ({type(error).__name__}: {_line(error)})"
        ) from error


def _frame(one: Slice, number: int, groups: Any, shared: Any) -> Slice:
    def item(sequence: str) -> Any:
        for level in (groups, shared):
            found = getattr(level, sequence, None) if level is not None else None
            if found:
                return found[0]
        return None

    def numbers(sequence: str, name: str) -> tuple[float, ...]:
        value = getattr(item(sequence), name, None)
        if value is None:
            return ()
        many = [value] if isinstance(value, str | int | float) else list(value)
        found = tuple(float(part) for part in many)
        return found if all(map(math.isfinite, found)) else ()

    content = item("FrameContentSequence")
    kind = item("CTImageFrameTypeSequence")
    image_type = getattr(kind, "FrameType", None)
    rescale = [
        numbers("PixelValueTransformationSequence", name)[:1] for name in ("RescaleSlope", "RescaleIntercept")
    ]
    own_type = str(getattr(item("PixelValueTransformationSequence"), "RescaleType", "") or "")
    return replace(
        one,
        instance=f"{one.instance}.{number + 1}",
        frame=number,
        position=numbers("PlanePositionSequence", "ImagePositionPatient"),
        orientation=numbers("PlaneOrientationSequence", "ImageOrientationPatient"),
        spacing=numbers("PixelMeasuresSequence", "PixelSpacing"),
        thickness=(numbers("PixelMeasuresSequence", "SliceThickness") or (one.thickness,))[0],
        rescale=(rescale[0] + rescale[1]) or one.rescale,
        rescale_type=own_type.upper() or one.rescale_type,
        image_type="\\".join(image_type) if image_type else one.image_type,
        acquisition=str(getattr(content, "FrameAcquisitionNumber", "") or one.acquisition),
        phase=str(getattr(content, "TemporalPositionIndex", "") or one.phase),
        time="",  # every frame has its own
        kernel=str(getattr(item("CTReconstructionSequence"), "ConvolutionKernel", "") or one.kernel),
    )


def read_frames(files: Sequence[str], frames: Sequence[tuple[int, int]]) -> NDArray[np.int16]:
    """HU int16 [z,y,x] of frames (number of the file, number of the frame in it), in this order. Raises BadScan."""
    out: NDArray[np.int16] | None = None
    for number, path in enumerate(files):
        data = read_dataset(path)
        try:
            cells = data.pixel_array
        except Exception as error:  # pydicom raises whatever its decoders do
            raise BadScan(
                f"the pixels of {os.path.basename(path)} cannot be read ({_line(error)}); compressed ones may need "
                "pip install pylibjpeg[all]"
            ) from error
        cells = cells if cells.ndim == 3 else cells[None]
        slices = _frames_rescale(path, data, len(cells))
        form = _form(data)
        for z, (file, frame) in enumerate(frames):
            if file != number:
                continue
            if out is None:
                out = np.empty((len(frames), *cells.shape[1:]), np.int16)
            slope, intercept = slices[frame]
            hu = np.rint(cells[frame].astype(np.float64) * slope + intercept)
            out[z] = np.clip(hu, -32768, 32767)
            if form.padding is not None:
                one = replace(form, slope=slope, intercept=intercept)
                if one.bright_padding:
                    fill_padding(out[z], cells[frame], one)
    assert out is not None
    return out


def _form(data: Any) -> PixelForm:
    """What the header says of padding and bits. Raises BadScan where it contradicts itself."""
    stored, high, allocated = int(data.BitsStored), int(data.HighBit), int(data.BitsAllocated)
    if high != stored - 1 or stored > allocated:
        raise BadScan(
            f"BitsAllocated {allocated}, BitsStored {stored} and HighBit {high} contradict each other: export it again"
        )
    ends = None
    if (padding := getattr(data, "PixelPaddingValue", None)) is not None:
        limits = int(padding), int(getattr(data, "PixelPaddingRangeLimit", None) or padding)
        ends = (min(limits), max(limits))
    return PixelForm(
        stored=stored, high=high, allocated=allocated, signed=int(data.PixelRepresentation), inverted=False, slope=1.0,
        intercept=float(AIR), padding=ends, cells=(), overlay=False,
    )  # fmt: skip


def _frames_rescale(path: str, data: Any, count: int) -> list[tuple[float, float]]:
    """Slope and intercept of every frame."""
    shared = next(iter(getattr(data, "SharedFunctionalGroupsSequence", None) or [None]))
    found = []
    for groups in list(getattr(data, "PerFrameFunctionalGroupsSequence", None) or [])[:count]:
        values = None
        for level in (groups, shared):
            sequence = getattr(level, "PixelValueTransformationSequence", None) if level is not None else None
            if sequence:
                values = (float(sequence[0].RescaleSlope), float(sequence[0].RescaleIntercept))
                break
        if values is None and "RescaleSlope" in data:
            values = (float(data.RescaleSlope), float(data.RescaleIntercept))
        if values is None:
            raise BadScan(f"no rescale in {os.path.basename(path)}")
        found.append(values)
    if len(found) != count:
        raise BadScan(
            f"{os.path.basename(path)} has {count} frames of pixels and {len(found)} of functional groups"
        )
    return found
