"""Whatever interrupts a run: the same weights at the same number of ranks, the same samples and parts at any number."""

import json
import os
import signal
from collections import Counter

import pytest
from launch_runs import TINY, metrics, status, wait_for, weights

from p2w.shards.manifest import read_manifest
from p2w.stream.local import LocalSet
from p2w.stream.stream import Stream
from p2w.train.checkpoint import Checkpoints

STEPS, EVERY, EPOCH = 10, 2, 3  # 24 sub-scans in batches of 8; the run ends in its fourth epoch
CHAIN = ((1, 0), (2, 2), (5, 0), (8, 2))  # killed at the step after so many, with so many readers


def command(shards, run, readers):
    sizes = (
        f"--data.batch 8 --train.steps {STEPS} --train.validate-every 100 --train.checkpoint-every {EVERY} "
        "--train.probe-every 0"
    )
    return [
        "demo", *TINY, *sizes.split(), "--data.reader-threads", readers, "--shards", shards, "--run-dir", run,
    ]  # fmt: skip


def read_record(path) -> dict[int, tuple]:
    """Step -> (epoch, ids, parts) in the order of the global batch. A step done twice must be the same both times."""
    seen: dict[tuple[int, int], dict] = {}
    for line in path.read_text().splitlines():
        one = json.loads(line)
        assert seen.setdefault((one["step"], one["rank"]), one) == one
    steps = {}
    for (step, _), one in sorted(seen.items()):
        _, ids, parts = steps.get(step, (0, [], []))
        steps[step] = (one["epoch"], ids + one["ids"], parts + one["parts"])
    return steps


@pytest.fixture(scope="module")
def uninterrupted(forge, tiny_set, tmp_path_factory):
    """Run folder and record of an uninterrupted run at a number of ranks; each is done once."""
    done = {}

    def once(ranks):
        if ranks not in done:
            folder = tmp_path_factory.mktemp(f"whole{ranks}")
            argv = command(tiny_set, folder / "run", 1)
            spies = (("record", str(folder / "record")),)
            codes, _, err = forge.run(folder, *argv, ranks=ranks, spies=spies)
            assert codes == [0] * ranks, err
            done[ranks] = (folder / "run", read_record(folder / "record"))
        return done[ranks]

    return once


def test_an_epoch_shows_every_sub_scan_once(uninterrupted):
    _, whole = uninterrupted(1)
    assert list(whole) == list(range(STEPS))
    assert [epoch for epoch, *_ in whole.values()] == [step // EPOCH for step in range(STEPS)]
    for first in range(0, STEPS - EPOCH, EPOCH):
        ids = Counter(one for step in range(first, first + EPOCH) for one in whole[step][1])
        assert len(ids) == 24 and set(ids.values()) == {1}


@pytest.mark.parametrize("ranks", [1, 4, 8])  # two are killed in test_continue.py
def test_killed_again_and_again(forge, tiny_set, uninterrupted, tmp_path, ranks):
    """In the first epoch, before and after the first checkpoint, and in later ones; with and without reader threads.

    Two ranks add the same two numbers in any order; four show whether the order is kept.
    """
    run, path = tmp_path / "run", tmp_path / "record"
    chain = CHAIN if ranks < 8 else CHAIN[1:]
    for count, (at, readers) in enumerate(chain):
        path.unlink(missing_ok=True)
        spies = (("record", str(path)), ("die", at, count % ranks))
        codes, _, err = forge.run(tmp_path, *command(tiny_set, run, readers), ranks=ranks, spies=spies)
        assert codes[count % ranks] == -9, err
        if count:  # lost: an interval, and the steps done while the last checkpoint was being written
            before = chain[count - 1][0]
            assert min(read_record(path)) >= before // EVERY * EVERY - EVERY
        (tmp_path / f"record{count}").write_bytes(path.read_bytes())
    path.unlink()
    spies = (("record", str(path)),)
    codes, _, err = forge.run(tmp_path, *command(tiny_set, run, 2), ranks=ranks, spies=spies)
    assert codes == [0] * ranks, err
    everything = tmp_path / "everything"
    everything.write_bytes(b"".join(file.read_bytes() for file in tmp_path.glob("record*")))
    assert read_record(everything) == uninterrupted(1)[1]
    if ranks < 8:
        assert weights(run, STEPS) == weights(uninterrupted(ranks)[0], STEPS)


def test_three_ranks_go_on_where_four_began(forge, tiny_set, uninterrupted, tmp_path):
    """Refused as it is, since 3 does not divide the batch; with --train.elastic two of them do the steps of the four."""
    run, path = tmp_path / "run", tmp_path / "record"
    spies = (("record", str(path)),)
    first = [*command(tiny_set, run, 1), "--train.steps", 4]
    assert forge.run(tmp_path, *first, ranks=4, spies=spies)[0] == [0] * 4
    codes, _, err = forge.run(tmp_path, *command(tiny_set, run, 1), ranks=3)
    assert (
        2 in codes and set(codes) <= {2, -15} and "evenly by 3 ranks" in err and "--train.elastic" in err
    ), err
    assert err.count("error:") == 1

    elastic = [*command(tiny_set, run, 1), "--train.elastic"]
    codes, _, err = forge.run(tmp_path, *elastic, ranks=3, spies=spies)
    assert codes == [0] * 3 and "2 of 3 ranks train" in err and "rank(s) 2 to 2 leave" in err, err
    assert "began with 4 ranks, goes on with 2" in err + (tmp_path / "out.txt").read_text()
    whole, record = uninterrupted(4)
    assert read_record(path) == record
    losses = [{r["step"]: r["train/loss"] for r in metrics(one) if "train/loss" in r} for one in (run, whole)]
    assert list(losses[0]) == list(range(1, STEPS + 1)) and losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert [start["world_size"] for start in json.loads((run / "run.json").read_text())["starts"]] == [4, 2]


@pytest.mark.parametrize("ranks", [1, 2])
def test_held_on_the_device(forge, tiny_set, uninterrupted, tmp_path, ranks):
    """The setting may come and go while a run continues: same samples, same parts, same weights."""
    run = tmp_path / "run"
    for steps, setting in ((4, ["--data.cache-on-device"]), (6, []), (STEPS, ["--data.cache-on-device"])):
        argv = [*command(tiny_set, run, 1), "--train.steps", steps, *setting]
        codes, _, err = forge.run(tmp_path, *argv, ranks=ranks)
        assert codes == [0] * ranks, err
    assert weights(run, STEPS) == weights(uninterrupted(ranks)[0], STEPS)


def test_killed_while_a_checkpoint_is_written(forge, tiny_set, uninterrupted, tmp_path):
    """Before its first file, before its checksums, before it is durable: what is there stays sound, and the run ends as
    if nothing had been."""
    run, reached = tmp_path / "run", tmp_path / "reached"
    argv = [*command(tiny_set, run, 1), "--train.checkpoint-every", 1]
    folder = run / "checkpoints"
    for at, function in ((2, "save_file"), (4, "_checksum"), (6, "sync_to_disk")):
        spies = (("stop_writing", at, function, str(reached)),)
        pids = forge.start(tmp_path, *argv, ranks=2, spies=spies)
        wait_for(reached.exists, f"the checkpoint of step {at}")
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert forge.wait() == [-9, -9]
        reached.unlink()
        assert (folder / f".step-{at:08d}.tmp").is_dir()
        said = []
        found = Checkpoints(folder, warn=said.append).load_latest()
        assert not said and found.step == at - 1
        assert (folder / "latest").resolve().name == f"step-{found.step:08d}"
    codes, _, err = forge.run(tmp_path, *argv, ranks=2)
    assert codes == [0, 0] and "passed over" not in err, err
    assert status(run)["state"] == "finished" and not list(folder.glob(".*"))
    assert weights(run, STEPS) == weights(uninterrupted(2)[0], STEPS)


class Counting(LocalSet):
    """Counts the epochs it orders and the sub-scans it reads."""

    orders = reads = 0

    def train_order(self, *args):
        self.orders += 1
        return super().train_order(*args)

    def read_into(self, *args):
        self.reads += 1
        return super().read_into(*args)


def test_a_late_position_costs_no_more_than_the_first(tiny_set):
    spent = []
    for place in ((0, 0), (1000, 1), (10**9, 2)):
        shards = Counting(read_manifest(tiny_set))
        with Stream(shards, "train", 8, readers=0) as stream:
            batch = next(stream.batches(*place))
        assert (batch.epoch, batch.step) == place
        spent.append((shards.orders, shards.reads))
    assert spent == [(1, 8)] * 3


def test_a_run_reads_the_copy_and_records_where_the_set_is(forge, tiny_set, uninterrupted, tmp_path):
    """Two ranks, one of which copies; the steps and weights are those of a run without a copy, and it is removed."""
    run, node = tmp_path / "run", tmp_path / "node"
    argv, more = command(tiny_set, run, 1), ["--stage-to", node, "--stage-remove"]
    codes, _, err = forge.run(tmp_path / "first", *argv, *more, ranks=2)
    assert codes == [0, 0], err
    assert weights(run, STEPS) == weights(uninterrupted(2)[0], STEPS)
    assert json.loads((run / "run.json").read_text())["starts"][0]["shards"] == str(tiny_set)
    assert os.listdir(node) == []

    (tmp_path / "file").touch()
    more[1] = tmp_path / "file"
    codes, _, err = forge.run(tmp_path / "second", *argv, *more, "--train.steps", STEPS + 1, ranks=2)
    assert codes == [2, 2] and err.count("error:") == 1 and "cannot be written" in err, err
