"""A run folder as training leaves it, written by the trainer's own writers."""

from dataclasses import replace

import pytest
import torch

from p2w.log import Log
from p2w.pretrain import build
from p2w.recipes import named
from p2w.train.checkpoint import Checkpoints, Snapshot
from p2w.train.folder import RunFolder


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """Two checkpoints, the first of them the best; do not change it."""
    run = tmp_path_factory.mktemp("runs") / "small"
    config = named("demo")
    config = replace(config, model=replace(config.model, width=2))
    folder, log = RunFolder(run), Log(run, True, 20)
    folder.open(config, "0123456789abcdef", "shards", {"host": "here"})
    checkpoints = Checkpoints(run / "checkpoints")
    for step, validation in ((10, 0.02), (20, 0.03)):
        torch.manual_seed(step)
        log.metrics(step, {"val/loss": validation, "similarity/auc": 0.8, "train/lr": 0.1})
        checkpoints.save(Snapshot(step, build(config)[1].state_dict(), {}, validation))
    log.close()
    folder.close()
    return run
