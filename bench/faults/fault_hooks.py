"""The forge of tests/launch with fault hooks: trap files that make a rank raise or its clock jump, and NaN targets.

Most starts of the soak are forked here; a stated share goes through torchrun, which runs launch/train.py unchanged.
"""

import os
import time
from pathlib import Path

import forge  # tests/launch/forge.py

from p2w.train.step import Stepper

JUMP_S = -3600.0
forge_become_rank = forge.become_rank


def triggered(trap: Path) -> bool:
    """Whether the trap file existed; it is deleted, so that a trap is triggered once."""
    try:
        os.unlink(trap)
    except FileNotFoundError:
        return False
    return True


def set_traps(folder: Path, poison: list[int], rank: int, ranks: int) -> None:
    """Check for trap files before every step of this rank."""
    step_of, clock = Stepper.step, time.time

    def step(self, views, number, *rest, **named):
        if triggered(folder / f"raise-{rank}"):
            raise RuntimeError(f"injected at step {number}: rank {rank} raises")
        if triggered(folder / f"clock-{rank}"):
            time.time = lambda: clock() + JUMP_S
        if number in poison and rank == number % ranks:
            views.target.fill_(float("nan"))
        return step_of(self, views, number, *rest, **named)

    Stepper.step = step


def become_rank(request: dict, rank: int, port: int) -> None:
    """Set the traps, then run the rank as the forge does."""
    own = request["argvs"].get(str(rank), request["argv"])
    set_traps(Path(request["traps"]), request["poison"], rank, request["ranks"])
    forge_become_rank({**request, "argv": own}, rank, port)


if __name__ == "__main__":
    forge.become_rank = become_rank
    forge.main()
