"""One stream, whatever the format, the ranks, the reader threads and the restarts."""

import gc
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import processes
import psutil
import pytest
import torch
from stream_sets import SHAPE, write_set

from p2w.errors import UserError
from p2w.stream import local
from p2w.stream.local import DataError, LocalSet
from p2w.stream.sampler import epoch_permutation
from p2w.stream.stream import Stream, open_set


def take(stream, count, epoch=0, step=0):
    """The next batches as (epoch, step, ids, voxels), copied."""
    with stream:
        batches = itertools.islice(stream.batches(epoch, step), count)
        return [(b.epoch, b.step, b.ids.tolist(), b.voxels.numpy().copy()) for b in batches]


def same(one, two):
    for a, b in zip(one, two, strict=True):
        assert a[:3] == b[:3]
        np.testing.assert_array_equal(a[3], b[3])


def readers_alive():
    return [thread for thread in threading.enumerate() if thread.name.startswith("p2w-reader")]


@pytest.mark.parametrize("form", ["tar", "arrow"])
@pytest.mark.parametrize("readers", [0, 1, 2, 5])
def test_batches_hold_the_right_voxels_in_the_right_order(tmp_path, form, readers):
    wholes = write_set(tmp_path, form)
    shards = open_set(os.fspath(tmp_path))
    ids = shards.ids("train")
    assert len(ids) == 15 and shards.shape == SHAPE
    batches = take(
        Stream(shards, batch=4, seed=3, readers=readers), 7
    )  # 3 steps an epoch, 3 sub-scans left out
    for number, (epoch, step, got, voxels) in enumerate(batches):
        assert (epoch, step) == divmod(number, 3)
        assert got == epoch_permutation(ids, 3, epoch)[step * 4 : step * 4 + 4].tolist()
        np.testing.assert_array_equal(voxels, np.stack([wholes[i] for i in got]))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("form", ["tar", "arrow"])
@pytest.mark.parametrize("readers", [0, 2])
def test_ranks_share_each_batch_out_exactly(tmp_path, world, form, readers):
    """The stream of any world size is that of one rank, cut; also with more ranks (4, 8) than shards."""
    write_set(tmp_path, form)
    shards = open_set(os.fspath(tmp_path))
    alone = take(Stream(shards, batch=8, seed=1, readers=0), 3)
    parts = [
        take(Stream(shards, batch=8, seed=1, rank=r, world_size=world, readers=readers), 3)
        for r in range(world)
    ]
    for step, whole in enumerate(alone):
        assert [i for part in parts for i in part[step][2]] == whole[2]
        np.testing.assert_array_equal(np.concatenate([part[step][3] for part in parts]), whole[3])


@pytest.mark.parametrize("readers", [0, 2])
def test_resume_equals_the_uninterrupted_stream(tmp_path, readers):
    write_set(tmp_path)
    shards = open_set(os.fspath(tmp_path))
    through = take(Stream(shards, batch=4, seed=9, readers=readers), 10)
    for position in (1, 2, 3, 4, 7):
        epoch, step = divmod(position, 3)
        same(
            take(Stream(shards, batch=4, seed=9, readers=readers), 3, epoch, step),
            through[position : position + 3],
        )
    same(take(Stream(shards, batch=4, seed=9, readers=readers), 2, 0, 3), through[3:5])  # after the last step


def test_resume_reads_nothing_before_its_position(tmp_path):
    write_set(tmp_path)
    shards = open_set(os.fspath(tmp_path))
    read = []
    whole = shards.read_into
    shards.read_into = lambda sub_scan, out: (read.append(sub_scan), whole(sub_scan, out))
    _, _, ids, _ = take(Stream(shards, batch=4, seed=9, readers=0), 1, 1000, 2)[0]
    assert read == ids


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("readers", [0, 2])
def test_validation_gives_every_sub_scan_once(tmp_path, world, readers):
    wholes = write_set(tmp_path, train=(3,), val=(4, 5))
    shards = open_set(os.fspath(tmp_path))
    seen = []
    for rank in range(world):
        with Stream.validation(shards, batch=4, rank=rank, world_size=world, readers=readers) as stream:
            assert stream.steps_per_epoch == 3
            for _ in range(2):  # it can be run again
                batches = [
                    (b.ids.tolist(), b.weight.tolist(), b.voxels.numpy().copy()) for b in stream.batches()
                ]
            assert len(batches) == 3
        for ids, weights, voxels in batches:
            for i, weight, whole in zip(ids, weights, voxels, strict=True):
                np.testing.assert_array_equal(whole, wholes[i])
                seen += [i] * int(weight)
    assert sorted(seen) == list(range(3, 12))
    assert not readers_alive()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch": 16}, "at most 15"),
        ({"batch": 16, "world_size": 4}, "at most 12"),
        ({"batch": 16, "world_size": 16}, "at most 15 ranks"),
        ({"batch": 6, "world_size": 4}, "use a batch of 4 or 8"),
        ({"batch": 2, "world_size": 4}, "use a batch of 4"),
        ({"batch": 0}, "batch >= 1"),
        ({"batch": 4, "rank": 2, "world_size": 2}, "rank < ranks"),
        ({"batch": 4, "readers": -1}, "reader threads"),
        ({"batch": 4, "split": "test"}, "split 'test': no sub-scans"),
    ],
)
def test_wrong_batch_sizes_are_refused_in_one_line(tmp_path, options, says):
    write_set(tmp_path)
    with pytest.raises(UserError, match=says) as error:
        Stream(open_set(os.fspath(tmp_path)), **options)
    assert "\n" not in str(error.value)


def test_the_remedy_in_the_message_works(tmp_path):
    write_set(tmp_path)
    Stream(open_set(os.fspath(tmp_path)), batch=12, world_size=4)


@pytest.mark.parametrize("position", [(-1, 0), (0, -1), (0, 4)])
def test_a_position_that_does_not_exist(tmp_path, position):
    write_set(tmp_path)
    with pytest.raises(UserError, match="an epoch here has 3 steps"):
        Stream(open_set(os.fspath(tmp_path)), batch=4).batches(*position)


def flip(folder, name, at):
    with open(folder / name, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("form", ["tar", "arrow"])
@pytest.mark.parametrize("readers", [0, 1, 2])
def test_every_flipped_byte_is_found(tmp_path, form, readers):
    write_set(tmp_path, form)
    shards = open_set(os.fspath(tmp_path))
    victim = 6
    for at in (0, shards.nbytes // 2, shards.nbytes - 1):
        flip(tmp_path, shards.shard(victim), int(shards.offsets[victim]) + at)
        stream = Stream(open_set(os.fspath(tmp_path)), batch=5, readers=readers)
        with pytest.raises(DataError, match="checksum differs") as error, stream:
            for batch in stream.batches():
                assert victim not in batch.ids.tolist()
                assert batch.epoch == 0
        assert shards.shard(victim) in str(error.value) and shards.key(victim) in str(error.value)
        assert (
            "p2w verify" in str(error.value)
            and "--repair" in str(error.value)
            and "\n" not in str(error.value)
        )
        assert not readers_alive()
        flip(tmp_path, shards.shard(victim), int(shards.offsets[victim]) + at)
    take(Stream(open_set(os.fspath(tmp_path)), batch=5, readers=readers), 3)
    flip(tmp_path, shards.shard(victim), int(shards.offsets[victim]))
    take(Stream(open_set(os.fspath(tmp_path), verify=False), batch=5, readers=readers), 3)


@pytest.mark.parametrize("form", ["tar", "arrow"])
def test_missing_and_truncated_shards_are_refused_at_open(tmp_path, form):
    write_set(tmp_path, form)
    path = tmp_path / f"1.2.0001.{form}"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(UserError, match=path.name):
        open_set(os.fspath(tmp_path))
    path.unlink()
    with pytest.raises(UserError, match=path.name):
        open_set(os.fspath(tmp_path))


def test_a_shard_cut_short_after_open_is_an_error_and_not_a_bus_error(tmp_path):
    write_set(tmp_path)
    shards = open_set(os.fspath(tmp_path))
    os.truncate(tmp_path / "1.2.0001.tar", 512)
    with pytest.raises(DataError, match=r"1\.2\.0001\.tar"):
        take(Stream(shards, batch=15, readers=2), 1)


@pytest.mark.parametrize("form", ["tar", "arrow"])
def test_a_shard_cut_short_while_it_is_mapped_is_an_error_and_not_a_bus_error(tmp_path, form):
    write_set(tmp_path, form)
    shards = open_set(os.fspath(tmp_path))
    with pytest.raises(DataError, match="has 0 bytes of") as error, Stream(shards, batch=15) as stream:
        for batch in stream.batches():
            if batch.epoch == 0:
                os.truncate(tmp_path / f"1.2.0001.{form}", 0)
    assert "p2w verify" in str(error.value)
    with pytest.raises(UserError, match=rf"1\.2\.0001\.{form} has 0 bytes"):  # and so says the next start
        open_set(os.fspath(tmp_path))


def test_no_manifest(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.parquet"):
        open_set(os.fspath(tmp_path))


def test_early_stop_leaves_no_thread(tmp_path):
    write_set(tmp_path)
    shards = open_set(os.fspath(tmp_path))
    stream = Stream(shards, batch=4, readers=2)
    for _ in stream.batches():  # break: the generator is dropped
        break
    gc.collect()
    assert not readers_alive()
    with pytest.raises(ZeroDivisionError), stream:
        for batch in stream.batches():
            batch.step / 0
    assert not readers_alive()
    batches = stream.batches()
    next(batches)
    assert len(readers_alive()) == 2
    other = stream.batches()
    with pytest.raises(RuntimeError, match="ended"):
        next(batches)
    assert next(other).step == 0
    del stream, batches, other
    gc.collect()
    assert not readers_alive()


ENDS = ["", "raise ValueError('mine')", "sys.exit(3)", "del stream"]
EXITS = """
import os, sys
from p2w.stream.stream import *

folder, *ends = sys.argv[1:]
for number, end in enumerate(ends):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(f"{folder}/{number}.txt", os.O_WRONLY | os.O_CREAT), 2)
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
stream = Stream(open_set(folder), batch=4, readers=2)
batches = stream.batches()
next(batches)
exec(end)
"""


@pytest.fixture(scope="module")
def exits(tmp_path_factory):
    """Exit code and stderr of interpreters that end so: forks of one that has imported torch, taken down as any other."""
    folder = tmp_path_factory.mktemp("exits")
    write_set(folder)
    done = subprocess.run(
        [sys.executable, "-c", EXITS, str(folder), *ENDS],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    said = [(folder / f"{number}.txt").read_text() for number in range(len(ENDS))]
    return dict(zip(ENDS, zip(map(int, done.stdout.split()), said, strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_the_interpreter_exits_with_batches_open(exits, end):
    code, said = exits[end]
    assert code == {"r": 1, "s": 3}.get(end[:1], 0), said
    assert ("mine" in said) == end.startswith("raise")
    assert end.startswith("raise") or not said


def test_a_batch_stays_whole_until_the_next_one_is_asked_for(tmp_path):
    wholes = write_set(tmp_path)
    with Stream(open_set(os.fspath(tmp_path)), batch=4, readers=2) as stream:
        for batch in itertools.islice(stream.batches(), 6):
            time.sleep(0.02)  # the readers run ahead as far as they can
            np.testing.assert_array_equal(batch.voxels, np.stack([wholes[i] for i in batch.ids.tolist()]))


@pytest.mark.parametrize("readers", [0, 2])
def test_buffers_are_reused_and_memory_does_not_grow(tmp_path, readers):
    write_set(tmp_path, train=(8, 8, 8, 8), shape=(16, 128, 128))  # 0.5 MiB a sub-scan
    process = psutil.Process()

    def anonymous():  # mapped shards are the page cache's
        return process.memory_info().rss - process.memory_info().shared

    with Stream(open_set(os.fspath(tmp_path)), batch=8, readers=readers) as stream:
        batches, places, memory = stream.batches(), set(), []
        for epoch in range(40):
            for batch in itertools.islice(batches, 4):
                places.add(batch.voxels.data_ptr())
            assert batch.epoch == epoch
            memory.append(anonymous())
    assert len(places) == (3 if readers else 1)
    slope = np.polyfit(np.arange(30), memory[10:], 1)[0]  # bytes an epoch of 16 MiB read
    assert slope < 64 * 1024


def test_open_files_do_not_grow_with_shards(tmp_path):
    write_set(tmp_path, train=(1,) * 64)
    before = psutil.Process().num_fds()
    stream = Stream(open_set(os.fspath(tmp_path)), batch=16, readers=2)
    batches = stream.batches()
    for _ in range(5):
        next(batches)
    assert psutil.Process().num_fds() <= before + 2
    stream.close()


def test_waiting_is_counted(tmp_path):
    write_set(tmp_path)
    shards = open_set(os.fspath(tmp_path))
    whole = shards.read_into
    shards.read_into = lambda sub_scan, out: (time.sleep(0.005), whole(sub_scan, out))
    stream = Stream(shards, batch=4, readers=0)
    take(stream, 3)
    assert 0.06 <= stream.wait_seconds < 2


def test_read_into_takes_arrays_and_tensors(tmp_path):
    wholes = write_set(tmp_path)
    shards = open_set(os.fspath(tmp_path))
    array, tensor = np.empty(SHAPE, np.int16), torch.empty(SHAPE, dtype=torch.int16)
    shards.read_into(8, array)
    shards.read_into(8, tensor)
    np.testing.assert_array_equal(array, wholes[8])
    np.testing.assert_array_equal(tensor, wholes[8])


@pytest.mark.slow
@pytest.mark.skipif("P2W_REAL_DATA" not in os.environ, reason="needs real scans in P2W_REAL_DATA")
def test_a_real_scan_gives_one_stream_in_both_formats(tmp_path):
    tool = os.fspath(Path(__file__).parents[2] / "preprocess" / "shard_scans.py")
    streams = []
    for form in ("tar", "arrow"):
        scans, out = os.path.join(os.environ["P2W_REAL_DATA"], "nifti"), os.fspath(tmp_path / form)
        command = [sys.executable, tool, "--scans", scans, "--out", out, "--format", form]
        processes.run(command, check=True, timeout=200)
        streams.append(take(Stream(open_set(out), batch=4, seed=2, readers=2), 8))
    same(*streams)
    voxels = np.stack([batch[3] for batch in streams[0]])
    assert voxels.min() == -1000 and voxels.max() == 1000 and voxels.std() > 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_the_gpu(tmp_path):
    write_set(tmp_path, shape=(16, 128, 128))
    shards = open_set(os.fspath(tmp_path))
    host = take(Stream(shards, batch=4, seed=5), 12)
    with Stream(shards, batch=4, seed=5, device="cuda") as stream:
        got = []
        for _, batch in zip(host, stream.batches(), strict=False):
            torch.cuda._sleep(10_000_000)  # the computation lags behind: copies must wait for it
            got.append((batch.epoch, batch.step, batch.ids, batch.voxels + 0))  # ids are no reused buffer
    for (epoch, step, ids, voxels), expected in zip(got, host, strict=True):
        assert (epoch, step, ids.tolist()) == expected[:3] and ids.device.type == "cuda"
        np.testing.assert_array_equal(voxels.cpu(), expected[3])
    shares = {"batch": 4, "readers": 1}
    with (
        Stream.validation(shards, **shares) as cpu,
        Stream.validation(shards, **shares, device="cuda") as gpu,
    ):
        weights = [[batch.weight.tolist() for batch in stream.batches()] for stream in (cpu, gpu)]
    assert weights[0] == weights[1] and len(weights[0]) == cpu.steps_per_epoch


def test_a_limit_of_threads_is_one_line(tmp_path, monkeypatch):
    """As with ulimit -u: "cannot join thread before it is started" hid it."""
    write_set(tmp_path)
    start = threading.Thread.start

    def limited(thread):
        if thread.name == "p2w-reader-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with (
        Stream(open_set(os.fspath(tmp_path)), batch=4, readers=2) as stream,
        pytest.raises(UserError, match=r"reader thread 2 of 2: can't start new thread; .*ulimit -u") as error,
    ):
        next(stream.batches())
    assert "\n" not in str(error.value) and not readers_alive()


def test_more_shards_than_maps_are_read_without_maps(tmp_path, monkeypatch):
    wholes = write_set(tmp_path)
    shards = open_set(os.fspath(tmp_path))
    expected = take(Stream(shards, batch=4, seed=3), 7)
    monkeypatch.setattr(local, "_MAPS", 2)
    shards = open_set(os.fspath(tmp_path))
    monkeypatch.setattr(LocalSet, "_map_shard", None)  # no map is made
    same(take(Stream(shards, batch=4, seed=3), 7), expected)
    victim, out = 6, np.empty(shards.shape, np.int16)
    shards.read_into(victim, out)
    np.testing.assert_array_equal(out, wholes[victim])
    os.truncate(tmp_path / shards.shard(victim), int(shards.offsets[victim]) + 100)
    with pytest.raises(DataError, match="100 bytes of"):
        shards.read_into(victim, out)
    os.unlink(tmp_path / shards.shard(victim))
    with pytest.raises(DataError, match="cannot be read"):
        shards.read_into(victim, out)


def test_one_process_of_a_node_looks_for_the_shards(tmp_path, monkeypatch):
    write_set(tmp_path)
    looked = []
    lstat = os.lstat
    monkeypatch.setattr(os, "lstat", lambda path, **more: looked.append(path) or lstat(path, **more))
    open_set(os.fspath(tmp_path))
    assert len(looked) == 4  # one call for each shard
    os.unlink(tmp_path / "1.2.0001.tar")
    looked.clear()
    open_set(os.fspath(tmp_path), check_shards=False)
    assert not looked
    with pytest.raises(UserError, match=r"1\.2\.0001\.tar is missing"):
        open_set(os.fspath(tmp_path))
