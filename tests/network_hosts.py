"""Hosts with network addresses of their own on one machine: network namespaces, joined by a bridge; needs root and iproute2.

As on Debian, the own name of each host is a loopback address there, so that who asks by name finds the wrong interface.
"""

import os
import shutil
import subprocess
from pathlib import Path

NETNS = Path("/etc/netns")  # NETNS / NAME: files that take the place of those of /etc on this host


def ip(*words: str) -> str:
    """Output of a command of iproute2. Raises RuntimeError with what it said when it fails."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Hosts:
    """Named hosts in the subnet 10.77.N, N from the process id: the first is 10.77.N.1. Close it in the end."""

    def __init__(self, count: int = 2, gateway: bool = False) -> None:
        """With `gateway`, this machine itself is 10.77.N.254. Raises RuntimeError where hosts cannot be made."""
        if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "nsenter", "unshare"))):
            raise RuntimeError("needs root, iproute2 and util-linux to make network namespaces")
        word, self.subnet = f"p2w{os.getpid()}", f"10.77.{os.getpid() % 256}"
        self.names = [f"{word}{letter}" for letter in "abcdefgh"[:count]]
        self.links = [f"{name[-13:]}v" for name in self.names]  # as each host names its interface
        self.addresses = [f"{self.subnet}.{number}" for number in range(1, count + 1)]
        self.gateway, self._bridge = f"{self.subnet}.254", f"{word[-12:]}br"
        try:
            self._make(gateway)
        except RuntimeError:
            self.close()
            raise

    def _make(self, gateway: bool) -> None:
        ip("link", "add", self._bridge, "type", "bridge")
        if gateway:
            ip("addr", "add", f"{self.gateway}/24", "dev", self._bridge)
        ip("link", "set", self._bridge, "up")
        for name, link, address in zip(self.names, self.links, self.addresses, strict=True):
            ip("netns", "add", name)
            (NETNS / name).mkdir(parents=True)
            own = f"127.0.0.1 localhost\n127.0.1.1 {os.uname().nodename} {name}\n"
            (NETNS / name / "hosts").write_text(own)
            (NETNS / name / "resolv.conf").write_text("")
            outside = f"{link}o"
            ip("link", "add", outside, "type", "veth", "peer", "name", link, "netns", name)
            ip("link", "set", outside, "master", self._bridge)
            ip("link", "set", outside, "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", link, "up")

    def inside(self, host: int) -> list[str]:
        """The words before a command that runs it on this host: `ip netns exec`, which hides control groups from slurmd."""
        name = self.names[host]
        own = " && ".join(
            f"mount --bind {NETNS / name / file} /etc/{file}" for file in ("hosts", "resolv.conf")
        )
        return [
            "nsenter",
            f"--net=/var/run/netns/{name}",
            "unshare",
            "--mount",
            "sh",
            "-c",
            f'{own} && exec "$0" "$@"',
        ]

    def link(self, host: int, up: bool) -> None:
        """Unplug the host, or plug it in again."""
        ip("-n", self.names[host], "link", "set", self.links[host], "up" if up else "down")

    def part(self, one: int, other: int, apart: bool) -> None:
        """Let two hosts reach each other no more, though each reaches all others; or again."""
        for here, there in ((one, other), (other, one)):
            change = "add" if apart else "del"
            ip("-n", self.names[here], "route", change, "blackhole", f"{self.addresses[there]}/32")

    def close(self) -> None:
        """Remove the hosts, as far as they have been made."""
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
            shutil.rmtree(NETNS / name, ignore_errors=True)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True, check=False)
