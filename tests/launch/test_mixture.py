"""A run on a mixture of sets: it continues bit for bit, and says what it was trained on."""

import json
import os
import signal

from launch_runs import TINY, metrics, status, wait_for, weights
from stream_sets import write_set

from p2w.shards.manifest import data_fingerprint
from p2w.stream.stream import open_set
from p2w.tasks.leak import pretraining_of

STEPS = 12
FEW = (*TINY, "--train.steps", STEPS, "--train.validate-every", 6)


def test_a_run_on_two_sets_that_is_killed_ends_with_the_same_bits(forge, tmp_path):
    for name, train in (("a", (12, 12)), ("b", (9,))):
        write_set(tmp_path / name, train=train, val=(3,), shape=(8, 16, 16))
    shards = (f"{tmp_path}/a:0.7", f"{tmp_path}/b:0.3")
    argv = ("demo", *FEW, "--shards", *shards, "--run-dir")
    codes, _, err = forge.run(tmp_path / "1", *argv, tmp_path / "whole", ranks=2)
    assert codes == [0, 0], err
    run = tmp_path / "run"
    pids = forge.start(tmp_path / "2", *argv, run, ranks=2, spies=(("lag", 0, 0.1),))
    wait_for((run / "checkpoints" / "step-00000004" / "meta.json").exists, "the first checkpoint")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert forge.wait() == [-9, -9]
    codes, _, err = forge.run(tmp_path / "2", *argv, run, ranks=2)
    assert codes == [0, 0], err
    assert status(run)["state"] == "finished"
    assert weights(run, STEPS) == weights(tmp_path / "whole", STEPS) and metrics(run) == metrics(
        tmp_path / "whole"
    )

    told = json.loads((run / "run.json").read_text())["starts"][-1]
    assert told["shards"] == " + ".join(shards)
    parts = told["data_set"]["mixture"]
    assert [part["weight"] for part in parts] == [0.7, 0.3]
    assert [part["data"] for part in parts] == [
        data_fingerprint(open_set(f"{tmp_path}/{name}").meta) for name in "ab"
    ]
    assert [where for _, where in pretraining_of(run)] == [f"{tmp_path}/a", f"{tmp_path}/b"]
    other = ("demo", *FEW, "--shards", f"{tmp_path}/a:0.5", f"{tmp_path}/b:0.5", "--run-dir", run)
    codes, _, err = forge.run(tmp_path / "3", *other)
    assert codes == [2] and "data set" in err
