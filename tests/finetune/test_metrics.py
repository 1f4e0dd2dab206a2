"""Metrics against voxel-by-voxel references in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from p2w.finetune import task_types
from p2w.finetune.task_types import TASK_TYPES, soft_dice


def naive_iou(mask, predicted):
    union = np.logical_or(mask, predicted).sum()
    return np.logical_and(mask, predicted).sum() / union if union else 1.0


def naive_dice(mask, predicted):
    both = mask.sum() + predicted.sum()
    return 2 * np.logical_and(mask, predicted).sum() / both if both else 1.0


@pytest.fixture
def cases():
    """Logits, masks (6, 1, 4, 5, 6), one sample without a mask or a prediction, and patients."""
    rng = np.random.default_rng(0)
    masks = (rng.random((6, 1, 4, 5, 6)) < 0.3).astype(np.uint8)
    logits = rng.normal(size=masks.shape) * 2 + 3 * masks - 1
    masks[2], logits[2] = 0, -5
    return logits, masks, ["a", "a", "b", "c", "c", "c"]


def measured(logits, masks, patients):
    kind = TASK_TYPES["segmentation"]
    records = [
        kind.record(torch.tensor(x), torch.tensor(m))
        for x, m in zip(logits[:, None], masks[:, None], strict=True)
    ]
    return torch.cat(records), kind.judge(torch.cat(records), patients)


def test_segmentation_is_what_counting_voxels_gives(cases):
    logits, masks, patients = cases
    probability = 1 / (1 + np.exp(-logits))
    _, (found, sure) = measured(logits, masks, patients)
    half = probability > 0.5
    assert found["iou"] == pytest.approx(naive_iou(masks, half))
    assert found["dice"] == pytest.approx(naive_dice(masks, half))
    each = list(zip(masks, half, strict=True))
    assert found["iou_sample"] == pytest.approx(np.mean([naive_iou(*one) for one in each]))
    assert found["dice_sample"] == pytest.approx(np.mean([naive_dice(*one) for one in each]))
    owner = np.array(patients)
    whole = [(masks[owner == name], half[owner == name]) for name in "abc"]
    assert found["iou_patient"] == pytest.approx(np.mean([naive_iou(*one) for one in whole]))
    assert found["dice_patient"] == pytest.approx(np.mean([naive_dice(*one) for one in whole]))
    means = []
    for threshold in np.arange(10) * 0.05 + 0.5:
        predicted = probability > threshold
        means.append((naive_iou(masks, predicted) + naive_iou(1 - masks, ~predicted)) / 2)
    assert found["mean_iou"] == pytest.approx(np.mean(means))
    assert set(sure) == set(found)
    assert all(low <= found[name] <= high for name, (low, high) in sure.items())


def test_a_perfect_and_an_empty_answer():
    masks = np.zeros((2, 1, 2, 2, 2), np.uint8)
    masks[0, 0, 0] = 1
    _, (found, _) = measured(np.where(masks, 9.0, -9.0), masks, ["a", "b"])
    assert all(value == 1 for value in found.values())
    _, (found, _) = measured(np.full(masks.shape, -9.0), masks, ["a", "b"])
    assert found["iou"] == found["dice"] == 0 and found["iou_sample"] == 0.5
    assert found["mean_iou"] == pytest.approx((0 + 12 / 16) / 2)


def test_soft_dice_is_of_the_flattened_batch_and_validation_takes_the_same(cases):
    logits, masks, patients = cases
    p = 1 / (1 + np.exp(-logits))
    expected = 1 - (2 * (p * masks).sum() + 1) / (p.sum() + masks.sum() + 1)
    records, _ = measured(logits, masks, patients)
    assert TASK_TYPES["segmentation"].loss_of(records) == pytest.approx(expected, rel=1e-6)
    world = type("One", (), {"size": 1})()
    loss = TASK_TYPES["segmentation"].loss(torch.tensor(logits), torch.tensor(masks), len(masks), world)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(soft_dice(torch.zeros(3))) == 0


def test_classification_counts_pairs_and_takes_the_patients_highest():
    rng = np.random.default_rng(1)
    label = (rng.random(60) < 0.3).astype(float)
    score = rng.normal(size=60) + label
    patients = [str(number // 6) for number in range(60)]
    label[:12] = 0  # two patients without
    found, sure = task_types.classification(score, label, patients)
    above = [(p > n) + 0.5 * (p == n) for p in score[label == 1] for n in score[label == 0]]
    assert found["auc"] == pytest.approx(np.mean(above))
    highest = score.reshape(10, 6).max(1)
    positive = label.reshape(10, 6).max(1) > 0
    above = [p > n for p in highest[positive] for n in highest[~positive]]
    assert found["auc_patient"] == pytest.approx(np.mean(above))
    assert sure["auc"][0] < found["auc"] < sure["auc"][1]


def test_classification_loss_and_record_agree():
    kind, world = TASK_TYPES["classification"], type("One", (), {"size": 1})()
    logits, label = torch.tensor([3.0, -1.0, 40.0]), torch.tensor([1.0, 1.0, 0.0])
    expected = float(nn.functional.binary_cross_entropy_with_logits(logits, label))
    assert float(kind.loss(logits, label, 3, world)) == pytest.approx(expected)
    assert kind.loss_of(kind.record(logits, label)) == pytest.approx(expected)
    kept = kind.keep(kind.record(logits, label))
    assert kept["probability"] == pytest.approx([0.952574, 0.268941, 1.0], abs=1e-6) and kept[
        "label"
    ].tolist() == [1, 1, 0]
