"""Shared by all stages of the GPU day: rows of results, the remaining time, timing, and sizes for a GPU or a rehearsal.

A stage is a Python script that `day.py` starts with these variables set; all have defaults, so that a stage can be
started by hand as well. Torch and the standard library alone.
    OUT          folder of the results
    ROWS         name of the file in it that rows are appended to
    DAY          folder that both calls use: data sets, runs, wheels
    STAGE        the stage's name, which every row carries
    STAGE_ENDS   time (seconds since 1970) at which the stage is ended
    TOY          1: sizes of a rehearsal, on the CPU
"""

import contextlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

REPO = Path(__file__).resolve().parents[2]
for folder in (REPO, REPO / "bench"):  # `python bench/gpu/x.py` puts only its own folder on the path
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

OUT = Path(os.environ.get("OUT", "."))
DAY = Path(os.environ.get("DAY", "/tmp/day"))
ROWS = os.environ.get("ROWS", "rows.jsonl")
STAGE = os.environ.get("STAGE", Path(sys.argv[0]).stem)
ENDS = float(os.environ.get("STAGE_ENDS", "inf"))
TOY = os.environ.get("TOY") == "1"
CUDA = torch.cuda.is_available() and not TOY
DEVICE = torch.device("cuda" if CUDA else "cpu")

failures: list[str] = []  # parts of this stage that raised; `finish` turns them into the exit code


def say(what: str, **fields: Any) -> None:
    """Write one row at once, on the terminal and to the file of results: a JSON object on a line."""
    text = json.dumps({"stage": STAGE, "what": what, **fields}, default=str)
    print(text, flush=True)
    OUT.mkdir(parents=True, exist_ok=True)
    with open(OUT / ROWS, "a") as file:
        file.write(text + "\n")


def needs_card(what: str) -> None:
    """Write that a part is skipped on a CPU."""
    say(what, skipped="needs a card")


def seconds_left() -> float:
    """Seconds until this stage is ended."""
    return ENDS - time.time()


def attempt(what: str, body: Callable[[], None], needs_s: float = 0.0) -> bool:
    """Run one part of a stage; True when it went through.

    A part that raises becomes a row with `error`, and the parts after it are run all the same. A part that needs more
    seconds than the stage has left becomes a row with `skipped`.
    """
    if seconds_left() < needs_s:
        say(what, skipped=f"{seconds_left():.0f} s left, {needs_s:g} s needed")
        return False
    began = time.time()
    try:
        body()
    except Exception as error:
        traceback.print_exc()
        failures.append(what)
        say(what, error=f"{type(error).__name__}: {str(error)[:300]}", seconds=round(time.time() - began, 2))
        return False
    finally:
        if CUDA:
            with contextlib.suppress(Exception):
                torch.cuda.empty_cache()
    return True


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(body: Callable[[], Any], rounds: int = 10) -> float:
    """Median time of `body` on the device after three calls of warm-up; on a CPU, one call after one."""
    if not CUDA:
        body()
        began = time.perf_counter()
        body()
        return 1e3 * (time.perf_counter() - began)
    for _ in range(3):
        body()
    found = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        body()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return statistics.median(found)


def stages(table: dict[str, Callable[[], None]]) -> NoReturn:
    """Run the parts that the command line names, all of the table without names, and leave with the exit code.

    The process ends without the interpreter's last rites: threads of readers and a GPU's context would take seconds.
    """
    names = sys.argv[1:] or list(table)
    if unknown := [name for name in names if name not in table]:
        print(f"{unknown[0]}: no such part; one of {', '.join(table)}", file=sys.stderr)
        os._exit(2)
    for name in names:
        began = time.time()
        attempt(name, table[name])
        say(f"{name}: seconds", seconds=round(time.time() - began, 2))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if failures else 0)
