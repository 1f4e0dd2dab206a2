"""DICOM slices as pydicom writes them, with any tag, of a body that tells left from right and head from foot."""

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="the extra parts2whole[test] brings pydicom")
Dataset, FileMetaDataset = pydicom.dataset.Dataset, pydicom.dataset.FileMetaDataset

CT_IMAGE, ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1"


def body(slices=12, rows=24, columns=28):
    """HU int16 [z,y,x]: air, soft tissue, one lung on the left, and a spine that is denser towards the feet."""
    z, y, x = np.ogrid[:slices, :rows, :columns]
    inside = ((y - rows / 2) / (0.45 * rows)) ** 2 + ((x - columns / 2) / (0.45 * columns)) ** 2 < 1
    hu = np.where(inside, 40 + (x + y + z) % 3, -1000)
    lung = ((y - 0.45 * rows) / (0.2 * rows)) ** 2 + ((x - 0.3 * columns) / (0.15 * columns)) ** 2 < 1
    hu = np.where(lung, -850 + z, hu)
    spine = (abs(y - 0.8 * rows) < 2) & (abs(x - columns / 2) < 2)
    return np.where(spine, 700 - 3 * z, hu).astype(np.int16)


def ct_slice(
    hu,
    number,
    position,
    *,
    iop=(1, 0, 0, 0, 1, 0),
    intercept=-1024,
    signed=0,
    bits=16,
    series="1.2.3",
    **tags,
):
    """A CT slice of HU [y,x]; its first pixel is at `position` (x, y, z). Tags by pydicom's names, None leaves one out."""
    data, meta = Dataset(), FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = pydicom.uid.ExplicitVRLittleEndian, CT_IMAGE
    data.file_meta, data.SOPClassUID, data.Modality = meta, CT_IMAGE, "CT"
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.SeriesInstanceUID, data.SOPInstanceUID = series, f"{series}.{number + 1}"
    data.InstanceNumber = number + 1
    data.ImagePositionPatient = [f"{value:.5f}" for value in position]
    data.ImageOrientationPatient = [f"{value:.6f}" for value in iop]
    data.PixelSpacing = ["0.8", "0.7"]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.Rows, data.Columns = hu.shape
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, bits, bits - 1
    data.PixelRepresentation = signed
    data.RescaleSlope, data.RescaleIntercept = "1", str(intercept)
    data.PixelData = (hu.astype(int) - intercept).astype("<i2" if signed else "<u2").tobytes()
    data["PixelData"].VR = "OW"
    for name, value in tags.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    return data


def save(data, path):
    """Write a slice, its folder too, and give its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def write_series(folder, hu, heights=None, *, first=0, prefix="", place=None, **kwargs):
    """A series, one file a slice, at these heights in mm (2.5 mm apart unless told), or where `place(i)` says."""
    heights = heights if heights is not None else [2.5 * i for i in range(len(hu))]
    return [
        save(
            ct_slice(image, first + i, place(i) if place else (-10, -20, z), **kwargs),
            folder / f"{prefix}{i:04d}",
        )
        for i, (image, z) in enumerate(zip(hu, heights, strict=True))
    ]


def multi_frame(slices, **tags):
    """An Enhanced CT image of these slices, in their order, as its functional groups tell."""
    first = slices[0]
    data, meta = Dataset(), FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = pydicom.uid.ExplicitVRLittleEndian, ENHANCED_CT
    data.file_meta, data.SOPClassUID, data.Modality = meta, ENHANCED_CT, "CT"
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = "1.5.1"
    for name in (
        "SeriesInstanceUID",
        "ImageType",
        "SamplesPerPixel",
        "PhotometricInterpretation",
        "Rows",
        "Columns",
    ):
        setattr(data, name, getattr(first, name))
    for name in ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
        setattr(data, name, getattr(first, name))
    data.NumberOfFrames, data.PixelData = len(slices), b"".join(one.PixelData for one in slices)
    data["PixelData"].VR = "OW"
    shared = Dataset()
    shared.PlaneOrientationSequence = [_group(first, "ImageOrientationPatient")]
    shared.PixelMeasuresSequence = [_group(first, "PixelSpacing")]
    data.SharedFunctionalGroupsSequence = [shared]
    data.PerFrameFunctionalGroupsSequence = []
    for one in slices:
        own, content = Dataset(), Dataset()
        own.PlanePositionSequence = [_group(one, "ImagePositionPatient")]
        own.PixelValueTransformationSequence = [_group(one, "RescaleSlope", "RescaleIntercept")]
        if "TemporalPositionIdentifier" in one:
            content.TemporalPositionIndex = int(one.TemporalPositionIdentifier)
        own.FrameContentSequence = [content]
        data.PerFrameFunctionalGroupsSequence.append(own)
    for name, value in tags.items():
        setattr(data, name, value)
    return data


def _group(one, *names):
    """A functional group with these fields of a slice."""
    group = Dataset()
    for name in names:
        setattr(group, name, getattr(one, name))
    return group


def rtstruct(structures, series="1.2.3"):
    """An RTSTRUCT of a series: name of each structure -> its contours, each a list of (x, y, z) in mm."""
    data, meta = Dataset(), FileMetaDataset()
    data.SOPClassUID = meta.MediaStorageSOPClassUID = pydicom.uid.RTStructureSetStorage
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = "1.9.1"
    data.file_meta, data.Modality, data.SeriesInstanceUID = meta, "RTSTRUCT", "1.9"
    one, study, frame = Dataset(), Dataset(), Dataset()
    one.SeriesInstanceUID, study.RTReferencedSeriesSequence = series, [one]
    frame.RTReferencedStudySequence, data.ReferencedFrameOfReferenceSequence = [study], [frame]
    data.StructureSetROISequence, data.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(structures.items()):
        structure, roi = Dataset(), Dataset()
        structure.ROINumber, structure.ROIName = number, name
        roi.ReferencedROINumber, roi.ContourSequence = number, []
        for points in contours:
            contour = Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(points)
            contour.ContourData = [f"{value:.4f}" for point in points for value in point]
            roi.ContourSequence.append(contour)
        data.StructureSetROISequence.append(structure)
        data.ROIContourSequence.append(roi)
    return data
