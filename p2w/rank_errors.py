"""The main of a command that torchrun may start on several ranks, and how it ends after an error.

An error decides which rank says it, what the others do, and the exit code.

Every rank writes its error where torchrun looks for it, so torchrun's report ends with that line whichever rank it names.
On the terminal one rank says what several know: local rank 0 of a node what is refused before the ranks have met, rank 0
what they found out together. Exit code 2: bad input; 1: anything else.
"""

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn, TypeVar

from p2w.errors import SharedError, UserError
from p2w.world import World

Job = TypeVar("Job")

SPEAKER_S = 5.0  # at most, to wait for the rank that says it for all
HEARD_S = 2.0  # at most, for rank 0 to wait until the others know that it has said it
POLL_S = 0.02
REPORTED, HEARD = "error reported", "error heard"  # keys of the ranks' store; the second counts ranks


def run_on_ranks(
    build: Callable[[list[str], World], Job],
    work: Callable[[Job, World], int],
    *,
    alone: Callable[[Job, World], int | None] = lambda job, world: None,
    start: Callable[[Job], World] = lambda job: World.start(),
) -> int:
    """The main of such a command. It ends the process, or returns or raises for `p2w.errors.exits` to do so.

    `build` makes a job of the command line and refuses, before the ranks meet, what can be refused by then. `alone` does
    what needs no other rank, --dry-run for one, and returns the exit code, or None: then the ranks meet (`start`) and
    `work` does the job, with the exit code as its result.
    """
    world = World.from_env()
    try:
        job = build(sys.argv[1:], world)
    except (UserError, SystemExit) as error:
        return refuse(world, error)
    code = alone(job, world)
    if code is None:
        try:
            world = start(job)
            code = work(job, world)
        except Exception as error:
            leave(world, error)
        del job  # what it holds of torch is freed before the process group ends
        world.close()
    sys.stdout.flush()
    # Seen with torch 2.13 and pyarrow: threads of the manifest's reader abort an interpreter that is finalised.
    world.leave(code)


def refuse(world: World, error: UserError | SystemExit) -> int:
    """Before the ranks have met: raise `error` again where this process says it for its node, else return exit code 2.

    `SystemExit` is the argument parser's, after a complaint or after `--help`.
    """
    if isinstance(error, UserError):
        world.report_to_torchrun(f"error: {error}")
    elif not error.code:
        raise error
    if world.speaks:
        raise error
    # torchrun ends all ranks of a node when the first of them leaves: that is to be the one that says why.
    time.sleep(SPEAKER_S)
    return 2


def leave(world: World, error: Exception) -> NoReturn:
    """After the ranks have met, or were to: say what is to be said and end this process, without a collective.

    In one process an error that is not the user's is raised again, with its traceback.
    """
    if isinstance(error, SharedError):
        _leave_together(world, f"error: {error}")
    if isinstance(error, UserError):
        world.abort(2, f"error: {error}")
    if world.size == 1:
        raise error
    if World.lost_peer(error):
        world.abort(1, lost_peer_line(world, error))
    first = f"rank {world.rank} on {world.host} failed: {type(error).__name__}: {error}".partition("\n")[0]
    world.abort(1, f"{first}\n{''.join(traceback.format_exception(error))}")


def lost_peer_line(world: World, error: Exception) -> str:
    """What a rank says whose collective broke off, with the cause as torch tells it, without the place in its source."""
    cause = World.reason(error)
    if cause.startswith("["):
        cause = cause.partition("] ")[2] or cause
    return (
        f"rank {world.rank} on {world.host}: lost contact with another rank ({cause}): if that rank failed, its own message "
        "says why; if every rank says this, the network between them was cut"
    )


def _leave_together(world: World, line: str) -> NoReturn:
    """Rank 0 says what all ranks know; the others leave as soon as it has, or is gone."""
    if world.store is None:
        world.abort(2, line)
    store = world.store
    if world.is_main:
        world.report(line)
        with contextlib.suppress(RuntimeError):
            store.set(REPORTED, "")
        # The store may end with this process, and a rank that still asks it would print a C++ stack.
        _wait_until(lambda: store.add(HEARD, 0) == world.size - 1, HEARD_S)
    else:
        world.report_to_torchrun(line)
        _wait_until(lambda: store.check([REPORTED]), SPEAKER_S)
        with contextlib.suppress(RuntimeError):
            store.add(HEARD, 1)
    world.leave(2)


def _wait_until(happened: Callable[[], bool], seconds: float) -> None:
    """Poll what the store says; return early where it is gone.

    In a thread that may stay behind: a store whose process is stopped answers some calls never, whatever time-out was set
    (torch 2.13).
    """
    end = time.monotonic() + seconds

    def poll() -> None:
        with contextlib.suppress(RuntimeError):
            while not happened() and time.monotonic() < end:
                time.sleep(POLL_S)

    thread = threading.Thread(target=poll, name="p2w-report", daemon=True)
    thread.start()
    thread.join(seconds)
