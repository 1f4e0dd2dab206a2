"""A real web server for the tests of remote sets."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")


@contextmanager
def nginx(place: Path, more: str = "") -> Iterator[tuple[Path, str, Callable[[], list[str]]]]:
    """A folder behind nginx, with `more` in its configuration: (folder, URL, a function: the files asked for so far)."""
    if NGINX is None:
        pytest.skip("needs nginx (apt-get install nginx-light)")
    folder, run = place / "set", place / "nginx"
    folder.mkdir()
    run.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = "user root;" if os.geteuid() == 0 else ""
    places = " ".join(
        f"{kind}_temp_path {run}/{kind};" for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
    )
    (run / "conf").write_text(
        f"{root} worker_processes 1; daemon off; pid {run}/pid; error_log {run}/error; events {{}} "
        f"http {{ access_log {run}/access; {places} {more} "
        f"server {{ listen 127.0.0.1:{port}; root {folder}; }} }}"
    )
    server = subprocess.Popen([NGINX, "-p", str(run), "-e", f"{run}/error", "-c", f"{run}/conf"])
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)

    def asked() -> list[str]:
        time.sleep(0.1)
        return [
            line.split('"')[1].split("/")[1].split()[0] for line in (run / "access").read_text().splitlines()
        ]

    try:
        yield folder, f"http://127.0.0.1:{port}", asked
    finally:
        server.terminate()
        server.wait(10)
