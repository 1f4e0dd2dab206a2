"""All series of a patient lie on one side of the split, and the set does not say who they are."""

from ct_files import ct, dicom, write

from p2w.ct.dicom import salted_hash
from p2w.shards.grouping import identity_in_set
from p2w.shards.manifest import read_manifest

SMALL = ("--tile", 8, 32, 32, "--min-std", 0, "--val-fraction", 0.4)


def test_series_of_a_patient_stay_together(command, tmp_path):
    scans, out = tmp_path / "scans", tmp_path / "out"
    for number in range(6):
        tags = {
            "0010|0020": f"MRN-{number // 2}",
            "0010|0010": "Muller^Anna",
            "0020|000d": f"1.9.{number // 2}",
        }
        dicom(scans / f"S{number}", ct((8, 32, 32), number), f"1.2.{number}", tags=tags)
    code, said, err = command.call("shard_scans", "--scans", scans, "--out", out, *SMALL)
    assert code == 0, said + err
    assert "split by patient: 6 scans of 3 (DICOM)" in said
    meta = read_manifest(out).meta
    side = {uid: name for name in ("train", "val") for uid in meta["split"][f"{name}_scans"]}
    assert sorted(side.values()) == ["train"] * 4 + ["val"] * 2
    assert all(side[f"1.2.{2 * k}"] == side[f"1.2.{2 * k + 1}"] for k in range(3))
    told = {source["uid"]: source["patient"] for source in meta["sources"]}
    assert told["1.2.0"] == identity_in_set(salted_hash("MRN-0", ""), meta["split"]["salt"])
    for path, data in command.contents(out).items():
        assert b"MRN" not in data and b"Muller" not in data, path


def test_without_patients_the_set_is_split_by_scan_as_ever(command, tmp_path):
    for number in range(3):
        write(tmp_path / "scans" / f"p{number}.nii.gz", ct((8, 32, 32), number))
    out = tmp_path / "out"
    code, said, err = command.call("shard_scans", "--scans", tmp_path / "scans", "--out", out, *SMALL)
    assert code == 0 and "split by scan: nothing tells which are of one patient" in said, said + err
    split = read_manifest(out).meta["split"]
    assert (
        split["rule"]
        == "by scan: the first of the scans ordered by sha256(seed:uid) are val, the others train"
    )
    code, said, _ = command.call(
        "shard_scans", "--scans", tmp_path / "scans", "--out", tmp_path / "by", *SMALL, "--groups", "^p[01]"
    )
    assert code == 0 and "split by patient: 3 scans of 3" in said
