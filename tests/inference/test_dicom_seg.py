"""DICOM-SEG out of p2w predict, read back by the reader of masks: the same voxels, whatever way round the series lies."""

import warnings

import numpy as np
import pytest
import SimpleITK as sitk
from test_predict import card, saved

from p2w.ct.discover import SearchOptions, find_scans
from p2w.ct.scan import read_scan
from p2w.errors import UserError
from p2w.inference import predict, predict_cohort
from p2w.inference.finetuned_model import FineTunedModel
from p2w.inference.mask_files import check_dicom_source, write_dicom_seg
from p2w.inference.predict import read_input
from p2w.tasks.dicom_masks import masks_by_series, read_mask

pydicom = pytest.importorskip("pydicom", reason="pip install 'p2w[test]' brings pydicom")
pytest.importorskip("highdicom", reason="pip install 'p2w[test]' brings highdicom")

from dicom_files import body, multi_frame, save, write_series  # noqa: E402

HU = body(12, 40, 44)
IDS = {"StudyInstanceUID": "1.7", "FrameOfReferenceUID": "1.8"}
MASK = np.zeros(HU.shape, np.uint8)  # in the order of the canonical scan
MASK[2:5, 7:20, 12:30] = MASK[8, 30:36, 3:9] = 1  # with empty slices before, between and behind
ORIENTATIONS = {
    "straight": ((1, 0, 0, 0, 1, 0), (0, 0, 2.5)),
    "rows and slices the other way": ((1, 0, 0, 0, -1, 0), (0, 0, -2.5)),
    "columns the other way": ((-1, 0, 0, 0, 1, 0), (0, 0, -2.5)),
    "sagittal": ((0, 1, 0, 0, 0, -1), (2.5, 0, 0)),
    "oblique": ((0.98, 0.198997, 0, -0.198997, 0.98, 0), (0, 0, 2.5)),
}


def series(folder, iop=ORIENTATIONS["straight"][0], step=(0, 0, 2.5), ids=IDS):
    """A series whose slice i lies i steps from the first, and names of files that are in another order."""
    place = lambda i: tuple(float(o + i * s) for o, s in zip((-10, -20, 5), step, strict=True))  # noqa: E731
    write_series(folder, HU, place=place, iop=iop, **ids)
    return folder


def source_of(folder):
    found = find_scans([str(folder)], "", options=SearchOptions())
    assert len(found.sources) == 1, found.bad
    return found.sources[0]


def again(folder, out):
    """The mask as p2w prepare reads it, on the scan's canonical grid; by the series that the object refers to."""
    source = source_of(folder)
    scan = read_scan(source)
    (seg,) = masks_by_series(str(out), "", "seg")["1.2.3"]
    return read_mask(seg, "seg", "", source, scan.grid, scan.voxels.shape)


def stored(folder, mask):
    model = FineTunedModel(None, None, card())
    return read_input([folder], model).stored(mask)


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_it_is_read_back_voxel_by_voxel(tmp_path, name):
    folder, out = series(tmp_path / "ct", *ORIENTATIONS[name]), tmp_path / "seg"
    out.mkdir()
    scan = read_scan(source_of(folder))
    mask = np.zeros(scan.voxels.shape, np.uint8)
    mask.reshape(-1)[np.flatnonzero(MASK) % mask.size] = 1
    write_dicom_seg(out / "a.dcm", {"Liver": stored(folder, mask)}, source_of(folder), "weights")
    np.testing.assert_array_equal(again(folder, out), mask)
    made = pydicom.dcmread(out / "a.dcm")
    assert made.Modality == "SEG" and made.StudyInstanceUID == "1.7" and made.FrameOfReferenceUID == "1.8"
    assert made.SegmentSequence[0].SegmentLabel == "Liver"
    referred = made.ReferencedSeriesSequence[0]
    instances = {one.ReferencedSOPInstanceUID for one in referred.ReferencedInstanceSequence}
    assert instances == {str(pydicom.dcmread(path).SOPInstanceUID) for path in folder.iterdir()}


def test_an_empty_mask_several_classes_and_the_same_object_again(tmp_path):
    folder, out = series(tmp_path / "ct"), tmp_path / "seg"
    out.mkdir()
    source = source_of(folder)
    write_dicom_seg(out / "a.dcm", {"Liver": np.zeros_like(MASK)}, source, "weights")
    assert not again(folder, out).any()
    other = np.roll(MASK, 2, 1)  # overlaps the first
    for name in ("a.dcm", "b.dcm"):
        write_dicom_seg(out / name, {"Liver": MASK, "Tumour": other}, source, "weights")
    one, two = (pydicom.dcmread(out / name) for name in ("a.dcm", "b.dcm"))
    assert one.SOPInstanceUID == two.SOPInstanceUID and one.PixelData == two.PixelData
    (out / "b.dcm").unlink()
    scan = read_scan(source)
    (seg,) = masks_by_series(str(out), "", "seg")["1.2.3"]
    for name, wanted in (("liver", MASK), ("tumour", other), ("", MASK | other)):
        np.testing.assert_array_equal(
            read_mask(seg, "seg", name, source, scan.grid, scan.voxels.shape), wanted
        )
    write_dicom_seg(out / "a.dcm", {"Liver": MASK}, source, "other weights")
    assert pydicom.dcmread(out / "a.dcm").SOPInstanceUID != one.SOPInstanceUID


def test_no_warning_quotes_the_patients_name(tmp_path):
    """highdicom warns of a name of one word, and prints it."""
    folder = series(tmp_path / "ct", ids=IDS | {"PatientName": "Smithson", "PatientID": "4711"})
    out = tmp_path / "seg"
    out.mkdir()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        write_dicom_seg(out / "a.dcm", {"Liver": MASK}, source_of(folder), "weights")
        again(folder, out)
    assert not [
        str(one.message) for one in said if "Smithson" in str(one.message) or "4711" in str(one.message)
    ]
    assert pydicom.dcmread(out / "a.dcm").PatientName == "Smithson"


def test_frames_of_one_file_in_another_order(tmp_path):
    folder, out = tmp_path / "ct", tmp_path / "seg"
    slices = [pydicom.dcmread(path) for path in sorted(series(tmp_path / "single").iterdir())]
    order = [5, 0, 11, 3, 8, 1, 10, 2, 9, 4, 7, 6]
    save(multi_frame([slices[n] for n in order], **IDS), folder / "all.dcm")
    out.mkdir()
    write_dicom_seg(out / "a.dcm", {"Liver": MASK}, source_of(folder), "weights")
    np.testing.assert_array_equal(again(folder, out), MASK)
    save(multi_frame(slices[:6], **IDS), tmp_path / "parts" / "a.dcm")
    save(multi_frame(slices[6:], **(IDS | {"SOPInstanceUID": "1.5.2"})), tmp_path / "parts" / "b.dcm")
    with pytest.raises(UserError, match="some of the frames of its files, or of several files"):
        check_dicom_source(source_of(tmp_path / "parts"))


def test_what_cannot_be_referred_to_is_refused_before_anything_is_computed(tmp_path):
    image = sitk.GetImageFromArray(HU)
    sitk.WriteImage(image, str(tmp_path / "scan.nii.gz"))
    saved(tmp_path / "run" / "trial-00", "segmentation")
    argv = [str(tmp_path / "run"), "--scan", str(tmp_path / "scan.nii.gz"), "--format", "dicom-seg", "--out"]
    with pytest.raises(UserError, match="is for DICOM series, and this is none; leave --format out"):
        predict.main([*argv, str(tmp_path / "a.dcm")])
    with pytest.raises(UserError, match=r"name --out FILE\.dcm"):
        predict.main([*argv, str(tmp_path / "a.nii.gz")])
    saved(tmp_path / "classes" / "trial-00", "classification")
    with pytest.raises(UserError, match="makes no mask"):
        predict.main([str(tmp_path / "classes"), *argv[1:], str(tmp_path / "a.dcm")])
    with pytest.raises(UserError, match="no FrameOfReferenceUID, which the mask has to refer to"):
        check_dicom_source(source_of(series(tmp_path / "ct", ids={"StudyInstanceUID": "1.7"})))


def test_from_the_command_one_scan_and_many(tmp_path, capsys, monkeypatch):
    """The object holds the mask that an image file would hold, of a network that finds what is above 0 HU."""
    monkeypatch.setattr(
        FineTunedModel, "predictions_of_scaled", lambda self, x, dtype: (x[:, 0] > 0.5).float()
    )
    folder = series(tmp_path / "scans" / "ct", *ORIENTATIONS["rows and slices the other way"])
    saved(tmp_path / "run" / "trial-00", "segmentation")
    run, dcm, mha = str(tmp_path / "run"), tmp_path / "one" / "a.dcm", tmp_path / "a.mha"
    dcm.parent.mkdir()
    for out, more in ((dcm, ["--format", "dicom-seg"]), (mha, [])):
        assert predict.main([run, "--scan", str(folder), "--out", str(out), "--overlap", "0", *more]) == 0
    wanted = sitk.GetArrayFromImage(sitk.DICOMOrient(sitk.ReadImage(str(mha)), "LPS"))
    assert 0 < wanted.mean() < 1
    np.testing.assert_array_equal(again(folder, dcm.parent), wanted)
    many = [
        run,
        "--scans",
        str(folder.parent),
        "--out",
        str(tmp_path / "out"),
        "--overlap",
        "0",
        "--no-overlays",
    ]
    assert predict_cohort.main([*many, "--format", "dicom-seg"]) == 0
    np.testing.assert_array_equal(again(folder, tmp_path / "out" / "masks"), wanted)
    assert predict_cohort.main([*many, "--format", "dicom-seg"]) == 0
    with pytest.raises(UserError, match="holds predictions of other settings"):
        predict_cohort.main(many)
    sitk.WriteImage(sitk.GetImageFromArray(HU), str(folder.parent / "other.nii.gz"))
    assert predict_cohort.main([*many, "--format", "dicom-seg"]) == 1
    assert "bad: other.nii.gz: --format dicom-seg is for DICOM series" in capsys.readouterr().out
