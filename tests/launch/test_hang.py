"""A rank that is stopped, hangs, or raises: it is named, the others leave, torchrun brings the run back. Real processes."""

import os
import re
import signal
import time

import psutil
import pytest
from launch_runs import TINY, metrics, status, wait_for, weights

STEPS = 12
HANG = ["--train.hang-minutes", "0.5"]  # a rank that gives no sign of life is found after 7.5 s


@pytest.fixture(scope="session")
def calm(forge, tiny_set, tmp_path_factory):
    """The uninterrupted run on three processes."""
    folder = tmp_path_factory.mktemp("calm")
    codes, _, err = forge.run(folder, *argv(tiny_set, folder / "run"), ranks=3)
    assert codes == [0] * 3, err
    return folder / "run"


def argv(shards, run):
    return (
        "demo",
        *TINY,
        "--data.batch",
        6,
        "--train.steps",
        STEPS,
        "--train.validate-every",
        100,
        *HANG,
        "--shards",
        shards,
        "--run-dir",
        run,
    )


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_and_torchrun_brings_the_run_back(forge, tiny_set, calm, tmp_path, victim):
    run = tmp_path / "run"
    spies = (("lag", 1, 0.4),)  # at step 8 every rank has given a first sign of life: one comes each 0.75 s
    agent = forge.torchrun(tmp_path, *argv(tiny_set, run), ranks=3, restarts=1, spies=spies)
    wait_for((run / "checkpoints" / "step-00000008" / "meta.json").exists, "a checkpoint")
    ranks = sorted(agent.children(), key=lambda one: one.pid)  # torchrun starts them in this order
    ranks[victim].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    _, left = psutil.wait_procs(ranks, timeout=60)
    assert (
        not left and time.monotonic() - stopped < 25
    )  # torchrun alone would have waited 30 s for the stopped one
    assert forge.wait() == [0], (tmp_path / "err.txt").read_text()
    err = (tmp_path / "err.txt").read_text()
    said = re.findall(r"^hangs: .*", err, re.MULTILINE)
    assert len(said) == 1 and re.match(rf"hangs: rank {victim} on \S+: no sign of life for \d+ s", said[0]), (
        err
    )
    assert status(run) == {"state": "finished", "step": STEPS, "why": ""}
    assert weights(run, STEPS) == weights(calm, STEPS) and metrics(run) == metrics(calm)


def test_the_stopped_rank_that_holds_the_store_is_found(forge, tiny_set, tmp_path):
    """Without torchrun, rank 0 does; asked from a stopped process, some calls of the store never return."""
    run, err = tmp_path / "run", tmp_path / "err.txt"
    pids = forge.start(tmp_path, *argv(tiny_set, run), "--train.hang-minutes", "0.1", ranks=2)
    wait_for((run / "metrics.jsonl").exists, "a sign of life")
    os.kill(pids[0], signal.SIGSTOP)
    wait_for(lambda: "hangs: no answer from the rendezvous store" in err.read_text(), "the reason", 20)
    os.kill(pids[0], signal.SIGKILL)
    assert forge.wait() == [-9, 1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_waits_for_its_data_is_named(forge, tiny_set, tmp_path, ranks):
    run = tmp_path / "run"
    codes, _, err = forge.run(
        tmp_path, *argv(tiny_set, run), "--train.hang-minutes", "0.1", ranks=ranks,
        spies=(("starve", 5, ranks - 1),),
    )  # fmt: skip
    assert codes[0] == 1 and 0 not in codes, err
    said = re.findall(r"^hangs: .*", err, re.MULTILINE)
    assert len(said) == 1, err
    assert re.match(
        rf"hangs: rank {ranks - 1} on \S+: reading data at step 5 for \d+ s; all ranks leave", said[0]
    )
    codes, _, err = forge.run(tmp_path, *argv(tiny_set, run), "--train.hang-minutes", "10", ranks=ranks)
    assert codes == [0] * ranks and status(run)["state"] == "finished", err


def test_a_long_look_is_no_hang(forge, tiny_set, tmp_path):
    """Each of four batches takes 1.3 of the 3.6 s that a hang takes."""
    codes, _, err = forge.run(
        tmp_path, *argv(tiny_set, tmp_path / "run"), "--train.hang-minutes", "0.06", "--train.steps", 1,
        "--data.batch", 2, ranks=2, spies=(("dawdle", 1.3),),
    )  # fmt: skip
    assert codes == [0, 0] and "hangs" not in err, err


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_raises_is_readable_and_the_others_leave(forge, tiny_set, calm, tmp_path, victim):
    run = tmp_path / "run"
    began = time.monotonic()
    codes, _, err = forge.run(tmp_path, *argv(tiny_set, run), ranks=3, spies=(("fail", 9, victim),))
    assert time.monotonic() - began < 60 and codes[victim] == 1 and 0 not in codes, err
    host = os.uname().nodename
    first = f"rank {victim} on {host} failed: LookupError: no such part\nTraceback (most recent call last):\n"
    assert first in err and err.count("Traceback") == 1, err
    # The others may be told to stop before they can say that they lost a rank; what they say comes after its own message.
    assert "lost contact with another rank" not in err[: err.index(first)]
    assert "hangs" not in err
    codes, _, err = forge.run(tmp_path, *argv(tiny_set, run), ranks=3)
    assert codes == [0] * 3, err
    assert weights(run, STEPS) == weights(calm, STEPS) and metrics(run) == metrics(calm)


def test_where_the_network_is_cut_every_rank_says_what_broke(forge, tiny_set, tmp_path):
    """No rank fails, so none has a message of its own: the cause is in what each of them says."""
    codes, _, err = forge.run(
        tmp_path, *argv(tiny_set, tmp_path / "run"), ranks=3, spies=(("cut_network", 5),)
    )
    assert codes == [1, 1, 1] and "Traceback" not in err, err
    said = re.findall(r"^rank (\d) on \S+: lost contact with another rank \((.*?)\): (.*)", err, re.MULTILINE)
    assert {rank for rank, _, _ in said} == set("012"), err
    assert all(
        re.search(r"[Cc]onnection (closed|reset) by peer|Broken pipe", cause) for _, cause, _ in said
    ), said
    assert all("the network between them was cut" in rest for _, _, rest in said)
