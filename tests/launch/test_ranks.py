"""The same samples, the same parts and the same validation, however many ranks share the work. Real processes over gloo."""

import json

import numpy as np
import pytest
import torch

from p2w.analysis.monitors import Validation, validation_keys
from p2w.stream.stream import Stream, open_set
from p2w.world import World
from tests.launch.sees import network


def run(forge, shards, folder, size):
    """Rank by rank what was seen, and the validation, of which all ranks must have the same."""
    folder = folder / str(size)
    codes, _, err = forge.run(folder, shards, folder, ranks=size, script="tests/launch/sees.py")
    assert codes == [0] * size, err
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    assert all(values == found[0][1] for _, values in found)
    return [seen for seen, _ in found], found[0][1]


def test_samples_parts_and_validation_do_not_depend_on_the_ranks(forge, tiny_set, tmp_path):
    (whole,), alone = run(forge, tiny_set, tmp_path, 1)
    assert [(epoch, step) for epoch, step, *_ in whole] == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    for size in (2, 4):
        shares, values = run(forge, tiny_set, tmp_path, size)
        for step, expected in enumerate(whole):
            parts = [share[step] for share in shares]
            assert all(part[:2] == expected[:2] for part in parts)
            for field in (2, 3, 4):  # ids, boxes, voxels: rank after rank they are the batch of one rank
                assert [item for part in parts for item in part[field]] == expected[field]
        for (
            name,
            value,
        ) in values.items():  # a pair of parts that moves in its last bits may pass another: AUC in steps
            slack = {"similarity/auc": 1e-3, "contrast/loss": 1e-5}.get(name, 1e-6)
            assert value == pytest.approx(alone[name], rel=slack), name
        assert set(values) == set(alone) and len(values) == 7


def test_validation_and_mean_image_against_numpy(tiny_set):
    """8 sub-scans in batches of 3: the last is filled up, and what fills it does not count."""
    data = open_set(str(tiny_set))
    pretext, model = network()
    world = World(0, 1, 0, 1, "here", torch.device("cpu"), "test")
    with torch.no_grad():
        values = dict(Validation(pretext, model, lambda: Stream.validation(data, 3, readers=0), world)(0))
        outputs, targets = [], []
        for batch in Stream.validation(data, 1, readers=0).batches():
            views = pretext.sample(batch.voxels, validation_keys(batch))
            outputs.append(model(views.input)[0].double().numpy())
            targets.append(views.target[0].double().numpy())
    assert len(targets) == 8
    error = np.mean([np.mean((o - t) ** 2) for o, t in zip(outputs, targets, strict=True)])
    assert values["val/loss"] == pytest.approx(error, rel=1e-5)
    mean = np.mean(targets, axis=0)
    assert values["val/loss_mean_image"] == pytest.approx(
        np.mean([(t - mean) ** 2 for t in targets]), rel=1e-9
    )
