"""Byte ranges from a real nginx, and from servers that answer wrongly, break off and hang up."""

import gzip
import http.server
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
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
from p2w.stream.http import HttpSet
from p2w.stream.local import DataError
from p2w.stream.prefetch import DeviceCache
from p2w.stream.staging import StagedCopy
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
    connections: list[int]  # requests of each
    ended: threading.Event

    def setup(self):
        super().setup()
        self.connections.append(0)
        self.number = len(self.connections) - 1

    def do_GET(self):
        self.connections[self.number] += 1
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
        if fault == "in chunks":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            pieces = [data[start : start + 3001] for start in range(0, len(data), 3001)]
            self.wfile.write(b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b"")))
            return
        if fault == "packs":
            data = gzip.compress(data)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault in ("falls silent", "trickles"):
            self.wfile.write(data[: len(data) // 2])
            for byte in data[len(data) // 2 :]:
                if (fault == "falls silent" and self.ended.wait(60)) or self.ended.wait(0.02):
                    return
                self.wfile.write(bytes([byte]))
        self.wfile.write(data[: len(data) // 2] if fault == "breaks off" else data)
        self.close_connection = fault in ("breaks off", "hangs up later")

    def log_message(self, *_):
        pass


@contextmanager
def odd_server(folder, fault, faults, certificate=""):
    """(URL, handler) of a folder behind `_Odd`, which speaks TLS with a certificate."""
    own = {"folder": os.fspath(folder), "fault": fault, "faults": faults, "asked": [], "connections": []}
    handler = type("Odd", (_Odd,), {**own, "ended": threading.Event()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http{'s' * bool(certificate)}://127.0.0.1:{server.server_port}", handler
        handler.ended.set()
        server.shutdown()


@contextmanager
def odd(folder, fault, faults):
    """The URL of a folder behind `_Odd`."""
    with odd_server(folder, fault, faults) as (url, _):
        yield url


@pytest.mark.parametrize("fault", ["busy", "hangs up", "breaks off"])
def test_temporary_faults_are_tried_again(tmp_path, fault, caplog):
    wholes = write_set(tmp_path, train=(8, 8), shape=(4, 32, 32))
    with odd(tmp_path, fault, 3) as url:
        for _, _, ids, voxels in take(Stream(open_set(url), batch=4, readers=2), 4):
            np.testing.assert_array_equal(voxels, np.stack([wholes[i] for i in ids]))
    assert caplog.text.count("trying again") == 6 and "0x" not in caplog.text


BIG = (8, 64, 64)  # 64 KiB: more than arrives with the head of an answer


@pytest.mark.parametrize("fault", ["", "in chunks", "hangs up later"])
def test_bodies_of_every_form_and_kept_connections(tmp_path, fault, monkeypatch, caplog):
    """Several blocks a sub-scan; a connection is used again where the server keeps it, and a closed one is no failure."""
    monkeypatch.setattr(stream_http, "BLOCK", 20_000)
    wholes = write_set(tmp_path, train=(8,), shape=BIG)
    out = np.empty(BIG, np.int16)
    with odd_server(tmp_path, fault, 99) as (url, handler):
        shards = open_set(url)
        for sub_scan in range(6):
            shards.read_into(sub_scan, out)
            np.testing.assert_array_equal(out, wholes[sub_scan])
            if fault == "hangs up later":
                time.sleep(0.05)  # the end of the connection arrives
    assert not caplog.text
    assert handler.connections[-1] == (1 if fault == "hangs up later" else 6)


@pytest.mark.parametrize(("fault", "says"), [("falls silent", "timed out"), ("trickles", "bytes in 0 s")])
def test_a_server_that_stops_within_a_body_is_given_up(tmp_path, fault, says, monkeypatch):
    """No byte for READ_S, and fewer than SLOWEST bytes a second: both are tried again, and named in the end."""
    write_set(tmp_path, train=(8,), shape=BIG)
    with odd(tmp_path, fault, 99) as url:
        shards = open_set(url)
        monkeypatch.setattr(http_client, "READ_S", 0.1)
        if fault == "trickles":
            monkeypatch.setattr(http_client, "SLOWEST", 1e9)
        with pytest.raises(DataError, match=rf"cannot be fetched \(.*{says}.*\), tried 5 times"):
            shards.read_into(0, np.empty(BIG, np.int16))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl, which makes the certificate")
def test_https_takes_the_certificates_of_the_environment(tmp_path, monkeypatch):
    """Manifest and ranges take the same ones; without them, the server is refused."""
    pair = tmp_path / "pair.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
               "-days", "2", "-subj", "/CN=us", "-addext", "subjectAltName=IP:127.0.0.1",
               "-keyout", pair, "-out", f"{pair}.crt"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    pair.write_text(pair.read_text() + (tmp_path / "pair.pem.crt").read_text())
    wholes = write_set(tmp_path / "set", train=(8,), shape=BIG)
    out = np.empty(BIG, np.int16)
    with odd_server(tmp_path / "set", "", 0, pair) as (url, _):
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", f"{pair}.crt")
        shards = open_set(url)
        for sub_scan in (3, 1):
            shards.read_into(sub_scan, out)
            np.testing.assert_array_equal(out, wholes[sub_scan])
        monkeypatch.delenv("REQUESTS_CA_BUNDLE")
        stream_http._own.servers.clear()
        stream_http._settings.cache_clear()
        with pytest.raises(DataError, match="certificate verify failed"):
            shards.read_into(2, out)


@pytest.mark.slow
def test_s3_is_read_by_ranges_in_the_order_of_a_folder(served, monkeypatch, tmp_path):
    """nginx stands for the bucket: to read objects, HEAD and GET are enough. No message has an address that opens one."""
    pytest.importorskip("botocore")
    folder, url, asked = served
    for name, value in {"ENDPOINT_URL": url, "ACCESS_KEY_ID": "me", "SECRET_ACCESS_KEY": "secret"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.fspath(tmp_path / "none"))
    http_client._s3_client.cache_clear()
    http_client._signed.cache_clear()
    write_set(folder / "bucket" / "my set", "arrow", train=COUNTS)
    shards = open_set("s3://bucket/my set/")
    assert isinstance(shards, HttpSet) and shards.order == "shuffled"
    local = open_set(os.fspath(folder / "bucket" / "my set"))
    same(take(Stream(shards, batch=4, seed=3), 12), take(Stream(local, batch=4, seed=3), 12))
    copies = StagedCopy(shards, tmp_path / "node")
    copies.copy()
    same(take(Stream(copies.open(), batch=4, seed=3), 3), take(Stream(local, batch=4, seed=3), 3))
    assert asked()
    (folder / "bucket" / "my set" / shards.shard(0)).unlink()
    with pytest.raises(DataError, match="404 Not Found") as error:
        shards.read_into(0, np.empty(SHAPE, np.int16))
    assert "s3://bucket/my set/" in str(error.value) and "Signature" not in str(error.value)
    with pytest.raises(UserError, match=r"s3://bucket/other/manifest\.parquet: cannot be fetched"):
        open_set("s3://bucket/other")


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
        url, out = "http://data.example/a.tar", bytearray(3)
        assert http_client.read_range(url, 0, 3) == b"abc"
        assert list(stream_http.receive_range(url, 0, memoryview(out))) == [3] and out == b"abc"
        monkeypatch.setattr("requests.sessions.get_environ_proxies", None)
        assert http_client.read_range(url, 0, 3) == b"abc"
        assert list(stream_http.receive_range(url, 0, memoryview(out))) == [3] and out == b"abc"
    finally:
        server.shutdown()
        server.server_close()
    assert handler.asked == [("http://data.example/a.tar", "Basic bWU6c2VjcmV0")] * 4
