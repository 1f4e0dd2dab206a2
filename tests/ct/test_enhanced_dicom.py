"""Multi-frame CT becomes the same volume as its slices, and is proven in the same way."""

import gzip
import re
import sys

import numpy as np
import pytest
from dicom_files import body, ct_slice, multi_frame, save

from p2w.ct.discover import SearchOptions, find_scans
from p2w.ct.orientation import BadScan
from p2w.ct.scan import read_grid, read_image, read_scan

pydicom = pytest.importorskip("pydicom", reason="pip install 'parts2whole[test]' brings pydicom")
legacy = pytest.importorskip("highdicom.legacy", reason="pip install 'parts2whole[test]' brings highdicom")


def slices(hu, *, step=2.5, first=0, **tags):
    return [ct_slice(image, first + i, (-10, -20, step * i), **tags) for i, image in enumerate(hu)]


def only(folder):
    found = find_scans([str(folder)], "")
    assert not found.bad, found.bad
    (source,) = found.sources
    return source


def test_frames_in_any_order_with_a_rescale_of_their_own(tmp_path):
    frames = [ct_slice(image, i, (-10, -20, 2.5 * i), intercept=-1024 - i) for i, image in enumerate(body())]
    order = np.random.default_rng(0).permutation(12)
    save(multi_frame([frames[i] for i in order]), tmp_path / "a.dcm")
    scan = read_scan(only(tmp_path))
    np.testing.assert_array_equal(scan.voxels, body())
    assert (scan.grid.spacing, scan.grid.origin) == ((0.7, 0.8, 2.5), (-10, -20, 0))
    assert read_grid(only(tmp_path)) == (scan.grid, (tmp_path / "a.dcm").stat().st_size)


def test_several_files_of_a_series(tmp_path):
    every = slices(body())
    save(multi_frame(every[:7], SOPInstanceUID="1.5.1"), tmp_path / "a.dcm")
    save(multi_frame(every[7:], SOPInstanceUID="1.5.2"), tmp_path / "b.dcm")
    np.testing.assert_array_equal(read_scan(only(tmp_path)).voxels, body())


def test_files_of_one_frame_each(tmp_path):
    for i, one in enumerate(slices(body())):
        save(multi_frame([one], SOPInstanceUID=f"1.5.{i + 1}"), tmp_path / f"{i}.dcm")
    np.testing.assert_array_equal(read_scan(only(tmp_path)).voxels, body())


def test_magnitude_and_phase_of_mr_are_scans_of_their_own(tmp_path):
    data = multi_frame(slices(body()) + slices(body()[:, ::-1]), Modality="MR")
    for i, groups in enumerate(data.PerFrameFunctionalGroupsSequence):
        kind = pydicom.Dataset()
        kind.FrameType = ["ORIGINAL", "PRIMARY", ("M", "PHASE")[i // 12], "NONE"]
        groups.MRImageFrameTypeSequence = [kind]
    save(data, tmp_path / "a.dcm")
    first, second = find_scans([str(tmp_path)], "", options=SearchOptions(modality="MR")).sources
    np.testing.assert_array_equal(read_image(first).values, body())
    np.testing.assert_array_equal(read_image(second).values, body()[:, ::-1])


@pytest.mark.parametrize("what", ["stack", "kV"])
def test_stacks_and_energies_are_scans_of_their_own(tmp_path, what):
    data = multi_frame(slices(body()) + slices(body()[:, ::-1]))
    for i, groups in enumerate(data.PerFrameFunctionalGroupsSequence):
        if what == "stack":
            groups.FrameContentSequence[0].StackID = str(1 + i // 12)
        else:
            details = pydicom.Dataset()
            details.KVP = (80, 140)[i // 12]
            groups.CTXRayDetailsSequence = [details]
    save(data, tmp_path / "a.dcm")
    found = find_scans([str(tmp_path)], "").sources
    assert len(found) == 2 and all(f", {what} " in one.name for one in found)


@pytest.mark.parametrize("lacks", ["PixelData", "HighBit", "PixelRepresentation"])
def test_headers_that_lack_what_pixels_need(tmp_path, lacks):
    data = multi_frame(slices(body()))
    delattr(data, lacks)
    save(data, tmp_path / "a.dcm")
    with pytest.raises(BadScan, match=lacks):
        found = find_scans([str(tmp_path)], "")
        for _, why in found.bad:
            raise BadScan(why)
        read_scan(found.sources[0])


def test_phases_are_scans_of_their_own(tmp_path):
    later = slices(body()[:, ::-1], TemporalPositionIdentifier="2")
    save(multi_frame(slices(body(), TemporalPositionIdentifier="1") + later), tmp_path / "a.dcm")
    first, second = find_scans([str(tmp_path)], "").sources
    assert (first.uid, second.uid) == ("1.2.3-phase_1", "1.2.3-phase_2")
    np.testing.assert_array_equal(read_scan(first).voxels, body())
    np.testing.assert_array_equal(read_scan(second).voxels, body()[:, ::-1])


def test_padding_and_monochrome1(tmp_path):
    hu = body()
    hu[:, :4, :4] = 30000
    frames = slices(hu, signed=1, intercept=0)
    made = multi_frame(frames, PhotometricInterpretation="MONOCHROME1")
    made.add_new(0x00280120, "SS", 30000)
    save(made, tmp_path / "a.dcm")
    hu[:, :4, :4] = -1000
    np.testing.assert_array_equal(read_scan(only(tmp_path)).voxels, hu)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda data: data.PerFrameFunctionalGroupsSequence.pop(), "12 frames with 11 functional groups"),
        (lambda data: delattr(data, "PerFrameFunctionalGroupsSequence"), "with 0 functional groups"),
        (lambda data: delattr(data, "SharedFunctionalGroupsSequence"), "lacks its orientation"),
        (
            lambda data: data.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence.clear(),
            "slices without a position",
        ),
        (
            lambda data: data.PerFrameFunctionalGroupsSequence[3].PixelValueTransformationSequence.clear(),
            "no rescale: .* missing in 1 of 12",
        ),
    ],
)
def test_functional_groups_that_do_not_say_it(tmp_path, change, why):
    data = multi_frame(slices(body()))
    change(data)
    save(data, tmp_path / "a.dcm")
    ((_, said),) = find_scans([str(tmp_path)], "").bad
    assert re.search(why, said), said


def test_uneven_frames_are_refused(tmp_path):
    frames = slices(body())
    frames[5].ImagePositionPatient = ["-10", "-20", "13.6"]
    save(multi_frame(frames), tmp_path / "a.dcm")
    ((_, why),) = find_scans([str(tmp_path)], "").bad
    assert why.startswith("uneven steps")


def test_without_pydicom_the_extra_is_named(tmp_path, monkeypatch):
    save(multi_frame(slices(body())), tmp_path / "a.dcm")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    ((_, why),) = find_scans([str(tmp_path)], "").bad
    assert why == "a multi-frame DICOM needs pydicom: pip install 'parts2whole[dicom]'"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("syntax", ["ExplicitVRLittleEndian", "JPEGLSLossless", "RLELossless"])
def test_legacy_converted_enhanced_ct(tmp_path, syntax):
    tags = dict.fromkeys(
        (
            "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime", "AccessionNumber",
            "ReferringPhysicianName", "PositionReferenceIndicator", "Manufacturer",
        ),
        "",
    )  # fmt: skip
    tags |= {"PatientID": "A", "StudyInstanceUID": "1.7", "FrameOfReferenceUID": "1.8", "SeriesNumber": 1}
    tags |= {"ContentDate": "20200101", "ContentTime": "101010", "SliceThickness": "2.5"}
    made = legacy.LegacyConvertedEnhancedCTImage(
        slices(body(), **tags), "1.5.500", 2, "1.5.501", 1, transfer_syntax_uid=getattr(pydicom.uid, syntax)
    )
    save(made, tmp_path / "a.dcm")
    source = only(tmp_path)
    np.testing.assert_array_equal(read_scan(source).voxels, body())
    assert (source.uid, source.info.thickness_mm) == ("1.5.500", 2.5)


@pytest.mark.parametrize("form", ["gzip", "bare", "one slice apart"])
def test_forms_of_multi_frame_files(tmp_path, form):
    """Packed by gzip, without the preamble, and with slices of the series in files of their own."""
    every = slices(body())
    path = save(multi_frame(every if form != "one slice apart" else every[:7]), tmp_path / "a.dcm")
    if form == "gzip":
        (tmp_path / "a.dcm.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    elif form == "bare":
        path.write_bytes(path.read_bytes()[132:])
    else:
        for one in every[7:]:
            save(one, tmp_path / str(one.InstanceNumber))
    np.testing.assert_array_equal(read_scan(only(tmp_path)).voxels, body())


def test_bits_above_those_stored(tmp_path):
    save(multi_frame(slices(body()), BitsStored=10, HighBit=9), tmp_path / "a.dcm")
    with pytest.raises(BadScan, match=r"BitsStored is 10, but .* hold more bits"):
        read_scan(only(tmp_path))


@pytest.mark.parametrize("slopes", [None, 0.003, 30.0])
def test_values_of_mr_are_neither_rounded_nor_clipped(tmp_path, slopes):
    stored = (body() + 1024).astype(int)
    frames = slices(stored, intercept=0, Modality="MR")
    for number, one in enumerate(frames):
        one.RescaleSlope = str((slopes or 1.0) * (1 + number))
    made = multi_frame(frames, Modality="MR")
    if slopes is None:
        for groups in made.PerFrameFunctionalGroupsSequence:
            del groups.PixelValueTransformationSequence
    save(made, tmp_path / "a.dcm")
    (source,) = find_scans([str(tmp_path)], "", options=SearchOptions(modality="MR")).sources
    factor = np.ones(12) if slopes is None else slopes * np.arange(1, 13)
    np.testing.assert_allclose(read_image(source).values, stored * factor[:, None, None], rtol=1e-6)


def test_frames_that_are_all_left_out_are_named_with_the_reason(tmp_path):
    made = multi_frame(slices(body()))
    for groups in made.PerFrameFunctionalGroupsSequence:
        groups.PixelValueTransformationSequence[0].RescaleType = "OD"
    save(made, tmp_path / "a.dcm")
    ((_, why),) = find_scans([str(tmp_path)], "").bad
    assert "every frame is left out: its values are OD (RescaleType), not HU" in why
