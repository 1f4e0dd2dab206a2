"""DICOM series against SimpleITK's own reading, in every encoding, and series with all kinds of faults."""

import os
import random
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from crc32c import crc32c
from ct_files import ct, dicom

from p2w.ct.dicom import read_slice
from p2w.ct.dicom_pixels import plain_pixels
from p2w.ct.discover import find_scans
from p2w.ct.orientation import BadScan
from p2w.ct.scan import read_grid, read_scan

SHAPE = (9, 16, 12)


def find(*roots, **options):
    return find_scans([str(root) for root in roots], "/no/such/out", **options)


def bad(tmp_path):
    found = find(tmp_path)
    assert not found.sources
    ((_, why),) = found.bad
    assert "\n" not in why
    return why


def element(tag, vr, value, order="<", explicit=True):
    """One DICOM element; a value of None is a sequence of undefined length with one item in it."""
    head = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF)
    if value is None:
        inner = element(0x00081150, b"UI", b"1.2", order, explicit)
        item = (
            struct.pack(order + "HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
            + inner
            + struct.pack(order + "HHI", 0xFFFE, 0xE00D, 0)
        )
        length = (
            b"SQ\0\0" + struct.pack(order + "I", 0xFFFFFFFF)
            if explicit
            else struct.pack(order + "I", 0xFFFFFFFF)
        )
        return head + length + item + struct.pack(order + "HHI", 0xFFFE, 0xE0DD, 0)
    value += b" " * (len(value) % 2)
    if not explicit:
        return head + struct.pack(order + "I", len(value)) + value
    if vr in (b"OW", b"UN"):
        return head + vr + b"\0\0" + struct.pack(order + "I", len(value)) + value
    return head + vr + struct.pack(order + "H", len(value)) + value


def test_series_in_one_folder_in_any_order_without_extensions(tmp_path):
    names = [f"IM{number}" for number in random.Random(0).sample(range(1000), 18)]
    volumes = {"1.2.3": ct(SHAPE, 1), "1.2.4": ct(SHAPE, 2)}
    for (uid, hu), own in zip(volumes.items(), (names[:9], names[9:]), strict=True):
        dicom(tmp_path / "study", hu, uid, names=own)
    (tmp_path / "study" / "DICOMDIR").write_bytes(b"not an image")
    (tmp_path / "study" / "notes.txt").write_text("hello")
    found = find(tmp_path)
    assert [source.uid for source in found.sources] == list(volumes)
    assert (found.bad, found.left_out, found.not_images) == ([], [], 2)
    for source in found.sources:
        scan = read_scan(source)
        np.testing.assert_array_equal(scan.voxels, volumes[source.uid])
        image = sitk.DICOMOrient(sitk.ReadImage(source.files), "LPS")
        np.testing.assert_array_equal(scan.voxels, sitk.GetArrayFromImage(image))
        for name in ("spacing", "origin", "direction"):
            theirs = getattr(image, f"Get{name.capitalize()}")()
            np.testing.assert_allclose(getattr(scan.grid, name), theirs, atol=1e-6)
        assert read_grid(source) == (scan.grid, scan.nbytes)


@pytest.mark.parametrize("compressor", ["JPEG2000", "JPEG"])
def test_compressed_dicom(tmp_path, compressor):
    dicom(tmp_path, ct(SHAPE), "1.2.3", compressor=compressor)
    (source,) = find(tmp_path).sources
    np.testing.assert_array_equal(read_scan(source).voxels, ct(SHAPE))


def test_fractional_slopes_are_rounded_and_not_cut_off(tmp_path):
    for path in dicom(tmp_path, ct(SHAPE), "1.2.3"):
        path.write_bytes(path.read_bytes().replace(b"-1024 ", b"-999.5"))
    (source,) = find(tmp_path).sources
    assert not source.exact
    stored = sitk.GetArrayFromImage(sitk.ReadImage(source.files[4]))[0].astype(np.float64)
    np.testing.assert_array_equal(read_scan(source).voxels[4], np.rint(stored))


def replaced(path, tag, vr, old, new):
    """Give an element of implicit form, which GDCM writes, another value of the same length."""
    data = path.read_bytes()
    before, after = (element(tag, vr, value, explicit=False) for value in (old, new))
    assert data.count(before) == 1
    path.write_bytes(data.replace(before, after))


def by_gdcm(source):
    series = sitk.ImageSeriesReader()
    series.SetImageIO("GDCMImageIO")
    series.SetFileNames(source.files)
    return np.clip(sitk.GetArrayFromImage(series.Execute()).astype(np.int64), -32768, 32767)


@pytest.mark.parametrize(
    "slope, intercept", [("1 ", "-1024 "), ("2 ", "-2000 "), ("1 ", "0     "), ("3 ", "-40000")]
)
@pytest.mark.parametrize("dtype", [np.int16, np.uint16])
def test_uncompressed_pixels_are_those_of_gdcm(tmp_path, dtype, slope, intercept):
    """Files are read once, also for the checksum; values beyond int16 are limited, as for all formats."""
    values = np.random.default_rng(0).integers(0, 31000, SHAPE).astype(dtype)
    for path in dicom(tmp_path, values, "1.2.3"):
        replaced(path, 0x00281053, b"DS", b"1 ", slope.encode())
        replaced(path, 0x00281052, b"DS", b"-1024 ", intercept.encode())
    (source,) = find(tmp_path).sources
    found = plain_pixels(source.files, source.grid.size)
    assert found is not None
    np.testing.assert_array_equal(found[0], by_gdcm(source))
    assert found[1] == crc32c(b"".join(Path(file).read_bytes() for file in source.files))


def test_bits_above_bits_stored_are_ignored(tmp_path):
    for path in dicom(tmp_path, ct(SHAPE), "1.2.3"):
        replaced(path, 0x00280101, b"US", struct.pack("<H", 16), struct.pack("<H", 12))
        replaced(path, 0x00280102, b"US", struct.pack("<H", 15), struct.pack("<H", 11))
    (source,) = find(tmp_path).sources
    found = plain_pixels(source.files, source.grid.size)
    assert found is not None
    np.testing.assert_array_equal(found[0], by_gdcm(source))


@pytest.mark.parametrize("case", ["packed", "cut short", "eight bits high"])
def test_other_pixels_are_left_to_gdcm(tmp_path, case):
    packed = {"compressor": "JPEGLS"} if case == "packed" else {}
    for path in dicom(tmp_path, ct(SHAPE), "1.2.3", **packed):
        if case == "eight bits high":
            replaced(path, 0x00280102, b"US", struct.pack("<H", 15), struct.pack("<H", 7))
    (source,) = find(tmp_path).sources
    if case == "cut short":  # after it was found
        Path(source.files[2]).write_bytes(Path(source.files[2]).read_bytes()[:-9])
    assert plain_pixels(source.files, source.grid.size) is None


def test_missing_slices_are_bad_unless_allowed(tmp_path):
    dicom(tmp_path, ct(SHAPE), "1.2.3", skip=(4, 5))
    found = find(tmp_path)
    ((where, why),) = found.bad
    assert not found.sources and "1.2.3" in where
    assert why.startswith(
        "2 slices missing, 1 gaps: the first is 7.50 mm between 0003.dcm and 0006.dcm, elsewhere 2.50"
    )
    (source,) = find(tmp_path, allow_gaps=True).sources
    assert read_scan(source).voxels.shape == (7, 16, 12)


def test_mixed_sizes(tmp_path):
    dicom(tmp_path, ct(SHAPE), "1.2.3")
    dicom(tmp_path / "more", ct((1, 8, 8)), "1.2.3")
    assert bad(tmp_path) == "slices of different sizes in one series: 9 of 12x16, 1 of 8x8"


def test_two_volumes_in_one_series_are_four_dimensions(tmp_path):
    dicom(tmp_path, ct(SHAPE), "1.2.3")
    dicom(tmp_path / "later", ct(SHAPE, 1), "1.2.3", tags={"0008|0018": "1.9"})
    dicom(tmp_path / "later", ct(SHAPE, 1)[:1], "1.2.3", tags={"0008|0018": "1.8"})
    # Nine images have the uid 1.9: they lie apart, so they are nine, not one.
    assert "4-D: 9 slices share their position" in bad(tmp_path)


def test_no_rescale(tmp_path):
    for path in dicom(tmp_path, ct(SHAPE), "1.2.3"):
        data = path.read_bytes()
        at = data.index(b"\x28\x00\x52\x10")
        path.write_bytes(data[:at] + b"\x28\x00\x51\x10" + data[at + 4 :])  # the intercept's tag made another
    assert bad(tmp_path) == "no rescale: RescaleSlope or RescaleIntercept is missing in 9 of 9 slices"


def test_truncated_slice(tmp_path):
    path = dicom(tmp_path, ct(SHAPE), "1.2.3")[3]
    os.truncate(path, path.stat().st_size - 200)
    found = find(tmp_path)
    assert any(where == "0003.dcm" and "truncated" in why for where, why in found.bad)
    assert any("1 slices missing" in why for _, why in found.bad)
    os.truncate(path, 200)
    assert any(where == "0003.dcm" and "header cannot be read" in why for where, why in find(tmp_path).bad)


@pytest.mark.parametrize(
    "syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"]
)
@pytest.mark.parametrize("filler", [10, 100_000])
def test_headers_of_every_encoding(tmp_path, syntax, filler):
    order, explicit = (">" if syntax.endswith(".1.2.2") else "<"), syntax != "1.2.840.10008.1.2"
    fields = [
        (0x00080008, b"CS", b"ORIGINAL\\PRIMARY\\AXIAL"),
        (0x00080060, b"CS", b"CT"),
        (0x00081140, b"SQ", None),
        (0x00091010, b"UN", b"x" * filler),
        (0x0020000E, b"UI", b"1.2.3"),
        (0x00200032, b"DS", b"-1.5\\2\\3e1"),
        (0x00200037, b"DS", b"1\\0\\0\\0\\1\\0"),
        (0x00280010, b"US", struct.pack(order + "H", 16)),
        (0x00280011, b"US", struct.pack(order + "H", 12)),
        (0x00280030, b"DS", b"0.8\\0.7"),
        (0x00281052, b"DS", b"-1024"),
        (0x00281053, b"DS", b"1"),
        (0x7FE00010, b"OW", bytes(384)),
    ]
    body = b"".join(element(*field, order, explicit) for field in fields)
    if syntax.endswith(".99"):
        packer = zlib.compressobj(wbits=-15)
        body = packer.compress(body) + packer.flush()
    path = tmp_path / "a"
    path.write_bytes(bytes(128) + b"DICM" + element(0x00020010, b"UI", syntax.encode()) + body)
    one = read_slice(str(path))
    assert (one.series, one.modality, one.rows, one.columns, one.frames) == ("1.2.3", "CT", 16, 12, 1)
    assert (one.position, one.spacing, one.rescale) == ((-1.5, 2, 30), (0.8, 0.7), (1, -1024))
    if not syntax.endswith(".99"):  # there, GDCM has to unpack the pixels to miss some
        os.truncate(path, path.stat().st_size - 2)
        with pytest.raises(BadScan, match="truncated"):
            read_slice(str(path))


def test_truncated_compressed_slice(tmp_path):
    path = dicom(tmp_path, ct(SHAPE), "1.2.3", compressor="JPEG2000")[3]
    os.truncate(path, path.stat().st_size - 100)
    (source,) = find(tmp_path).sources
    with pytest.raises(BadScan):
        read_scan(source)


def test_other_modalities_and_localizers_are_left_out(tmp_path):
    dicom(tmp_path / "ct", ct(SHAPE), "1.2.3")
    dicom(
        tmp_path / "ct",
        ct((2, 32, 32)),
        "1.2.3",
        names=["l0", "l1"],
        tags={"0008|0008": "ORIGINAL\\PRIMARY\\LOCALIZER"},
    )
    dicom(tmp_path / "mr", ct(SHAPE), "1.2.5", tags={"0008|0060": "MR"})
    found = find(tmp_path)
    assert [source.uid for source in found.sources] == ["1.2.3"]
    assert found.left_out == [("mr (series 1.2.5)", "modality MR, not CT")]
    assert found.bad == []


def test_copies_of_a_series_are_one_scan(tmp_path):
    dicom(tmp_path / "a", ct(SHAPE), "1.2.3")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    found = find(tmp_path)
    assert len(found.sources) == 1 and len(found.sources[0].files) == 9 and not found.bad
