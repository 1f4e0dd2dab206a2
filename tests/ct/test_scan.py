"""Scans of every format against SimpleITK, in every orientation; and every kind of bad scan."""

import gzip
import itertools
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from crc32c import crc32c
from ct_files import ct, write

from p2w.ct.discover import ScanSource
from p2w.ct.hu_values import check_hu
from p2w.ct.orientation import BadScan
from p2w.ct.scan import read_grid, read_scan, source_files, to_int16

SHAPE = (12, 20, 16)
NAMES = [
    "a.mhd",
    "packed.mhd",
    "a.mha",
    "packed.mha",
    "a.nii",
    "a.nii.gz",
    "a.nrrd",
    "packed.nrrd",
    "a.nhdr",
    "packed.nhdr",
]
PACKED = [name for name in NAMES if "packed" in name or name.endswith("gz")]  # these carry a checksum
TURNS = [
    np.eye(3)[list(order)] * np.array(signs)[:, None]
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def source(path):
    return ScanSource(path.name.split(".")[0], path.name, (str(path),))


def oracle(path):
    """A file as SimpleITK reads it: HU [z,y,x] in LPS order, and the image."""
    turned = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    return np.rint(sitk.GetArrayFromImage(turned).astype(np.float64)).clip(-32768, 32767), turned


def check_against_itk(path):
    scan = read_scan(source(path))
    hu, turned = oracle(path)
    np.testing.assert_array_equal(scan.voxels, hu)
    assert scan.voxels.dtype == np.int16
    assert scan.grid.size == turned.GetSize()
    np.testing.assert_allclose(scan.grid.spacing, turned.GetSpacing(), rtol=1e-6)
    np.testing.assert_allclose(scan.grid.origin, turned.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(scan.grid.direction, turned.GetDirection(), atol=1e-6)
    files = source_files(source(path))
    data = b"".join(Path(name).read_bytes() for name in files)
    assert (scan.nbytes, scan.checksum) == (len(data), crc32c(data))
    assert read_grid(source(path)) == (scan.grid, scan.nbytes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
def test_formats_and_types(tmp_path, name, dtype):
    hu = ct(SHAPE).astype(dtype)
    if np.dtype(dtype).kind == "f":
        hu += np.random.default_rng(1).uniform(-0.4, 0.4, SHAPE).astype(dtype)
    check_against_itk(write(tmp_path / name, hu))


@pytest.mark.parametrize("turn", TURNS)
def test_every_orientation_is_brought_to_lps(tmp_path, turn):
    check_against_itk(write(tmp_path / "a.mha", ct(SHAPE), direction=turn))


def test_oblique_scans_keep_their_angles(tmp_path):
    a, b = 0.1, -0.2
    tilt = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    turn = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]]) @ tilt
    check_against_itk(write(tmp_path / "a.nrrd", ct(SHAPE), direction=turn @ TURNS[13]))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti_rescale(tmp_path, name):
    path = write(tmp_path / name, (ct(SHAPE) + 1024).clip(0).astype(np.int16))
    data = bytearray(gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes())
    struct.pack_into("<2f", data, 112, 1.25, -1200.3)
    path.write_bytes(gzip.compress(bytes(data)) if name.endswith("gz") else bytes(data))
    check_against_itk(path)


def test_gzip_of_several_members(tmp_path):
    path = write(tmp_path / "a.nii.gz", ct(SHAPE))
    data = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(data[:3000]) + gzip.compress(data[3000:]))
    check_against_itk(path)


def test_big_endian_and_header_size(tmp_path):
    hu = ct(SHAPE)
    path = write(tmp_path / "a.mhd", hu)
    text = (
        path.read_text()
        .replace("MSB = False", "MSB = True")
        .replace("ElementType", "HeaderSize = -1\nElementType")
    )
    path.write_text(text)
    (tmp_path / "a.raw").write_bytes(b"seven b" + hu.astype(">i2").tobytes())
    with pytest.raises(BadScan, match="wrong size"):  # more than its voxels: not a raw of this header
        path.write_text(text.replace("HeaderSize = -1\n", ""))
        read_scan(source(path))
    path.write_text(text)
    check_against_itk(path)


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) * 2 // 3]
    elif how == "damaged":
        data[len(data) // 2] ^= 0x55
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, "truncated") for name in NAMES] + [(name, "damaged") for name in NAMES if name in PACKED],
)
def test_damaged_files_are_bad(tmp_path, name, how):
    path = write(tmp_path / name, ct(SHAPE))
    data = next(
        (p for p in tmp_path.iterdir() if p.suffix in (".raw", ".zraw") or p.name.endswith("raw.gz")), path
    )
    damage(data, how)
    with pytest.raises(BadScan) as error:
        read_scan(source(path))
    assert "\n" not in str(error.value)


def test_a_zraw_whose_header_does_not_say_its_size(tmp_path):
    path = write(tmp_path / "packed.mhd", ct(SHAPE))
    path.write_text(
        "\n".join(line for line in path.read_text().splitlines() if "CompressedDataSize" not in line)
    )
    check_against_itk(path)
    damage(tmp_path / "packed.zraw", "truncated")
    with pytest.raises(BadScan, match=r"damaged: packed\.zraw does not unpack"):
        read_scan(source(path))
    (tmp_path / "packed.zraw").write_bytes(zlib.compress(bytes(2 * np.prod(SHAPE) // 2)))
    with pytest.raises(BadScan, match=r"wrong size: packed\.zraw holds 3,840 bytes of voxels, not 7,680"):
        read_scan(source(path))


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        (
            "nan.nii.gz",
            np.where(ct(SHAPE) > 30, np.nan, ct(SHAPE)).astype(np.float32),
            "NaN or infinite values",
        ),
        ("inf.mha", np.where(ct(SHAPE) > 30, np.inf, ct(SHAPE)).astype(np.float32), "NaN or infinite values"),
        ("mask.nii.gz", (ct(SHAPE) > 0).astype(np.uint8), "not CT values: 0 … 1"),
        ("raw_units.nii.gz", (ct(SHAPE) + 1024).clip(0), "no rescale"),
        ("padded_raw.mha", np.where(ct(SHAPE) < -1500, -2000, ct(SHAPE) + 1024), "no rescale"),
        ("scaled.nii", ((ct(SHAPE) + 1000) / 2000).astype(np.float32), "not CT values"),
        ("constant.mha", np.full(SHAPE, -1000, np.int16), "none above -200 HU"),
        ("padding.mha", np.full(SHAPE, -3024, np.int16), "nothing but padding"),
        ("four.nii.gz", np.stack([ct(SHAPE)] * 2), "4-D"),
        ("flat.nii.gz", ct(SHAPE)[5], "2-D"),
    ],
)
def test_images_that_are_not_ct_volumes_are_bad(tmp_path, name, values, reason):
    path = tmp_path / name
    sitk.WriteImage(sitk.GetImageFromArray(values, isVector=False), str(path))
    with pytest.raises(BadScan, match=reason) as error:
        read_scan(source(path))
    assert "\n" not in str(error.value)


def test_colour_and_missing_data_and_junk(tmp_path):
    rgb = tmp_path / "rgb.mha"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((*SHAPE, 3), np.uint8), isVector=True), str(rgb))
    with pytest.raises(BadScan, match="3 values a voxel"):
        read_scan(source(rgb))
    path = write(tmp_path / "a.mhd", ct(SHAPE))
    (tmp_path / "a.raw").unlink()
    with pytest.raises(BadScan, match=r"a\.raw is missing beside it"):
        read_scan(source(path))
    for name in ("junk.nii.gz", "junk.nii", "junk.mhd", "junk.mha", "junk.nrrd"):
        for data in (b"", b"what is this\n" * 100):
            (tmp_path / name).write_bytes(data)
            with pytest.raises(BadScan):
                read_scan(source(tmp_path / name))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("DimSize = 16 20 12", "DimSize = 160000 200000 120000", "truncated"),
        ("DimSize = 16 20 12", "DimSize = -16 20 12", "wrong size"),
        ("DimSize = 16 20 12", "DimSize = a b c", "header is damaged"),
        ("TransformMatrix = 1 0 0 0 1 0", "TransformMatrix = 1 0 0 1 0 0", "invalid orientation"),
        ("ElementSpacing", "Spacing", "has no voxel size"),  # ITK reads 1 mm, which is a guess
        ("ElementSpacing", "ElementSize", None),  # read as ITK reads it
    ],
)
def test_invalid_headers(tmp_path, old, new, reason):
    path = write(tmp_path / "a.mha", ct(SHAPE))
    data = path.read_bytes()
    assert old.encode() in data
    path.write_bytes(data.replace(old.encode(), new.encode(), 1))
    if reason is None:
        check_against_itk(path)
    else:
        with pytest.raises(BadScan, match=reason):
            read_scan(source(path))


def test_a_single_volume_of_four_dimensions_is_fine(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(ct(SHAPE)[None], isVector=False), str(tmp_path / "a.nii"))
    assert read_scan(source(tmp_path / "a.nii")).voxels.shape == SHAPE


def test_rounding_and_limits():
    values = np.array([[[-0.5, 0.5, 1.5, 2.5, -1000.4, 1e9, -1e9]]])
    assert to_int16(values).tolist() == [[[0, 0, 2, 2, -1000, 32767, -32768]]]
    assert to_int16(np.array([[[40000, -40000]]])).tolist() == [[[32767, -32768]]]
    assert to_int16(np.array([[[0, 4095]]], np.uint16), 1.0, -1024.0).tolist() == [[[-1024, 3071]]]


def test_real_looking_values_pass():
    for seed in range(3):
        check_hu(ct((16, 32, 32), seed))
