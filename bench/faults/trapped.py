"""The forge of tests/launch, with traps: files that make a rank raise or its clock jump, and steps whose target is NaN.

The bulk of the soak's lives are forked here; a stated share goes through torchrun, which runs launch/train.py untouched.
"""

import os
import time
from pathlib import Path

import forge  # tests/launch/forge.py

from p2w.train.step import Stepper

JUMP_S = -3600.0
untrapped = forge.become_rank


def sprung(trap: Path) -> bool:
    """Whether the file was there; it is gone then, so that a trap goes off once."""
    try:
        os.unlink(trap)
    except FileNotFoundError:
        return False
    return True


def set_traps(folder: Path, poison: list[int], rank: int, ranks: int) -> None:
    """Look for traps before every step of this rank."""
    step_of, clock = Stepper.step, time.time

    def step(self, views, number, *rest, **named):
        if sprung(folder / f"raise-{rank}"):
            raise RuntimeError(f"injected at step {number}: rank {rank} raises")
        if sprung(folder / f"clock-{rank}"):
            time.time = lambda: clock() + JUMP_S
        if number in poison and rank == number % ranks:
            views.target.fill_(float("nan"))
        return step_of(self, views, number, *rest, **named)

    Stepper.step = step


def become_rank(request: dict, rank: int, port: int) -> None:
    """Set the traps, then what the forge does."""
    own = request["argvs"].get(str(rank), request["argv"])
    set_traps(Path(request["traps"]), request["poison"], rank, request["ranks"])
    untrapped({**request, "argv": own}, rank, port)


if __name__ == "__main__":
    forge.become_rank = become_rank
    forge.main()
