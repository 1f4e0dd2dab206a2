"""Worker processes for scans, none of which outlives the process that started them."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import FrameType
from typing import Any

from p2w.data.scan import quiet
from p2w.resources import usable_cores


@contextmanager
def pool(workers: int) -> Iterator[Callable[..., Any]]:
    """Worker processes that end with this one, however it ends, and at once."""
    threads = max(1, usable_cores() // workers)
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, _start_worker, (threads,))

    def submit(*task: Any) -> Any:
        # A worker starts in here and inherits that Ctrl-C is ignored: none dies of it with a traceback while
        # it imports. The price is a Ctrl-C that is lost in these milliseconds.
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            return executor.submit(*task)
        finally:
            signal.signal(signal.SIGINT, interrupt)

    before = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        yield submit
        executor.shutdown()
    finally:
        signal.signal(signal.SIGTERM, before)
        executor.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        for child in multiprocessing.active_children():
            child.join(5)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    print("stopped: SIGTERM; finished scans are kept, the same command goes on", file=sys.stderr, flush=True)
    sys.exit(128 + number)


def _start_worker(threads: int) -> None:
    """In the worker: Ctrl-C is the parent's business, and a killed parent takes the worker along."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet(threads)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
