"""Stored pixels become HU as pydicom computes them: display, padding, bits and encodings change nothing."""

import gzip

import numpy as np
import pytest
from ct_files import dicom
from dicom_files import body, ct_slice, save, write_series

from p2w.ct.discover import SearchOptions, find_scans
from p2w.ct.orientation import BadScan
from p2w.ct.scan import read_image, read_scan

pydicom = pytest.importorskip("pydicom", reason="pip install 'parts2whole[test]' brings pydicom")


def only(folder):
    found = find_scans([str(folder)], "")
    assert not found.bad, found.bad
    (source,) = found.sources
    return source


def by_pydicom(source):
    """HU [z,y,x] of the stored values, as the standard says: value x slope + intercept."""
    slices = [pydicom.dcmread(path) for path in source.files]
    return np.stack(
        [one.pixel_array * float(one.RescaleSlope) + float(one.RescaleIntercept) for one in slices]
    )


@pytest.mark.parametrize(("signed", "intercept"), [(1, 0), (1, -1024), (0, -1024)])
def test_monochrome1_is_a_matter_of_display(tmp_path, signed, intercept):
    write_series(
        tmp_path, body(), signed=signed, intercept=intercept, PhotometricInterpretation="MONOCHROME1"
    )
    source = only(tmp_path)
    np.testing.assert_array_equal(read_scan(source).voxels, body())
    np.testing.assert_array_equal(read_scan(source).voxels, by_pydicom(source))


@pytest.mark.parametrize("signed", [0, 1])
def test_monochrome1_of_compressed_pixels(tmp_path, signed):
    """GDCM inverts what it unpacks: that is undone."""
    for i, hu in enumerate(body()):
        image = ct_slice(hu, i, (0, 0, 2.5 * i), signed=signed, PhotometricInterpretation="MONOCHROME1")
        image.compress(pydicom.uid.JPEGLSLossless)
        save(image, tmp_path / str(i))
    np.testing.assert_array_equal(read_scan(only(tmp_path)).voxels, body())


def padded(tmp_path, cell, *, signed=0, bits=16):
    """A series whose corner holds a cell, which PixelPaddingValue tells."""
    for i, image in enumerate(body()):
        one = ct_slice(image, i, (0, 0, 2.5 * i), signed=signed, intercept=0 if signed else -1024, bits=bits)
        cells = np.frombuffer(one.PixelData, "<u2").reshape(image.shape).copy()
        cells[:4, :4] = cell
        one.PixelData = cells.tobytes()
        one.add_new(0x00280120, "US", cell)
        save(one, tmp_path / str(i))
    return read_scan(only(tmp_path)).voxels


@pytest.mark.parametrize(
    ("cell", "signed", "bits"),
    [
        (63536, 0, 16),  # -2000 in unsigned cells
        (65535, 0, 16),
        (4095, 0, 12),
        (63536, 0, 12),  # needs more bits than are stored
        (30000, 1, 16),
        (3000, 0, 16),
        (2000, 0, 12),
    ],
)
def test_padding_of_any_size_is_air(tmp_path, cell, signed, bits):
    voxels = padded(tmp_path, cell, signed=signed, bits=bits)
    assert (voxels[:, :4, :4] == -1000).all()
    outside = np.ones(voxels.shape, bool)
    outside[:, :4, :4] = False
    np.testing.assert_array_equal(voxels[outside], body()[outside])


def test_a_padding_value_that_tissue_has_too_is_padding_at_the_border_alone(tmp_path):
    voxels = padded(tmp_path, 1024 + 41)  # 41 HU
    assert (voxels[:, :4, :4] == -1000).all() and (voxels[:, 8:, 8:] == 41).any()


def test_padding_up_to_a_limit(tmp_path):
    for i, image in enumerate(body()):
        one = ct_slice(image, i, (0, 0, 2.5 * i))
        cells = np.frombuffer(one.PixelData, "<u2").reshape(image.shape).copy()
        cells[:2, :4], cells[2:4, :4] = 49000, 50000
        one.PixelData = cells.tobytes()
        one.add_new(0x00280120, "US", 50500)
        one.add_new(0x00280121, "US", 48000)
        save(one, tmp_path / str(i))
    assert (read_scan(only(tmp_path)).voxels[:, :4, :4] == -1000).all()


def test_padding_that_is_darker_than_air_stays(tmp_path):
    """Shards clip it to -1000, so voxels remain those of every other reader."""
    assert (padded(tmp_path, 0)[:, :4, :4] == -1024).all()


def test_padding_that_no_tag_tells_is_refused(tmp_path):
    hu = body().astype(int)
    hu[:, :4, :4] = 63536 - 1024
    write_series(tmp_path, hu)
    with pytest.raises(BadScan, match="padding that its header does not tell"):
        read_scan(only(tmp_path))


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ({"BitsStored": 12, "HighBit": 15}, "contradict each other"),
        ({"BitsStored": 16, "HighBit": 11}, "contradict each other"),
        ({"BitsStored": 8, "HighBit": 7}, "BitsStored is 8, but"),
        ({"BitsStored": 10, "HighBit": 9}, "BitsStored is 10, but"),
    ],
)
def test_bits_that_contradict_the_pixels(tmp_path, tags, why):
    write_series(tmp_path, body(), **tags)
    with pytest.raises(BadScan, match=why):
        read_scan(only(tmp_path))


@pytest.mark.parametrize(
    "form",
    [
        "no preamble", "no transfer syntax", "explicit, no syntax", "gzip", "raw", "txt", "says implicit", "says explicit",
        "GE",
    ],
)  # fmt: skip
def test_files_that_break_the_file_format_are_read(tmp_path, form):
    for i, image in enumerate(body()):
        one, path = ct_slice(image, i, (-10, -20, 2.5 * i)), tmp_path / f"{i}.dcm"
        if form == "no preamble":
            del one.file_meta
            one.save_as(path, implicit_vr=True, little_endian=True)
        elif form == "explicit, no syntax":
            del one.file_meta
            one.save_as(path, implicit_vr=False, little_endian=True)
        elif form == "no transfer syntax":
            del one.file_meta
            one.save_as(path, implicit_vr=True, little_endian=True)
            path.write_bytes(bytes(128) + b"DICM" + path.read_bytes())
        elif form in ("says implicit", "says explicit", "GE"):
            save_as_another_syntax(one, path, form)
        elif form == "gzip":
            save(one, path)
            (tmp_path / f"{i}.dcm.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
        else:
            save(one, tmp_path / f"{i}.{form}")
    scan = read_scan(only(tmp_path))
    np.testing.assert_array_equal(scan.voxels, body())
    assert scan.grid.spacing == (0.7, 0.8, 2.5)


def save_as_another_syntax(one, path, form):
    """Write a slice in one syntax, and the name of another into its meta information; GE's own turns the bytes of pixels."""
    uid = pydicom.uid
    written, said = {
        "says implicit": (uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian),
        "says explicit": (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian),
        "GE": (uid.ImplicitVRLittleEndian, uid.UID("1.2.840.113619.5.2")),
    }[form]
    if form == "GE":
        one.PixelData = np.frombuffer(one.PixelData, "<u2").astype(">u2").tobytes()
    one.file_meta.TransferSyntaxUID = written
    data = save(one, path).read_bytes()
    behind = 144 + int.from_bytes(data[140:144], "little")
    one.file_meta.TransferSyntaxUID = said
    meta = pydicom.filebase.DicomBytesIO()
    pydicom.filewriter.write_file_meta_info(meta, one.file_meta)
    path.write_bytes(data[:132] + meta.getvalue() + data[behind:])


@pytest.mark.parametrize("floats", [False, True])
def test_images_without_pixels_are_named(tmp_path, floats):
    for path in write_series(tmp_path, body()):
        one = pydicom.dcmread(path)
        del one.PixelData
        if floats:
            one.FloatPixelData = bytes(4 * 24 * 28)
        one.save_as(path)
    ((_, why),) = find_scans([str(tmp_path)], "").bad
    assert "has no pixels (PixelData" in why


def test_packed_files_of_compressed_pixels(tmp_path):
    for path in dicom(tmp_path, body(), "1.2.3", compressor="JPEGLS"):
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    np.testing.assert_array_equal(read_scan(only(tmp_path)).voxels, body())


@pytest.mark.parametrize("first", [0, 1])
def test_packed_files_among_others(tmp_path, first):
    paths = dicom(tmp_path, body(), "1.2.3", compressor="JPEGLS")
    for path in paths[first::2]:
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    np.testing.assert_array_equal(read_scan(only(tmp_path)).voxels, body())


@pytest.mark.parametrize("slope", ["1", "0.5", None])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_of_mr_is_as_dark_as_its_darkest_voxel(tmp_path, slope, photometric):
    """And not -1000, which is air in CT alone: percentiles would begin there. One slice is nothing but padding."""
    stored = np.maximum(body() + 1024, 7).astype(int)
    stored[3:6, 10:14, 10:14] = 999  # inside the body: a value like any other
    expected = stored.copy()
    stored[:, :4, :4], expected[:, :4, :4] = 999, expected.min()
    stored[-1], expected[-1] = 999, expected.min()
    for i, image in enumerate(stored):
        rescale = {"RescaleSlope": slope, "RescaleIntercept": "0" if slope else None}
        one = ct_slice(
            image, i, (0, 0, 2.5 * i), intercept=0, Modality="MR", PhotometricInterpretation=photometric, **rescale
        )  # fmt: skip
        one.add_new(0x00280120, "US", 999)
        save(one, tmp_path / str(i))
    (source,) = find_scans([str(tmp_path)], "", options=SearchOptions(modality="MR")).sources
    np.testing.assert_array_equal(read_image(source).values, expected * float(slope or 1))


def test_a_packed_file_that_ends_early(tmp_path):
    for i, path in enumerate(write_series(tmp_path, body())):
        data = gzip.compress(path.read_bytes())
        (tmp_path / f"{i}.dcm.gz").write_bytes(data[:-20] if i == 5 else data)
        path.unlink()
    with pytest.raises(BadScan, match=r"5\.dcm\.gz ends too early"):
        read_scan(only(tmp_path))


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        (
            {"SamplesPerPixel": 3, "PhotometricInterpretation": "YBR_FULL_422", "Modality": "US"},
            "modality US, not CT",
        ),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, "a colour picture"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "a colour picture"),
        ({"RescaleType": "Z_EFF"}, "its values are Z_EFF"),
        ({"ImagePositionPatient": None}, "a picture without a position"),
    ],
)
def test_pictures_in_a_study_are_left_out(tmp_path, tags, why):
    write_series(tmp_path / "ct", body())
    write_series(tmp_path / "other", body()[:2], series="1.9", **tags)
    found = find_scans([str(tmp_path)], "")
    ((where, reason),) = found.left_out
    assert where == "other (series 1.9)" and why in reason
    assert not found.bad and len(found.sources) == 1


def test_ct_images_without_a_series_are_named(tmp_path):
    write_series(tmp_path / "a", body(), SeriesInstanceUID="")
    ((where, why),) = find_scans([str(tmp_path)], "").bad
    assert where == "a (no series)" and why.startswith("12 CT images without a SeriesInstanceUID")
