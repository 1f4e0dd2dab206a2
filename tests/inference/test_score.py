"""p2w score: measures of known masks, pairs by name, and what is refused."""

import csv
import json
import math

import numpy as np
import pytest
from ct_files import write

from p2w.errors import UserError
from p2w.inference import score

SHAPE = (6, 12, 10)  # spacing 0.7, 0.8, 2.5 mm (x, y, z)


def box(low, high, value=1):
    mask = np.zeros(SHAPE, np.uint8)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = value
    return mask


@pytest.fixture
def folders(tmp_path):
    """Two scans of one patient and one of another, classes 1 and 2."""
    true = box((1, 2, 2), (4, 8, 8)) + box((4, 2, 2), (6, 5, 5), 2)
    for name in ("p_1", "p_2", "q_1"):
        write(tmp_path / "true" / f"{name}_seg.nii.gz", true)
    moved = box((2, 2, 2), (5, 8, 8))
    moved[5, 2:5, 2:5] = 2
    write(tmp_path / "out" / "masks" / "p_1_ct.nii.gz", moved)
    write(tmp_path / "out" / "masks" / "p_2_ct.nii.gz", true)
    write(tmp_path / "out" / "masks" / "q_1_ct.nii.gz", np.zeros(SHAPE, np.uint8))
    (tmp_path / "out" / "labels.json").write_text(json.dumps({"labels": {"background": 0, "a": 1, "b": 2}}))
    return tmp_path


def run(folders, *more):
    argv = [
        str(folders / "out" / "masks"),
        "--predictions",
        "*_ct.nii.gz",
        "--reference",
        str(folders / "true"),
    ]
    argv += ["--masks", "*_seg.nii.gz", "--out", str(folders / "scores.csv"), "--patient", "^([a-z])_", *more]
    assert score.main(argv) == 0
    return {(row["scan"], row["class"]): row for row in csv.DictReader((folders / "scores.csv").open())}


def test_known_masks(folders, capsys):
    rows = run(folders)
    assert len(rows) == 6 and {row["patient"] for row in rows.values()} == {"p", "q"}
    one = rows["p_1", "a"]
    assert float(one["dice"]) == pytest.approx(2 * 2 / (3 + 3)) and float(one["iou"]) == 0.5
    assert float(one["hd95_mm"]) == pytest.approx(2.5)
    assert float(one["reference_ml"]) == pytest.approx(108 * 1.4e-3, abs=1e-3)
    assert [float(rows["p_2", "b"][name]) for name in score.NAMES] == [1, 1, 0, 1]
    diagonal = math.sqrt((6 * 2.5) ** 2 + (12 * 0.8) ** 2 + (10 * 0.7) ** 2)
    assert [float(rows["q_1", "b"][name]) for name in score.NAMES] == pytest.approx(
        [0, 0, diagonal, 0], abs=1e-5
    )
    said = capsys.readouterr().out
    mean = (np.mean([2 / 3, 1]) + 0) / 2  # scans of a patient first, then patients
    assert f"{mean:8.3f}" in next(
        line for line in said.splitlines() if line.startswith("a ") and " dice " in line
    )


def test_regions_and_masks_of_one_value(folders):
    rows = run(folders, "--label-names", "whole=1,2", "core=2")
    assert {of for _, of in rows} == {"whole", "core"}
    (folders / "out" / "labels.json").unlink()
    rows = run(folders)
    assert {of for _, of in rows} == {"mask"} and float(rows["p_2", "mask"]["dice"]) == 1


def test_refusals(folders):
    with pytest.raises(UserError, match="holds the value 2, declared are"):
        run(folders, "--label-names", "a=1")
    (folders / "out" / "masks" / "q_1_ct.nii.gz").unlink()
    with pytest.raises(UserError, match="1 masks have no prediction, the first is q_1"):
        run(folders)
    assert len(run(folders, "--allow-missing")) == 4
    write(folders / "out" / "masks" / "q_1_ct.nii.gz", np.zeros(SHAPE, np.uint8), origin=(0, 0, 0))
    with pytest.raises(UserError, match="voxels away from"):
        run(folders)
    (folders / "true" / "p_1_seg.nii.gz").unlink()
    with pytest.raises(UserError, match="holds no true mask of it"):
        run(folders)


def test_pairs_that_measure_nothing_are_refused(folders):
    """A mask beside itself, an image in place of a mask, and two files of one name."""
    masks, true = folders / "out" / "masks", folders / "true"
    out = ["--out", str(folders / "scores.csv")]
    with pytest.raises(UserError, match="is the prediction and the true mask"):
        score.main([str(true), "--reference", str(true), *out])
    (folders / "out" / "labels.json").unlink()
    write(true / "q_1_seg.nii.gz", np.full(SHAPE, -900, np.int16))
    with pytest.raises(UserError, match=r"q_1_seg\.nii\.gz: holds values from -900: is it an image"):
        run(folders)
    write(true / "p_1_seg.mha", box((1, 2, 2), (4, 8, 8)))
    with pytest.raises(UserError, match="both are the mask p_1_seg: remove one"):
        score.main([str(masks), "--reference", str(true), *out])
