"""Slices become a volume only where their positions prove it; whatever else lies under one uid is split or refused."""

import shutil

import numpy as np
import pytest
from dicom_files import body, ct_slice, save, write_series

from p2w.ct.discover import SearchOptions, find_scans
from p2w.ct.orientation import TOLERANCE_MM
from p2w.ct.scan import read_grid, read_image, read_scan

pydicom = pytest.importorskip("pydicom", reason="pip install 'parts2whole[test]' brings pydicom")


def find(folder, **options):
    return find_scans([str(folder)], "", options=SearchOptions(**options))


def refused(folder, **options):
    """Why the only series below a folder is bad."""
    found = find(folder, **options)
    assert not found.sources, found.sources
    ((_, why),) = found.bad
    assert "\n" not in why
    return why


def tilted(degrees):
    t = np.radians(degrees)
    return (1, 0, 0, 0, np.cos(t), -np.sin(t))


@pytest.mark.parametrize("degrees", [18.5, -7.0, 1.0])
def test_a_gantry_tilt_is_refused(tmp_path, degrees):
    write_series(tmp_path, body(60), iop=tilted(degrees))
    assert f"({abs(degrees):.1f} degrees; 0.2 mm are tolerated); --resample-tilt" in refused(tmp_path)


@pytest.mark.parametrize("slope", [0.05, -1.0])
def test_a_drift_is_refused(tmp_path, slope):
    write_series(tmp_path, body(), place=lambda i: (slope * i, 0, 2.5 * i))
    assert "gantry tilt or drift: positions leave the normal" in refused(tmp_path)


def test_a_block_that_leans_as_a_whole_is_sound(tmp_path):
    """Slices of a turned head are stacked along their own normal: oblique, but straight."""
    row, column = np.array([1, 0, 0]), np.array(tilted(20.0)[3:])
    normal = np.cross(row, column)
    write_series(tmp_path, body(), iop=tilted(20.0), place=lambda i: normal * 2.5 * i)
    (source,) = find(tmp_path).sources
    assert read_grid(source)[0].spacing[2] == pytest.approx(2.5, abs=1e-4)


HALVES = [2.5 * i for i in range(10)], [2.5 * 9 + 5 * (i + 1) for i in range(10)]


@pytest.mark.parametrize("turned", [False, True])
def test_steps_that_change_are_uneven_and_not_missing_slices(tmp_path, turned):
    heights = HALVES[0] + HALVES[1]
    heights = [-z for z in heights] if turned else heights
    write_series(tmp_path, body(20), heights)
    why = refused(tmp_path, allow_gaps=True)
    assert why.startswith("uneven steps: adjacent slices are 2.50 to 5.00 mm apart")


@pytest.mark.parametrize(
    "heights",
    [
        [0, 2.5, 5, 7.5, 10, 13, 15.5, 18],  # one step is longer
        [0, 2.5, 5, 7.5, 10, 12.1, 14.6],  # or shorter
        [2.5 * 1.02**i * i for i in range(12)],  # or each is
        [0, 0.5, 1, 1.5, 2.12, 2.5, 3],  # thin slices: a fifth of a step is less than the tolerance
    ],
)
def test_uneven_steps_are_refused(tmp_path, heights):
    write_series(tmp_path, body(len(heights)), heights)
    assert "uneven steps" in refused(tmp_path)


@pytest.mark.parametrize("digits", [1, 2])
def test_rounded_positions_are_sound_and_their_mean_step_is_the_true_one(tmp_path, digits):
    heights = [round(0.625 * i, digits) for i in range(60)]
    write_series(tmp_path, body(60), heights)
    (source,) = find(tmp_path).sources
    grid, _ = read_grid(source)
    far = grid.spacing[2] * 59
    assert abs(far - 0.625 * 59) <= TOLERANCE_MM


def test_equal_steps_are_kept_to_the_bit(tmp_path):
    write_series(tmp_path, body(), [100 - 1.25 * i for i in range(12)])
    (source,) = find(tmp_path).sources
    assert read_grid(source)[0].spacing[2] == 1.25


def test_missing_slices_are_counted(tmp_path):
    heights = [2.5 * i for i in range(14) if i not in (4, 9)]
    write_series(tmp_path, body(), heights)
    assert refused(tmp_path).startswith(
        "2 slices missing, 2 gaps: the first is 5.00 mm between 0003 and 0004"
    )
    assert len(find(tmp_path, allow_gaps=True).sources) == 1


@pytest.mark.parametrize("shift", [-1.7, 1.25, 0.0])
def test_overlapping_acquisitions_are_two_scans(tmp_path, shift):
    """Also where they interleave at equal steps, or lie at the same places."""
    hu = body(20)
    write_series(tmp_path, hu[:14], [2.5 * i for i in range(14)], AcquisitionNumber=1)
    later = [2.5 * i + shift for i in range(6, 20)]
    write_series(tmp_path, hu[6:, ::-1], later, AcquisitionNumber=2, first=14, prefix="b")
    found = find(tmp_path)
    assert not found.bad
    assert [source.uid for source in found.sources] == ["1.2.3-acquisition_1", "1.2.3-acquisition_2"]
    first, second = (read_scan(source) for source in found.sources)
    np.testing.assert_array_equal(first.voxels, hu[:14])
    np.testing.assert_array_equal(second.voxels, hu[6:, ::-1])
    assert second.grid.origin[2] == pytest.approx(later[0])
    assert found.sources[1].info.series == "1.2.3"


def test_an_acquisition_without_a_number_is_one_too(tmp_path):
    """Interleaved at equal steps with one that has a number, beside a field that tells nothing."""
    for number in (0, 1):
        for i, image in enumerate(body()[:, :: 1 - 2 * number]):
            place = (-10, -20, 2.5 * i + 1.25 * number)
            one = ct_slice(image, 12 * number + i, place, KVP="120" if (i * 7) % 5 < 2 else "100")
            if number:
                one.AcquisitionNumber = 2
            save(one, tmp_path / f"{number}{i}")
    found = find(tmp_path)
    assert [len(source.files) for source in found.sources] == [12, 12]
    np.testing.assert_array_equal(read_scan(found.sources[0]).voxels, body()[:, ::-1])


@pytest.mark.parametrize("at", [3, 10])
@pytest.mark.parametrize("leans", [0.0, 0.5])
def test_missing_slices_are_not_made_up_where_slices_are_resampled(tmp_path, at, leans):
    heights = [2.5 * i + (31.3 if i > at else 0) for i in range(12)]
    write_series(tmp_path, body(), place=lambda i: (-10, -20 + leans * i, heights[i]))
    assert "slices missing: 33.80 mm between 00" in refused(tmp_path, resample=True)
    (source,) = find(tmp_path, resample=True, allow_gaps=True).sources
    assert source.positions and source.grid.spacing[2] == pytest.approx(2.5)


def test_overlapping_acquisitions_are_not_resampled_into_one(tmp_path):
    hu = body(20)
    write_series(tmp_path, hu[:14], [2.5 * i + 0.6 * (i == 3) for i in range(14)], AcquisitionNumber=1)
    later = [2.5 * i - 1.7 for i in range(6, 20)]
    write_series(tmp_path, hu[6:, ::-1], later, AcquisitionNumber=2, first=14, prefix="b")
    assert refused(tmp_path, resample=True).startswith("uneven steps")


@pytest.mark.parametrize(
    "tag", ["AcquisitionTime", "TemporalPositionIdentifier", "TriggerTime", "ConvolutionKernel", "KVP"]
)
def test_other_fields_tell_volumes_apart_too(tmp_path, tag):
    values = {"AcquisitionTime": ("101010", "101020"), "ConvolutionKernel": ("B30f", "B70f")}.get(
        tag, ("1", "2")
    )
    for number, value in enumerate(values):
        hu = body()[:, ::-1] if number else body()
        write_series(tmp_path, hu, first=12 * number, prefix=str(number), **{tag: value})
    found = find(tmp_path)
    assert len(found.sources) == 2
    # A time may tell who it is, and becomes a number in all that names the scan.
    assert not any("1010" in f"{one.uid} {one.name} {one.info}" for one in found.sources)


def test_two_fields_together_tell_volumes_apart(tmp_path):
    """Phases whose trigger time differs from slice to slice, of two acquisitions at the same places."""
    number = 0
    for acquisition in "12":
        for phase in "123":
            for i, image in enumerate(body() + np.int16(10 * int(phase))):
                tags = {"AcquisitionNumber": acquisition, "TemporalPositionIdentifier": phase}
                one = ct_slice(image, number, (-10, -20, 2.5 * i), TriggerTime=f"{number * 0.7:.1f}", **tags)
                save(one, tmp_path / str(number))
                number += 1
    found = find(tmp_path)
    assert not found.bad and len(found.sources) == 6
    last = found.sources[-1]
    assert last.uid == "1.2.3-acquisition_2__temporal_position_3-" + last.uid[-8:]
    np.testing.assert_array_equal(read_scan(last).voxels, body() + 30)


def b_value(one, value):
    one.DiffusionBValue = value


def description(one, value):
    one.SeriesDescription = f"Doe {value} keV"


def echo(one, value):
    one.EchoTime = value


@pytest.mark.parametrize("tell", [echo, b_value, description])
@pytest.mark.parametrize("shift", [0.0, 1.25])
def test_echoes_b_values_and_descriptions_tell_volumes_apart(tmp_path, tell, shift):
    for number in (0, 1):
        for i, image in enumerate(body() - np.int16(number)):
            one = ct_slice(image, 12 * number + i, (-10, -20, 2.5 * i + shift * number))
            tell(one, 40 + 30 * number)
            save(one, tmp_path / f"{number}{i}")
    found = find(tmp_path)
    assert not found.bad and not any("Doe" in source.uid + source.name for source in found.sources)
    for number, source in enumerate(found.sources):
        np.testing.assert_array_equal(read_scan(source).voxels, body() - number)


@pytest.mark.parametrize("tag", ["AcquisitionTime", "AcquisitionNumber"])
def test_slices_of_mr_that_were_measured_by_turns_are_one_volume(tmp_path, tag):
    mr = {"Modality": "MR", "SliceThickness": "2.2", "signed": 1, "intercept": 0}
    for i, image in enumerate(body()):
        save(ct_slice(image, i, (-10, -20, 2.5 * i), **mr, **{tag: f"12000{1 + i % 2}"}), tmp_path / str(i))
    (source,) = find(tmp_path, modality="MR").sources
    np.testing.assert_array_equal(read_image(source).values, body())
    for path in tmp_path.iterdir():  # slices twice as thick as they are apart overlap: two volumes
        one = pydicom.dcmread(path)
        one.SliceThickness = "5"
        one.save_as(path)
    assert len(find(tmp_path, modality="MR").sources) == 2


@pytest.mark.parametrize("kind", ["SCOUT", "LOCALIZER", "AXIAL"])
def test_a_scout_among_the_slices_is_left_out(tmp_path, kind):
    write_series(tmp_path, body())
    tags = {"ImageType": ["ORIGINAL", "PRIMARY", kind], "PixelSpacing": ["2.5", "0.7"]}
    save(ct_slice(body()[:, 12], 99, (-10, 0, 30), iop=(1, 0, 0, 0, 0, -1), **tags), tmp_path / "scout")
    found = find(tmp_path)
    (source,) = found.sources
    np.testing.assert_array_equal(read_scan(source).voxels, body())
    assert found.passed_over.total() == 1 and "a localizer" in next(iter(found.passed_over))


def test_a_mosaic_is_no_slice(tmp_path):
    kind = ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]
    write_series(tmp_path, body(1), Modality="MR", ImageType=kind, SliceThickness="3")
    found = find(tmp_path, modality="MR")
    assert not found.sources and "a mosaic" in found.left_out[0][1]


@pytest.mark.parametrize("again", ["header", "syntax", "compressed", "other values"])
def test_slices_that_were_exported_again_are_copies(tmp_path, again):
    write_series(tmp_path, body())
    for i, image in enumerate(body()):
        one = ct_slice(image + np.int16(again == "other values" and i == 5), i, (-10, -20, 2.5 * i))
        one.StationName = "elsewhere"
        if again == "syntax":
            one.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
        elif again == "compressed":
            one.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
        save(one, tmp_path / "again" / str(i))
    if again == "other values":
        assert refused(tmp_path).startswith("two different images have one SOPInstanceUID and one position")
        return
    found = find(tmp_path)
    np.testing.assert_array_equal(read_scan(found.sources[0]).voxels, body())
    assert found.passed_over == {"copies of another DICOM file": 12}


def test_one_slice_needs_a_thickness(tmp_path):
    write_series(tmp_path, body(1))
    assert "tells no SliceThickness" in refused(tmp_path)
    write_series(tmp_path, body(1), SliceThickness="4")
    assert read_grid(find(tmp_path).sources[0])[0].spacing == (0.7, 0.8, 4.0)


@pytest.mark.parametrize("pixels", [["0.0007", "0.0007"], ["700", "700"]])
def test_sizes_in_another_unit_are_refused(tmp_path, pixels):
    write_series(tmp_path, body(), PixelSpacing=pixels)
    assert "are they in another unit than mm?" in refused(tmp_path)


def test_mr_without_a_rescale_is_as_it_is_stored(tmp_path):
    """Its values have no unit. CT, PET, and MR of which some slices have a rescale, need it."""
    bare = {"RescaleSlope": None, "RescaleIntercept": None}
    write_series(tmp_path / "mr", body(), intercept=0, signed=1, Modality="MR", **bare)
    (source,) = find(tmp_path / "mr", modality="MR").sources
    np.testing.assert_array_equal(read_image(source).values, body())
    save(ct_slice(body()[0], 40, (-10, -20, 30), Modality="MR"), tmp_path / "mr" / "more")
    assert "is missing in 12 of 13 slices" in refused(tmp_path / "mr", modality="MR")
    write_series(tmp_path / "pt", body(), intercept=0, Modality="PT", **bare)
    assert "is missing in 12 of 12 slices" in refused(tmp_path / "pt", modality="PT")


@pytest.mark.parametrize(
    ("scales", "slopes", "sound"),
    [([0.01], [2], True), ([0.01, 0.02], [2, 1], True), ([0.01, 0.02], [2], False), ([0.01], [2, 1], False)],
)
def test_values_of_philips_compare_from_slice_to_slice(tmp_path, scales, slopes, sound):
    for i, image in enumerate(body()):
        tags = {"Modality": "MR", "signed": 1, "intercept": 0, "RescaleSlope": str(slopes[i % len(slopes)])}
        one = ct_slice(image, i, (-10, -20, 2.5 * i), **tags)
        block = one.private_block(0x2005, "Philips MR Imaging DD 001", create=True)
        block.add_new(0x0E, "FL", scales[i % len(scales)])
        save(one, tmp_path / str(i))
    if sound:
        assert len(find(tmp_path, modality="MR").sources) == 1
    else:
        assert "scale slopes of Philips" in refused(tmp_path, modality="MR")


def test_volumes_that_nothing_tells_apart_are_refused(tmp_path):
    write_series(tmp_path / "a", body())
    write_series(tmp_path / "b", body()[:, ::-1], first=12)
    assert refused(tmp_path) == (
        "4-D: 12 slices share their position with another slice of the series (in 2 folders: a, b)"
    )


def test_acquisitions_end_to_end_are_one_scan(tmp_path):
    for number in (0, 1):
        heights = [2.5 * i for i in range(6 * number, 6 * number + 6)]
        part = body()[6 * number : 6 * number + 6]
        write_series(
            tmp_path, part, heights, first=6 * number, prefix=str(number), AcquisitionNumber=number + 1
        )
    (source,) = find(tmp_path).sources
    np.testing.assert_array_equal(read_scan(source).voxels, body())


@pytest.mark.parametrize("tag", ["PatientID", "StudyInstanceUID", "FrameOfReferenceUID"])
def test_two_patients_under_one_uid_are_two_scans(tmp_path, tag):
    for number, name in enumerate(("A", "B")):
        heights = [2.5 * (12 * number + i) for i in range(12)]
        write_series(tmp_path / name, body(), heights, first=12 * number, **{tag: f"1.{number + 1}"})
    found = find(tmp_path)
    assert not found.bad and [len(source.files) for source in found.sources] == [12, 12]
    assert len({source.uid for source in found.sources}) == 2
    assert all("of several patients or studies under this uid" in source.name for source in found.sources)


def test_two_patients_with_the_same_instance_uids_at_one_place_are_two_scans(tmp_path):
    for name in ("A", "B"):
        write_series(tmp_path / name, body() if name == "A" else body()[:, ::-1], PatientID=name)
    assert [len(source.files) for source in find(tmp_path).sources] == [12, 12]


def test_slices_without_a_patient_belong_to_the_only_one(tmp_path):
    for i, image in enumerate(body()):
        tags = {} if i % 3 else {"PatientID": "A"}
        save(ct_slice(image, i, (0, 0, 2.5 * i), **tags), tmp_path / str(i))
    assert len(find(tmp_path).sources[0].files) == 12


def test_an_instance_uid_that_many_slices_have_drops_none(tmp_path):
    for i, image in enumerate(body()):
        save(ct_slice(image, i, (0, 0, 2.5 * i), SOPInstanceUID=f"1.9.{i // 2}"), tmp_path / str(i))
    (source,) = find(tmp_path).sources
    scan = read_scan(source)
    np.testing.assert_array_equal(scan.voxels, body())
    assert scan.grid.spacing[2] == 2.5


def test_different_images_of_one_instance_uid_and_place_are_refused(tmp_path):
    write_series(tmp_path / "a", body())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (source,) = find(tmp_path).sources  # copies
    assert len(source.files) == 12 and find(tmp_path).passed_over == {"copies of another DICOM file": 12}
    save(ct_slice(body()[3][::-1], 3, (-10, -20, 7.5)), tmp_path / "b" / "0003")
    assert "two different images have one SOPInstanceUID and one position: 0003 and 0003" in refused(tmp_path)


@pytest.mark.parametrize(
    ("tags", "why"),
    [
        ({"PixelSpacing": ["0", "0.7"]}, "has to be above 0"),
        ({"RescaleSlope": "0"}, "RescaleSlope is 0"),
        ({"iop": (1, 0, 0, 0, 0.8, 0)}, "two unit vectors at a right angle"),
        ({"iop": (1, 0, 0, 0.3, 0.954, 0)}, "two unit vectors at a right angle"),
        ({"ImageOrientationPatient": None}, "lacks its orientation"),
    ],
)
def test_headers_without_a_geometry(tmp_path, tags, why):
    write_series(tmp_path, body(), **tags)
    assert why in refused(tmp_path)


@pytest.mark.parametrize(
    "lost", [(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), (5,), (11,), (0, 1, 2, 3, 4, 5, 6, 7, 8)]
)
def test_slices_that_lost_their_position(tmp_path, lost):
    """SliceLocation alone is none. A slice at the end would leave no gap, and three of twelve would be a volume."""
    for number, hu in enumerate(body()):
        place = {"ImagePositionPatient": None} if number in lost else {}
        save(
            ct_slice(hu, number, (0, 0, 2.5 * number), SliceLocation=str(2.5 * number), **place),
            tmp_path / f"{number:02}",
        )
    assert refused(tmp_path).startswith(
        f"{len(lost)} of 12 slices without a position in space (ImagePositionPatient); SliceLoc"
    )


def test_a_screenshot_among_slices_is_no_lost_slice(tmp_path):
    write_series(tmp_path, body())
    for name, hu, location in (("shot", body()[0], None), ("other size", body(12, 32, 32)[0], "5")):
        tags = {"SliceLocation": location} if location else {}
        save(ct_slice(hu, 20, (0, 0, 0), ImagePositionPatient=None, **tags), tmp_path / name)
    assert len(find(tmp_path).sources[0].files) == 12 and not find(tmp_path).bad


def test_slices_of_two_orientations(tmp_path):
    write_series(tmp_path, body()[:6])
    write_series(tmp_path, body()[6:], [15 + 2.5 * i for i in range(6)], first=6, prefix="b", iop=tilted(5))
    assert "slices of different orientations in one series" in refused(tmp_path)


def test_a_damaged_series_is_one_line(tmp_path):
    for path in write_series(tmp_path / "s", body()):
        path.write_bytes(path.read_bytes()[:-100])
    ((where, why),) = find(tmp_path).bad
    assert where == "s" and why.startswith("12 files, the first 0000: truncated: has ")
