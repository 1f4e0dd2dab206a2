"""Trains a network with batch norm over all ranks for two steps at 1, 2 and 3 ranks; what came out goes to files.

python tests/model/norm_ranks.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
import torch._dynamo  # DDP imports it: here once, and not in each rank
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from p2w.model import build_encoder
from p2w.model.decoder import EncoderDecoder, build_decoder
from p2w.model.norm import synchronise_batch_norm

SHARES = {
    1: ((0, 5),),
    2: ((0, 2), (2, 5)),
    3: ((0, 3), (3, 5), (5, 5)),
}  # rows of the batch; the last rank has none
BATCH, STEPS = 5, 2


class Foreign(nn.Module):
    """Torch's own batch norms, of maps and of features."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 3, 3, bias=False)
        self.maps = nn.BatchNorm3d(3, momentum=None)
        self.linear = nn.Linear(3, 4)
        self.features = nn.BatchNorm1d(4, affine=False)

    def forward(self, x):
        return self.features(self.linear(torch.tanh(self.maps(self.conv(x))).sum((2, 3, 4))))


def networks():
    torch.manual_seed(0)
    encoder = build_encoder("unet3d", 2)
    paper = EncoderDecoder(encoder, build_decoder(encoder, skips=False))
    return {"paper": paper.double(), "foreign": Foreign().double()}


def train(network, rank, size):
    """Losses of this rank, as shares of the batch's; gradients and state after each step; what it says in eval mode."""
    synchronise_batch_norm(network, size)
    model = DistributedDataParallel(network, broadcast_buffers=False) if size > 1 else network
    begin, end = SHARES[size][rank]
    found = []
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step)
        x = 3 + torch.rand(BATCH, 1, 8, 8, 8, generator=draw, dtype=torch.float64)
        weight = torch.rand(BATCH, generator=draw, dtype=torch.float64)
        out = model(x[begin:end]).flatten(1)
        loss = (weight[begin:end, None] * out.square()).sum() / BATCH
        network.zero_grad()
        (loss * size).backward()  # DDP takes the mean over ranks
        gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.5)
        state = {name: value.clone() for name, value in network.state_dict().items()}
        found.append({"loss": loss.detach(), "gradients": gradients, "state": state})
    network.eval()
    with torch.no_grad():
        return {"steps": found, "judged": network(torch.ones(1, 1, 8, 8, 8, dtype=torch.float64))}


def one_rank(folder, rank, size):
    torch.set_num_threads(1)
    if size > 1:
        store = dist.FileStore(str(folder / f"store{size}"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    found = {}
    for name, network in networks().items():
        if size < 3 or name == "foreign":  # max-pooling of no sample is refused by torch
            found[name] = train(network, rank, size)
    torch.save(found, folder / f"{size}-{rank}.pt")
    if size > 1:
        dist.barrier()


def main():
    folder = Path(sys.argv[1])
    for size in SHARES:
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
