"""p2w prepare of sets with several classes, channels and answers, with its worker processes, and back out of the shards."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from ct_files import ct, write
from scipy import ndimage

from p2w.commands.prepare_target import main
from p2w.errors import UserError
from p2w.tasks.reader import open_target

SHAPE = (10, 30, 30)


def prepare(source, out, *more):
    argv = ["custom", "--source", str(source), "--out", str(out), "--size", "8", "16", "16", "--workers", "1"]
    return main([*argv, *map(str, more)])


def test_regions_and_channels_of_nnunet_reach_the_reader(tmp_path):
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:8, 5:25, 5:25], labels[4:6, 8:16, 9:14] = 1, 2
    for number in range(5):
        values = np.random.default_rng(number).gamma(2.0, 200.0, (2, *SHAPE)).astype(np.float32)
        for channel in range(2):
            write(tmp_path / "raw" / "imagesTr" / f"c{number}_{channel:04d}.nii.gz", values[channel])
        write(tmp_path / "raw" / "labelsTr" / f"c{number}.nii.gz", labels)
    tree = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "whole": [1, 2], "core": [2]},
    }
    tree |= {"regions_class_order": [1, 2], "numTraining": 5, "file_ending": ".nii.gz"}
    (tmp_path / "raw" / "dataset.json").write_text(json.dumps(tree))
    more = (
        "--layout",
        "nnunet",
        "--values",
        "percentiles",
        "--around",
        "foreground",
        "--crops",
        2,
        "--format",
        "arrow",
    )
    assert prepare(tmp_path / "raw", tmp_path / "set", *more) == 0
    target = open_target(tmp_path / "set")
    assert target.kind == "multi-label segmentation" and target.meta["classes"] == ["whole", "core"]
    assert target.meta["target"] == {"values": [[1, 2], [2]], "order": [1, 2]}
    assert target.channels == 2 and target.meta["channel_names"] == ["T1", "T2"] and len(target) == 10
    voxels, masks = target.read(range(10))
    assert (
        voxels.shape == (10, 2, 8, 16, 16)
        and set(masks.unique().tolist()) <= {0, 1, 3}
        and (masks == 3).any()
    )
    shares = np.stack([((masks >> bit) & 1).float().mean((1, 2, 3, 4)) for bit in (0, 1)], 1)
    np.testing.assert_allclose(shares, target.targets, rtol=1e-5)
    assert prepare(tmp_path / "raw", tmp_path / "set", *more) == 0  # nothing is left to do


def test_a_value_that_is_not_declared_ends_it_and_a_damaged_file_does_not(tmp_path):
    for number in range(4):
        mask = np.zeros(SHAPE, np.uint8)
        mask[2:8, 5:25, 5:25], mask[4:6, 8:16, 9:14] = 1, 2
        write(tmp_path / "raw" / f"c{number}_image.nii.gz", ct(SHAPE, number))
        write(tmp_path / "raw" / f"c{number}_mask.nii.gz", mask)
    with pytest.raises(
        UserError, match=r"c0_image.nii.gz: mask c0_mask.nii.gz: holds the value 2, declared are 0 and a=1"
    ):
        prepare(tmp_path / "raw", tmp_path / "set", "--label-names", "a=1")
    assert not (tmp_path / "set" / "manifest.parquet").exists()
    with pytest.raises(UserError, match="c: has no case in any sample"):
        prepare(tmp_path / "raw", tmp_path / "other", "--label-names", "a=1", "b=2", "c=3")
    (tmp_path / "raw" / "c3_mask.nii.gz").write_bytes(b"none")
    assert (
        prepare(
            tmp_path / "raw", tmp_path / "set", "--label-names", "a=1", "b=2", "--fractions", 0.5, 0.2, 0.3
        )
        == 1
    )
    assert open_target(tmp_path / "set").meta["classes"] == ["background", "a", "b"]


SARCOMA = Path(os.environ.get("P2W_REAL_DATA", "/nowhere")) / "sarcoma"


@pytest.mark.skipif(not SARCOMA.is_dir(), reason="P2W_REAL_DATA does not name real scans")
def test_real_sarcomas_as_tumour_and_body(tmp_path):
    """Tumours as outlined, the body as what is denser than fat and larger than all else."""
    (tmp_path / "raw").mkdir()
    truth = {}
    for number in (2, 3, 8):
        (tmp_path / "raw" / f"S{number}_ct.nii.gz").symlink_to(SARCOMA / f"STS_{number:03d}_ct.nii.gz")
        scan, outline = (
            sitk.ReadImage(str(SARCOMA / f"STS_{number:03d}_{kind}.nii.gz")) for kind in ("ct", "gtv")
        )
        parts, _ = ndimage.label(sitk.GetArrayFromImage(scan) > -300)
        labels = (parts == 1 + np.bincount(parts.ravel())[1:].argmax()).astype(np.uint8)
        labels[sitk.GetArrayFromImage(outline) > 0] = 2
        image = sitk.GetImageFromArray(labels)
        image.CopyInformation(scan)
        sitk.WriteImage(image, str(tmp_path / "raw" / f"S{number}_seg.nii.gz"))
        truth[f"S{number}_ct"] = labels
    more = ("--images", "*_ct.nii.gz", "--masks", "*_seg.nii.gz", "--label-names", "body=1", "tumour=2")
    more += ("--around", "foreground", "--crops", 4, "--fractions", 0.4, 0.3, 0.3)
    assert prepare(tmp_path / "raw", tmp_path / "set", *more) == 0
    target = open_target(tmp_path / "set")
    assert target.meta["classes"] == ["background", "body", "tumour"] and len(target) == 12
    _, masks = target.read(range(12))
    assert (masks == 2).flatten(1).any(1).sum() >= 3
    for row in range(12):
        z, y, x = (int(at) for at in target.first_voxel[row])
        assert (truth[target.scan_uid[row]][z : z + 8, y : y + 16, x : x + 16] == masks[row, 0].numpy()).all()


def test_answers_of_scans_and_what_is_unknown(tmp_path):
    for number in range(6):
        write(tmp_path / "scans" / f"s{number}.nii.gz", ct(SHAPE, number))
    rows = [f"s{n},{n % 2},{'' if n == 3 else (n + 1) % 2}" for n in range(5)] + ["s5,,"]
    (tmp_path / "t.csv").write_text("\n".join(["scan,u,v", *rows]))
    more = (
        "--answer",
        "labels",
        "--answer-columns",
        "u",
        "v",
        "--spacing",
        4,
        2,
        2,
        "--fractions",
        0.6,
        0.2,
        0.2,
    )
    assert prepare(tmp_path / "scans", tmp_path / "set", "--scan-table", tmp_path / "t.csv", *more) == 0
    target = open_target(tmp_path / "set")
    assert (
        target.kind == "multi-label classification"
        and len(target) == 5
        and target.meta["target"] == {"sample": "scan"}
    )
    known = dict(zip(target.scan_uid, target.targets.tolist(), strict=True))
    assert (
        known["s1"] == [1, 0]
        and known["s4"] == [0, 1]
        and np.isnan(known["s3"][1])
        and "t.csv" in target.meta["tables"]
    )
    assert np.array_equal(target.read(range(5))[1].numpy(), target.targets.astype(np.float32), equal_nan=True)
