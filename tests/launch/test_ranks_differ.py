"""Ranks that do not fit together: what differs is named once; what may differ does no harm. Real processes."""

import json
import os
import re
import socket

import pytest
from ct_sets import write_structured_set
from launch_runs import TINY, metrics, weights


@pytest.mark.parametrize("what", ["torch", "p2w"])
def test_another_version_on_a_rank_is_refused_and_named_once(forge, tiny_set, tmp_path, what):
    argv = ("demo", *TINY, "--shards", tiny_set, "--run-dir", tmp_path / "run")
    codes, _, err = forge.run(tmp_path, *argv, ranks=2, spies=(("be_another", 1, what),))
    assert set(codes) <= {2, -15} and 2 in codes and not (tmp_path / "run").exists()
    assert re.findall(
        rf"^error: rank 1 on \S+ has {what} \S+; rank 0 on \S+ has {what} ", err, re.MULTILINE
    ), err
    assert err.count("error:") == 1


def test_a_slow_rank_and_wrong_clocks_change_nothing(forge, tiny_set, tmp_path):
    argv = ("demo", *TINY, "--train.steps", 12, "--shards", tiny_set, "--run-dir")
    assert forge.run(tmp_path, *argv, tmp_path / "calm", ranks=2)[0] == [0, 0]
    spies = (("lag", 1, 0.1), ("skew_clock", 1, 3600.0), ("skew_clock", 0, -86400.0))
    codes, _, err = forge.run(tmp_path, *argv, tmp_path / "run", ranks=2, spies=spies)
    assert codes == [0, 0], err
    assert weights(tmp_path / "run", 12) == weights(tmp_path / "calm", 12)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "calm")


def test_more_ranks_than_shards(forge, tmp_path):
    shards = write_structured_set(tmp_path / "set", train=1, val=1, per=8)
    argv = ("demo", *TINY, "--train.steps", 6, "--shards", shards, "--run-dir", tmp_path / "run")
    codes, _, err = forge.run(tmp_path, *argv, ranks=4)
    assert codes == [0] * 4, err


def meet(forge, folder, *place):
    codes, _, err = forge.run(folder, *place, script="tests/launch/meets.py")
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert codes == [1] and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def test_a_busy_port_is_one_line(forge, tmp_path):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        said = meet(forge, tmp_path, 0, "127.0.0.1", port, 3)
    assert f"could not meet the other ranks at 127.0.0.1:{port} (MASTER_ADDR:MASTER_PORT) within 3 s" in said
    assert "in use" in said


def test_torchrun_repeats_why_the_ranks_did_not_meet(forge, tiny_set, tmp_path):
    told = tmp_path / "told.json"
    spies = (("take_port", str(told)),)
    codes, _, err = forge.run(
        tmp_path, "demo", *TINY, "--shards", tiny_set, "--run-dir", tmp_path / "run", ranks=2, spies=spies
    )
    assert codes == [2, 0] and "Traceback" not in err
    line = json.loads(told.read_text())["message"]
    assert line in err.splitlines() and "error: rank 0 on" in line and "in use" in line


@pytest.mark.parametrize("address", ["127.0.0.1", "no-such-node.invalid"])
def test_a_rank_0_that_cannot_be_reached_is_one_line(forge, tmp_path, address):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    said = meet(forge, tmp_path, 1, address, port, 3)
    assert f"rank 1 on {os.uname().nodename}: could not meet the other ranks at {address}:{port}" in said


def test_others_that_do_not_come_are_waited_for_and_then_it_is_said(forge, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert "meet" in meet(forge, tmp_path, 0, "127.0.0.1", port, 3)
