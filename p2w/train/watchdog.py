"""How a run ends: the watchdog, which finds the rank that hangs; stop requests by signals, and what they interrupt.

Ranks train in lockstep, so one rank that stops makes all of them wait without a message.

A thread of each rank writes heartbeats to the rendezvous store. Rank 0 reads all of them in one request and writes its own
with what it has found to the "board", which the others read: two small requests a rank and beat. If every rank read every
other's, the one store would serve N^2 of them a second. A heartbeat contains no time: the reader checks, by its own
monotonic clock, whether it has changed.

- A rank without new heartbeats is stopped, dead or cut off. It is named after SILENT_S, or a quarter of `hang_s`.
  Rank 0 is watched by all others.
- If all ranks send heartbeats and none makes progress for `hang_s`, the one that is furthest behind is named: it reads,
  validates or saves while the others wait for it.
- A rank that exited with an error is named after LEFT_S, if the others have not noticed by themselves.

Rank 0 writes the cause to the board, so that all ranks give the same reason. Then they exit with code 1, and torchrun or
Slurm starts the run again.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from p2w.errors import first_line
from p2w.stream.stream import Batch, Stream
from p2w.world import World

PHASES = (
    "starting",
    "validating",
    "saving",
    "reading data",
    "computing",
    "drawing",
)  # in the order of a step
BEAT_S = 1.0
RANKS_A_SECOND = 400  # with more ranks than these, beats are further apart: the store answers from one core
MOST_KEYS = 512  # keys in one request to the store
SILENT_S = 60.0
LEFT_S = 5.0
LAST_BEAT_S = 2.0  # longest wait for the last heartbeat, which tells the others that this rank exits
# Factor on `hang_s` where a phase is slow: the first step compiles and tries kernels, drawing imports matplotlib.
SLOW_FACTOR = 3.0
EXIT_DELAY_S = 3.0  # the other ranks of a node wait so long, while the lowest one reports
STOP_POLL_S = 0.25  # time between two all-reduces that ask whether any rank has a stop request


@dataclass
class Peer:
    """A rank as its heartbeats show it: `heard` and `moved` are when the last heartbeat and progress came (monotonic s)."""

    rank: int
    host: str
    heard: float
    moved: float
    tick: int = -1
    progress: tuple[int, int, int] = (0, 0, 0)  # steps done, index in PHASES, batches of that phase
    pid: int = 0
    left: str = ""  # "done" or "failed" once the rank has exited

    @property
    def key(self) -> str:
        """The key of its heartbeat in the store."""
        return f"beat/{self.rank}"

    def doing(self) -> str:
        """Its phase and step as text."""
        return f"{PHASES[self.progress[1]]} at step {self.progress[0]}"

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host or 'a node that never answered'}"


class Watchdog:
    """Watches inside its `with` block. The training thread calls `at` and `count`, which take no time.

    `hang_s` is how long all ranks may be without progress.
    """

    def __init__(self, world: World, hang_s: float = 600.0) -> None:
        self.world, self.hang_s = world, hang_s
        # Called before the process is ended
        self.on_exit: Callable[[str, int], None] = lambda reason, step: None
        self.silent_s = min(SILENT_S, hang_s / 4)
        self.beat_s = min(max(BEAT_S, world.size / RANKS_A_SECOND), self.silent_s / 10)
        now = time.monotonic()
        self.peers = [
            Peer(rank, world.host if rank == world.rank else "", now, now) for rank in range(world.size)
        ]
        self._progress = (0, 0, 0)
        self._steps = 0  # done since this start
        self._tick = 0
        self._left = self._reason = ""
        self._failure_seen: float | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="p2w-watchdog", daemon=True)
        self._store: dist.Store | None = None
        self._silent: list[int] = []  # ranks that rank 0 names as silent
        self._answer_s = max(2.0, self.silent_s / 4)
        self._exchange_thread: threading.Thread | None = None
        self._store_error = ""

    def at(self, step: int, doing: str) -> None:
        """Record that this rank has done `step` steps and now begins the phase `doing`, one of PHASES."""
        self._steps += step > self._progress[0] and self._progress[1] > 0
        self._progress = (step, PHASES.index(doing), 0)

    def count(self) -> None:
        """Record progress within the phase, e.g. one more batch of a validation."""
        step, doing, batches = self._progress
        self._progress = (step, doing, batches + 1)

    def __enter__(self) -> "Watchdog":
        if self.world.size > 1:
            self._store = self.world.connection(self._answer_s)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Send a last heartbeat, which tells the others that this rank exits, and whether with an error."""
        self._left = "done" if kind is None else "failed"
        self._end.set()
        self._thread.join(LAST_BEAT_S)  # the rank or node of the store may be gone
        self._store = None

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._end.wait(self.beat_s):
            store_error = self._exchange()
            now = time.monotonic()
            if now - last > self.silent_s / 2 and not store_error:
                for peer in self.peers:  # this process itself was stopped, so it knows nothing of the others
                    peer.heard = peer.moved = now
            last = now
            reason = self._reason or self.find_hang(time.monotonic(), store_error)
            if reason and not self._end.is_set():  # else this rank has left meanwhile
                self._exit(reason, store_answers=not store_error)
        self._exchange()

    def _exchange(self) -> str:
        """Write this rank's heartbeat; read the board, or as rank 0 all heartbeats. Returns what is wrong with the store.

        In a thread that may never end: if the store's process is stopped, TCPStore's `check` and `clone` wait for ever,
        whatever time-out is set (torch 2.13).
        """
        thread = self._exchange_thread
        if thread is None or not thread.is_alive():
            thread = threading.Thread(target=self._exchange_beats, name="p2w-beat", daemon=True)
            self._exchange_thread = thread
            thread.start()
        thread.join(self._answer_s)
        return "it does not answer" if thread.is_alive() else self._store_error

    def _exchange_beats(self) -> None:
        """Do the work of `_exchange`; an error of the store goes to `_store_error`."""
        self._tick += 1
        me = self.peers[self.world.rank]
        beat = [self._tick, self._progress, os.getpid(), self.world.host, self._left, self._reason]
        store, self._store_error = self._store, ""
        self._read_beat(me, json.dumps(beat))
        if store is None:
            return
        try:
            if me.rank == 0:
                self._read_all(store)
                silent = [peer.rank for peer in self._silent_peers(time.monotonic())]
                store.set("board", json.dumps([[*beat[:-1], self._reason], silent]))
                return
            store.set(f"beat/{me.rank}", json.dumps(beat))
            if self.peers[0].tick >= 0 or store.check(["board"]):
                board, self._silent = json.loads(store.get("board"))
                self._read_beat(self.peers[0], json.dumps(board))
        except RuntimeError as error:
            self._store_error = first_line(error)
            if self._end.is_set():
                return  # this rank exits, and to connect again would take up to twice the time-out (torch 2.13)
            with contextlib.suppress(RuntimeError):  # after a time-out an answer may still be on the way
                self._store = self.world.connection(self._answer_s) if self._store is not None else None

    def _read_all(self, store: dist.Store) -> None:
        """Rank 0: read the heartbeats of all other ranks that still run."""
        others = [peer for peer in self.peers[1:] if not peer.left]
        for peers in (others[start : start + MOST_KEYS] for start in range(0, len(others), MOST_KEYS)):
            there = peers
            if any(peer.tick < 0 for peer in peers) and not store.check([peer.key for peer in peers]):
                there = [peer for peer in peers if peer.tick >= 0 or store.check([peer.key])]
            if there:
                for peer, text in zip(there, store.multi_get([peer.key for peer in there]), strict=True):
                    self._read_beat(peer, text.decode())

    def _read_node(self) -> None:
        """Read the heartbeats of this node's ranks, in a thread that is left behind if the store does not answer."""
        world, store = self.world, self._store
        first = world.rank - world.local_rank

        def read() -> None:
            with contextlib.suppress(RuntimeError):
                for peer in self.peers[max(1, first) : first + world.local_size]:
                    if store is not None and peer.rank != world.rank and store.check([peer.key]):
                        self._read_beat(peer, store.get(peer.key).decode())

        thread = threading.Thread(target=read, name="p2w-beat", daemon=True)
        thread.start()
        thread.join(self._answer_s)

    def _read_beat(self, peer: Peer, text: str) -> None:
        """Update `peer` from its heartbeat."""
        tick, progress, pid, host, left, reason = json.loads(text)
        now = time.monotonic()
        if tick != peer.tick:
            peer.heard = now
        if tuple(progress) != peer.progress:
            peer.moved = now
        peer.tick, peer.progress, peer.pid, peer.host, peer.left = tick, tuple(progress), pid, host, left
        self._reason = self._reason or reason

    def _silent_peers(self, now: float) -> list[Peer]:
        """The ranks that this one watches, run, and have given no sign of life for too long."""
        watched = self.peers[1:] if self.world.rank == 0 else self.peers[:1]
        return [peer for peer in watched if not peer.left and now - peer.heard > self.silent_s]

    def find_hang(self, now: float, store_error: str = "") -> str:
        """One line that names what hangs at the monotonic time `now`; "" while nothing does."""
        me = self.peers[self.world.rank]
        # Rank 0 knows all; another rank knows itself and rank 0, and watches its own progress once rank 0 has left.
        known = self.peers if me.rank == 0 or not self.world.store else [self.peers[0], me]
        # torchrun, where it has the store, takes it along. The ranks then save and leave, and watch their own progress.
        storeless = bool(store_error) and self.world.orphaned()
        if storeless:
            known = [me]
        others = [peer for peer in known if peer is not me]
        running = [peer for peer in known if not peer.left]
        if store_error and not storeless:
            quiet = now - max((peer.heard for peer in others), default=now)
            if quiet <= self.silent_s:
                return ""
            return (
                f"no answer from the rendezvous store for {quiet:.0f} s ({store_error}): its node is stopped, dead or cut "
                "off"
            )
        silent = [peer for peer in self._silent_peers(now) if peer in known]
        if silent:
            return "; ".join(
                f"{p}: no sign of life for {now - p.heard:.0f} s, last heard of {p.doing()}" for p in silent
            ) + (" (stopped, dead or cut off)")
        failed = [peer for peer in others if peer.left == "failed"]
        self._failure_seen = (self._failure_seen or now) if failed else None
        if self._failure_seen is not None and now - self._failure_seen > LEFT_S:
            return "; ".join(
                f"{peer} has left, at step {peer.progress[0]}; its own message says why" for peer in failed
            )
        watched_by_0 = bool(me.rank and not self.peers[0].left and self.world.store and not storeless)
        slow = not self._steps or any(PHASES[peer.progress[1]] == "drawing" for peer in running)
        allowed = self.hang_s * (SLOW_FACTOR if slow else 1.0)
        if watched_by_0 or not running or min(now - peer.moved for peer in running) <= allowed:
            return ""
        behind = min(peer.progress for peer in running)
        return "; ".join(
            f"{peer}: {peer.doing()} for {now - peer.moved:.0f} s"
            for peer in running
            if peer.progress == behind
        )

    def _exit(self, reason: str, store_answers: bool) -> None:
        """Report the reason, once for each node, and end this process.

        First it ends a stopped process of the same node, for which torchrun would wait 30 s.
        """
        self._reason = reason
        self._exchange()
        self._read_node()
        now, me = time.monotonic(), self.peers[self.world.rank]
        silent = {peer.rank for peer in self._silent_peers(now)} | set(self._silent)
        near = [peer for peer in self.peers if peer.host == me.host]
        alive = [peer.rank for peer in near if not peer.left and peer.rank not in silent and store_answers]
        if me.rank != min([me.rank, *alive]):
            time.sleep(EXIT_DELAY_S)
            os._exit(1)
        if me.rank == 0 or 0 in silent or not store_answers:
            self.on_exit(f"hangs: {reason}", me.progress[0])
        for peer in near:
            if store_answers and peer.rank in silent and not peer.left:
                self.world.end_neighbour(peer.pid)
        # The store may end with this process, so the others get time to read the reason in its heartbeat.
        time.sleep(2 * self.beat_s)
        self.world.abort(1, f"hangs: {reason}; all ranks leave", at_once=True)


class StopRequest:
    """Records SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (Slurm's warning) and SIGHUP (the terminal goes) inside a `with` block.

    It restores the handlers after the block.

    A SIGTERM or SIGINT later than BURST_S after the first one ends the process at once, without saving, with exit code 128
    + its number. Earlier ones change nothing: scancel signals torchrun and its workers, torchrun then signals the workers
    again, and all of that is one request. SIGUSR1 never counts as a second signal, because slurm/pretrain.sbatch repeats it
    until the run has ended. SIGHUP does not either, and is left alone where the process was started to ignore it (nohup).

    With `ignore_after_error`, the handlers stay in place when the block ends with an error: the process then reports the
    error and exits by itself, and the SIGTERM that torchrun sends because a peer has failed must not cut that short.

    Python runs a handler only between two of its own instructions, so a process that waits for a dead peer inside a
    collective would never see the second signal. A thread does: the interpreter writes each signal's number to a socket.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    FORCING = (signal.SIGTERM, signal.SIGINT)  # a second one of these ends the process at once
    BURST_S = 2.0

    def __init__(self, speaks: bool = False, ignore_after_error: bool = False) -> None:
        """`speaks`: this process tells the user that it will stop."""
        self.name, self.speaks, self.ignore_after_error = "", speaks, ignore_after_error
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """True after the first signal; `name` is then its name."""
        return bool(self.name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            return
        self.name = signal.Signals(number).name
        if self.speaks:
            line = f"{self.name}: saves after this step, then leaves (a second Ctrl-C or SIGTERM leaves at once)\n"
            # To the file descriptor: a signal may come while Python's own stream is locked. The terminal may be gone.
            with contextlib.suppress(OSError):
                os.write(2, line.encode())

    def _watch(self, numbers: socket.socket) -> None:
        """Runs in a thread: ends the process at a second signal, and returns when the socket is closed."""
        first: float | None = None
        while received := numbers.recv(1):
            if received[0] not in self.FORCING:
                continue
            now = time.monotonic()
            first = now if first is None else first
            if now - first > self.BURST_S:
                os._exit(128 + received[0])
        numbers.close()

    def __enter__(self) -> "StopRequest":
        numbers, self._written = socket.socketpair()
        self._written.setblocking(False)
        threading.Thread(target=self._watch, args=(numbers,), name="p2w-signals", daemon=True).start()
        self._wakeup = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        for number in self.SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.ignore_after_error and isinstance(error, Exception):
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._written.close()


class EvaluationInterrupted(Exception):
    """A stop request came during an evaluation, which must be repeated after the restart."""


class InterruptibleStream(Stream):
    """A stream that asks before each batch whether any rank has a stop request: one small all-reduce.

    All ranks must iterate over it together. Code that runs on one rank alone uses a plain Stream, or the shards' reader.
    """

    stop_requested: Callable[[], bool] | None = None

    def batches(self, epoch: int = 0, step: int = 0) -> Generator[Batch, None, None]:
        """As Stream.batches. Raises EvaluationInterrupted on all ranks when `stop_requested()` is true."""
        for batch in super().batches(epoch, step):
            if self.stop_requested is not None and self.stop_requested():
                raise EvaluationInterrupted
            yield batch
