"""Streaming from a web server without byte ranges: the same sub-scans, exactly shared, and a connection that breaks."""

import gc
import gzip
import http.server
import io
import itertools
import os
import shutil
import tarfile
import threading
import time

import numpy as np
import psutil
import pytest
import torch
from stream_sets import SHAPE, write_set
from test_stream import flip, readers_alive, same, take
from web import nginx

from p2w.errors import UserError
from p2w.stream import tar
from p2w.stream.local import DataError
from p2w.stream.prefetch import DeviceCache
from p2w.stream.sampler import shuffled_order, streamed_order
from p2w.stream.stream import Stream, open_set

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest.fixture
def served(tmp_path):
    """A folder behind an nginx that gives no ranges: (folder, its URL, a function giving the files asked for so far)."""
    with nginx(tmp_path, "max_ranges 0;") as found:
        yield found


def curls():
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.name() in ("curl", "sh", "aws", "python3.11")
    ]


COUNTS = (5, 3, 7, 1, 9, 2, 6)


@pytest.mark.parametrize("readers", [0, 2])
def test_batches_hold_the_right_voxels_in_the_streamed_order(served, readers):
    folder, url, _ = served
    wholes = write_set(folder, train=COUNTS)
    shards = open_set(url)
    ids = shards.ids("train")
    batches = take(Stream(shards, batch=4, seed=3, readers=readers), 20)  # 8 steps an epoch
    for number, (epoch, step, got, voxels) in enumerate(batches):
        assert (epoch, step) == divmod(number, 8)
        order = streamed_order(ids, shards.shard_numbers[ids], 4, seed=3, epoch=epoch, buffer=tar.BUFFER)
        assert got == order[step].tolist()
        np.testing.assert_array_equal(voxels, np.stack([wholes[i] for i in got]))
    assert not readers_alive() and not curls()


@pytest.mark.parametrize("readers", [0, 1, 2])
def test_held_on_the_device_a_set_crosses_the_network_once(served, readers):
    folder, url, asked = served
    write_set(folder, train=(*COUNTS[:-1], 5))  # 8 steps an epoch, none left out
    shards = open_set(url)
    plain = take(Stream(shards, batch=4, seed=3, readers=readers), 32)
    held = DeviceCache(shards, "train", torch.device("cpu"))
    with Stream(shards, batch=4, seed=3, readers=readers, cache=held) as stream:
        before, gone = len(asked()), []
        for count, batch in enumerate(itertools.islice(stream.batches(), 32)):
            assert (batch.epoch, batch.step, batch.ids.tolist()) == plain[count][:3]
            np.testing.assert_array_equal(batch.voxels.numpy(), plain[count][3])
            if count in (7, 23, 31):
                gone.append(len(asked()) - before)
    assert held.filled.all() and gone[0] > 0 and gone[1] == gone[2]
    assert not readers_alive() and not curls()


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("counts", [COUNTS, (20,)])
def test_ranks_share_each_batch_out_exactly(served, world, counts):
    """Independent of the world size, with equal steps on every rank, also with one shard for eight ranks."""
    folder, url, _ = served
    write_set(folder, train=counts)
    shards = open_set(url)
    alone = take(Stream(shards, batch=8, seed=1, readers=0), 3)
    parts = [
        take(Stream(shards, batch=8, seed=1, rank=r, world_size=world, readers=1), 3) for r in range(world)
    ]
    for step, whole in enumerate(alone):
        assert [i for part in parts for i in part[step][2]] == whole[2]
        np.testing.assert_array_equal(np.concatenate([part[step][3] for part in parts]), whole[3])


def test_resume_equals_the_uninterrupted_stream(served):
    folder, url, _ = served
    write_set(folder, train=COUNTS)
    shards = open_set(url)
    through = take(Stream(shards, batch=4, seed=9, readers=2), 20)
    for position in (3, 7, 8, 13):
        again = take(Stream(shards, batch=4, seed=9, readers=2), 4, *divmod(position, 8))
        same(again, through[position : position + 4])


@pytest.mark.parametrize("batch", [4, 16])
def test_validation_gives_every_sub_scan_once(served, batch):
    folder, url, _ = served
    wholes = write_set(folder, train=(3,), val=(4, 5))
    seen = []
    for rank in range(2):
        with Stream.validation(open_set(url), batch=batch, rank=rank, world_size=2) as stream:
            for b in stream.batches():
                np.testing.assert_array_equal(b.voxels, np.stack([wholes[i] for i in b.ids.tolist()]))
                seen += [i for i, weight in zip(b.ids.tolist(), b.weight.tolist(), strict=True) if weight]
    assert sorted(seen) == list(range(3, 12))


def test_an_epoch_fetches_each_shard_about_once(served):
    folder, url, asked = served
    write_set(folder, train=(4,) * 20)
    take(Stream(open_set(url), batch=4, readers=0), 20)
    names = asked()
    assert names[:2] == ["manifest.parquet"] * 2  # the second time asked for a range of it
    assert len(set(names)) == 21 and len(names) <= 2 + 20 + 3  # two slots share a shard where they meet


def test_resume_fetches_only_what_is_still_to_come(served):
    folder, url, asked = served
    write_set(folder, train=(4,) * 20)
    take(Stream(open_set(url), batch=4, readers=0), 2, 0, 18)  # 20 steps an epoch
    assert len(set(asked())) <= 1 + 4 * 2  # the last shards of each of the four slots


def test_the_number_of_buffered_sub_scans_is_bounded(served):
    folder, url, _ = served
    write_set(folder, train=(40, 1, 2, 30, 1, 1, 50, 3, 40))
    shards = open_set(url)
    ids = shards.ids("train")
    order = shards.train_order(ids, 2, 5, 0)
    out, most = np.empty(SHAPE, np.int16), 0
    for slot in order.T:
        with shards.reader(slot, (5, 0)) as cursor:
            for i in slot.tolist():
                cursor.read_into(i, out)
                most = max(most, len(cursor.buffered) + 1)
    assert 1 < most <= tar.BUFFER


def test_neighbours_come_apart(served):
    """A batch mixes scans as a global shuffle does, and consecutive steps of a slot are not adjacent sub-scans."""
    folder, url, _ = served
    write_set(folder, train=(40,) * 32, shape=(1, 1, 2))
    shards = open_set(url)
    ids = shards.ids("train")
    order = shards.train_order(ids, 16, 0, 0)
    scans = np.mean([len(set(row.tolist())) for row in shards.shard_numbers[order]])
    everywhere = np.mean(
        [len(set(row.tolist())) for row in shards.shard_numbers[shuffled_order(ids, 16, 0, 0)]]
    )
    assert scans >= everywhere
    assert np.mean(np.diff(order, axis=0) == 1) < 0.1


def test_every_flipped_byte_is_found(served):
    folder, url, _ = served
    write_set(folder)
    shards = open_set(url)
    flip(folder, shards.shard(6), int(shards.offsets[6]) + 5)
    with pytest.raises(DataError, match="checksum differs") as error:
        take(Stream(shards, batch=5), 3)
    assert shards.key(6) in str(error.value) and url in str(error.value) and "\n" not in str(error.value)
    assert not curls()


def test_a_missing_shard_is_one_line(served, monkeypatch):
    monkeypatch.setattr(tar, "_PAUSE", 0.01)
    folder, url, asked = served
    write_set(folder)
    shards = open_set(url)
    (folder / "1.2.0001.tar").unlink()
    with pytest.raises(
        DataError, match=r"1\.2\.0001\.tar: cannot be streamed \(curl ended with code 22"
    ) as error:
        take(Stream(shards, batch=5), 3)
    assert "\n" not in str(error.value)
    assert 5 <= asked().count("1.2.0001.tar") <= 10


def test_a_shard_without_its_end_is_one_line(served, monkeypatch):
    monkeypatch.setattr(tar, "_PAUSE", 0.01)
    folder, url, _ = served
    write_set(folder)
    shards = open_set(url)
    os.truncate(folder / shards.shard(7), int(shards.offsets[7]) - 200)
    with pytest.raises(DataError, match="cannot be streamed"):
        take(Stream(shards, batch=15), 1)


def test_an_empty_folder_is_refused(served):
    _, url, _ = served
    with pytest.raises(
        UserError, match=r"manifest\.parquet: cannot be fetched \(the server answers 404 Not Found\)"
    ) as error:
        open_set(url)
    assert "\n" not in str(error.value)


def test_arrow_cannot_be_streamed(served):
    folder, url, _ = served
    write_set(folder, "arrow")
    with pytest.raises(UserError, match="--format tar"):
        open_set(url)


def test_early_stop_ends_the_fetching(served):
    folder, url, _ = served
    write_set(folder, train=(6, 6, 6, 6), shape=(16, 128, 128))
    shards = open_set(url)
    with Stream(shards, batch=4, readers=2) as stream:
        for _ in stream.batches():
            break
    assert not readers_alive() and not curls()
    with Stream(shards, batch=4, readers=0) as stream:
        batches = stream.batches()
        next(batches)
        assert curls()
    batches.close()
    assert not curls()


def test_read_into_streams_to_one_sub_scan(served):
    folder, url, _ = served
    wholes = write_set(folder)
    out = np.empty(SHAPE, np.int16)
    open_set(url).read_into(10, out)
    np.testing.assert_array_equal(out, wholes[10])


class _HangsUp(http.server.BaseHTTPRequestHandler):
    """Sends one more eighth of a shard with each request before it hangs up."""

    folder = ""
    asked: dict[str, int]

    def do_GET(self):
        with open(self.folder + self.path, "rb") as file:
            data = file.read()
        self.asked[self.path] = count = self.asked.get(self.path, 0) + 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) * count // 8] if self.path.endswith("tar") else data)

    def log_message(self, *_):
        pass


def test_a_broken_connection_is_opened_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tar, "_PAUSE", 0.01)
    wholes = write_set(tmp_path, train=(8, 8), shape=(4, 32, 32))
    handler = type("HangsUp", (_HangsUp,), {"folder": os.fspath(tmp_path), "asked": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        shards = open_set(f"http://127.0.0.1:{server.server_port}")
        with Stream(shards, batch=2) as stream:
            seen = []
            for batch in itertools.islice(stream.batches(), 8):
                np.testing.assert_array_equal(batch.voxels, np.stack([wholes[i] for i in batch.ids.tolist()]))
                seen += batch.ids.tolist()
        server.shutdown()
    assert sorted(seen) == list(range(16))
    assert "trying again" in caplog.text and "curl ended with code 18" in caplog.text


def test_what_arrived_before_a_failure_is_not_lost(tmp_path):
    """A short shard is in the pipe, and curl has ended with an error, before anything is read."""
    whole = bytes(range(256)) * 64
    (tmp_path / "a.tar").write_bytes(whole)
    handler = type("HangsUp", (_HangsUp,), {"folder": os.fspath(tmp_path), "asked": {"/a.tar": 3}})
    arrived = b""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.tar"
        with pytest.raises(OSError, match="curl ended with code 18"), tar.open_stream(url) as stream:
            time.sleep(1.0)
            arrived = stream.read(1000) + stream.read()
        server.shutdown()
    assert arrived == whole[: len(whole) // 2]


def test_addresses(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="http, https or s3"):
        open_set("ftp://host/set")
    assert tar.tar_source("https://host/set/a.tar") == "https://host/set/a.tar"
    if shutil.which("aws"):
        command = "pipe:exec aws s3 cp --only-show-errors 's3://bucket/my set/a.tar' -"
        assert tar.tar_source("s3://bucket/my set/a.tar") == command
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(UserError, match="'curl', which is not on the PATH: apt-get install curl"):
        open_set("http://host/set")
    monkeypatch.setattr(tar.http_client, "reaches", lambda url: url.startswith("http"))  # as without botocore
    with pytest.raises(UserError, match=r"pip install botocore, .* AWS CLI"):
        open_set("s3://bucket/set")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("aws") is None, reason="needs the AWS CLI")
def test_s3_through_the_aws_cli(served, monkeypatch):
    """AWS's own client, asking nginx for the bucket: to read objects it needs no more than HEAD and GET."""
    folder, url, _ = served
    monkeypatch.setattr(tar.http_client, "reaches", lambda url: url.startswith("http"))  # as without botocore
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    wholes = write_set(folder / "bucket" / "my set", train=(6,), val=())
    shards = open_set("s3://bucket/my set/")
    for _, _, ids, voxels in take(Stream(shards, batch=1), 6):
        np.testing.assert_array_equal(voxels, np.stack([wholes[i] for i in ids]))
    assert not curls()
    with pytest.raises(UserError, match=r"aws ended with code 1"):
        open_set("s3://bucket/other")


@pytest.mark.slow
def test_substitutes_for_what_cannot_be_streamed(served, monkeypatch, capfd):
    """A flipped byte, a truncated shard and a missing one: substitutes are read, the same ones for any world size."""
    monkeypatch.setattr(tar, "_PAUSE", 0.01)
    folder, url, _ = served
    wholes = write_set(folder, train=COUNTS)
    shards = open_set(url)
    flip(folder, shards.shard(1), int(shards.offsets[1]))
    os.truncate(folder / shards.shard(6), int(shards.offsets[6]))
    (folder / shards.shard(9)).unlink()
    bad = {
        1,
        *(i for i in range(len(shards)) if i >= 6 and shards.shard(i) in (shards.shard(6), shards.shard(9))),
    }
    streams = []
    for world in (1, 2):
        parts = [
            take(
                Stream(open_set(url, on_bad="skip"), batch=4, seed=2, rank=r, world_size=world, readers=1), 8
            )
            for r in range(world)
        ]
        streams.append([[i for part in parts for i in part[step][2]] for step in range(8)])
        for step in range(8):
            voxels = np.concatenate([part[step][3] for part in parts])
            np.testing.assert_array_equal(voxels, np.stack([wholes[i] for i in streams[-1][step]]))
    assert streams[0] == streams[1] and not {i for ids in streams[0] for i in ids} & bad
    assert "checksum differs" in capfd.readouterr().err


def npy_member(name, size=None, shape=SHAPE, kind=tarfile.REGTYPE, link=""):
    """A tar with a member like those of a shard, in which the named fields are wrong."""
    voxels = np.zeros(shape, "<i2")
    file = io.BytesIO()
    np.save(file, voxels)
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(file.getvalue()) if size is None else size, kind, link
    data = file.getvalue() if kind == tarfile.REGTYPE else b""
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize(
    ("lie", "says"),
    [
        ({"kind": tarfile.SYMTYPE, "link": "/etc/passwd", "size": 0}, "not a file of 128 bytes"),
        ({"kind": tarfile.LNKTYPE, "link": "/etc/passwd", "size": 0}, "not a file of 128 bytes"),
        ({"kind": tarfile.CHRTYPE, "size": 0}, "not a file of 128 bytes"),
        ({"kind": tarfile.GNUTYPE_SPARSE}, "not a file of 128 bytes|cannot be streamed"),
        ({"size": 1 << 32}, "not a file of 128 bytes"),
        ({"size": 10}, "not a file of 128 bytes"),
        ({"shape": (4, 4, 4)}, r"holds int16 \(4, 4, 4\)"),
    ],
)
def test_wrong_tar_members_are_refused(served, monkeypatch, lie, says):
    monkeypatch.setattr(tar, "_PAUSE", 0.01)
    folder, url, _ = served
    write_set(folder, train=(4,))
    shards = open_set(url)
    key, path = shards.key(0), folder / shards.shard(0)
    size = path.stat().st_size
    before = npy_member(f"/{key}.npy") + npy_member(f"../{key}.npy")  # names of other files: passed by
    data = before + npy_member(f"{key}.npy", **lie)
    path.write_bytes((data + bytes(size))[:size])
    with pytest.raises(DataError, match=says) as error:
        shards.read_into(0, np.empty(SHAPE, np.int16))
    assert "\n" not in str(error.value) and not curls()


def test_a_packed_tar_is_not_unpacked(served, monkeypatch):
    monkeypatch.setattr(tar, "_PAUSE", 0.01)
    folder, url, _ = served
    write_set(folder, train=(4,))
    shards = open_set(url)
    path = folder / shards.shard(0)
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match="cannot be streamed"):
        shards.read_into(0, np.empty(SHAPE, np.int16))


def test_an_npy_header_that_is_no_python(served, monkeypatch):
    monkeypatch.setattr(tar, "_PAUSE", 0.01)
    folder, url, _ = served
    write_set(folder, train=(4,))
    shards = open_set(url)
    path = folder / shards.shard(0)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"'fortran_order'", b"'fortran_order(", 1))
    with pytest.raises(DataError, match="header cannot be read") as error:
        shards.read_into(0, np.empty(SHAPE, np.int16))
    assert "\n" not in str(error.value)


def test_headers_are_parsed_by_one_thread_at_a_time():
    """Python 3.11.7 raised SystemError in one of two threads that parse: here wherever the other one may interrupt it."""
    file = io.BytesIO()
    np.save(file, np.zeros((2, 3), "<i2"))
    first, errors, moment = threading.current_thread(), [], [0, 0]
    threshold = gc.get_threshold()

    def parse():
        try:
            assert tar._read_npy_header(file.getvalue()) == (((2, 3), False, np.dtype("<i2")), 128)
        except SystemError as error:
            errors.append(error)

    def interrupt(phase, _):
        if phase == "start" and threading.current_thread() is first:
            moment[0] += 1
            if moment[0] == moment[1]:
                other = threading.Thread(target=parse)  # at another depth of calls
                other.start()
                other.join(0.02)
                others.append(other)

    others = []
    gc.callbacks.append(interrupt)
    try:
        while moment[0] >= moment[1]:
            moment[:] = [0, moment[1] + 1]
            gc.set_threshold(3)
            parse()
            gc.set_threshold(*threshold)
    finally:
        gc.callbacks.remove(interrupt)
        gc.set_threshold(*threshold)
    for other in others:
        other.join()
    assert moment[1] > 5 and errors == []
