"""shard_scans.py end to end, on made folders and on real scans."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from ct_files import ct, dicom, write

from p2w.shards.manifest import read_manifest

NAME = "shard_scans"
REAL = os.environ.get("P2W_REAL_DATA")


def test_a_mixed_folder(command, tmp_path):
    scans, out = tmp_path / "hospital", tmp_path / "hospital" / "out"
    write(scans / "a b" / "one.nii.gz", ct((64, 128, 128), 1))
    write(scans / "two.nrrd", ct((65, 130, 128), 2))
    write(scans / "mask.nii.gz", (ct((64, 128, 128)) > 0).astype(np.uint8))
    dicom(scans / "disc" / "S1", ct((64, 128, 128), 3), "1.2.3")
    dicom(scans / "disc" / "S2", ct((66, 128, 128), 4), "1.2.4", skip=(30,))
    dicom(scans / "disc" / "S3", ct((3, 128, 128), 4), "1.2.5", tags={"0008|0060": "PT"})
    (scans / "readme.txt").write_text("hello")
    common = ("--scans", scans, "--out", out)
    code, said, err = command.call(NAME, *common)
    assert code == 1 and not err, said + err
    assert "bad scan: disc/S2 (series 1.2.4): 1 slices missing" in said
    assert "bad scan: mask.nii.gz: not CT values" in said
    assert "left out: disc/S3 (series 1.2.5): modality PT, not CT" in said
    report = json.loads((out / "report.json").read_text())
    assert [entry["where"] for entry in report["bad_scans"]] == ["disc/S2 (series 1.2.4)", "mask.nii.gz"]
    assert report["files_that_are_no_images"] == 1
    manifest = read_manifest(out)
    uids = manifest.table.column("scan_uid").to_pylist()
    assert uids[0] == "1.2.3" and uids[1].startswith("a_b_one-") and uids[2] == "two"
    assert set(manifest.table.column("subset").to_pylist()) == {-1}
    code, said, _ = command.call(NAME, *common)  # the shards inside are no scans
    assert code == 1 and "3 sub-scans kept" in said


def test_tilted_series_and_the_table_of_series(command, tmp_path):
    """A tilt is refused, or straightened where it is asked for, and then the manifest says so."""
    pytest.importorskip("pydicom")
    from dicom_files import body, write_series

    scans, t = tmp_path / "scans", np.radians(12)
    tilt = (1, 0, 0, 0, np.cos(t), -np.sin(t))
    hu = body(66, 130, 130)
    write_series(scans / "tilted", hu, series="1.2.1", iop=tilt, PatientID="MEIER", SliceThickness="2.5")
    write_series(scans / "straight", hu, series="1.2.2", PatientID="MEIER", SliceThickness="5")
    (scans / "study.zip").write_bytes(b"PK")
    common = ("--scans", scans, "--min-std", "0")
    code, said, err = command.call(NAME, *common, "--json")
    straight, tilted = json.loads(said)
    assert code == 0 and not err and "MEIER" not in said
    assert (straight["action"], tilted["action"]) == ("cut into 1", "refuse")
    assert tilted["why"].startswith("gantry tilt or drift") and straight["patient"] == tilted["patient"]
    code, said, _ = command.call(NAME, *common, "--out", tmp_path / "a")
    assert code == 1 and "passed over  66: slices of bad series" in said and "1: archives" in said
    code, said, _ = command.call(NAME, *common, "--out", tmp_path / "b", "--resample-tilt")
    assert code == 0 and "read         132 files of 2 scans" in said
    sources = {source["uid"]: source for source in read_manifest(tmp_path / "b").meta["sources"]}
    assert (
        sources["1.2.1"]["resampled"].startswith("gantry tilt or drift")
        and "resampled" not in sources["1.2.2"]
    )
    choice = ("--resample-tilt", "--select", "slice_thickness <= 3")
    code, said, _ = command.call(NAME, *common, "--out", tmp_path / "c", *choice)
    assert code == 0 and [one["uid"] for one in read_manifest(tmp_path / "c").meta["sources"]] == ["1.2.1"]
    code, _, err = command.call(NAME, *common)
    assert code == 2 and err.startswith("error: --out DIR is missing")


@pytest.mark.skipif(not REAL, reason="P2W_REAL_DATA names no folder of real scans")
@pytest.mark.parametrize(("folder", "count"), [("dicom", 16), ("nifti", 16), ("luna16", 64)])
def test_real_scans(command, tmp_path, folder, count):
    out = tmp_path / "shards"
    if folder == "luna16":
        code, said, _ = command.call(
            "shard_luna", "--luna", Path(REAL) / folder, "--out", out, "--min-std", 0
        )
    else:
        code, said, _ = command.call(NAME, "--scans", Path(REAL) / folder, "--out", out, "--min-std", 0)
    assert code == 0 and f"{count} sub-scans, 0 left out" in said
    assert read_manifest(out).table.num_rows == count
