"""The loop one writes after PyTorch's torchrun tutorial: DDP, a DataLoader over an .npy memory map, a snapshot an epoch.

    torchrun --standalone --nproc_per_node=2 --max-restarts=1000 bench/plain_loop.py --data wholes.npy --folder DIR

Network, pretext and optimizer are p2w's, so that a step costs the same; what differs is how a run survives: a synchronous
torch.save of model and optimizer over the one snapshot at the end of every epoch, and a restart that begins that epoch
again. bench/goodput.py compares the two. DIR/steps.jsonl has a line a step, repeated ones too;
DIR/events.jsonl has starts and saves.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from p2w.pretext import build_pretext_and_network
from p2w.recipes import named
from p2w.rng import SampleKeys


class Wholes(Dataset):
    """Sub-scans of an .npy file (N, D, H, W), over and over up to `length`: an epoch of any length from few scans."""

    def __init__(self, path: str, length: int) -> None:
        self.array, self.length = np.load(path, mmap_mode="r"), length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(np.array(self.array[index % len(self.array)])), index


def main() -> None:
    """Train as the tutorial does, from the newest snapshot on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epoch-steps", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=1000)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    pretext, network = build_pretext_and_network(named("demo"))
    network = network.to(memory_format=torch.channels_last_3d)
    model = DistributedDataParallel(network)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    snapshot, first = args.folder / "snapshot.pt", 0
    if snapshot.exists():
        saved = torch.load(snapshot)
        network.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epochs"]
    data = Wholes(args.data, args.epoch_steps * args.batch)
    sampler = DistributedSampler(data, ranks, rank)
    loader = DataLoader(data, args.batch // ranks, sampler=sampler, num_workers=1)

    def note(name: str, entry: dict) -> None:
        if rank == 0:
            with open(args.folder / name, "a") as file:
                file.write(json.dumps(entry) + "\n")

    for name in ("steps.jsonl", "events.jsonl"):
        note(name, {"start": first * args.epoch_steps})
    for epoch in range(first, args.epochs):
        sampler.set_epoch(epoch)
        for step, (voxels, ids) in enumerate(loader):
            views = pretext.sample(voxels, SampleKeys(0, epoch, ids))
            optimizer.zero_grad(set_to_none=True)
            loss, _ = pretext.loss(model(views.input), views)
            loss.backward()
            optimizer.step()
            done = epoch * args.epoch_steps + step + 1
            note("steps.jsonl", {"step": done, "time": time.time(), "train/loss": loss.item()})
        if rank == 0:
            began = time.monotonic()
            saved = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epoch + 1}
            torch.save(saved, snapshot)
            note("events.jsonl", {"save_s": time.monotonic() - began})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
