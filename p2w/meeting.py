"""How the ranks of one start find each other in the rendezvous store, and what is checked of the network between nodes.

`agree_on_prefix` takes a few requests a rank, and keys whose length does not grow with the number of ranks: TCPStore hangs
up on keys above 8,192 bytes, and serves all ranks from one core.

Between nodes, before the first collective, within bounded time: which address of a node reaches the others, whether a port
that a rank opens can be reached and passes more than a packet, and how far the clocks are apart. gloo would wait half an
hour for a closed port, and without a word.
"""

import contextlib
import fcntl
import hashlib
import json
import resource
import secrets
import socket
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from p2w.errors import SharedError

ROOM = 256  # store requests that read or write many keys take so many at a time
REACH_S = 20.0  # within which a node must reach another, and the bytes pass
PROBE_BYTES = 256 << 10  # more than one packet of any network
SKEW_S = 1.0  # clocks further apart than this are warned of
TORCHRUN_SKEW_S = 15.0  # torchrun takes a node for dead whose clock is further behind (c10d: 3 beats of 5 s)
FILES_A_RANK = 3  # open files that a rank's connections to the store may need


@dataclass(frozen=True)
class Met:
    """A rank's place among those that met: the store with the prefix of this start, and the first rank of every node."""

    store: dist.Store
    leaders: list[int]
    prefix: str


def agree_on_prefix(store: dist.Store, rank: int, size: int, leads: bool, deadline: float) -> Met | None:
    """A store whose keys belong to this start alone; None when not all ranks have come by `deadline` (monotonic s).

    torchrun (torch 2.13) keeps one store over its restarts, without a prefix per start: restarted ranks read the addresses
    that an earlier attempt left, and wait for them for ever (in half of the restarts tried). So rank 0 draws a random word,
    every rank answers it with one of its own, and the prefix is a digest of all of them. A rank takes a digest only from a
    key that holds its own word, so what an earlier attempt left is nobody's.
    """
    part = Host(store, size) if rank == 0 else Guest(store, rank, leads)
    while time.monotonic() < deadline:
        with contextlib.suppress(dist.DistStoreError):
            if met := part.step():
                return met
        time.sleep(max(0.01, size / 10_000))  # all ranks together ask ten thousand times a second at most
    return None


class Guest:
    """The part of every other rank in `agree_on_prefix`. Call `step` until it gives the result."""

    def __init__(self, store: dist.Store, rank: int, leads: bool) -> None:
        self.store, self.rank, self.leads = store, rank, leads
        self.own, self.asked, self.offered = secrets.token_hex(8), "", ""

    def step(self) -> Met | None:
        """Answer what has been asked since the last call; the result once all have met. Waits for nobody."""
        store, rank = self.store, self.rank
        if not store.check(["invitation"]):
            return None
        word = store.get("invitation").decode()
        if word != self.asked:
            store.set(f"{word}/answer/{rank}", f"{self.own} {int(self.leads)}")
            self.asked = word
        offer = f"{word}/offer/{rank}/{self.own}"
        if not store.check([offer]):
            return None
        digest = store.get(offer).decode()
        if digest != self.offered:
            store.set(f"{word}/seen/{rank}", digest)
            self.offered = digest
        if not store.check([f"{digest}/met"]):
            return None
        return Met(dist.PrefixStore(digest, store), json.loads(store.get(f"{digest}/met")), digest)


class Host:
    """Rank 0's part in `agree_on_prefix`. Call `step` until it gives the result."""

    def __init__(self, store: dist.Store, size: int) -> None:
        self.store, self.others = store, range(1, size)
        self.own, self.word = secrets.token_hex(8), secrets.token_hex(8)
        self.offered: dict[int, str] = {}

    def step(self) -> Met | None:
        """Read what has been answered since the last call; the result once all have met. Waits for nobody."""
        store, word, others = self.store, self.word, self.others
        if not store.check(["invitation"]) or store.get("invitation").decode() != word:
            store.set("invitation", word)  # the first time, or after rank 0 of an earlier attempt
        asked = [f"{word}/answer/{rank}" for rank in others]
        if not _all_there(store, asked):
            return None
        answers = _read(store, asked)
        digest = hashlib.sha256(" ".join((word, self.own, *answers)).encode()).hexdigest()[:32]
        for rank, answer in zip(others, answers, strict=True):
            if self.offered.get(rank) != f"{digest} {answer}":
                store.set(f"{word}/offer/{rank}/{answer.split()[0]}", digest)
                self.offered[rank] = f"{digest} {answer}"
        seen = [f"{word}/seen/{rank}" for rank in others]
        if not _all_there(store, seen) or any(value != digest for value in _read(store, seen)):
            return None
        leaders = [0, *(rank for rank, answer in zip(others, answers, strict=True) if answer.endswith("1"))]
        store.set(f"{digest}/met", json.dumps(leaders))
        return Met(dist.PrefixStore(digest, store), leaders, digest)


def _all_there(store: dist.Store, keys: list[str]) -> bool:
    """Whether all keys exist; asks for a few hundred in one request."""
    return all(store.check(keys[start : start + ROOM]) for start in range(0, len(keys), ROOM))


def _read(store: dist.Store, keys: list[str]) -> list[str]:
    """The values of keys that exist."""
    found: list[str] = []
    for start in range(0, len(keys), ROOM):
        found += [value.decode() for value in store.multi_get(keys[start : start + ROOM])]
    return found


def address_towards(other: str) -> str:
    """This host's own address on the way to the host `other`; "" when there is none. Sends nothing."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))
        return str(probe.getsockname()[0])
    return ""


def interface_of(address: str) -> str:
    """The name of the network interface with this IPv4 address; "" when there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # SIOCGIFADDR; an interface may have no address
                answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""


@dataclass(frozen=True)
class Network:
    """What was found between nodes: this node's address and interface, and a line on the clocks (rank 0 has all)."""

    address: str
    interface: str
    clocks: str
    apart_s: float = 0.0


def check_network(met: Met, rank: int, host: str, master: str, timeout_s: float) -> Network:
    """Find this node's interface; let each node reach the next one; compare the clocks with that of rank 0. A collective.

    `master` is the address of rank 0's host. Raises SharedError, on all ranks, where a node cannot reach another; it names
    both and the port.
    """
    store, leaders = met.store, met.leaders
    address = address_towards(master)
    if rank == leaders[1]:
        store.set("address", address)
    if not address or address.startswith("127."):  # rank 0's node, whose name may resolve to loopback there
        address = address_towards(store.get("address").decode()) or address
    if rank in leaders:
        _reach_next(met, rank, host, address)
        _compare_clocks(met, rank, host)
    if rank == 0:
        store.set("network", json.dumps(_verdict(met)))
    found = json.loads(store.get("network"))
    if found["errors"]:
        raise SharedError(found["errors"][0])
    interface = "" if address.startswith("127.") else interface_of(address)
    return Network(address, interface, found["clocks"], found["apart_s"])


def _reach_next(met: Met, rank: int, host: str, address: str) -> None:
    """Open a port for the leader before this one, and exchange bytes with the one after it; the store gets the outcome."""
    store, leaders = met.store, met.leaders
    after = leaders[(leaders.index(rank) + 1) % len(leaders)]
    with socket.create_server(("", 0)) as server:
        server.settimeout(2 * REACH_S)
        store.set(f"door/{rank}", json.dumps([host, address, server.getsockname()[1]]))
        thread = threading.Thread(target=_echo, args=(server,), name="p2w-door", daemon=True)
        thread.start()
        other, where, port = json.loads(store.get(f"door/{after}"))
        began = time.monotonic()
        # Without an IPv4 address gloo itself will say what it finds
        error = _try_port(where, port) if where else ""
        if error:
            error = (
                f"{host} cannot reach port {port} of {other} ({where}) in {time.monotonic() - began:.0f} s: {error}; open "
                "the ports between the nodes, or choose another network with GLOO_SOCKET_IFNAME"
            )
        store.set(f"reached/{rank}", error)
        # The port stays open until the leader before this one is done with it.
        store.get(f"reached/{leaders[leaders.index(rank) - 1]}")


def _try_port(where: str, port: int) -> str:
    """Connect to a leader's port and exchange more than one packet; "" or what went wrong."""
    error = ""
    try:
        with socket.create_connection((where, port), timeout=REACH_S) as connection:
            error = (
                "it connects, but more than a packet does not pass: MTUs differ (ip link; ping -M do -s 8972)"
            )
            connection.sendall(bytes(PROBE_BYTES))
            if _receive(connection, PROBE_BYTES) == PROBE_BYTES:
                error = ""
    except OSError as cause:
        return error or f"{cause.strerror or cause}"
    return error


def _echo(server: socket.socket) -> None:
    """Accept one connection, read what a probe sends, and send as much back."""
    with contextlib.suppress(OSError):
        connection, _ = server.accept()
        with connection:
            connection.settimeout(2 * REACH_S)
            if _receive(connection, PROBE_BYTES) == PROBE_BYTES:
                connection.sendall(bytes(PROBE_BYTES))


def _receive(connection: socket.socket, count: int) -> int:
    """Bytes received, `count` unless the connection ends before."""
    done = 0
    while done < count and (piece := connection.recv(min(1 << 16, count - done))):
        done += len(piece)
    return done


def _compare_clocks(met: Met, rank: int, host: str) -> None:
    """Each leader asks rank 0 for its time, one after the other; the difference goes to the store."""
    store = met.store
    if rank:
        store.get(f"turn/{rank}")
        began = time.time()
        store.set(f"ask/{rank}", "")
        theirs = float(store.get(f"time/{rank}"))
        ended = time.time()
        store.set(f"clock/{rank}", json.dumps([host, (began + ended) / 2 - theirs, ended - began]))
        return
    for other in met.leaders[1:]:
        store.set(f"turn/{other}", "")
        store.get(f"ask/{other}")
        store.set(f"time/{other}", repr(time.time()))
        store.get(f"clock/{other}")
    store.set("host", host)


def _verdict(met: Met) -> dict[str, object]:
    """Rank 0: what the leaders have found."""
    store, others = met.store, met.leaders[1:]
    errors = [error for rank in met.leaders if (error := store.get(f"reached/{rank}").decode())]
    clocks = [json.loads(store.get(f"clock/{rank}")) for rank in others]
    host, apart, took = max(clocks, key=lambda one: abs(one[1]))
    own = store.get("host").decode()
    if abs(apart) <= max(SKEW_S, took):
        said = f"clocks of the nodes within {max(abs(apart), took):.3f} s"
    else:
        said = (
            f"the clock of {host} is {abs(apart):.1f} s {'ahead of' if apart > 0 else 'behind'} that of {own}; torchrun's "
            f"rendezvous bears {TORCHRUN_SKEW_S:.0f} s: set the clocks (chronyc makestep)"
        )
    return {"errors": errors, "clocks": said, "apart_s": apart if abs(apart) > max(SKEW_S, took) else 0.0}


def allow_open_files(ranks: int, server: int = 0) -> str:
    """Raise the limit of open files, of this process and of `server`, to what the connections of so many ranks need.

    `server` is the process that serves the store (0: this one). Returns "" or one line on a limit that is too low.
    """
    needed = FILES_A_RANK * ranks + 512
    for pid in {0, server}:
        with contextlib.suppress(OSError, ValueError):
            soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            if soft < needed and soft != resource.RLIM_INFINITY:
                most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (max(soft, most), hard))
                if most < needed:
                    return f"{ranks} ranks need {needed:,} open files where the store is, the limit is {hard:,}: ulimit -n"
    return ""


def torchrun_nodes(agent: int) -> str:
    """What the torchrun with this process id was given as --nnodes; "" when that cannot be found out."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{agent}/cmdline").read_bytes().decode(errors="replace").split("\0")
        if not any("torch.distributed" in word or word.endswith("torchrun") for word in words):
            return ""
        for word, after in zip(words, [*words[1:], ""], strict=True):
            if word.startswith("--nn"):
                return word.partition("=")[2] if "=" in word else after
    return ""
