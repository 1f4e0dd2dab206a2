"""What the runs of the soak need beside themselves: processes that fork ranks, a web server, two hosts, a Slurm.

Each is made when it is first asked for. Where a machine cannot have it, the kinds of faults that need it are not drawn.
"""

import contextlib
import functools
import http.server
import os
import re
import shutil
import socket
import tempfile
import threading
from pathlib import Path

from network_hosts import Hosts
from slurm_cluster import DAEMONS, PREFIX, Cluster, start, stop

from faults.launched_run import Forge


class Answer(http.server.BaseHTTPRequestHandler):
    """Files below a folder, whole or by byte ranges, as long as the server is up."""

    protocol_version = "HTTP/1.1"
    server: "WebServer.Listening"

    def setup(self) -> None:
        """Note the connection, so that a server that goes down can cut it."""
        self.server.connections.add(self.request)
        super().setup()

    def finish(self) -> None:
        """Forget the connection."""
        with contextlib.suppress(OSError):
            super().finish()
        self.server.connections.discard(self.request)

    def do_GET(self) -> None:
        """Answer, or fail as the server is told to."""
        self.server.answers.wait()
        if self.server.fails:
            return self._head(503, 0, Retry_After="1")
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            return self._head(404, 0)
        size, wanted = path.stat().st_size, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(wanted[1]), min(int(wanted[2]), size - 1)) if wanted else (0, size - 1)
        place = {"Content_Range": f"bytes {first}-{last}/{size}"} if wanted else {}
        self._head(206 if wanted else 200, last - first + 1, **place)
        with open(path, "rb") as file:
            file.seek(first)
            self.wfile.write(file.read(last - first + 1))

    def _head(self, code: int, size: int, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(size), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class WebServer:
    """A folder behind http, at one port for good; `down` and `up` again."""

    class Listening(http.server.ThreadingHTTPServer):
        """The server between an `up` and a `down`."""

        daemon_threads = True
        request_queue_size = 64

        def __init__(self, folder: Path, port: int) -> None:
            self.folder, self.connections, self.fails = folder, set[socket.socket](), False
            self.answers = threading.Event()
            self.answers.set()
            super().__init__(("127.0.0.1", port), Answer)

        def handle_error(self, *_: object) -> None:
            """A client that was killed, or a connection that was cut, is nothing to report."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 0
        self.up()
        self.url = f"http://127.0.0.1:{self.port}"

    def up(self) -> None:
        """Listen and answer."""
        self._now = self.Listening(self.folder, self.port)
        self.port = self._now.server_address[1]
        threading.Thread(target=self._now.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def down(self, how: str) -> None:
        """Go down: "refuses" (nobody listens, connections are cut), "silent" (no answers) or "fails" (503)."""
        if how == "silent":
            self._now.answers.clear()
        elif how == "fails":
            self._now.fails = True
        else:
            self._now.shutdown()
            self._now.server_close()
            for one in list(self._now.connections):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def back(self, how: str) -> None:
        """Be up again after `down(how)`."""
        if how == "refuses":
            return self.up()
        self._now.fails = False
        self._now.answers.set()

    def close(self) -> None:
        """Stop listening."""
        self._now.shutdown()
        self._now.server_close()


class Services:
    """All of them for one soak."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.forge, self.second_forge = Forge(), Forge()  # the second one for a run beside the run

    @functools.cached_property
    def server(self) -> WebServer:
        """The sets of the soak."""
        return WebServer(self.folder / "set")

    @functools.cached_property
    def hosts(self) -> Hosts | None:
        """Two hosts; None where they cannot be made."""
        try:
            return Hosts()
        except RuntimeError:
            return None

    @functools.cached_property
    def cluster(self) -> Cluster:
        """A Slurm of two nodes."""
        folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        folder.chmod(0o755)
        try:
            return start(folder)
        except BaseException:
            stop(folder)
            raise

    def possible(self) -> set[str]:
        """Which of them this machine can have, of those that not every machine can."""
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        slurm = all(shutil.which(name, path=path) for name in (*DAEMONS, "sbatch", "srun"))
        return {name for name, has in (("two hosts", self.hosts is not None), ("slurm", slurm)) if has}

    def end_forked(self) -> None:
        """End all ranks that were forked and still run, whoever has forgotten them."""
        self.forge.end()
        self.second_forge.end()

    def close(self) -> None:
        """End those that have been made."""
        made = vars(self)
        self.forge.close()
        self.second_forge.close()
        if "server" in made:
            self.server.close()
        if made.get("hosts"):
            self.hosts.close()
        if made.get("cluster"):
            stop(self.cluster.folder)
