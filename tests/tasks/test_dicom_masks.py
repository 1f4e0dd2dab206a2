"""DICOM series with masks of every kind: NIfTI, RTSTRUCT contours and DICOM-SEG segments, voxel by voxel."""

import gzip

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_files import body, rtstruct, save, write_series

from p2w.ct.dicom import salted_hash
from p2w.ct.discover import SearchOptions, find_scans
from p2w.ct.orientation import BadScan
from p2w.ct.scan import read_scan
from p2w.errors import UserError
from p2w.tasks.custom import Custom

pydicom = pytest.importorskip("pydicom", reason="pip install 'parts2whole[test]' brings pydicom")
highdicom = pytest.importorskip("highdicom", reason="pip install 'parts2whole[test]' brings highdicom")

HU = body(12, 40, 44)
SIZE = (8, 16, 16)
TAGS = dict.fromkeys(
    (
        "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime", "AccessionNumber",
        "ReferringPhysicianName", "PositionReferenceIndicator",
    ),
    "",
) | {"PatientID": "A1", "SliceThickness": "2.5", "StudyInstanceUID": "1.7", "FrameOfReferenceUID": "1.8"}  # fmt: skip
TRUTH = np.zeros(HU.shape, np.uint8)
TRUTH[3:9, 10:20, 12:30] = 1
TRUTH[4:6, 13:16, 15:20] = 0  # a hole


def series(folder):
    return write_series(folder / "ct", HU, **TAGS)


def masks_of(folder, **options):
    """The mask [z,y,x] of the only case, from its only sample, and the case; it holds the image as far as it reaches."""
    task = Custom(images="dicom", min_foreground=0.0, **options)
    task.check()
    cases = task.find(str(folder), "")
    assert not cases.bad, cases.bad
    (case,) = cases.cases
    samples = list(task.cut(case, HU.shape).samples)
    (sample,) = samples
    first = np.array(sample.first_voxel).astype(int)
    np.testing.assert_array_equal(sample.first_voxel, first)
    wide = np.pad(np.clip(HU, -1000, 1000), 64, constant_values=-1000)
    z, y, x = (slice(64 + start, 64 + start + n) for start, n in zip(first, HU.shape, strict=True))
    np.testing.assert_array_equal(sample.record[0], wide[z, y, x])
    mask = np.zeros_like(wide)
    mask[z, y, x] = sample.record[-1]
    return mask[64:-64, 64:-64, 64:-64], case


def mm(x, y, z):
    """The centre of a voxel of the series in mm."""
    return -10 + 0.7 * x, -20 + 0.8 * y, 2.5 * z


def square(z, y, x):
    """A contour round voxels z, from y and to y, from x and to x, half a voxel beyond their centres."""
    (y0, y1), (x0, x1) = y, x
    corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    shift = [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]
    return [mm(cx + dx, cy + dy, z) for (cx, cy), (dx, dy) in zip(corners, shift, strict=True)]


def structures(folder, contours):
    """An RTSTRUCT with these contours of the structure GTV, and a structure Body of one contour."""
    save(rtstruct({"GTV": contours, "Body": [square(2, (0, 39), (0, 43))]}), folder / "rs.dcm")


def gtv():
    contours = [square(z, (10, 19), (12, 29)) for z in range(3, 9)]
    return contours + [square(z, (13, 15), (15, 19)) for z in (4, 5)]


def test_rtstruct(tmp_path):
    series(tmp_path)
    structures(tmp_path, gtv())
    mask, case = masks_of(tmp_path, masks="rtstruct", structures="^gtv")
    np.testing.assert_array_equal(mask, TRUTH)
    assert case.patient == "1.2.3" and case.name == "ct (series 1.2.3)"  # nothing of the PatientID
    every, _ = masks_of(tmp_path, masks="rtstruct")
    assert every[2].mean() > 0.4 and (every[3:] == TRUTH[3:]).all()


@pytest.mark.parametrize(
    ("z", "why"), [(3.5, "lies between the slices of the image, at z = 3.50"), (14, "lies outside the image")]
)
def test_contours_that_are_not_on_slices(tmp_path, z, why):
    series(tmp_path)
    structures(tmp_path, [square(z, (10, 19), (12, 29))])
    with pytest.raises(BadScan, match=why):
        masks_of(tmp_path, masks="rtstruct", structures="GTV")
    with pytest.raises(BadScan, match="no structure is called like 'liver': it has Body, GTV"):
        masks_of(tmp_path, masks="rtstruct", structures="liver")


def on_grid(folder, contours):
    """The mask [z,y,x] of an RTSTRUCT whose structure GTV has these contours."""
    structures(folder, contours)
    return masks_of(folder, masks="rtstruct", structures="GTV")[0]


def test_contours_that_are_there_twice_or_in_one_another(tmp_path):
    series(tmp_path)
    outer, hole, island = (
        square(3, (5, 24), (5, 24)),
        square(3, (8, 20), (8, 20)),
        square(3, (10, 12), (10, 12)),
    )
    above = square(4, (5, 24), (5, 24))
    ring = np.zeros(HU.shape, bool)
    ring[3:5, 5:25, 5:25] = True
    np.testing.assert_array_equal(on_grid(tmp_path, [outer, above, outer[2:] + outer[:2]]), ring)
    ring[3, 8:21, 8:21] = False
    ring[3, 10:13, 10:13] = True
    for order in ([outer, hole, island], [island, outer, hole], [hole, island, outer]):
        np.testing.assert_array_equal(on_grid(tmp_path, [above, *order]), ring)
    with pytest.raises(BadScan, match="two contours of GTV cross"):
        on_grid(tmp_path, [outer, square(3, (20, 30), (20, 30))])


def test_contours_on_some_slices_alone(tmp_path):
    series(tmp_path)
    levels = {z: square(z, (5, 24), (5, 24)) for z in range(12)}
    with pytest.raises(BadScan, match=r"GTV has contours on every 3\. slice of the image alone"):
        on_grid(tmp_path, [levels[z] for z in (1, 4, 7)])
    for lesions in ((1, 2, 3, 7, 8), (1, 7), (1, 4, 11)):  # apart, or of one slice
        found = on_grid(tmp_path, [levels[z] for z in lesions])
        assert np.flatnonzero(found.any(axis=(1, 2))).tolist() == list(lesions)


def changed(folder, change):
    """The RTSTRUCT of the folder, with a change by pydicom."""
    data = pydicom.dcmread(folder / "rs.dcm")
    change(data)
    save(data, folder / "rs.dcm")


def first_contour(data):
    return data.ROIContourSequence[0].ContourSequence[0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda data: delattr(first_contour(data), "ContourData"), "is damaged .* no attribute 'ContourData'"),
        (lambda data: setattr(first_contour(data), "ContourData", ["1"] * 4), "is damaged .* cannot reshape"),
        (lambda data: first_contour(data).ContourData.__setitem__(0, "nan"), "points that are no numbers"),
        (lambda data: first_contour(data).ContourData.__setitem__(slice(0, 12, 3), ["900"] * 4), "beside the image"),
        (lambda data: delattr(data.ROIContourSequence[0], "ReferencedROINumber"), "is damaged"),
        (
            lambda data: setattr(data.ReferencedFrameOfReferenceSequence[0], "FrameOfReferenceUID", "1.99"),
            "its FrameOfReferenceUID is not its image's",
        ),
    ],
)  # fmt: skip
def test_structures_that_say_nothing_sure(tmp_path, change, why):
    series(tmp_path)
    structures(tmp_path, gtv())
    changed(tmp_path, change)
    with pytest.raises(BadScan, match=why):
        masks_of(tmp_path, masks="rtstruct", structures="GTV")


@pytest.mark.parametrize("form", ["gzip", "bare"])
def test_structures_that_break_the_file_format(tmp_path, form):
    series(tmp_path)
    structures(tmp_path, gtv())
    path = tmp_path / "rs.dcm"
    data = path.read_bytes()
    path.write_bytes(gzip.compress(data) if form == "gzip" else data[132:])
    np.testing.assert_array_equal(masks_of(tmp_path, masks="rtstruct", structures="GTV")[0], TRUTH)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_truncated_structure_set_is_not_used_in_part(tmp_path, share):
    series(tmp_path)
    structures(tmp_path, gtv())
    data = (tmp_path / "rs.dcm").read_bytes()
    (tmp_path / "rs.dcm").write_bytes(data[: int(share * len(data))])
    cases = Custom(images="dicom", masks="rtstruct").find(str(tmp_path), "")
    assert not cases.cases and any("rs.dcm" in name for name, _ in cases.bad)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL"])
def test_dicom_seg(tmp_path, kind):
    paths = series(tmp_path)
    images = [pydicom.dcmread(path) for path in paths]
    code = highdicom.sr.CodedConcept("91723000", "SCT", "Anatomical structure")
    algorithm = highdicom.AlgorithmIdentificationSequence("hand", code, "1")
    described = [
        highdicom.seg.SegmentDescription(n, label, code, code, "AUTOMATIC", algorithm)
        for n, label in ((1, "Tumour"), (2, "Lung"))
    ]
    lung = np.zeros_like(TRUTH)
    lung[1:3, 30:, 30:] = 1
    pixels = np.stack([TRUTH, lung], axis=-1)
    made = highdicom.seg.Segmentation(
        images, pixels if kind == "BINARY" else pixels.astype(np.float32), kind, described, "1.9", 3, "1.9.2", 1,
        "maker", "model", "1", "1",
    )  # fmt: skip
    save(made, tmp_path / "seg.dcm")
    mask, _ = masks_of(tmp_path, masks="seg", structures="tumour")
    np.testing.assert_array_equal(mask, TRUTH)
    mask, _ = masks_of(tmp_path, masks="seg")
    np.testing.assert_array_equal(mask, TRUTH | lung)


@pytest.mark.parametrize("name", ["1.2.3_mask.nii.gz", "ct_mask.nii.gz"])
def test_nifti(tmp_path, name):
    """As dcm2niix writes masks: rows the other way round."""
    series(tmp_path)
    image = sitk.GetImageFromArray(TRUTH)
    image.SetSpacing((0.7, 0.8, 2.5))
    image.SetOrigin((-10, -20, 0))
    sitk.WriteImage(sitk.DICOMOrient(image, "RAS"), str(tmp_path / name))
    mask, _ = masks_of(tmp_path)
    np.testing.assert_array_equal(mask, TRUTH)


def test_a_tilted_series_with_a_mask_on_its_straight_grid(tmp_path):
    lean = {"iop": (1, 0, 0, 0, np.cos(0.2), -np.sin(0.2)), "place": lambda i: (-10, -20, 2.5 * i)}
    write_series(tmp_path / "ct", HU, **TAGS, **lean)
    options = SearchOptions(resample=True)
    scan = read_scan(find_scans([str(tmp_path)], "", options=options).sources[0])
    truth = np.zeros(scan.voxels.shape, np.uint8)
    truth[4:8, 12:20, 10:30] = 1
    mask = sitk.GetImageFromArray(truth)
    mask.SetSpacing(scan.grid.spacing)
    mask.SetOrigin(scan.grid.origin)
    mask.SetDirection(scan.grid.direction)
    sitk.WriteImage(mask, str(tmp_path / "1.2.3_mask.nii.gz"))
    refused = Custom(images="dicom").find(str(tmp_path), "")
    assert any("gantry tilt" in why for _, why in refused.bad)
    task = Custom(images="dicom", resample_tilt=True, min_foreground=0.0)
    (case,) = task.find(str(tmp_path), "").cases
    (sample,) = task.cut(case, truth.shape).samples
    assert sample.record[-1].sum() == truth.sum()
    assert case.source("image").info.patient == salted_hash(
        "A1", ""
    )  # by which the leak check compares patients


def test_what_has_no_mask_or_several_is_named(tmp_path):
    series(tmp_path)
    task = Custom(images="dicom", masks="rtstruct")
    assert task.find(str(tmp_path), "").bad == [
        ("ct (series 1.2.3)", "has no mask (--masks rtstruct), one is needed")
    ]
    structures(tmp_path / "a", gtv())
    structures(tmp_path / "b", gtv())
    ((_, why),) = task.find(str(tmp_path), "").bad
    assert why.startswith("has 2 masks: a/rs.dcm, b/rs.dcm")
    save(rtstruct({"GTV": gtv()}, series="1.99"), tmp_path / "b" / "rs.dcm")
    found = task.find(str(tmp_path), "")
    assert ("b/rs.dcm", "refers to no series that is there and can be used") in found.left_out
    assert len(found.cases) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"masks": "seg"},
        {"images": "dicom", "masks": "seg", "labels": (1,)},
        {"images": "dicom", "values": "min-max"},
        {"images": "dicom", "structures": "("},
    ],
)
def test_options_that_do_not_go_together(options):
    with pytest.raises(UserError):
        Custom(**options).check()
