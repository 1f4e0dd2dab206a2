"""How a command on several ranks ends after an error: which rank prints the message, what the others do, the exit codes.

Every rank writes its error to the file that torchrun reads, so that torchrun's report ends with that line whichever rank it
names. On the terminal only one rank prints an error that several have: local rank 0 of each node before the ranks have
joined the process group, rank 0 for errors that all ranks raise together. Exit code 2: bad input; 1: anything else.
"""

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn, TextIO, TypeVar, cast

from p2w.errors import SharedError, UserError
from p2w.log import TolerantStream
from p2w.world import World

SPEAKER_S = 5.0  # longest wait for the rank that prints the message
HEARD_S = 2.0  # longest wait of rank 0 until the others know that it has printed the message
POLL_S = 0.02
REPORTED, HEARD = (
    "error reported",
    "error heard",
)  # keys in the store of the process group; HEARD counts ranks


def refuse(world: World, error: UserError | SystemExit) -> int:
    """End before the ranks have met: raise `error` again on the rank that prints for its node, else return exit code 2.

    `SystemExit` comes from the argument parser, after an error or after `--help`.
    """
    if isinstance(error, UserError):
        world.report_to_torchrun(f"error: {error}")
    elif not error.code:
        raise error
    if world.speaks:
        raise error
    # torchrun ends all ranks of a node when the first one exits: that should be the one that prints the message.
    time.sleep(SPEAKER_S)
    return 2


def leave(world: World, error: Exception) -> NoReturn:
    """End after the ranks have met, or failed to: print the message and end this process, without a collective.

    In a run of one process, an error other than a UserError is raised again, with its traceback.
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
    """The message of a rank whose collective failed, with torch's own reason, without the position in torch's source."""
    cause = World.reason(error)
    if cause.startswith("["):
        cause = cause.partition("] ")[2] or cause
    return (
        f"rank {world.rank} on {world.host}: lost contact with another rank ({cause}): if that rank failed, its own message "
        "says why; if every rank says this, the network between them was cut"
    )


def _leave_together(world: World, line: str) -> NoReturn:
    """Rank 0 prints the message of all ranks; the others exit as soon as it has, or when it is gone."""
    if world.store is None:
        if not world.speaks:  # before the group had a store: one line a node
            world.report_to_torchrun(line)
            time.sleep(SPEAKER_S)
            world.leave(2)
        world.abort(2, line)
    store = world.store
    if world.is_main:
        world.report(line)
        with contextlib.suppress(RuntimeError):
            store.set(REPORTED, "")
        # The store may end with this process, and a rank that still uses it would print a C++ stack.
        _wait_until(lambda: store.add(HEARD, 0) == world.size - 1, HEARD_S)
    else:
        world.report_to_torchrun(line)
        _wait_until(lambda: store.check([REPORTED]), SPEAKER_S)
        with contextlib.suppress(RuntimeError):
            store.add(HEARD, 1)
    world.leave(2)


def _wait_until(happened: Callable[[], bool], seconds: float) -> None:
    """Poll the store until `happened()` is true, the time is over, or the store is gone.

    Polls in a thread that may be left behind: while the store's process is stopped, some calls never return, whatever
    time-out was set (torch 2.13).
    """
    end = time.monotonic() + seconds

    def poll() -> None:
        with contextlib.suppress(RuntimeError):
            while not happened() and time.monotonic() < end:
                time.sleep(POLL_S)

    thread = threading.Thread(target=poll, name="p2w-report", daemon=True)
    thread.start()
    thread.join(seconds)


Job = TypeVar("Job")


def run_on_ranks(
    build: Callable[[list[str], World], Job],
    work: Callable[[Job, World], int],
    argv: list[str] | None = None,
    *,
    alone: Callable[[Job, World], int | None] = lambda job, world: None,
    start: Callable[[Job], World] = lambda job: World.start(),
) -> int:
    """The main of such a command. It ends the process, or returns or raises for `p2w.errors.exits` to do so.

    `build` makes a job of `argv`, by default this process's command line, and refuses, before the ranks meet, what can be
    refused by then. `alone` does what needs no other rank, --dry-run for one, and returns the exit code, or None: then the
    ranks meet (`start`) and `work` does the job, with the exit code as its result.
    """
    world = World.from_env()
    sys.stderr = cast(TextIO, TolerantStream(sys.stderr))  # logging never ends a run
    try:
        world.check_asked()
        job = build(sys.argv[1:] if argv is None else argv, world)
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
    # Seen with torch 2.13 and pyarrow: threads of the manifest's reader abort an interpreter that is finalised.
    world.leave(code)
