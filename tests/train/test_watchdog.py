"""What the watchdog takes for a hang when the store does not answer."""

import time
from dataclasses import replace

import pytest

from p2w.train.watchdog import Watchdog
from p2w.world import World

ERROR = "it does not answer"


def watchdog_of(rank: int, agent: int) -> Watchdog:
    """Of a rank of two, which the process `agent` has started, 0 for none; all have been heard of now."""
    world = replace(
        World.from_env(), rank=rank, size=2, local_rank=rank, local_size=2, agent=agent, store=object()
    )
    return Watchdog(world, hang_s=30.0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_torchrun_has_taken_along_is_no_hang(rank):
    """The ranks save, draw and leave, which took 8 s on a busy machine: rank 1 wrote "hangs" over "told to stop"."""
    orphan, ordinary, now = watchdog_of(rank, agent=1 << 30), watchdog_of(rank, agent=0), time.monotonic()
    for one in (orphan, ordinary):
        one.at(7, "computing")
        one.at(8, "saving")
        one._read_beat(one.peers[rank], '[1, [8, 2, 0], 1, "here", "", ""]')
    assert orphan.find_hang(now + 29, ERROR) == ""
    assert "no answer from the rendezvous store" in ordinary.find_hang(now + 29, ERROR)
    assert f"rank {rank} on here: saving at step 8 for 31 s" in orphan.find_hang(now + 31.5, ERROR)
    assert "no sign of life" in orphan.find_hang(now + 29, "")  # while the store answers, others are watched


def test_a_rank_that_has_left_is_not_ended_by_its_watchdog(monkeypatch):
    """The main thread leaves while the watchdog's waits for the store."""
    watchdog = watchdog_of(1, agent=0)
    watchdog.beat_s = 0.0

    def exchange() -> str:
        watchdog._end.set()
        watchdog.peers[0].heard = time.monotonic() - 100
        return ERROR

    monkeypatch.setattr(watchdog, "_exchange", exchange)
    monkeypatch.setattr(watchdog, "_exit", lambda *_, **__: pytest.fail("ended"))
    watchdog._watch()
    assert watchdog.find_hang(time.monotonic(), ERROR)  # it is a hang, of which this rank is no part any more
