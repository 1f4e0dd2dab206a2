"""Trials side by side: the same command, several times. The processes share the trials through the run's folder."""

import signal
import subprocess
import sys
from types import FrameType

import torch

from p2w.resources import usable_cores
from p2w.world import variables


def run(argv: list[str], workers: int) -> int:
    """Start `workers` processes of this command line and wait for them; a signal is passed on. Returns the worst exit code.

    Each has its share of the cores, and with GPUs one of them in turn.
    """
    command = [sys.executable, argv[0], *_without_workers(argv[1:]), "--quiet"]
    threads = max(1, usable_cores() // workers)
    devices = torch.cuda.device_count()
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: None)  # the terminal tells all
    try:
        for worker in range(workers):
            place = {"LOCAL_RANK": str(worker % devices)} if devices else {}
            children.append(subprocess.Popen(command, env=variables(OMP_NUM_THREADS=str(threads), **place)))
        return max(abs(child.wait()) for child in children)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _without_workers(argv: list[str]) -> list[str]:
    """The arguments without `--workers N`."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if skip:
            skip = False
        elif word == "--workers":
            skip = True
        elif not word.startswith("--workers="):
            kept.append(word)
    return kept
