"""Byte ranges from a real nginx, and from servers that answer wrongly, break off and hang up."""

import gzip
import http.server
import os
import re
import shutil
import socket
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from stream_sets import SHAPE, write_set
from test_stream import flip, readers_alive, same, take
from web import nginx

from p2w import http_client
from p2w.errors import UserError
from p2w.stream import http as stream_http
from p2w.stream.device_cache import DeviceCache
from p2w.stream.http import HttpSet
from p2w.stream.local import DataError
from p2w.stream.stream import Stream, open_set

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl, which fetches the manifest")
COUNTS = (5, 3, 7, 1, 9, 2, 6)


@pytest.fixture
def served(tmp_path):
    with nginx(tmp_path) as found:
        yield found


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(stream_http, "_PAUSE", 0.01)


@pytest.mark.parametrize("form", ["tar", "arrow"])
@pytest.mark.parametrize("readers", [0, 2])
def test_batches_are_those_of_the_folder_bit_for_bit(served, form, readers):
    folder, url, asked = served
    wholes = write_set(folder, form, train=COUNTS)
    shards = open_set(url)
    assert isinstance(shards, HttpSet)
    remote = take(Stream(shards, batch=4, seed=3, readers=readers), 20)
    same(remote, take(Stream(open_set(folder.as_posix()), batch=4, seed=3, readers=2), 20))
    for _, _, ids, voxels in remote:
        np.testing.assert_array_equal(voxels, np.stack([wholes[i] for i in ids]))
    assert not readers_alive()
    if not readers:
        assert len(asked()) == 2 + 20 * 4  # the manifest twice, then each sub-scan once


def test_validation_and_resume_are_those_of_the_folder(served):
    folder, url, _ = served
    write_set(folder, train=COUNTS, val=(4, 5))
    for where in (url, folder.as_posix()):
        shards = open_set(where)
        found = [batch.ids.tolist() for batch in Stream.validation(shards, batch=4).batches()]
        assert [i for ids in found for i in ids][:9] == shards.ids("val").tolist()
    through = take(Stream(open_set(url), batch=4, seed=9), 20)
    same(take(Stream(open_set(url), batch=4, seed=9), 4, *divmod(13, 8)), through[13:17])


def test_with_a_cache_each_sub_scan_crosses_the_network_once(served):
    folder, url, asked = served
    write_set(folder, train=(*COUNTS[:-1], 5))  # 32 sub-scans, none left out
    shards = open_set(url)
    plain = take(Stream(open_set(folder.as_posix()), batch=4, seed=3), 24)
    held = DeviceCache(shards, "train", torch.device("cpu"))
    with Stream(shards, batch=4, seed=3, cache=held) as stream:
        for batch, (epoch, step, ids, voxels) in zip(stream.batches(), plain, strict=False):
            assert (batch.epoch, batch.step, batch.ids.tolist()) == (epoch, step, ids)
            np.testing.assert_array_equal(batch.voxels.numpy(), voxels)
    assert held.filled.all() and len(asked()) <= 2 + 32 + 4 * 3  # the ring's batches may be asked for ahead


def test_more_reader_threads_than_for_a_folder(served):
    folder, url, _ = served
    write_set(folder, train=(40,))
    assert Stream(open_set(url), batch=16, readers=1).readers == stream_http.MIN_THREADS
    assert Stream(open_set(url), batch=4, readers=1).readers == 4
    assert Stream(open_set(url), batch=4, readers=0).readers == 0
    assert Stream(open_set(folder.as_posix()), batch=16, readers=1).readers == 1


def test_every_flipped_byte_is_found(served):
    folder, url, _ = served
    write_set(folder)
    shards = open_set(url)
    flip(folder, shards.shard(6), int(shards.offsets[6]) + 5)
    with pytest.raises(DataError, match="checksum differs") as error:
        take(Stream(shards, batch=5), 3)
    assert shards.key(6) in str(error.value) and url in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_one_line_and_requested_once(served):
    folder, url, asked = served
    write_set(folder)
    shards = open_set(url)
    (folder / shards.shard(0)).unlink()
    for sub_scan in (0, 7):
        if sub_scan:
            os.truncate(folder / shards.shard(7), int(shards.offsets[7]) - 200)
        says = "416 Requested Range Not Satisfiable" if sub_scan else "404 Not Found"
        with pytest.raises(
            DataError, match=rf"cannot be fetched \(the server answers {says}\), tried 1 times"
        ) as error:
            shards.read_into(sub_scan, np.empty(SHAPE, np.int16))
        assert "\n" not in str(error.value)
    assert len(asked()) == 4
    held = Stream(open_set(url, on_bad="skip"), batch=5)
    assert all(0 not in ids for _, _, ids, _ in take(held, 3))


class _Odd(http.server.BaseHTTPRequestHandler):
    """Ranges by a kept connection, with a fault in the first answers for each shard."""

    protocol_version = "HTTP/1.1"
    folder, fault, faults = "", "", 0
    asked: list[str]

    def do_GET(self):
        with open(self.folder + self.path, "rb") as file:
            data = file.read()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        shard = self.path.endswith("tar")
        fault = self.fault if shard and self.asked.count(self.path) < self.faults else ""
        if shard:
            self.asked.append(self.path)
        if fault == "busy":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "moved":
            self.send_response(302)
            self.send_header("Location", self.path + "?elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "hangs up":
            self.close_connection = True
            return
        if not wanted:
            self.send_response(200)
        else:
            start, end = int(wanted[1]), int(wanted[2]) + 1
            self.send_response(206)
            place = f"bytes {start + (fault == 'elsewhere')}-{end - 1}/{len(data)}"
            self.send_header("Content-Range", place)
            data = data[start:end]
        if fault == "packs":
            data = gzip.compress(data)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "breaks off" else data)
        self.close_connection = fault == "breaks off"

    def log_message(self, *_):
        pass


@contextmanager
def odd(folder, fault, faults):
    """The URL of a folder behind `_Odd`."""
    handler = type(
        "Odd", (_Odd,), {"folder": os.fspath(folder), "fault": fault, "faults": faults, "asked": []}
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("fault", ["busy", "hangs up", "breaks off"])
def test_temporary_faults_are_tried_again(tmp_path, fault, caplog):
    wholes = write_set(tmp_path, train=(8, 8), shape=(4, 32, 32))
    with odd(tmp_path, fault, 3) as url:
        for _, _, ids, voxels in take(Stream(open_set(url), batch=4, readers=2), 4):
            np.testing.assert_array_equal(voxels, np.stack([wholes[i] for i in ids]))
    assert caplog.text.count("trying again") == 6 and "0x" not in caplog.text


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("busy", "answers 503 Service Unavailable"),
        ("hangs up", "without response"),
        ("breaks off", "bytes"),
        ("elsewhere", "the server gives 'bytes"),
        ("packs", "the server compresses its answers"),
    ],
)
def test_permanent_faults_are_one_line(tmp_path, fault, says):
    write_set(tmp_path, train=(8,), shape=(4, 32, 32))
    with odd(tmp_path, fault, 99) as url, pytest.raises(DataError, match=says) as error:
        open_set(url).read_into(0, np.empty((4, 32, 32), np.int16))
    assert "\n" not in str(error.value) and "0x" not in str(error.value)


def test_a_redirect_is_followed(tmp_path):
    wholes = write_set(tmp_path, train=(8,), shape=(4, 32, 32))
    os.symlink(tmp_path / "1.2.0000.tar", tmp_path / "1.2.0000.tar?elsewhere")
    out = np.empty((4, 32, 32), np.int16)
    with odd(tmp_path, "moved", 99) as url:
        open_set(url).read_into(3, out)
    np.testing.assert_array_equal(out, wholes[3])


def test_a_server_that_never_answers_is_given_up(monkeypatch):
    """It takes the request for the manifest and is silent: without a time-out the run would wait without a word."""
    monkeypatch.setattr(http_client, "READ_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/manifest.parquet"
        with pytest.raises(UserError, match=r"cannot be fetched \(.*timed out.*\), tried 5 times"):
            http_client.fetch(url, 1 << 20, pause_s=0.01)


class _Proxy(http.server.BaseHTTPRequestHandler):
    """Answers every request, and notes what was asked for and with which authorization."""

    protocol_version = "HTTP/1.1"
    asked: list[tuple[str, str | None]]

    def do_GET(self):
        self.asked.append((self.path, self.headers.get("Authorization")))
        self.send_response(206)
        self.send_header("Content-Range", "bytes 0-2/9")
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"abc")

    def log_message(self, *args):
        pass


def test_proxy_and_netrc_hold_for_every_request(tmp_path, monkeypatch):
    """They are looked up once for each server: the second request has them too, without another look."""
    (tmp_path / "netrc").write_text("machine data.example login me password secret\n")
    handler = type("Handler", (_Proxy,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        assert http_client.read_range("http://data.example/a.tar", 0, 3) == b"abc"
        monkeypatch.setattr("requests.sessions.get_environ_proxies", None)
        assert http_client.read_range("http://data.example/a.tar", 0, 3) == b"abc"
    finally:
        server.shutdown()
        server.server_close()
    assert handler.asked == [("http://data.example/a.tar", "Basic bWU6c2VjcmV0")] * 2
