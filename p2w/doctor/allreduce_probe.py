"""One of the two ranks that `p2w doctor` starts: join, all-reduce, check the sum; rank 0 prints the seconds as JSON."""

import json
import sys
import time

import torch

from p2w.world import World

NUMBERS = 1 << 23  # 32 MiB: half of the paper's gradients


def main(timeout_s: float) -> None:
    """All-reduce over gloo on the CPU and, if this rank has a GPU, over NCCL."""
    world = World.start(timeout_s)
    took = {}
    for backend, device in {"gloo": "cpu", "NCCL": "cuda"}.items():
        if device not in ("cpu", world.device.type):
            continue
        for _ in range(2):  # the first one opens the connections
            values = torch.full(
                (NUMBERS,), world.rank + 1.0, device=world.device if device == "cuda" else device
            )
            began = time.perf_counter()
            world.sum(values)
            right = bool((values == 3).all())  # also waits for a GPU
            seconds = time.perf_counter() - began
        if not right:
            sys.exit(f"rank {world.rank}: the sum over {backend} is wrong")
        took[backend] = (seconds, values.nbytes)
    world.close()
    if world.is_main:
        print(json.dumps(took))


if __name__ == "__main__":
    main(float(sys.argv[1]))
