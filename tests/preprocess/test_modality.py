"""MR: each scan scaled by its percentiles, CT and localizers left out, repaired as it was cut."""

import sys

import numpy as np
import processes
import pytest
from ct_files import ct, dicom, write

from p2w.shards.manifest import read_manifest
from p2w.stream.stream import open_set

MR = {"0008|0060": "MR", "0028|1052": "0", "0028|1053": "1"}
SMALL = ("--tile", 8, 32, 32, "--min-std", 0)


def mr(seed):
    """Values of an MR image, int16 [z,y,x], none of them below 0."""
    return np.random.default_rng(seed).gamma(2.0, 300.0, (8, 32, 32)).astype(np.int16)


def test_mr_is_scaled_and_ct_left_out(command, tmp_path):
    scans, out = tmp_path / "scans", tmp_path / "out"
    values = {"1.2.1": mr(1), "1.2.2": mr(2)}
    for uid, voxels in values.items():
        dicom(scans / uid, voxels, uid, tags=MR)
    dicom(scans / "ct", ct((8, 32, 32)), "1.2.9")
    write(scans / "flat.nii.gz", np.full((8, 32, 32), 7, np.int16))
    code, said, err = command.call("shard_scans", "--scans", scans, "--out", out, "--modality", "mr", *SMALL)
    assert code == 1, said + err
    assert "left out: ct (series 1.2.9): modality CT, not MR" in said
    assert "bad scan: flat.nii.gz: 99 % of its voxels have one value, 7" in said
    manifest = read_manifest(out)
    assert manifest.meta["modality"] == "mr"
    assert manifest.meta["intensity"] == {"percentiles": [0.5, 99.5], "become": [-1000, 1000]}
    shards = open_set(str(out))
    for number, (source, voxels) in enumerate(zip(manifest.meta["sources"], values.values(), strict=True)):
        low, high = np.percentile(voxels, (0.5, 99.5))
        assert source["intensity_range"] == pytest.approx([low, high])
        got = np.empty(shards.shape, np.int16)
        shards.read_into(number, got)
        wanted = np.clip((voxels - low) / (high - low), 0, 1) * 2000 - 1000
        assert np.abs(got - wanted).max() <= 0.5 + 1e-6
    damaged = out / "1.2.1.tar"
    whole = damaged.read_bytes()
    damaged.unlink()
    line = [sys.executable, "-m", "p2w", "verify", out, "--repair", "--scans", scans]
    done = processes.run(line, capture_output=True, text=True)
    assert done.returncode == 0 and damaged.read_bytes() == whole, done.stdout + done.stderr


def test_what_is_in_hu_is_refused_for_mr(command, tmp_path):
    (tmp_path / "scans").mkdir()
    code, _, err = command.call(
        "shard_scans",
        "--scans",
        tmp_path / "scans",
        "--out",
        tmp_path / "o",
        "--modality",
        "mr",
        "--body-only",
    )
    assert code == 2 and "--body-only: is a rule in HU, which --modality mr has not" in err
