"""The three kinds of real scan, cut by the commands users type, and learned from by two processes."""

import json
import os
import sys
from pathlib import Path

import processes
import pytest
from processes import REPO, torchrun

from p2w.log import read_metrics

REAL = os.environ.get("P2W_REAL_DATA", "")
KINDS = {
    "luna16": ("preprocess/shard_luna.py", "--luna", "luna16", 64),
    "dicom": ("preprocess/shard_scans.py", "--scans", "dicom", 16),
    "nifti": ("preprocess/shard_scans.py", "--scans", "nifti", 16),
}

pytestmark = pytest.mark.skipif(not REAL, reason="P2W_REAL_DATA names no folder of real scans")


def run(*command: object) -> str:
    env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    words = [str(word) for word in command]
    spies = (("draw_nothing",), ("recalibrate_on_few",))
    done = processes.run(words, cwd=REPO, env=env, capture_output=True, text=True, timeout=220, spies=spies)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_every_full_tile_of_a_real_scan_is_cut(kind: str, tmp_path: Path) -> None:
    script, flag, folder, count = KINDS[kind]
    said = run(sys.executable, script, flag, Path(REAL) / folder, "--out", tmp_path / "set", "--min-std", 0)
    assert f"{count} sub-scans" in said
    plan = run(sys.executable, "launch/train.py", "--shards", tmp_path / "set", "--dry-run")
    assert f"{count} sub-scans to train" in plan


def test_two_processes_learn_from_real_scans(tmp_path: Path) -> None:
    scans = [Path(REAL) / kind for kind in KINDS]
    tile = ("--tile", 32, 64, 64)  # small wholes are read and resized in less time
    run(sys.executable, "preprocess/shard_scans.py", "--scans", *scans, "--out", tmp_path / "set", *tile)
    # A fifth of the time of the recipe's own; bfloat16 takes longer than float32 where arrays are small.
    small = ["--model.width", 4, "--pretext.size", 8, 16, 16, "--train.precision", "fp32"]
    steps = [*small, "--train.steps", 80, "--train.validate-every", 80, "--optim.lr", "5e-3"]
    run(*torchrun(2, "demo", "--shards", tmp_path / "set", "--run-dir", tmp_path / "run", *steps))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    first, *_, last = [record for record in read_metrics(tmp_path / "run") if "val/loss" in record]
    assert last["val/loss"] < 0.75 * first["val/loss_mean_image"]
