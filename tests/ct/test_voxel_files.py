"""MetaImage and NRRD: lists of data files, text, and headers that do not say how large voxels are."""

import zlib

import numpy as np
import pytest
import SimpleITK as sitk
from crc32c import crc32c
from ct_files import ct, write

from p2w.ct import voxel_files
from p2w.ct.discover import ScanSource, find_scans
from p2w.ct.orientation import BadScan, reason_of
from p2w.ct.scan import read_grid, read_scan, source_files
from p2w.ct.voxel_files import VoxelLayout, last_line, read_voxels

SHAPE = (12, 20, 16)


def source(path):
    return ScanSource("a", path.name, (str(path),))


def refused(path):
    with pytest.raises(BadScan) as error:
        read_scan(source(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def edited(path, old, new):
    data = path.read_bytes()
    assert old.encode() in data
    path.write_bytes(data.replace(old.encode(), new.encode(), 1))
    return path


@pytest.mark.parametrize("axis", range(3))
def test_a_negative_spacing_turns_the_axis(tmp_path, axis):
    """As older ITK wrote, and SimpleITK reads them."""
    spacing = ["0.7", "0.8", "2.5"]
    path = write(tmp_path / "a.mhd", ct(SHAPE))
    text = path.read_text()
    line = next(line for line in text.splitlines() if line.startswith("ElementSpacing"))
    spacing[axis] = "-" + spacing[axis]
    edited(path, line, f"ElementSpacing = {' '.join(spacing)}")
    theirs = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    scan = read_scan(source(path))
    np.testing.assert_array_equal(scan.voxels, sitk.GetArrayFromImage(theirs))
    assert scan.grid.spacing == pytest.approx((0.7, 0.8, 2.5))
    np.testing.assert_allclose(scan.grid.origin, theirs.GetOrigin(), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "old", "new", "why"),
    [
        ("a.mha", "ElementSpacing", "Comment", "no voxel size"),
        ("a.mha", "ElementSpacing = ", "ElementSpacing = 0 ", "mm that are not 0"),
        ("a.mha", "ElementSpacing = ", "ElementSpacing = nan ", "mm that are not 0"),
        ("a.mha", "ElementSpacing = ", "ElementSpacing = 0.7 0.8\nComment = ", "has 2 numbers, of 3 axes"),
        (
            "a.mha",
            "TransformMatrix = 1 0 0 0 1 0 0 0 1",
            "TransformMatrix = 1 0 0 0 1 0 0 0.3 1",
            "no unit vectors",
        ),
        (
            "a.mha",
            "TransformMatrix = 1 0 0 0 1 0 0 0 1",
            "TransformMatrix = 1 0 0 0 1 0 0 0.6 0.8",
            "sheared axes",
        ),
        ("a.nrrd", "space: left-posterior-superior\n", "", "nothing says where left"),
        ("a.nrrd", "space: left-posterior-superior", "space: scanner-xyz", "nothing says where left"),
        ("a.nrrd", "space directions: (", "space directions: (nan", "no voxel sizes"),
        ("a.nrrd", "(0,0,2.5)", "(0,1.5,2)", "sheared axes"),
    ],
)
def test_headers_without_a_geometry(tmp_path, name, old, new, why):
    path = write(tmp_path / name, ct(SHAPE))
    said = refused(edited(path, old, new))
    assert why in said or "cannot be read" in said


MANY_SPACES = '(0,0,2.5)\nspace units: "{0}" "{0}" "{0}"'


@pytest.mark.parametrize(
    ("name", "old", "new", "why"),
    [
        ("a.mha", "ElementType", "DistanceUnits = cm\nElementType", "DistanceUnits cm: readers take sizes for mm"),
        ("a.mha", "ElementType", "DistanceUnits = um\nElementType", "DistanceUnits um: readers take sizes for mm"),
        ("a.mha", "ElementType", "ElementToIntensityFunctionSlope = 2\nElementType", "readers do not apply"),
        ("a.mha", "ElementType", "ElementToIntensityFunctionOffset = -1024\nElementType", "readers do not apply"),
        ("a.mha", "ElementType", "ElementSpacing = 9 9 9\nElementType", "ElementSpacing twice"),
        ("a.mha", "ElementType", "ElementByteOrderMSB = True\nElementType", "contradict each other"),
        ("a.mha", "NDims", "ndims", "no NDims"),
        ("a.mha", "ElementSpacing", "elementspacing", "has elementspacing, which readers pass over"),
        ("a.mha", "TransformMatrix", "TRANSFORMMATRIX", "which readers pass over: write TransformMatrix"),
        ("a.mha", "ElementType", "Position = 1 2 3\nElementType", "Offset and Position and Origin that differ"),
        ("a.mha", "ElementType", "HeaderSize = 16\nElementType", "HeaderSize is 16, but its voxels follow"),
        ("a.mha", "ElementSpacing = 0.", "ElementSpacing = 0.0000", "are they in another unit than mm?"),
        ("a.nrrd", "(0,0,2.5)", MANY_SPACES.format("cm"), "space units cm: readers take sizes for mm"),
        ("a.nrrd", "(0,0,2.5)", MANY_SPACES.format("m"), "space units m: readers take sizes for mm"),
        ("a.nrrd", "(0,0,2.5)", "(0,0,2.5)\nold min: -1000\nold max: 3000", "has old min -1000: its values were"),
        ("a.nrrd", "(0,0,2.5)", "(0,0,2500)", "are they in another unit than mm?"),
    ],
)  # fmt: skip
def test_units_and_functions_that_readers_overlook(tmp_path, name, old, new, why):
    assert why in refused(edited(write(tmp_path / name, ct(SHAPE)), old, new))


@pytest.mark.parametrize("yes", ["True", "true", "T", "1"])
def test_meta_image_words_for_yes(tmp_path, yes):
    """As MetaIO reads them, which looks at the first letter."""
    hu = ct(SHAPE)
    path = write(tmp_path / "a.mhd", hu)
    edited(path, "BinaryDataByteOrderMSB = False", f"BinaryDataByteOrderMSB = {yes}")
    edited(path, "BinaryData = True", f"BinaryData = {yes}")
    (tmp_path / "a.raw").write_bytes(hu.astype(">i2").tobytes())
    np.testing.assert_array_equal(read_scan(source(path)).voxels, hu)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), hu)
    path = write(tmp_path / "packed.mha", hu)
    edited(path, "CompressedData = True", f"CompressedData = {yes}")
    np.testing.assert_array_equal(read_scan(source(path)).voxels, hu)


def test_reasons_name_no_folder_of_this_machine(tmp_path):
    inner = RuntimeError(
        f"Exception\nITK ERROR: GDCMImageIO(0x55bb357f4600): {tmp_path}/a b.dcm: cannot be read"
    )
    assert last_line(inner) == "ITK ERROR: GDCMImageIO: a b.dcm: cannot be read"
    with pytest.raises(OSError, match="No such file") as error:
        (tmp_path / "a.dcm").read_bytes()
    assert reason_of(error.value) == "cannot be read: No such file or directory"


def test_remarks_of_an_nrrd_are_no_fields(tmp_path):
    hu = ct(SHAPE)
    path = edited(
        write(tmp_path / "a.nrrd", hu),
        "(0,0,2.5)",
        MANY_SPACES.format("mm") + "\nspace:=scanner\nspacings:=9",
    )
    np.testing.assert_array_equal(read_scan(source(path)).voxels, hu)


def test_nrrd_spacings_without_directions_are_refused(tmp_path):
    path = write(tmp_path / "a.nrrd", ct(SHAPE))
    head, _, data = path.read_bytes().partition(b"\n\n")
    lines = [line for line in head.splitlines() if not line.startswith((b"space", b"kinds"))]
    path.write_bytes(b"\n".join([*lines, b"spacings: 0.7 0.8 -2.5"]) + b"\n\n" + data)
    assert "nothing says where left" in refused(path)


@pytest.mark.parametrize("name", ["a.mhd", "a.mha"])
def test_meta_image_lists(tmp_path, name):
    hu = ct(SHAPE)
    write(tmp_path / "a.mhd", hu)
    for z, image in enumerate(hu):
        (tmp_path / f"s{z:03d}.raw").write_bytes(image.tobytes())
    (tmp_path / "a.raw").unlink()
    text = (tmp_path / "a.mhd").read_text()
    listed = "LIST\n" + "\n".join(f"s{z:03d}.raw" for z in range(len(hu)))
    (tmp_path / "a.mhd").unlink()
    for form in (listed, f"s%03d.raw 0 {len(hu) - 1} 1"):
        (tmp_path / name).write_text(text.replace("a.raw", form))
        scan = read_scan(source(tmp_path / name))
        np.testing.assert_array_equal(scan.voxels, hu)
        assert len(source_files(source(tmp_path / name))) == 1 + len(hu)
        assert scan.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    found = find_scans([str(tmp_path)], "")
    assert found.passed_over == {} and found.files == 1 + len(hu)  # the voxels belong to the header
    (tmp_path / "s004.raw").write_bytes(hu[4].tobytes()[:-2])
    assert "truncated: s004.raw" in refused(tmp_path / name)
    (tmp_path / "s004.raw").unlink()
    assert "s004.raw is missing" in refused(tmp_path / name)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_meta_image_text(tmp_path, dtype):
    hu = ct(SHAPE).astype(dtype)
    path = write(tmp_path / "a.mha", hu)
    head = path.read_bytes()[: -hu.nbytes].replace(b"BinaryData = True", b"BinaryData = False")
    numbers = " ".join(f"{value:g}" for value in hu.ravel()).encode()
    path.write_bytes(head + numbers + b"\n")
    np.testing.assert_array_equal(read_scan(source(path)).voxels, hu)
    path.write_bytes(head + numbers.rpartition(b" ")[0])
    assert "wrong size" in refused(path)
    path.write_bytes(head + numbers.replace(b"-3024", b"minus", 1))
    assert "its voxels are no numbers" in refused(path)


@pytest.mark.parametrize("form", ["LIST", "pattern"])
def test_nrrd_lists(tmp_path, form):
    hu = ct(SHAPE)
    path = write(tmp_path / "a.nhdr", hu)
    raw = next(file for file in tmp_path.iterdir() if file != path)
    raw.unlink()
    for z, image in enumerate(hu):
        (tmp_path / f"s{z}.raw").write_bytes(image.tobytes())
    lines = [line for line in path.read_text().splitlines() if not line.startswith("data file")]
    lines = [line.replace("encoding: gzip", "encoding: raw") for line in lines if line]
    names = "\n".join(f"s{z}.raw" for z in range(len(hu)))
    last = f"data file: LIST\n{names}\n" if form == "LIST" else f"data file: s%d.raw 0 {len(hu) - 1} 1 2\n"
    path.write_text("\n".join(lines) + "\n" + last)
    scan = read_scan(source(path))
    np.testing.assert_array_equal(scan.voxels, hu)
    assert scan.nbytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert read_grid(source(path))[1] == scan.nbytes
    (tmp_path / "s4.raw").write_bytes(hu[4].tobytes() * 2)  # of another type, or of another header
    assert "wrong size: its data files have" in refused(path)


def _members(values, wbits, level=6, members=1):
    data = values.tobytes()
    size = -(-len(data) // members)
    packed = []
    for start in range(0, len(data), size):
        stream = zlib.compressobj(level, zlib.DEFLATED, wbits)
        packed.append(stream.compress(data[start : start + size]) + stream.flush())
    return b"".join(packed)


def _changed(data, at, bits):
    data = bytearray(data)
    data[at] ^= bits
    return bytes(data)


def _streams():
    """(name, bytes) of compressed streams of 30,000 int16, whole and damaged, as zlib and as gzip."""
    values = np.cumsum(np.random.default_rng(0).integers(-3, 4, 30_000)).astype("<i2")
    yield "stored", _members(values, 31, 0)
    yield "pigz", _members(values, 31, members=7)
    for kind, wbits in (("zlib", 15), ("gzip", 31)):
        whole = _members(values, wbits)
        yield kind, whole
        yield f"{kind} and zeros", whole + bytes(5000)
        yield f"{kind} without its end", whole[:-3]
        yield f"{kind}, half", whole[: len(whole) // 2]
        yield f"{kind}, wrong checksum", _changed(whole, -5 if wbits > 15 else -1, 1)
        yield f"{kind}, a changed bit", _changed(whole, len(whole) // 2, 4)
        yield f"{kind}, twice", whole + whole
    yield "gzip, wrong length", _changed(_members(values, 31), -1, 1)
    yield "gzip, reserved flags", _changed(_members(values, 31), 3, 0x40)
    yield "empty", b""


STREAMS = dict(_streams())


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("piece", [1 << 20, 1000])
def test_isal_and_zlib_give_the_same(tmp_path, monkeypatch, name, piece):
    """The voxels, the checksum of the file, or the refusal."""
    pytest.importorskip("isal", reason="needs isal (pip install parts2whole[fast])")
    monkeypatch.setattr(voxel_files, "PIECE", piece)
    path = tmp_path / "a.zraw"
    path.write_bytes(b"head" + STREAMS[name])
    layout = VoxelLayout(str(path), 4, np.dtype("<i2"), 30_000, compressed=True, own_file=True)

    def outcome():
        try:
            flat, crc = read_voxels(layout, 7)
        except BadScan as error:
            return str(error)
        assert crc == crc32c(path.read_bytes(), 7)
        return flat.tobytes()

    ours = outcome()
    assert voxel_files._isal() is not None
    monkeypatch.setattr(voxel_files, "_isal", lambda: None)
    assert ours == outcome()
    good = name in ("stored", "pigz", "zlib", "gzip", "zlib and zeros", "gzip and zeros")
    assert isinstance(ours, bytes) == (good or name.endswith("twice"))


def test_plain_voxels_between_a_header_and_more(tmp_path):
    """The checksum is of the whole file, the voxels are those at the offset."""
    values = np.arange(700_000, dtype="<i2")
    path = tmp_path / "a.mha"
    path.write_bytes(b"header" + values.tobytes() + b"tail")
    flat, crc = read_voxels(VoxelLayout(str(path), 6, np.dtype("<i2"), len(values)), 3)
    np.testing.assert_array_equal(flat, values)
    assert crc == crc32c(path.read_bytes(), 3)
