"""Which values of a mask are which class, and crops of such masks against plain loops."""

import json

import numpy as np
import pytest

from p2w.ct.orientation import Grid
from p2w.errors import UserError
from p2w.tasks.case_samples import RandomCrops, nth_voxel
from p2w.tasks.crops import CropBox
from p2w.tasks.custom import Custom
from p2w.tasks.label_values import WrongLabels, parse_label_names

STRAIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def test_values_become_numbers_of_classes_and_bits_of_regions():
    mask = np.array([[[0, 7, 300], [7, 0, 0]]], np.int32)
    labels = parse_label_names(["background=0", "tumour=7", "left lung=300"])
    assert not labels.regions and labels.encode(mask, "m").tolist() == [[[0, 1, 2], [1, 0, 0]]]
    regions = parse_label_names(["whole=1,2,3", "core=2,3", "enhancing=3"])
    assert regions.regions
    assert regions.encode(np.array([[[0, 1, 2, 3]]], np.uint8), "m").tolist() == [[[0, 1, 3, 7]]]
    assert parse_label_names(["a=1", "b=1"]).regions  # a value of two names


@pytest.mark.parametrize(
    "mask",
    [
        np.array([[[0, 9]]]),
        np.array([[[-128, 127]]], np.int8),
        np.array([[[-1, 1]]], np.int16),
        np.array([[[1e6, 1]]]),
    ],
)
def test_a_value_that_is_not_declared_ends_the_build(mask):
    with pytest.raises(WrongLabels, match=r"mask m: holds the values? .*declared are 0 and a=1") as error:
        parse_label_names(["a=1"]).encode(mask, "m")
    assert error.value.ends_build and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        (["tumour"], "NAME=VALUE"), (["a=x"], "NAME=VALUE"), (["a=-1"], "NAME=VALUE"), (["background=0"], "no label beside"),
        (["a=0"], "from 1 to"), (["a=70000"], "from 1 to"), (["a=1", "a=2"], "declared twice"), (["a/b=1"], "is no name"),
        (["a=1,1"], "each once"), ([f"r{i}={i + 1},{i + 2}" for i in range(16)], "at most 15"),
    ],
)  # fmt: skip
def test_names_that_cannot_be(texts, why):
    with pytest.raises(UserError, match=why):
        parse_label_names(texts)


def naive_labels(labels, box, bits):
    """Each voxel's classes by the shares that `CropBox.cut` gives of one class alone."""
    numbers = range(bits) if bits else range(int(labels.max()) + 1)
    shares = np.stack([box.cut((((labels >> n) & 1) if bits else labels == n).astype(np.float32), float(not bits and n == 0))
                       for n in numbers])  # fmt: skip
    if bits:
        return sum((own > 0.5).astype(int) << n for n, own in enumerate(shares))
    return shares.argmax(0)


@pytest.mark.parametrize("bits", [0, 3])
@pytest.mark.parametrize("step", [(1, 1, 1), (2.3, 0.7, 1.5), (0.5, 3, 3)])
@pytest.mark.parametrize("first", [(0, 0, 0), (-3.3, 2.1, 5.5), (40, 0, 0)])
def test_a_crop_of_classes_has_the_class_with_the_largest_share(bits, step, first):
    labels = np.random.default_rng(0).integers(0, 8 if bits else 4, (9, 12, 11)).astype(np.int16)
    first = np.rint(first) if step == (1, 1, 1) else np.array(first, float)
    box = CropBox(first, np.array(step, float), (5, 6, 7))
    assert (box.cut_labels(labels, bits) == naive_labels(labels, box, bits)).all()


def test_a_sample_of_the_whole_scan_has_the_same_middle():
    grid = Grid((20, 31, 12), (0.8, 0.8, 2.5), (0.0, 0.0, 0.0), STRAIGHT)
    box = CropBox.of_whole((8, 16, 16), grid, (4.0, 2.0, 1.5))
    last = box.first + (np.array(box.size) - 1) * box.step
    np.testing.assert_allclose((box.first + last) / 2, (np.array([12, 31, 20]) - 1) / 2)
    np.testing.assert_allclose(box.step, np.array([4, 2, 1.5]) / [2.5, 0.8, 0.8])


def test_random_crops_hold_the_class_they_are_drawn_for():
    labels = np.zeros((20, 40, 40), np.int16)
    labels[5:15, 5:35, 5:35] = 1
    labels[9, 30, 31] = 2  # a class of one voxel
    grid = Grid((40, 40, 20), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), STRAIGHT)
    drawn = RandomCrops((8, 16, 16), None, 8, 0.5, 3)

    def cut():
        return list(drawn.cut(lambda box: [box.cut(labels, 0)], labels, grid, "uid"))

    found = cut()
    assert [one.of for one in found if "anywhere" in one.of] == [f"crop {k}, anywhere" for k in range(4, 8)]
    for one in found[:4]:
        number = int(one.of.rpartition(" ")[2])
        assert (one.record[-1] == number).any() and (one.record[0] == one.record[1]).all()
        assert min(one.first_voxel) >= 0 and (np.add(one.first_voxel, (8, 16, 16)) <= (20, 40, 40)).all()
    assert {int(one.of.rpartition(" ")[2]) for one in found[:4]} == {1, 2}
    assert all((a.record == b.record).all() for a, b in zip(found, cut(), strict=True))
    mask = np.random.default_rng(0).random((3, 4, 5)) < 0.3
    every = [tuple(nth_voxel(mask, (k + 0.5) / mask.sum())) for k in range(mask.sum())]
    assert every == [tuple(at) for at in np.argwhere(mask)]


def dataset(tmp_path, **changes):
    tree = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "a": 1, "b": 2},
        "file_ending": ".nii.gz",
        "numTraining": 1,
    }
    tree = {key: value for key, value in (tree | changes).items() if value is not None}
    for name in ("imagesTr/x_0000.nii.gz", "labelsTr/x.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "dataset.json").write_text(json.dumps(tree))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"labels": {"background": 0, "a": 1, "b": 3}}, "0, 1, 3 are not contiguous: 2 is missing"),
        ({"labels": {"air": 0, "a": 1}}, "label 0 is 'air'"),
        ({"labels": {"background": 0, "a": "1"}}, "label 'a' is"),
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, "ignore label"),
        ({"labels": {"background": 0, "a": [1, 2], "b": [2]}}, "regions_class_order is missing"),
        ({"labels": {"background": 0, "a": [1, 2], "b": [2]}, "regions_class_order": [1]}, "1 values for 2 regions"),
        ({"channel_names": {"1": "CT"}}, "without gaps"),
        ({"channel_names": None, "modality": {"0": "CT"}}, "--layout decathlon"),
        ({"numTraining": 7}, "numTraining is 7, the folder has 1"), ({"file_ending": ".png"}, "file_ending"),
        ({"labels": None}, "lacks 'labels'"), ({"channel_names": {"0": "T1"}}, "--values hu is for CT alone"),
    ],
)  # fmt: skip
def test_a_dataset_json_that_cannot_be(tmp_path, changes, why):
    with pytest.raises(UserError, match=why) as error:
        Custom(layout="nnunet").find(dataset(tmp_path, **changes), "")
    assert "\n" not in str(error.value)


def test_regions_of_nnunet(tmp_path):
    changes = {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
    cases = Custom(layout="nnunet").find(dataset(tmp_path, **changes), "")
    task = cases.task
    assert task.kind == "multi-label segmentation" and task.classes == ("whole", "core")
    assert task.target == {"values": ((1, 2), (2,)), "order": (1, 2)} and task.channel_names == ("CT",)
    assert [case.uid for case in cases.cases] == ["x"]
