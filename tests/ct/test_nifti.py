"""NIfTI headers against SimpleITK, and every geometry that readers would read in two ways."""

import gzip
import struct

import numpy as np
import pytest
import SimpleITK as sitk
from ct_files import ct, write

from p2w.ct.discover import ScanSource
from p2w.ct.orientation import BadScan
from p2w.ct.scan import read_grid, read_scan

SHAPE = (12, 20, 16)
QFORM, SFORM = 252, 254  # bytes of the codes
PIXDIM, OFFSET, UNITS, MAGIC, SROW = 76, 108, 123, 344, 280


def source(path):
    return ScanSource("a", path.name, (str(path),))


def changed(path, *values):
    """Write values (byte, struct format, number, ...) into a header."""
    data = bytearray(path.read_bytes())
    for at, form, *numbers in values:
        struct.pack_into("<" + form, data, at, *numbers)
    path.write_bytes(bytes(data))
    return path


def refused(path):
    with pytest.raises(BadScan) as error:
        read_scan(source(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def as_nifti2(path):
    """The same image as NIfTI-2, by the offsets of nifti2.h."""
    old = path.read_bytes()
    new = bytearray(544)
    struct.pack_into("<i", new, 0, 540)
    new[4:12] = b"n+2\0\r\n\x1a\n"
    new[12:16] = old[70:74]
    struct.pack_into("<8q", new, 16, *struct.unpack_from("<8h", old, 40))
    struct.pack_into("<8d", new, 104, *struct.unpack_from("<8f", old, PIXDIM))
    struct.pack_into("<q2d", new, 168, 544, *struct.unpack_from("<2f", old, 112))
    struct.pack_into("<2i6d12d", new, 344, *struct.unpack_from("<2h6f12f", old, QFORM))
    struct.pack_into("<i", new, 500, old[UNITS])
    path.write_bytes(bytes(new) + old[352:])


TURNS = [np.eye(3), np.diag([-1, -1, 1]), np.array([[0, 0, 1], [-1, 0, 0], [0, 1, 0]])]


@pytest.mark.parametrize("turn", TURNS, ids=range(3))
@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (1, 1), (0, 4)])
@pytest.mark.parametrize("version", [1, 2])
def test_qform_sform_and_both_versions_are_read_as_itk_reads_them(tmp_path, turn, codes, version):
    path = write(tmp_path / "a.nii", ct(SHAPE), direction=turn)
    changed(path, (QFORM, "2h", *codes))
    image = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    if version == 2:
        as_nifti2(path)
    scan = read_scan(source(path))
    np.testing.assert_array_equal(scan.voxels, sitk.GetArrayFromImage(image))
    for name in ("spacing", "origin", "direction"):
        theirs = getattr(image, f"Get{name.capitalize()}")()
        np.testing.assert_allclose(getattr(scan.grid, name), theirs, atol=1e-4)


def test_packed_or_not_is_seen_from_the_content(tmp_path):
    plain, packed = write(tmp_path / "a.nii", ct(SHAPE)), write(tmp_path / "b.nii.gz", ct(SHAPE))
    plain.rename(tmp_path / "c.nii.gz")
    packed.rename(tmp_path / "d.nii")
    for name in ("c.nii.gz", "d.nii"):
        np.testing.assert_array_equal(read_scan(source(tmp_path / name)).voxels, ct(SHAPE))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([(QFORM, "2h", 0, 0)], "no orientation"),
        ([(PIXDIM + 4, "f", 0.0), (SFORM, "h", 0)], "have to be above 0"),
        ([(PIXDIM + 12, "f", -2.5), (SFORM, "h", 0)], "have to be above 0"),
        ([(PIXDIM + 12, "f", float("nan")), (SFORM, "h", 0)], "have to be above 0"),
        ([(PIXDIM + 12, "f", 5.0), (QFORM, "h", 0)], "(pixdim), but"),
        ([(SROW, "f", 0.7)], "qform and sform put it at two places"),  # left and right
        ([(SROW + 44, "f", 500.0)], "qform and sform put it at two places"),
        ([(SROW + 4, "f", 0.4), (QFORM, "h", 0)], "(pixdim), but"),
        ([(SROW, "4f", 0.0, 0.0, 0.0, 0.0), (QFORM, "h", 0)], "axis of length 0"),
        ([(SROW, "f", float("inf")), (QFORM, "h", 0)], "not finite"),
        ([(256, "3f", 1.0, 1.0, 1.0)], "no rotation"),
        ([(OFFSET, "f", 0.0)], "voxels at byte 0, its header takes 352"),
        ([(OFFSET, "f", 348.0)], "has to be at least 352"),
        ([(OFFSET, "f", 352.5)], "has to be at least 352"),
        ([(OFFSET, "f", 368.0), (348, "B", 1), (352, "i", 64)], "inside an extension that ends at 416"),
        ([(MAGIC, "4s", b"ni1\0")], "header of a pair"),
        ([(MAGIC, "4s", b"\0\0\0\0")], "Analyze"),
        ([(0, "i", 7)], "is no NIfTI file"),
        ([(UNITS, "B", 5)], "unit of length 5"),
        ([(UNITS, "B", 1)], "are they in another unit than mm?"),
        ([(112, "2f", 2.0, float("nan"))], "scl_slope is 2, but scl_inter is nan"),
        ([(70, "h", 128)], "3 values a voxel"),
        ([(70, "h", 1536)], "NIfTI type 1536"),
    ],
)
def test_headers_that_do_not_say_where_voxels_lie(tmp_path, values, why):
    path = changed(write(tmp_path / "a.nii", ct(SHAPE)), *values)
    assert why in refused(path)


def test_sheared_axes(tmp_path):
    """A gantry tilt as a converter writes it: the third axis leans."""
    path = write(tmp_path / "a.nii", ct(SHAPE))
    lean = np.tan(np.radians(15)) * 2.5
    length = float(np.hypot(lean, 2.5))
    changed(path, (QFORM, "h", 0), (SROW + 24, "f", lean), (PIXDIM + 12, "f", length))
    assert "sheared axes: y and z are 15.0 degrees off a right angle" in refused(path)


@pytest.mark.parametrize("pixdim", [0.0, -2.5, float("nan")])
def test_a_voxel_size_that_the_sform_says_need_not_be_in_pixdim(tmp_path, pixdim):
    path = write(tmp_path / "a.nii", ct(SHAPE))
    changed(path, (QFORM, "h", 0), (PIXDIM + 12, "f", pixdim))
    assert read_grid(source(path))[0].spacing == pytest.approx((0.7, 0.8, 2.5))


@pytest.mark.parametrize(("unit", "times"), [(1, 1000.0), (2, 1.0), (3, 0.001), (0, 1.0)])
def test_units_of_length(tmp_path, unit, times):
    """In metres and micrometres too, a scan has voxels of about a millimetre; others are a wrong unit."""
    stored = tuple(mm / times for mm in (0.7, 0.8, 2.5))
    origin = tuple(mm / times for mm in (-10.0, -20.0, 30.0))
    path = changed(write(tmp_path / "a.nii", ct(SHAPE), spacing=stored, origin=origin), (UNITS, "B", unit))
    grid, _ = read_grid(source(path))
    assert grid.spacing == pytest.approx((0.7, 0.8, 2.5)) and grid.origin == pytest.approx((-10, -20, 30))
    if times != 1:
        assert "are they in another unit than mm?" in refused(changed(path, (UNITS, "B", 2)))


def test_voxels_that_the_header_does_not_know_of(tmp_path):
    path = write(tmp_path / "a.nii", ct(SHAPE))
    path.write_bytes(path.read_bytes() + bytes(2 << 20))
    assert "wrong size" in refused(path)
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert "unpacks to more" in refused(tmp_path / "b.nii.gz")


@pytest.mark.parametrize("version", [1, 2])
def test_a_header_may_end_anywhere(tmp_path, version):
    path = write(tmp_path / "a.nii", ct(SHAPE))
    if version == 2:
        as_nifti2(path)
    data = path.read_bytes()
    for length in range(352 if version == 1 else 544):
        path.write_bytes(data[:length])
        assert refused(path)
