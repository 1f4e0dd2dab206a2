"""What this rank sees in five steps (an epoch and a half of 24 sub-scans in batches of 8), and its looks, as JSON.

python tests/launch/sees.py SHARDS FOLDER       writes FOLDER/RANK.json
"""

import json
import sys
from pathlib import Path

import torch

from p2w.analysis.features import TrainingWholes
from p2w.analysis.monitors import SimilarityMonitor, Validation
from p2w.config import Config, DataConfig, PretextConfig
from p2w.geometry import sample_boxes
from p2w.log import Log
from p2w.model import build_encoder
from p2w.model.norm import synchronise_batch_norm
from p2w.pretext import build_pretext
from p2w.rng import SampleKeys
from p2w.stream.stream import Stream, open_set
from p2w.world import World

PRETEXT = PretextConfig(size=(8, 16, 16))


def network():
    torch.manual_seed(0)
    pretext = build_pretext(Config(pretext=PRETEXT))
    return pretext, pretext.build(build_encoder("unet3d", 2)).eval()


def main():
    shards, folder = sys.argv[1:]
    torch.set_num_threads(1)
    world, data = World.start(60), open_set(shards)
    share = {"rank": world.rank, "world_size": world.size, "readers": 1}
    seen = []
    with Stream(data, "train", 8, seed=5, **share) as stream:
        for batch, _ in zip(stream.batches(0, 1), range(5), strict=False):
            boxes = sample_boxes(SampleKeys(5, batch.epoch, batch.ids), 0, data.shape)
            sums = batch.voxels.sum((1, 2, 3)).tolist()
            seen.append((batch.epoch, batch.step, batch.ids.tolist(), boxes.tolist(), sums))
    pretext, model = network()
    synchronise_batch_norm(model, world.size)  # which a recalibrated copy must not follow
    with torch.no_grad():
        values = dict(Validation(pretext, model, lambda: Stream.validation(data, 12, **share), world)(0))
        config, log = Config(data=DataConfig(batch=12), pretext=PRETEXT), Log(Path(shards), False, 1)
        wholes = TrainingWholes(data, world)
        values |= SimilarityMonitor(
            config, model.encoder, data, "val", world, log,
            recalibrate=lambda encoder: wholes.recalibrate(encoder, pretext),
        )(0)  # fmt: skip
    (Path(folder) / f"{world.rank}.json").write_text(json.dumps([seen, values]))
    world.close()


if __name__ == "__main__":
    main()
