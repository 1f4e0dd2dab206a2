"""Starting and ending real processes, for the tests of the trainer."""

import multiprocessing
import multiprocessing.context
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parent.parent


def ranks_context() -> multiprocessing.context.ForkServerContext:
    """Starts processes as forks of one that has done the slow imports, and no computing: two ranks import torch once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["p2w.model", "p2w.train.form_choice", "p2w.train.run_dir"])
    return context


def torchrun(ranks: int, *args: object, restarts: int = 0) -> list[str]:
    """The command line that starts launch/train.py on `ranks` processes."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*agent, f"--max-restarts={restarts}", "launch/train.py", *map(str, args)]


def kill_group(process: subprocess.Popen) -> None:
    """SIGKILL the process, its group, and the workers of torchrun, which have sessions of their own."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for pid in [process.pid, *(child.pid for child in family)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
