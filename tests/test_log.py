"""metrics.jsonl after crashes, restarts and full disks, and lines on the console."""

import errno
import io
import json
import os
import sys
import threading
import time

import pytest

from p2w.files import write_atomic
from p2w.log import Log, TolerantStream, hours_minutes_seconds, read_metrics


def steps(run):
    return [record["step"] for record in read_metrics(run)]


def test_rewind_drops_later_steps_and_a_broken_last_line(tmp_path):
    log = Log(tmp_path, True, 10)
    for step in (0, 1, 2, 3):
        log.metrics(step, {"train/loss": step / 2})
    log.close()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4, "tra\x00\xff')
    assert steps(tmp_path) == [0, 1, 2, 3]
    Log(tmp_path, False, 10).rewind(0)  # another rank: touches nothing
    assert steps(tmp_path) == [0, 1, 2, 3]
    Log(tmp_path, True, 10).rewind(2)
    assert steps(tmp_path) == [0, 1, 2]
    assert all(json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_rewind_before_a_pending_evaluation_keeps_the_records_of_the_step(tmp_path):
    log = Log(tmp_path, True, 10)
    log.event(2, {"skipped": "the loss of rank 1 was not finite"})
    log.metrics(2, {"train/loss": 0.5})
    log.metrics(2, {"val/loss": 0.5})
    log.close()
    Log(tmp_path, True, 10).rewind(2, evaluated=False)
    assert [set(record) - {"step", "time"} for record in read_metrics(tmp_path)] == [
        {"skipped"},
        {"train/loss"},
    ]


@pytest.mark.parametrize("line", ['{"step": Infinity}', '{"step": null}', "[]", "7", "{}", '"step"'])
def test_a_damaged_line_is_left_out(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{line}\n{{"step": 1}}\n')
    assert steps(tmp_path) == [1]
    Log(tmp_path, True, 10).rewind(5)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_other_ranks_write_nothing(tmp_path):
    log = Log(tmp_path, False, 10)
    log.metrics(1, {"train/loss": 1.0})
    log.progress(1, 1.0, 1.0, 0.0)
    log.line("said")
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_off_a_terminal_there_is_a_line_with_rate_and_time_left(tmp_path, capsys):
    log = Log(tmp_path, True, 100)
    log.progress(1, 0.5, 12.3, 0.04)
    log.progress(2, 0.4, 12.3, 0.04)  # within ten seconds of the first: silent
    shown = capsys.readouterr().err
    assert shown == "step 1/100  loss 0.5000  12.3 samples/s  waiting 4%  left ?\n"


def test_a_run_folder_that_moves_costs_tensorboard_one_line(tmp_path, capsys, monkeypatch):
    """Its thread writes every two minutes; what that raises is no traceback of its own beside our line."""
    threads = []
    monkeypatch.setattr(threading, "excepthook", threads.append)
    (tmp_path / "run").mkdir()
    log = Log(tmp_path / "run", True, 10)
    log.metrics(1, {"loss": 1.0})
    writer = next(one for one in threading.enumerate() if type(one).__module__.startswith("tensorboard."))
    while not writer._next_flush_time:  # it writes once as it starts, and not within the next two minutes
        time.sleep(0.01)
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").mkdir()  # as p2w.train.run_dir makes it anew
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 300)
    log.metrics(2, {"loss": 1.0})
    writer.join()
    for step in (3, 4):
        log.metrics(step, {"loss": 1.0})
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "tensorboard: not written" in said and threads == []
    other = threading.Thread(target=lambda: 1 / 0)
    other.start()
    other.join()
    assert [one.exc_type for one in threads] == [ZeroDivisionError]
    log.close()
    assert steps(tmp_path / "run") == [2, 3, 4] and threading.excepthook == threads.append


def test_text_in_brackets_is_not_markup(tmp_path, capsys):
    Log(tmp_path, True, 1).line("[/bold] a shard [red] x")
    assert capsys.readouterr().err == "[/bold] a shard [red] x\n"


def test_write_atomic_replaces_and_leaves_nothing_beside(tmp_path):
    write_atomic(tmp_path / "a", "one")
    write_atomic(tmp_path / "a", b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "two"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.9, "0:00:59"), (86400.5, "24:00:00"), (float("nan"), "?")]
)
def test_duration(seconds, text):
    assert hours_minutes_seconds(seconds) == text


def test_a_full_disk_loses_a_line_but_not_the_run(tmp_path, capsys):
    """/dev/full takes nothing: the record is lost with a warning, and the next one that fits is complete."""
    log = Log(tmp_path, True, 10)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log.metrics(1, {"train/loss": 1.0})
    assert "metrics.jsonl: not written (No space left on device)" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").unlink()
    log.metrics(2, {"train/loss": 1.0})
    log.close()
    assert steps(tmp_path) == [2]


class FullDisk(io.StringIO):
    """A stream on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    flush = close = lambda self: None


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", TolerantStream(FullDisk()))
    log = Log(tmp_path, True, 10)
    log.warn("the disk is full")
    log.progress(1, 0.5, 1.0, 0.0)
    print("more", file=sys.stderr, flush=True)
    monkeypatch.setattr(sys, "stderr", FullDisk())
    with pytest.raises(OSError):
        print("as it was", file=sys.stderr, flush=True)
