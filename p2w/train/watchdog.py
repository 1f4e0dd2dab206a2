"""Finds the rank that hangs. Training is in lockstep: one rank that stops stops them all, and none of them says a word.

A thread of each rank writes a beat to the store that the ranks met at, and reads the beats of the others. Beats carry no
clock time: what counts is whether one has changed, by the reader's own monotonic clock.

- A rank whose beats do not come is stopped, dead, or cut off. It is named after SILENT_S, or a quarter of the time allowed.
- When all ranks beat and none gets further within the time allowed, the one that is furthest behind is named: it reads,
  validates or saves while the others wait for it.
- A rank that left with an error is named after LEFT_S, should the others not have noticed by themselves.

Whoever finds it out says so in its beat, so all give one reason; then they end with exit code 1, for torchrun or Slurm to
start the run again.
"""

import contextlib
import json
import os
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from p2w.world import World

PLACES = (
    "starting",
    "validating",
    "saving",
    "reading data",
    "computing",
    "drawing",
)  # in the order of a step
BEAT_S = 1.0
SILENT_S = 60.0
LEFT_S = 5.0
LAST_BEAT_S = 2.0  # at most, to tell the others that this rank leaves
SLOW = 3.0  # times what is allowed else: the first step compiles and tries kernels out, drawing imports matplotlib
LOWEST_SPEAKS_S = 3.0


@dataclass
class Peer:
    """What is known of a rank: its last beat, when it last changed, and when it last got further (monotonic seconds)."""

    rank: int
    host: str
    heard: float
    moved: float
    tick: int = -1
    place: tuple[int, int, int] = (0, 0, 0)  # steps done, number in PLACES, batches of it
    pid: int = 0
    left: str = ""  # "done", or "failed" once the rank has left

    def doing(self) -> str:
        """Where it stands, in words."""
        return f"{PLACES[self.place[1]]} at step {self.place[0]}"

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host or 'a node that never answered'}"


class Watchdog:
    """Watches from `with` on. The training thread calls `at` and `count`, which cost nothing."""

    def __init__(self, world: World, hang_s: float = 600.0) -> None:
        self.world, self.hang_s = world, hang_s
        self.silent_s = min(SILENT_S, hang_s / 4)
        self.beat_s = min(BEAT_S, self.silent_s / 10)
        now = time.monotonic()
        self.peers = [
            Peer(rank, world.host if rank == world.rank else "", now, now) for rank in range(world.size)
        ]
        self._place = (0, 0, 0)
        self._steps = 0  # done since this start
        self._tick = 0
        self._left = self._verdict = ""
        self._left_seen: float | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="p2w-watchdog", daemon=True)
        self._origin: Any = None  # whose stub knows no `clone`
        self._store: Any = None
        self._answer_s = max(2.0, self.silent_s / 4)
        self._talk: threading.Thread | None = None
        self._trouble = ""

    def at(self, step: int, doing: str) -> None:
        """This rank has done `step` steps and now begins `doing`, one of PLACES."""
        self._steps += step > self._place[0] and self._place[1] > 0
        self._place = (step, PLACES.index(doing), 0)

    def count(self) -> None:
        """This rank got further with what it is doing: one more batch of a look, for example."""
        step, doing, batches = self._place
        self._place = (step, doing, batches + 1)

    def __enter__(self) -> "Watchdog":
        if self.world.size > 1:
            self._origin = self.world.connection(self._answer_s)
            self._store = self._origin.clone()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The last beat tells the others that this rank leaves, and how."""
        self._left = "done" if kind is None else "failed"
        self._end.set()
        self._thread.join(LAST_BEAT_S)  # the store may be gone, with the rank or the node that held it
        self._store = self._origin = None

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._end.wait(self.beat_s):
            trouble = self._exchange()
            now = time.monotonic()
            if now - last > self.silent_s / 2 and not trouble:
                for peer in self.peers:  # this very process was stopped: it knows nothing of the others
                    peer.heard = peer.moved = now
            last = now
            verdict = self._verdict or self.judge(time.monotonic(), trouble)
            if verdict:
                self._leave(verdict, store_answers=not trouble)
        self._exchange()

    def _exchange(self) -> str:
        """Write this rank's beat and read the others'. Returns what is wrong with the store, if anything.

        In a thread that may stay behind: where the store's process is stopped, TCPStore's `check` and `clone` wait for ever,
        whatever time-out was set (torch 2.13).
        """
        if self._talk is None or not self._talk.is_alive():
            self._talk = threading.Thread(target=self._converse, name="p2w-beat", daemon=True)
            self._talk.start()
        self._talk.join(self._answer_s)
        return "it does not answer" if self._talk.is_alive() else self._trouble

    def _converse(self) -> None:
        """One beat out, the others' in; `_trouble` says what was wrong."""
        self._tick += 1
        me = self.peers[self.world.rank]
        beat = [self._tick, self._place, os.getpid(), self.world.host, self._left, self._verdict]
        store, self._trouble = self._store, ""
        if store is None:
            self._take(me, json.dumps(beat))
            return
        try:
            store.set(f"beat/{me.rank}", json.dumps(beat))
            for peer in self.peers:
                if peer.tick < 0 and not store.check([f"beat/{peer.rank}"]):
                    continue
                self._take(peer, store.get(f"beat/{peer.rank}").decode())
        except RuntimeError as error:
            self._trouble = str(error).partition("\n")[0]
            if self._end.is_set():
                return  # this rank leaves: to connect anew would take up to twice the time-out (torch 2.13), for nobody
            with contextlib.suppress(RuntimeError):  # after a time-out an answer may still be on the way
                self._store = self._origin.clone() if self._origin is not None else None

    def _take(self, peer: Peer, text: str) -> None:
        """Note what a beat says and when it changed."""
        tick, place, pid, host, left, verdict = json.loads(text)
        now = time.monotonic()
        if tick != peer.tick:
            peer.heard = now
        if tuple(place) != peer.place:
            peer.moved = now
        peer.tick, peer.place, peer.pid, peer.host, peer.left = tick, tuple(place), pid, host, left
        self._verdict = self._verdict or verdict

    def judge(self, now: float, trouble: str = "") -> str:
        """One line that names what hangs; empty while all is well."""
        me = self.peers[self.world.rank]
        others = [peer for peer in self.peers if peer is not me]
        here = [peer for peer in self.peers if not peer.left]
        if trouble:
            quiet = now - max((peer.heard for peer in others), default=now)
            if quiet <= self.silent_s:
                return ""
            return (
                f"no answer from the rendezvous store for {quiet:.0f} s ({trouble}): the node that holds it is stopped, "
                "dead or cut off"
            )
        silent = [peer for peer in here if peer is not me and now - peer.heard > self.silent_s]
        if silent:
            return "; ".join(
                f"{p}: no sign of life for {now - p.heard:.0f} s, last heard of {p.doing()}" for p in silent
            ) + (" (stopped, dead or cut off)")
        failed = [peer for peer in others if peer.left == "failed"]
        self._left_seen = (self._left_seen or now) if failed else None
        if self._left_seen is not None and now - self._left_seen > LEFT_S:
            return "; ".join(
                f"{peer} has left, at step {peer.place[0]}; its own message says why" for peer in failed
            )
        slow = not self._steps or any(PLACES[peer.place[1]] == "drawing" for peer in here)
        allowed = self.hang_s * (SLOW if slow else 1.0)
        if not here or min(now - peer.moved for peer in here) <= allowed:
            return ""
        behind = min(peer.place for peer in here)
        return "; ".join(
            f"{peer}: {peer.doing()} for {now - peer.moved:.0f} s" for peer in here if peer.place == behind
        )

    def _leave(self, verdict: str, store_answers: bool) -> None:
        """Say it, once a node; end a stopped neighbour, which torchrun would wait 30 s for; end this process."""
        self._verdict = verdict
        self._exchange()
        now, me = time.monotonic(), self.peers[self.world.rank]
        near = [peer for peer in self.peers if peer.host == me.host]
        alive = [peer.rank for peer in near if not peer.left and now - peer.heard <= self.silent_s]
        if me.rank != min([me.rank, *alive]):
            time.sleep(LOWEST_SPEAKS_S)
            os._exit(1)
        for peer in near:
            if store_answers and peer.rank not in alive and not peer.left:
                self.world.end_neighbour(peer.pid)
        time.sleep(
            2 * self.beat_s
        )  # the others read the reason in our beat; the store may end with this process
        self.world.abort(1, f"hangs: {verdict}; all ranks leave", at_once=True)
