"""Being told to stop: flags while open, the handlers of before after, leaving at once only for an impatient person."""

import os
import signal
import subprocess
import sys
import time

import pytest
from processes import Forked

from p2w.train.watchdog import StopRequest


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_a_signal_sets_the_flag_and_handlers_are_restored(number):
    before = {one: signal.getsignal(one) for one in StopRequest.SIGNALS}
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and stop.name == number.name
    assert {one: signal.getsignal(one) for one in StopRequest.SIGNALS} == before


WAITS = """
import sys, time
from p2w.train.watchdog import StopRequest
with StopRequest() as stop:
    print("open", flush=True)
    while not stop.requested: time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(float(sys.argv[1]))
print("saved", flush=True)
"""


def waiting(seconds):
    process = Forked(
        [sys.executable, "-c", WAITS, str(seconds)], stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdout.readline() == "open\n"
    return process


@pytest.mark.slow
def test_a_burst_of_signals_still_saves():
    """scancel signals torchrun and its workers, and torchrun then signals the workers again: that is one request."""
    process = waiting(0.5)
    for number in (
        signal.SIGTERM,
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGINT,
        signal.SIGUSR1,
        signal.SIGTERM,
    ):
        process.send_signal(number)
        time.sleep(0.02)
    assert process.communicate(timeout=20)[0] == "asked\nsaved\n" and process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (signal.SIGINT, signal.SIGINT, 130),
        (signal.SIGTERM, signal.SIGTERM, 143),
        (signal.SIGTERM, signal.SIGINT, 130),
    ],
)
def test_a_second_one_after_a_while_leaves_at_once(first, second, code):
    process = waiting(60)
    process.send_signal(first)
    assert process.stdout.readline() == "asked\n"
    time.sleep(StopRequest.BURST_S + 0.1)
    process.send_signal(second)
    assert process.communicate(timeout=20)[0] == "" and process.returncode == code


@pytest.mark.slow
def test_slurms_warning_repeated_is_no_second_signal():
    """Nor is the SIGTERM at the time limit after it: the run is saving by then."""
    process = waiting(2 * StopRequest.BURST_S + 1)
    for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(number)
        time.sleep(StopRequest.BURST_S / 2 + 0.1)
    assert process.communicate(timeout=20)[0] == "asked\nsaved\n" and process.returncode == 0
