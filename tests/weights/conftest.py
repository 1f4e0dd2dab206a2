"""A run folder as training leaves it, written by the trainer's own code."""

from dataclasses import replace

import pytest
import torch

from p2w.log import Log
from p2w.model import ENCODERS
from p2w.pretext import build_pretext_and_network
from p2w.recipes import named
from p2w.train.checkpoint import Checkpoints, Snapshot
from p2w.train.run_dir import RunDir

DATA_SET = {"shape": [64, 128, 128], "spacing_mm": [[0.6, 0.5, 0.5], [1.25, 0.7, 0.7], [2.5, 0.98, 0.98]]}


def write_run(run, encoder="unet3d", width=2, size=(16, 32, 32)):
    """Two checkpoints, the first of them the best."""
    config = named("demo")
    config = replace(
        config,
        model=replace(config.model, name=encoder, width=width),
        pretext=replace(
            config.pretext, size=size, skips=encoder == "dense_vnet"
        ),  # it has no decoder without
    )
    folder, log = RunDir(run), Log(run, True, 20)
    machine = {"host": "here", "command": "launch/train.py demo", "data_set": DATA_SET}
    folder.open(config, "0123456789abcdef", "shards", machine)
    checkpoints = Checkpoints(run / "checkpoints")
    for step, validation in ((10, 0.02), (20, 0.03)):
        torch.manual_seed(step)
        log.metrics(step, {"val/loss": validation, "similarity/auc": 0.8, "train/lr": 0.1})
        checkpoints.save(Snapshot(step, build_pretext_and_network(config)[1].state_dict(), {}, validation))
    log.close()
    folder.close()
    return run


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """A run of the paper's network; do not change it."""
    return write_run(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(scope="session")
def resencl_run(tmp_path_factory):
    """A run of nnU-Net's encoder; do not change it."""
    return write_run(tmp_path_factory.mktemp("runs") / "resencl", "resencl", 1, (32, 64, 64))


DEEP = ("resnet101", "resnet152", "resnet200")  # resnet50 with more of the same blocks
EVERY = [pytest.param(name, marks=[pytest.mark.slow] * (name in DEEP)) for name in sorted(ENCODERS)]


@pytest.fixture(scope="session", params=EVERY)
def any_run(request, tmp_path_factory):
    """A run of every encoder in the table; do not change it."""
    run = tmp_path_factory.mktemp("runs") / request.param
    return write_run(run, request.param, 1, (32, 64, 64))
