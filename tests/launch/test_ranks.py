"""The same samples, the same parts and the same validation, however many ranks share the work. Real processes over gloo."""

import json
import multiprocessing
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from p2w.analysis.looks import Similarity
from p2w.analysis.validation import Validation, validation_keys
from p2w.config import Config, DataConfig, PretextConfig
from p2w.data.stream import Stream, open_set
from p2w.geometry import Keys, sample_boxes
from p2w.log import Log
from p2w.model import build_encoder
from p2w.pretext import build_pretext
from p2w.world import World

PRETEXT = PretextConfig(size=(8, 16, 16))


def network():
    torch.manual_seed(0)
    pretext = build_pretext(Config(pretext=PRETEXT))
    return pretext, pretext.build(build_encoder("unet3d", 2)).eval()


def one_rank(rank, size, port, shards, answers):
    """What rank `rank` of `size` sees in ten steps (two epochs and a bit, 24 sub-scans, batch 10 would leave 4 out)."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), P2W_DEVICE="cpu")
    torch.set_num_threads(1)
    world, data = World.start(60), open_set(shards)
    share = {"rank": rank, "world_size": size, "readers": 1}
    seen = []
    with Stream(data, "train", 8, seed=5, **share) as stream:
        for batch, _ in zip(stream.batches(0, 1), range(5), strict=False):
            boxes = sample_boxes(Keys(5, batch.epoch, batch.ids), 0, data.shape)
            sums = batch.voxels.sum((1, 2, 3)).tolist()
            seen.append((batch.epoch, batch.step, batch.ids.tolist(), boxes.tolist(), sums))
    pretext, model = network()
    with torch.no_grad():
        values = dict(Validation(pretext, model, lambda: Stream.validation(data, 12, **share), world)(0))
        config, log = Config(data=DataConfig(batch=12), pretext=PRETEXT), Log(Path(shards), False, 1)
        values |= Similarity(config, model.encoder, data, "val", world, log)(0)
    answers.put((rank, seen, values))
    world.close()


def run(shards, size):
    """Rank by rank what was seen, and the validation, of which all ranks must have the same."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    ranks = [
        context.Process(target=one_rank, args=(rank, size, port, str(shards), answers))
        for rank in range(size)
    ]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(100)
        assert [process.exitcode for process in ranks] == [0] * size
        found = sorted((answers.get() for _ in ranks), key=lambda one: one[0])
    finally:
        for process in ranks:
            process.kill()
    assert all(values == found[0][2] for _, _, values in found)
    return [seen for _, seen, _ in found], found[0][2]


def test_samples_parts_and_validation_do_not_depend_on_the_ranks(tiny_set):
    (whole,), alone = run(tiny_set, 1)
    assert [(epoch, step) for epoch, step, *_ in whole] == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    for size in (2, 4):
        shares, values = run(tiny_set, size)
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
        assert set(values) == set(alone) and len(values) == 6
    assert json.dumps(alone)


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
