"""Trains every contrastive pretext for three steps at 1, 2 and 4 ranks in forked processes; what came out goes to files.

python tests/pretext/contrast_ranks.py FOLDER
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch._dynamo  # an optimizer imports it: here once, and not in each of seven ranks
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from p2w.config import Config, DataConfig, OptimConfig, PretextConfig
from p2w.model.encoder import Encoder
from p2w.pretext import build_pretext
from p2w.pretext.contrastive.objectives import ContrastConfig
from p2w.pretext.protocol import Views
from p2w.train.optim import Precision, Schedule
from p2w.train.step import Stepper

NAMES = ("simclr", "moco", "instdisc", "pirl", "exemplar", "swav", "dino", "amdim", "parts2whole_contrast")
BATCH, STEPS, SIZE = 8, 3, (4, 4, 4)
# The second batch holds a whole twice, as a stand-in for a damaged one may; the third brings back some of the first.
IDS = ((0, 1, 2, 3, 4, 5, 6, 7), (8, 9, 10, 8, 11, 12, 13, 14), (3, 1, 15, 16, 17, 18, 6, 19))


class Plain(Encoder):
    """Without batch norm, whose statistics are a rank's own."""

    channels, strides = (6,), (2,)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 6, 2, stride=2)

    def forward(self, x):
        return [torch.tanh(self.conv(x))]


class Up(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.ConvTranspose3d(6, 1, 2, stride=2)

    def forward(self, features):
        return self.conv(features[-1])


def build(name, **contrast):
    settings = ContrastConfig(
        **{
            "temperature": 0.7,
            "momentum_schedule": "constant",
            "jigsaw": False,
            "hidden": 10,
            "dim": 5,
            "queue": 20,
            "bank": 24,
            "prototypes": 7,
            **contrast,
        }
    )
    config = Config(
        data=DataConfig(batch=BATCH), pretext=PretextConfig(name=name, size=SIZE), contrast=settings
    )
    config = replace(config, optim=OptimConfig(name="sgd", lr=0.5, schedule="constant", fused="none"))
    torch.manual_seed(0)
    pretext = build_pretext(config)
    network = pretext.build(Plain())
    if hasattr(network, "decoder"):
        network.decoder = Up()
    return config, pretext, network


def views(step):
    """Of the whole batch."""
    draw = torch.Generator().manual_seed(step)
    one, two, whole = torch.rand(3, BATCH, 1, *SIZE, generator=draw)
    return Views(one, whole, extra_inputs=(two, torch.tensor(IDS[step])))


def train(name, rank, size):
    """State after each step, losses of this rank, and what validation would say."""
    config, pretext, network = build(name)
    model = DistributedDataParallel(network, broadcast_buffers=False) if size > 1 else network
    optimizer = torch.optim.SGD(network.parameters(), lr=config.optim.lr)
    precision = Precision("fp32", None, "test")
    stepper = Stepper(
        config,
        pretext,
        model,
        optimizer,
        Schedule(config.optim, STEPS),
        precision,
        torch.device("cpu"),
        network,
    )
    share = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    states, losses = [], []
    for step in range(STEPS):
        if step == 1:
            stepper.warm_up_ddp(views(step).rows(share))
        losses.append(stepper.step(views(step).rows(share), step).loss.item())
        states.append({key: value.clone() for key, value in network.state_dict().items()})
    network.eval()
    mine = views(1).rows(share)
    with torch.no_grad():
        judged = network(mine.input, *mine.extra_inputs)
    return {"states": states, "losses": losses, "judged": [one.clone() for one in judged]}


def one_rank(folder, rank, size):
    torch.set_num_threads(1)
    if size > 1:
        store = dist.FileStore(str(folder / f"store{size}"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    torch.save({name: train(name, rank, size) for name in NAMES}, folder / f"{size}-{rank}.pt")
    if size > 1:
        dist.barrier()


def main():
    folder = Path(sys.argv[1])
    for size in (1, 2, 4):
        pids = []
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                one_rank(folder, rank, size)
                os._exit(0)
            pids.append(pid)
        codes = [os.waitpid(pid, 0)[1] for pid in pids]
        if any(codes):
            sys.exit(f"{size} ranks: {codes}")


if __name__ == "__main__":
    main()
