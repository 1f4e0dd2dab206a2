"""prepare general on the layouts of others, from files to samples; what is refused in one line."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from ct_files import ct, write

from p2w.ct.orientation import BadScan
from p2w.errors import UserError
from p2w.tasks.case_samples import Declared
from p2w.tasks.custom import Custom
from p2w.tasks.label_values import WrongLabels
from p2w.tasks.prepare import TargetFolder, TargetSettings, refuse_missing_classes
from p2w.tasks.task import LeftOut, Split

SIZE = (8, 16, 16)
SHAPE = (10, 30, 30)
FLIPPED = np.diag([-1, -1, 1])


def body_and_tumour(number=0):
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:8, 5:25, 5:25] = 1
    labels[4:6, 8:12, 9 + number : 14] = 2
    return labels


def write_pair(folder, image, mask, number=0, labels=None, **geometry):
    write(folder / image, ct(SHAPE, number), direction=FLIPPED)
    labels = body_and_tumour(number) if labels is None else labels
    write(folder / mask, labels, **({"direction": FLIPPED} | geometry))


def cut(task, folder):
    """All samples of a folder, by case; and what cannot be used."""
    task.check()
    cases = task.find(str(folder), "").sort()
    task = cases.task or task
    return task, cases, {case.uid: list(task.cut(case, SIZE).samples) for case in cases.cases}


def test_files_that_are_of_no_case_are_named(tmp_path):
    write_pair(tmp_path / "pairs", "x_image.nii.gz", "x_mask.nii.gz")
    write_pair(tmp_path / "pairs", "y_IMAGE.nii.gz", "y_mask.nii.gz")
    found = Custom().find(str(tmp_path / "pairs"), "")
    assert [case.name for case in found.cases] == ["x_image.nii.gz"]
    why = "called neither like --images *_image.nii.gz nor like --masks *_mask.nii.gz"
    assert sorted(found.left_out) == [
        ("y_IMAGE.nii.gz", why),
        ("y_mask.nii.gz", "of no image *_image.nii.gz"),
    ]
    write_pair(tmp_path / "raw", "imagesTr/x_0000.nii.gz", "labelsTr/x.nii.gz")
    for other in "yz":
        write(tmp_path / "raw" / "imagesTr" / f"{other}_0000.nii.gz", ct(SHAPE))
    labels = {"background": 0, "body": 1, "tumour": 2}
    (tmp_path / "raw" / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1})
    )
    found = Custom(layout="nnunet").find(str(tmp_path / "raw"), "")
    assert found.left_out == [("imagesTr: 2 files, the first y_0000.nii.gz", "of no labelled case")]
    write_pair(tmp_path / "total", "x/ct.nii.gz", "x/segmentations/body.nii.gz")
    write_pair(tmp_path / "total", "y/CT.nii.gz", "y/segmentations/body.nii.gz")
    found = Custom(layout="structures", images="*/ct.nii.gz", masks="*/segmentations").find(
        str(tmp_path / "total"), ""
    )
    assert found.left_out == [("y/segmentations", "folders of masks of no image */ct.nii.gz")]


def whole_label(samples):
    """The middle of a sample of the whole scan, which is not resampled."""
    return samples[0].record[-1]


@pytest.mark.parametrize("layout", ["nnunet", "decathlon", "pairs", "structures"])
def test_every_layout_gives_the_same_samples(tmp_path, layout):
    ours, more = body_and_tumour(), {}
    if layout == "nnunet":
        write_pair(tmp_path, "imagesTr/x_0000.nii.gz", "labelsTr/x.nii.gz")
        tree = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "body": 1, "tumour": 2},
            "numTraining": 1,
        }
        (tmp_path / "dataset.json").write_text(json.dumps(tree))
    elif layout == "decathlon":
        write_pair(tmp_path, "imagesTr/x.nii.gz", "labelsTr/x.nii.gz")
        tree = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "body", "2": "tumour"}}
        tree["training"] = [{"image": "./imagesTr/x.nii.gz", "label": "./labelsTr/x.nii.gz"}]
        (tmp_path / "dataset.json").write_text(json.dumps(tree))
    elif layout == "pairs":
        write_pair(tmp_path, "x_image.nii.gz", "x_mask.nii.gz")
        more = {"label_names": ("body=1", "tumour=2")}
    else:
        write_pair(
            tmp_path, "x/ct.nii.gz", "x/segmentations/body.nii.gz", labels=(ours == 1).astype(np.uint8)
        )
        write(
            tmp_path / "x" / "segmentations" / "tumour.nii.gz",
            (ours == 2).astype(np.uint8),
            direction=FLIPPED,
        )
        more = {"images": "*/ct.nii.gz", "masks": "*/segmentations"}
    task, cases, samples = cut(Custom(layout=layout, around="object", jitter=0, **more), tmp_path)
    assert task.kind == "multi-class segmentation" and task.classes == ("background", "body", "tumour")
    (sample,) = samples["x" if layout != "pairs" else "x_image"]
    z, y, x = (int(at) for at in sample.first_voxel)
    canonical = ours[:, ::-1, ::-1]
    assert (sample.record[-1] == canonical[z : z + 8, y : y + 16, x : x + 16]).all() and (
        sample.record[-1] == 2
    ).any()
    folder = TargetFolder("x", TargetSettings("general", {}, SIZE, "tar", {}), task)
    row = folder._row(0, cases.cases[0], sample)
    shares = [(sample.record[-1] == k).mean() for k in (1, 2)]
    assert row["targets"] == pytest.approx(shares) and row["foreground"] == pytest.approx(sum(shares))


def test_structures_that_overlap(tmp_path):
    whole, core = body_and_tumour() > 0, body_and_tumour() == 2
    for name, mask in (("whole", whole), ("core", core)):
        write(tmp_path / "x" / "segmentations" / f"{name}.nii.gz", mask.astype(np.uint8), direction=FLIPPED)
    write(tmp_path / "x" / "ct.nii.gz", ct(SHAPE), direction=FLIPPED)
    how = {"layout": "structures", "images": "*/ct.nii.gz", "masks": "*/segmentations"}
    how |= {"around": "scan", "spacing": (2.5, 0.8, 0.7)}
    with pytest.raises(
        WrongLabels, match=r"masks core and whole overlap in \d+ voxels; with --overlapping"
    ) as error:
        cut(Custom(**how), tmp_path)
    assert error.value.ends_build
    task, _, samples = cut(Custom(**how, overlapping=True), tmp_path)
    assert task.kind == "multi-label segmentation" and task.classes == ("core", "whole")
    mask = samples["x"][0].record[-1]
    assert set(np.unique(mask)) == {0, 2, 3}  # core lies in whole
    task, _, _ = cut(Custom(**how, structures="^core$"), tmp_path)
    assert task.classes == ("background", "core")
    write(tmp_path / "y" / "ct.nii.gz", ct(SHAPE, 1), direction=FLIPPED)
    write(tmp_path / "y" / "segmentations" / "whole.nii.gz", whole.astype(np.uint8), direction=FLIPPED)
    cases = Custom(**how, overlapping=True).find(str(tmp_path), "")
    assert [case.uid for case in cases.cases] == ["x"] and "has no mask of core" in cases.bad[0][1]


def test_regions_become_bits(tmp_path):
    write_pair(tmp_path, "x_image.nii.gz", "x_mask.nii.gz")
    task, _, samples = cut(Custom(label_names=("whole=1,2", "core=2"), around="object", jitter=0), tmp_path)
    assert task.kind == "multi-label segmentation" and set(np.unique(whole_label(samples["x_image"]))) == {
        0,
        1,
        3,
    }


def test_what_a_mask_holds_and_where_it_lies_is_compared(tmp_path):
    write_pair(tmp_path, "x_image.nii.gz", "x_mask.nii.gz")
    with pytest.raises(WrongLabels, match=r"holds the value 2, declared are 0 and body=1"):
        cut(Custom(label_names=("body=1",)), tmp_path)
    write_pair(tmp_path, "x_image.nii.gz", "x_mask.nii.gz", origin=(0, 0, 0))
    with pytest.raises(BadScan, match=r"lies up to .* voxels away from its image; --resample-masks"):
        cut(Custom(label_names=("body=1", "tumour=2")), tmp_path)


def test_a_class_without_a_case_or_not_trained_on_is_refused():
    task = Custom(declared=Declared((), ("a", "b"), ((1,), (2,)), (), "multi-class segmentation"))
    row = {"split": "train", "label": -1, "targets": [0.1, 0.0]}
    with pytest.raises(UserError, match="b: has no case in any sample"):
        refuse_missing_classes([row], task, Split(""))
    test = {"split": "test", "label": -1, "targets": [0.0, 0.2]}
    with pytest.raises(UserError, match="b: has no case in the training split, 1 elsewhere"):
        refuse_missing_classes([row, test], task, Split(""))
    refuse_missing_classes([row, test], task, Split("", folds=2))


def test_scans_with_answers(tmp_path):
    for number in range(3):
        write(tmp_path / "scans" / f"s{number}.nii.gz", ct(SHAPE, number), direction=FLIPPED)
    table = tmp_path / "labels.csv"
    table.write_text("scan,patient,label\ns0,p,no\ns1.nii.gz,q,yes\ns2,q,yes\n")
    how = {"scan_table": str(table), "spacing": (4.0, 2.0, 2.0)}
    task, cases, samples = cut(Custom(**how), tmp_path / "scans")
    assert (
        task.kind == "multi-class classification"
        and task.classes == ("no", "yes")
        and task.target == {"sample": "scan"}
    )
    assert [case.patient for case in cases.cases] == ["p", "q", "q"] and cases.tables.keys() == {"labels.csv"}
    assert [samples[f"s{k}"][0].label for k in range(3)] == [0, 1, 1]
    assert samples["s0"][0].spacing_mm == pytest.approx((4, 2, 2))
    table.write_text("scan,u,v\ns0,1,0\ns1,0,\ns2,,1\n")
    task, _, samples = cut(Custom(**how, answer="labels", answer_columns=("u", "v")), tmp_path / "scans")
    assert task.kind == "multi-label classification" and samples["s0"][0].targets == (1, 0)
    table.write_text("scan,age,x,y,z\ns0,40,-10,-20,40\ns0,50,9999,0,0\ns1,60,-10,-20,40\n")
    task, cases, samples = cut(
        Custom(table=str(table), answer="value", answer_columns=("age",)), tmp_path / "scans"
    )
    assert task.target == {"sample": "crop"} and [s.targets for s in samples["s1"]] == [(60,)]
    assert isinstance(samples["s0"][1], LeftOut) and "outside the scan" in samples["s0"][1].why
    table.write_text("scan,label\ns0,0\nother,1\n")
    with pytest.raises(UserError, match="line 3: scan other is not below"):
        Custom(**how).find(str(tmp_path / "scans"), "")
    table.write_text("scan,label\ns0,0\ns0.nii.gz,1\n")
    with pytest.raises(UserError, match="is in line 2 too"):
        Custom(**how).find(str(tmp_path / "scans"), "")


def test_a_set_that_an_earlier_version_began_is_continued():
    """Options that came later are not among the settings of a folder that does not use them."""
    names = {
        name
        for name in TargetSettings("general", asdict(Custom()), SIZE, "tar", {}).plain()
        if "option" in name
    }
    assert names == {
        f"option {name}" for name in (
            "spacing", "stride", "min_foreground", "max_tiles", "resample_masks", "seed", "images", "masks", "labels",
            "around", "jitter", "crops", "table", "values", "patient", "fractions", "split_table", "folds", "val_fraction",
        )
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"layout": "nnunet", "table": "t.csv"}, "goes without"), ({"overlapping": True}, "goes with --layout structures"),
        ({"layout": "nnunet", "label_names": ("a=1",)}, "names the classes itself"),
        ({"scan_table": "t.csv"}, "name --spacing Z Y X"),
        ({"around": "scan"}, "name --spacing Z Y X"), ({"answer": "value"}, "goes with --table or --scan-table"),
        ({"table": "t", "scan_table": "u", "spacing": (1, 1, 1)}, "choose one"),
        ({"label_names": ("a=1",), "labels": (1,)}, "without --labels"),
        ({"around": "foreground", "crops": 0}, "--crops 0"),
        ({"around": "foreground", "foreground_share": 2}, "from 0 to 1"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(options, why):
    with pytest.raises(UserError, match=why):
        Custom(**options).check()
