"""Metrics of several classes: surfaces by plain loops and MONAI, answers by scikit-learn, empty masks as stated."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, r2_score, roc_auc_score

from p2w.finetune import metrics
from p2w.finetune.task_types import task_type
from p2w.world import World

WORLD = World(0, 1, 0, 1, "here", torch.device("cpu"), "test")


def naive_surface(mask):
    """Voxels of the mask with a neighbour across a face that is not in it, or beyond the volume."""
    found = []
    for at in np.argwhere(mask):
        near = [at + step for step in np.vstack((np.eye(3, dtype=int), -np.eye(3, dtype=int)))]
        if any((n < 0).any() or (n >= mask.shape).any() or not mask[tuple(n)] for n in near):
            found.append(at)
    return np.array(found, np.float64)


def naive_measures(one, other, spacing, tolerance):
    edges = [naive_surface(mask) * np.array(spacing) for mask in (one, other)]
    away = np.sqrt(((edges[0][:, None] - edges[1][None]) ** 2).sum(-1))
    near = [away.min(1), away.min(0)]
    share = sum((own <= tolerance).sum() for own in near) / sum(map(len, near))
    return max(np.percentile(own, 95) for own in near), share


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 0.7, 1.3)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_surfaces_are_those_of_a_plain_loop_and_of_monai(spacing, seed):
    monai = pytest.importorskip("monai.metrics")
    rng = np.random.default_rng(seed)
    one, other = (rng.random((5, 7, 6)) < share for share in (0.5, 0.4))
    one[:2], other[3:, :3] = False, False
    found = metrics.surface_measures(one, other, spacing, 1.5)
    assert found == pytest.approx(naive_measures(one, other, spacing, 1.5), abs=1e-9)
    pair = [torch.from_numpy(mask)[None, None].float() for mask in (one, other)]
    theirs = monai.compute_hausdorff_distance(
        *pair, include_background=True, percentile=95, spacing=list(spacing)
    )
    near = monai.compute_surface_dice(*pair, [1.5], include_background=True, spacing=list(spacing))
    assert found == pytest.approx((theirs.item(), near.item()), abs=1e-5)


def test_a_box_moved_by_known_millimetres():
    one, other = np.zeros((12, 30, 30), bool), np.zeros((12, 30, 30), bool)
    one[2:8, 5:15, 5:15], other[4:10, 5:15, 5:15] = True, True
    assert metrics.surface_measures(one, one, (2.5, 1, 1)) == (0, 1)
    distance, near = metrics.surface_measures(one, other, (2.5, 1, 1), 5.0)
    assert distance == pytest.approx(5.0) and near == 1  # two slices of 2.5 mm
    assert metrics.surface_measures(one, other, (2.5, 1, 1), 4.9)[1] < 1


def test_empty_masks_are_as_stated():
    full, empty = np.ones((2, 3, 4), bool), np.zeros((2, 3, 4), bool)
    assert metrics.surface_measures(full, empty, (1, 1, 1)) == (math.inf, 0.0)
    assert metrics.surface_measures(empty, full, (1, 1, 1)) == (math.inf, 0.0)
    distance, near = metrics.surface_measures(empty, empty, (1, 1, 1))
    assert math.isnan(distance) and near == 1.0


def test_auc_balanced_accuracy_and_errors_are_scikit_learns():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 60)
    score = rng.random((60, 3)) + 0.4 * np.eye(3)[label]
    score /= score.sum(1, keepdims=True)
    area, each = metrics.macro_auc(score, np.eye(3)[label])
    assert area == pytest.approx(roc_auc_score(label, score, multi_class="ovr"))
    assert each[1] == pytest.approx(roc_auc_score(label == 1, score[:, 1]))
    right = (score.argmax(1) == label).astype(float)
    assert metrics.balanced_accuracy(right, label) == pytest.approx(
        balanced_accuracy_score(label, score.argmax(1))
    )
    value, truth = rng.random(60), rng.random(60)
    mae, r2 = metrics.errors(value, truth)
    assert (mae, r2) == pytest.approx((np.abs(value - truth).mean(), r2_score(truth, value)))
    absent = np.eye(3)[label] * [1, 1, 0]  # nobody has the third
    area, each = metrics.macro_auc(score, absent)
    assert math.isnan(each[2]) and area == pytest.approx(np.mean(each[:2]))


def test_a_perfect_ranking_of_few_is_no_proof():
    truth = np.eye(2)[[0, 0, 0, 1, 1]]
    low, high = metrics.macro_auc_interval(truth, truth, list("abcde"))
    assert high == 1 and low == pytest.approx(0.025 ** (1 / 2))


SEGMENTATIONS = {
    "multi-class segmentation": ("background", "a", "b"),
    "multi-label segmentation": ("a", "b", "c"),
}


def drawn(name, rng, size=(4, 5, 6), samples=5):
    kind = task_type(name).for_set({"classes": SEGMENTATIONS[name]})
    logits = torch.from_numpy(rng.normal(size=(samples, 3, *size)))
    most = 3 if name.startswith("multi-class") else 8
    masks = torch.from_numpy(rng.integers(0, most, (samples, 1, *size)).astype(np.int16))
    return kind, logits, masks


@pytest.mark.parametrize("name", SEGMENTATIONS)
def test_segmentation_of_classes_is_what_counting_gives(name):
    rng = np.random.default_rng(1)
    kind, logits, masks = drawn(name, rng)
    patients, spacing = ["p", "p", "q", "r", "r"], np.full((5, 3), 2.0, np.float32)
    records = torch.cat(
        [kind.test_record(logits[i : i + 1], masks[i : i + 1], spacing[i : i + 1]) for i in range(5)]
    )
    found, sure = kind.judge(records, patients)
    x, y = logits.numpy(), masks.numpy()[:, 0]
    if name.startswith("multi-class"):
        names, true = ["a", "b"], np.stack([y == 1, y == 2], 1)
        answer = np.stack([x.argmax(1) == 1, x.argmax(1) == 2], 1)
        probability = np.exp(x) / np.exp(x).sum(1, keepdims=True)
        entropy = -np.log(np.take_along_axis(probability, y[:, None].astype(int), 1)).mean()
        probability = probability[:, 1:]
    else:
        names, true = ["a", "b", "c"], np.stack([(y >> bit) & 1 == 1 for bit in range(3)], 1)
        answer, probability = x > 0, 1 / (1 + np.exp(-x))
        entropy = -np.where(true, np.log(probability), np.log(1 - probability)).mean()
    dice, each = [], []
    for k, of in enumerate(names):
        t, a = true[:, k], answer[:, k]
        dice.append(2 * (t & a).sum() / (t.sum() + a.sum()))
        assert found[f"dice:{of}"] == pytest.approx(dice[-1])
        assert found[f"iou:{of}"] == pytest.approx((t & a).sum() / (t | a).sum())
        by_patient = [(t[:2], a[:2]), (t[2:3], a[2:3]), (t[3:], a[3:])]
        each.append(np.mean([2 * (p & q).sum() / (p.sum() + q.sum()) for p, q in by_patient]))
        assert found[f"dice_patient:{of}"] == pytest.approx(each[-1])
        far = [metrics.surface_measures(q, p, (2, 2, 2))[0] for p, q in zip(t, a, strict=True)]
        means = [np.mean(far[:2]), far[2], np.mean(far[3:])]
        assert found[f"hd95_mm:{of}"] == pytest.approx(np.mean(means))
    assert found["dice"] == pytest.approx(np.mean(dice)) and found["dice_patient"] == pytest.approx(
        np.mean(each)
    )
    soft = [1 - (2 * (probability[:, k] * true[:, k]).sum() + 1) / (probability[:, k].sum() + true[:, k].sum() + 1)
            for k in range(len(names))]  # fmt: skip
    assert kind.loss_of(records) == pytest.approx(entropy + np.mean(soft), rel=1e-5)
    assert float(kind.loss(logits, masks, 5, WORLD)) == pytest.approx(kind.loss_of(records), rel=1e-5)
    assert sure.keys() == found.keys() and kind.measure(records, patients) == found
    assert all(low <= found[one] + 1e-9 and found[one] <= high + 1e-9 for one, (low, high) in sure.items())


def test_a_missing_prediction_counts_the_diagonal_and_two_empty_masks_nothing():
    kind = task_type("multi-class segmentation").for_set({"classes": ("background", "a", "b")})
    masks = torch.zeros((2, 1, 2, 3, 6), dtype=torch.uint8)
    masks[0, 0, 0, 0, 0] = 1  # b is nowhere, a in the first sample alone
    logits = torch.zeros((2, 3, 2, 3, 6))
    logits[:, 0] = 9
    records = kind.test_record(logits, masks, np.array([[3, 2, 1]] * 2, np.float32))
    found, _ = kind.judge(records, ["p", "q"])
    assert found["hd95_mm:a"] == pytest.approx(np.sqrt(3 * 6**2)) == found["hd95_mm"]
    assert "hd95_mm:b" not in found and found["dice:b"] == 1 and found["dice:a"] == 0
    assert found["dice_patient:a"] == 0.5 and found["surface_dice:a"] == 0.5


def test_answers_are_judged_and_unknown_ones_take_no_part():
    rng = np.random.default_rng(2)
    kind = task_type("multi-label classification").for_set({"classes": ("u", "v")})
    logits, target = (
        torch.from_numpy(rng.normal(size=(12, 2))),
        torch.tensor([[0.0, 1.0], [1.0, math.nan]] * 6),
    )
    records = kind.record(logits, target)
    found, _ = kind.judge(records, [f"p{i // 2}" for i in range(12)])
    assert found["auc"] == found["auc:u"] == pytest.approx(roc_auc_score(target[:, 0], logits[:, 0]))
    p = torch.sigmoid(logits).numpy()
    losses = -np.where(target == 1, np.log(p), np.where(target == 0, np.log(1 - p), 0))
    assert kind.loss_of(records) == pytest.approx(losses.mean())
    assert float(kind.loss(logits, target.double(), 12, WORLD)) == pytest.approx(losses.mean())

    two = task_type("multi-class classification").for_set({"classes": ("no", "yes")})
    label = torch.tensor([0.0, 1.0] * 6)
    found, sure = two.judge(two.record(logits, label), [f"p{i}" for i in range(12)])
    assert set(found) == set(sure) == {"auc", "balanced_accuracy", "accuracy"}
    assert found["auc"] == pytest.approx(roc_auc_score(label, (logits[:, 1] - logits[:, 0])))
    assert two.needed_labels == (0, 1) and "all of class yes" in two.problem_of(np.ones(3, np.int8))


def test_a_regression_speaks_in_the_unit_of_the_table():
    train = np.array([[40.0, 1.0], [60.0, math.nan], [80.0, 3.0]])
    kind = task_type("regression").for_set({"classes": ("age", "grade")}, train)
    assert kind.target["mean"] == [60, 2] and kind.target["sd"] == pytest.approx([np.std([40, 60, 80]), 1])
    again = task_type("regression").for_set({"classes": ("age", "grade"), "target": kind.target})
    logits = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    torch.testing.assert_close(
        again.predict(logits), torch.tensor([[60.0, 2.0], [60 + np.std([40, 60, 80]), 1.0]]).float()
    )
    target = torch.tensor([[60.0, 2.0], [70.0, math.nan]])
    found, _ = kind.judge(kind.record(logits, target), ["p", "q"])
    assert found["mae:age"] == pytest.approx((np.std([40, 60, 80]) - 10) / 2) and found["mae:grade"] == 0
    assert math.isfinite(kind.loss_of(kind.record(logits, target)))
    other = task_type("regression").for_set(
        {"classes": ("age", "grade")}, train * 3 - 7
    )  # another fold's scale
    together = torch.cat((kind.record(logits, target), other.record(logits, target)))
    errors = [abs(own.predict(logits)[1, 0].item() - 70) for own in (kind, other)]
    errors += [abs(own.predict(logits)[0, 0].item() - 60) for own in (kind, other)]
    plain = task_type("regression").for_set({"classes": ("age", "grade")})
    found, _ = plain.judge(together, ["p", "q", "p", "q"])
    assert found["mae:age"] == pytest.approx(np.mean(errors), rel=1e-6) and found == plain.measure(
        together, list("pqpq")
    )
    assert "40 alone in column age" in kind.problem_of_targets(train[:1])
