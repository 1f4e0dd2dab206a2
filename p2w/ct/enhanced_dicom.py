"""Multi-frame CT (Enhanced CT and Legacy Converted Enhanced CT): frames as slices. Needs pydicom, of the extra `dicom`.

Frames carry their geometry and rescale in functional groups, shared or of each frame (DICOM PS3.3 C.7.6.16).
"""

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2w.ct.dicom import Slice, not_a_scan
from p2w.ct.dicom_pixels import AIR, PixelForm, darken_padding, fill_padding, unpacked_files
from p2w.ct.orientation import BadScan
from p2w.errors import first_line

MISSING = "needs pydicom: pip install 'parts2whole[dicom]'"


def frames_of(slices: Sequence[Slice], modality: str = "CT") -> list[Slice]:
    """The slices of a series, with every frame of a multi-frame file as a slice of its own. Raises BadScan."""
    if not any(one.has_groups for one in slices):
        return list(slices)
    found = []
    for one in slices:
        found += _frames(one) if one.has_groups else [one]
    usable = [one for one in found if not_a_scan(one, modality) is None]
    if not usable:
        reasons = sorted({str(not_a_scan(one, modality)) for one in found})
        raise BadScan(f"a multi-frame DICOM of which every frame is left out: {', '.join(reasons)}")
    return usable


def drop_dicom_warnings() -> None:
    """Drop warnings of pydicom and highdicom in this process: they quote values of headers, such as a patient's name."""
    ours = r"p2w\.(ct|tasks|inference)\..*dicom"
    warnings.filterwarnings("ignore", category=UserWarning, module=rf"(pydicom|highdicom)\.|{ours}")


def read_dataset(path: str, pixels: bool = True) -> Any:
    """A file as pydicom reads it. Raises BadScan when it cannot, or pydicom is not installed."""
    try:
        import pydicom  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise BadScan(f"a multi-frame DICOM {MISSING}") from error
    drop_dicom_warnings()
    try:
        with unpacked_files((path,)) as files:  # force: without the preamble, as p2w.ct.dicom reads it too
            return pydicom.dcmread(files[0], stop_before_pixels=not pixels, force=True)
    except BadScan:
        raise
    except Exception as error:  # pydicom raises whatever its parsers do
        raise BadScan(f"cannot be read: {type(error).__name__}: {first_line(error)[:200]}") from error


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
            f"its functional groups are damaged ({type(error).__name__}: {first_line(error)[:200]})"
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
    names = ("CTImageFrameTypeSequence", "MRImageFrameTypeSequence", "PETFrameTypeSequence")
    kind = next((found for name in names if (found := item(name)) is not None), None)
    image_type = getattr(kind, "FrameType", None)
    rescale = [
        numbers("PixelValueTransformationSequence", name)[:1] for name in ("RescaleSlope", "RescaleIntercept")
    ]
    own_type = str(getattr(item("PixelValueTransformationSequence"), "RescaleType", "") or "")
    return replace(
        one,
        instance=f"{one.instance}.{number + 1}",
        frame=number,
        of_groups=True,
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
        kvp=str(getattr(item("CTXRayDetailsSequence"), "KVP", "") or one.kvp),
        echo=str(getattr(item("MREchoSequence"), "EffectiveEchoTime", "") or one.echo),
        b_value=str(getattr(item("MRDiffusionSequence"), "DiffusionBValue", "") or one.b_value),
        stack=str(getattr(content, "StackID", "") or ""),
    )


def read_frames(files: Sequence[str], frames: Sequence[tuple[int, int]], in_hu: bool = True) -> NDArray[Any]:
    """HU int16 [z,y,x] of frames (number of the file, number of the frame in it), in this order. Raises BadScan.

    Without `in_hu`, the values of another modality as float32.
    """
    out: NDArray[Any] | None = None
    padded: list[tuple[NDArray[Any], PixelForm] | None] = [None] * len(frames)
    for number, path in enumerate(files):
        data = read_dataset(path)
        try:
            cells = _cells(data)
        except Exception as error:  # pydicom raises whatever its decoders do
            raise BadScan(
                f"the pixels of {os.path.basename(path)} cannot be read ({first_line(error)[:200]}); compressed ones may "
                "need pip install pylibjpeg[all]"
            ) from error
        cells = cells if cells.ndim == 3 else cells[None]
        try:
            slices, form = _frames_rescale(path, data, len(cells)), _form(data)
        except (AttributeError, TypeError, ValueError) as error:
            raise BadScan(
                f"the header of {os.path.basename(path)} is damaged ({type(error).__name__}: {first_line(error)[:200]})"
            ) from error
        for z, (file, frame) in enumerate(frames):
            if file != number:
                continue
            if out is None:
                out = np.empty((len(frames), *cells.shape[1:]), np.int16 if in_hu else np.float32)
            if cells.shape[1:] != out.shape[1:]:
                raise BadScan("its files have frames of different sizes")
            slope, intercept = slices[frame]
            values = form.values(cells[frame]) if cells.dtype.itemsize == 2 else cells[frame]
            scaled = values.astype(np.float64) * slope + intercept
            out[z] = np.clip(np.rint(scaled), -32768, 32767) if in_hu else scaled
            one = replace(form, slope=slope, intercept=intercept)
            if in_hu and one.bright_padding:
                fill_padding(out[z], values, one)
            elif not in_hu and form.padding is not None:
                padded[z] = (values, one)
    assert out is not None
    if any(padded):
        darken_padding(out, padded)
    return out


def _cells(data: Any) -> NDArray[Any]:
    """The cells of all frames as they are stored, [frame,y,x] or [y,x]: pydicom would drop the bits above those stored."""
    if data.BitsAllocated != 16 or data.file_meta.TransferSyntaxUID.is_compressed:
        cells: NDArray[Any] = data.pixel_array
        return cells
    order = "<" if data.is_little_endian else ">"
    shape = (int(getattr(data, "NumberOfFrames", 1) or 1), data.Rows, data.Columns)
    stored = np.frombuffer(
        data.PixelData, order + ("i2" if data.PixelRepresentation else "u2"), math.prod(shape)
    )
    return stored.reshape(shape).astype(stored.dtype.newbyteorder("="))


def _form(data: Any) -> PixelForm:
    """What the header says of padding and bits. Raises BadScan where it contradicts itself."""
    stored, high, allocated = int(data.BitsStored), int(data.HighBit), int(data.BitsAllocated)
    if high != stored - 1 or stored > allocated:
        raise BadScan(
            f"BitsAllocated {allocated}, BitsStored {stored} and HighBit {high} contradict each other: export it again"
        )
    ends = None
    if (padding := getattr(data, "PixelPaddingValue", None)) is not None:
        limit = getattr(data, "PixelPaddingRangeLimit", None)
        limits = int(padding), int(padding if limit is None else limit)
        ends = (min(limits), max(limits))
    return PixelForm(
        stored=stored, high=high, allocated=allocated, signed=int(data.PixelRepresentation), inverted=False, slope=1.0,
        intercept=float(AIR), padding=ends, cells=(), overlay=0x60000102 in data,
    )  # fmt: skip


def _frames_rescale(path: str, data: Any, count: int) -> list[tuple[float, float]]:
    """Slope and intercept of every frame."""
    shared = next(iter(getattr(data, "SharedFunctionalGroupsSequence", None) or [None]))
    found = []
    own = list(getattr(data, "PerFrameFunctionalGroupsSequence", None) or [])
    # A file of one frame may be a slice among multi-frame files
    for groups in own[:count] or [None] * (count == 1):
        values = None
        for level in (groups, shared):
            sequence = getattr(level, "PixelValueTransformationSequence", None) if level is not None else None
            if sequence:
                values = (float(sequence[0].RescaleSlope), float(sequence[0].RescaleIntercept))
                break
        if values is None and "RescaleSlope" in data:
            values = (float(data.RescaleSlope), float(data.RescaleIntercept))
        if values is None and getattr(data, "Modality", "") == "MR":
            values = (1.0, 0.0)
        if values is None:
            raise BadScan(f"no rescale in {os.path.basename(path)}")
        found.append(values)
    if len(found) != count:
        raise BadScan(
            f"{os.path.basename(path)} has {count} frames of pixels and {len(found)} of functional groups"
        )
    return found
