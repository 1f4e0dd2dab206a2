"""Runs from a web server that fails for one rank or at a resume: one order for all ranks and starts, or a refusal."""

import http.server
import json
import os
import re
import shutil
import threading
import time
from collections import Counter
from contextlib import contextmanager

import pytest
from launch_runs import TINY, metrics, weights

pytestmark = pytest.mark.slow
FEW = [*TINY, "--train.steps", 8, "--train.validate-every", 100, "--train.probe-every", 0]


class Server(http.server.BaseHTTPRequestHandler):
    """A folder with byte ranges. `answer(handler, number of this kind of request)` may answer in their place."""

    protocol_version = "HTTP/1.1"
    folder = ""
    counts: Counter
    lock: threading.Lock

    def fault(self, kind, number):
        """Answer wrongly, and return True; the server is sound without it."""
        return False

    def do_GET(self):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        name = self.path.rpartition("/")[2]
        kind = "shard" if name.endswith(".tar") else "probe" if wanted else "manifest"
        with self.lock:
            self.counts[kind] += 1
            number = self.counts[kind]
        if self.fault(kind, number):
            return
        with open(os.path.join(self.folder, name), "rb") as file:
            data = file.read()
        if wanted:
            start, end = int(wanted[1]), int(wanted[2]) + 1
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
            data = data[start:end]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def say(self, code, **headers):
        """Answer with a status and no content."""
        self.send_response(code)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        return True

    def whole(self):
        """Answer with the whole file, as a server without byte ranges does."""
        with open(os.path.join(self.folder, self.path.rpartition("/")[2]), "rb") as file:
            data = file.read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        return True

    def log_message(self, *_):
        pass


@contextmanager
def serve(folder, fault):
    """The URL of a folder behind a server with a fault."""
    handler = type(
        "Faulty", (Server,),
        {"folder": os.fspath(folder), "fault": fault, "counts": Counter(), "lock": threading.Lock()},
    )  # fmt: skip
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/set", handler.counts
        server.shutdown()


def trained_on(path):
    """The sub-scans of each step, over all ranks, in the order of ranks."""
    rows = sorted(
        (json.loads(line) for line in path.read_text().splitlines()), key=lambda r: (r["step"], r["rank"])
    )
    steps: dict[int, list[int]] = {}
    for row in rows:
        steps.setdefault(row["step"], []).extend(row["ids"])
    return steps


def train(forge, folder, url, *more, ranks=2, run=None, spies=()):
    ids = folder / "ids.jsonl"
    argv = ["demo", *FEW, "--shards", url, "--run-dir", run or folder / "run", *more]
    return *forge.run(folder, *argv, ranks=ranks, spies=(("record", str(ids)), *spies)), ids


@pytest.fixture(scope="module")
def calm(forge, tiny_set, tmp_path_factory):
    """The run from the folder; copy it, do not change it."""
    folder = tmp_path_factory.mktemp("calm")
    codes, _, err, ids = train(forge, folder, tiny_set)
    assert codes == [0, 0], err
    return folder / "run", trained_on(ids)


def test_a_probe_that_fails_once_changes_nothing(forge, tiny_set, calm, tmp_path):
    with serve(tiny_set, lambda self, kind, number: (kind, number) == ("probe", 2) and self.say(503)) as (
        url,
        counts,
    ):
        codes, _, err, ids = train(forge, tmp_path, url)
    assert codes == [0, 0], err
    assert counts["probe"] == 3 and trained_on(ids) == calm[1]
    assert weights(tmp_path / "run", 8) == weights(calm[0], 8) and metrics(tmp_path / "run") == metrics(
        calm[0]
    )
    assert json.loads((tmp_path / "run" / "run.json").read_text())["starts"][0]["order"] == "shuffled"


def test_a_rank_that_gets_no_ranges_streams_with_all_others(forge, tiny_set, calm, tmp_path):
    def fault(self, kind, number):
        return (kind, number) == ("probe", 2) and self.whole()

    with serve(tiny_set, fault) as (url, _):
        codes, _, err, ids = train(forge, tmp_path, url)
    assert codes == [0, 0] and re.search(r"rank\(s\) [01] get no byte ranges", err), err
    steps = trained_on(ids)
    assert steps != calm[1] and all(len(set(step)) == len(step) for step in steps.values())
    epoch = [i for step in list(steps)[: len(calm[1]) // 2] for i in steps[step]]
    assert len(set(epoch)) == len(epoch)  # nothing twice
    # Continued from the folder, it keeps its order.
    codes, _, err, ids = train(forge, tmp_path, tiny_set, "--train.steps", 12, run=tmp_path / "run")
    assert codes == [0, 0], err
    with serve(tiny_set, lambda self, kind, number: kind == "probe" and self.whole()) as (url, _):
        codes, out, err, through = train(forge, tmp_path / "through", url, "--train.steps", 12)
    assert codes == [0, 0], err
    assert (out + err).count(
        "of a streamed set, not that of a folder, since the server gives no byte ranges"
    ) == 1
    assert trained_on(ids) == trained_on(through)


def test_a_resume_without_ranges_is_refused(forge, tiny_set, calm, tmp_path):
    shutil.copytree(calm[0], tmp_path / "run")
    with serve(tiny_set, lambda self, kind, number: kind == "probe" and self.whole()) as (url, _):
        codes, _, err, _ = train(forge, tmp_path, url, "--train.steps", 12)
    assert (
        2 in codes and set(codes) <= {2, -15} and err.count("error:") == 1 and "no byte ranges now" in err
    ), err


def test_a_refused_probe_ends_the_run_at_once(forge, tiny_set, tmp_path):
    with serve(tiny_set, lambda self, kind, number: kind == "probe" and self.say(403)) as (url, counts):
        codes, _, err, _ = train(forge, tmp_path, url, ranks=1)
    assert codes == [2] and counts["probe"] == 1 and "403 Forbidden" in err and err.count("error:") == 1, err


def test_a_server_that_is_down_for_a_while_is_waited_for(forge, tiny_set, calm, tmp_path):
    """Longer than the 7.5 s that five tries took; its Retry-After is heeded."""

    down: list[float] = []

    def fault(self, kind, number):
        if kind != "shard" or number <= 8:
            return False
        down.append(time.monotonic())
        return time.monotonic() - down[0] < 9 and self.say(503, Retry_After=1)

    with serve(tiny_set, fault) as (url, _):
        codes, _, err, ids = train(forge, tmp_path, url)
    assert codes == [0, 0] and "503 Service Unavailable; trying again" in err, err
    assert trained_on(ids) == calm[1] and weights(tmp_path / "run", 8) == weights(calm[0], 8)


def test_a_server_that_stays_down_ends_the_run_after_its_minutes(forge, tiny_set, tmp_path):
    with serve(tiny_set, lambda self, kind, number: kind == "shard" and number > 8 and self.say(503)) as (
        url,
        _,
    ):
        codes, _, err, _ = train(forge, tmp_path, url, "--data.retry-minutes", "0.15", ranks=1)
    assert codes == [2] and re.search(r"503 Service Unavailable\), tried [5-9] times", err), err


def test_ranks_that_read_in_different_orders_are_found(forge, tiny_set, tmp_path):
    codes, _, err, _ = train(forge, tmp_path, tiny_set, spies=(("read_in_another_order", 1),))
    assert 2 in codes and set(codes) <= {2, -15} and "rank(s) 1 have another order than rank 0" in err, err
    assert err.count("error:") == 1


def test_a_run_that_would_continue_in_another_order_is_refused(forge, tiny_set, calm, tmp_path):
    shutil.copytree(calm[0], tmp_path / "run")
    spies = (("read_in_another_order", 0), ("read_in_another_order", 1))
    codes, _, err, _ = train(forge, tmp_path, tiny_set, "--train.steps", 12, spies=spies)
    assert 2 in codes and set(codes) <= {2, -15} and "in another order than the one of this command" in err, (
        err
    )
