"""Killed, told to stop, or restarted by torchrun: the same command ends with the same bits. Real processes throughout."""

import os
import random
import signal
import time

import psutil
import pytest
from launch_runs import TINY, Forge, metrics, status, wait_for, weights
from processes import kill_group, torchrun

from p2w.log import read_metrics
from p2w.train.watchdog import StopRequest

STEPS = 16
RUN = ("demo", *TINY, "--train.steps", STEPS, "--train.validate-every", 8, "--train.probe-every", 12)
SLOW = (("lag", 1, 0.1),)  # a run that is interrupted lasts for a while after its first checkpoint


@pytest.fixture(scope="module")
def forge():
    """Its runs measure in full, since they are compared with one that a real torchrun starts."""
    forge = Forge(recalibrates=True)
    yield forge
    forge.end()


@pytest.fixture(scope="module")
def whole(forge, tiny_set, tmp_path_factory):
    """The uninterrupted run on two processes."""
    folder = tmp_path_factory.mktemp("whole")
    codes, _, err = forge.run(folder, *RUN, "--shards", tiny_set, "--run-dir", folder / "run", ranks=2)
    assert codes == [0, 0], err
    return folder / "run"


def check(run, whole):
    """The same weights, and each step once in metrics.jsonl with the same numbers."""
    assert status(run) == {"state": "finished", "step": STEPS, "why": ""}
    assert weights(run, STEPS) == weights(whole, STEPS)
    assert metrics(run) == metrics(whole)
    trained = [record["step"] for record in metrics(run) if "train/loss" in record]
    assert trained == list(range(1, STEPS + 1))
    assert not list((run / "checkpoints").glob(".*"))


def first_checkpoint(run):
    wait_for((run / "checkpoints" / "step-00000004" / "meta.json").exists, "the first checkpoint")


def test_torchrun_killed_at_any_moment_and_repeated(forge, tiny_set, whole, tmp_path, start):
    """The one that a real torchrun starts; it draws its pictures, and a run that drew none ends with the same bits."""
    argv = (*RUN, "--shards", tiny_set, "--run-dir", tmp_path / "run")
    process = start(torchrun(2, *argv), tmp_path)
    first_checkpoint(tmp_path / "run")
    time.sleep(random.uniform(0, 2))
    kill_group(process)
    assert status(tmp_path / "run")["state"] == "running"
    forge.torchrun(tmp_path, *argv, ranks=2)
    assert forge.wait() == [0], (tmp_path / "err.txt").read_text()
    check(tmp_path / "run", whole)


def test_killed_twice_once_before_the_first_checkpoint(forge, tiny_set, whole, tmp_path):
    run = tmp_path / "run"
    argv = (*RUN, "--shards", tiny_set, "--run-dir", run)
    for ready in ((run / "metrics.jsonl").exists, lambda: first_checkpoint(run) or True):
        pids = forge.start(tmp_path, *argv, ranks=2, spies=SLOW)
        wait_for(ready, "a sign of life")
        time.sleep(random.uniform(0, 0.5))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert forge.wait() == [-9, -9]
    codes, _, err = forge.run(tmp_path, *argv, ranks=2)
    assert codes == [0, 0], err
    check(run, whole)


def test_sigterm_to_torchrun_loses_nothing(forge, tiny_set, whole, tmp_path):
    run = tmp_path / "run"
    argv = (*RUN, "--shards", tiny_set, "--run-dir", run)
    agent = forge.torchrun(tmp_path, *argv, ranks=2, draws=True, spies=SLOW)
    first_checkpoint(run)
    began = time.monotonic()
    ranks = agent.children()
    for one in (
        agent,
        *ranks,
        agent,
    ):  # scancel signals the whole step, torchrun forwards, people are impatient
        one.send_signal(signal.SIGTERM)
    forge.wait()
    assert time.monotonic() - began < 20  # torchrun kills after 30 s
    said = status(run)
    assert said["state"] == "told to stop" and said["why"] == "SIGTERM" and said["step"] < STEPS
    assert (run / "checkpoints" / f"step-{said['step']:08d}" / "meta.json").exists()
    assert metrics(run)[-1]["step"] == said["step"]
    assert "the same command continues it" in (tmp_path / "err.txt").read_text()
    assert forge.run(tmp_path, *argv, ranks=2)[0] == [0, 0]
    check(run, whole)


def test_sigusr1_to_one_rank_stops_all_and_ends_well(forge, tiny_set, whole, tmp_path):
    run = tmp_path / "run"
    argv = (*RUN, "--shards", tiny_set, "--run-dir", run)
    pids = forge.start(tmp_path, *argv, ranks=2, spies=SLOW)
    first_checkpoint(run)
    os.kill(pids[1], signal.SIGUSR1)
    assert forge.wait() == [0, 0]
    assert (status(run)["state"], status(run)["why"]) == ("told to stop", "a signal to another rank")
    assert forge.run(tmp_path, *argv, ranks=2)[0] == [0, 0]
    check(run, whole)


def test_told_in_the_midst_of_a_look(forge, tiny_set, whole, tmp_path):
    """Validation or similarity, before the first step, between two and after the last: it is broken off and made up for."""
    run = tmp_path / "run"
    argv = (*RUN, "--shards", tiny_set, "--run-dir", run)
    looks = ((0, "validation"), (8, "validation"), (12, "similarity"), (STEPS, "validation"))
    for step, name in looks:
        spies = (("tell", step, 1, name),)
        codes, _, err = forge.run(tmp_path, *argv, ranks=2, spies=spies)
        assert codes == [0, 0], err
        assert status(run) == {"state": "told to stop", "step": step, "why": "a signal to another rank"}
        assert os.readlink(run / "checkpoints" / "latest") == f"step-{step:08d}"
        assert not any(one["step"] == step and "val/loss" in one for one in read_metrics(run))
    assert forge.run(tmp_path, *argv, ranks=2)[0] == [0, 0]
    check(run, whole)
    best = "checkpoints/best.json"
    assert (run / best).read_text() == (whole / best).read_text()
    assert [path.name for path in sorted((run / "checkpoints").glob("step-*"))] == [
        path.name for path in sorted((whole / "checkpoints").glob("step-*"))
    ]


def test_a_second_signal_leaves_at_once_though_a_peer_hangs(forge, tiny_set, tmp_path):
    """Rank 0 waits for rank 1 inside a collective, where Python's own handlers do not run."""
    run = tmp_path / "run"
    argv = ("demo", *TINY, "--train.steps", 100_000, "--shards", tiny_set, "--run-dir", run)
    pids = forge.start(tmp_path, *argv, ranks=2)
    first_checkpoint(run)
    os.kill(pids[1], signal.SIGSTOP)
    time.sleep(0.5)
    os.kill(pids[0], signal.SIGTERM)
    time.sleep(StopRequest.BURST_S + 0.2)
    assert psutil.Process(pids[0]).status() != psutil.STATUS_ZOMBIE
    os.kill(pids[0], signal.SIGTERM)
    os.kill(pids[1], signal.SIGKILL)
    assert forge.wait() == [128 + signal.SIGTERM, -9]


def test_torchrun_restarts_by_itself_when_a_rank_is_killed(forge, tiny_set, whole, tmp_path):
    run = tmp_path / "run"
    argv = (*RUN, "--shards", tiny_set, "--run-dir", run)
    agent = forge.torchrun(tmp_path, *argv, ranks=2, restarts=2, spies=SLOW)
    first_checkpoint(run)
    max(agent.children(), key=lambda one: one.pid).kill()
    assert forge.wait() == [0], (tmp_path / "err.txt").read_text()
    check(run, whole)


def test_a_finished_run_repeated_changes_nothing(forge, tiny_set, whole):
    before = {path: path.stat().st_mtime_ns for path in (whole / "checkpoints").rglob("*")}
    lines = metrics(whole)
    argv = (*RUN, "--shards", tiny_set, "--run-dir", whole)
    assert forge.run(whole.parent, *argv, ranks=2)[0] == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in (whole / "checkpoints").rglob("*")} == before
    assert metrics(whole) == lines and status(whole)["state"] == "finished"


def test_checkpoints_of_which_none_can_be_read_do_not_begin_the_run_again(forge, tiny_set, tmp_path):
    """A disk that fails for a while must not cost a week: the curves and what there is stay, a person decides."""
    run = tmp_path / "run"
    argv = ("demo", *TINY, "--train.steps", 8, "--shards", tiny_set, "--run-dir", run)
    assert forge.run(tmp_path, *argv)[0] == [0]
    damaged = sorted((run / "checkpoints").glob("step-*/state.pt"))
    assert len(damaged) > 1
    for path in damaged:
        path.write_bytes(path.read_bytes()[:-1])
    lines = (run / "metrics.jsonl").read_text()
    codes, _, err = forge.run(tmp_path, *argv)
    assert codes == [2] and f"{len(damaged)} checkpoints and not one that can be read" in err
    assert (run / "metrics.jsonl").read_text() == lines
