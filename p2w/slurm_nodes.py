"""Before torchrun starts on the nodes of a Slurm job: does each of them reach the first one's port, and what is its time?

    python -m p2w.slurm_nodes first ADDRESS PORT SECONDS NODE OTHER...     on the first node: waits for all others
    python -m p2w.slurm_nodes other ADDRESS PORT SECONDS NODE              on each other node: goes there

Exit code 44 when a node does not come in time, with one line that names it and the port; torchrun would try for minutes and
then name neither. Reaches no torch.
"""

import contextlib
import socket
import sys
import time

UNREACHED = 44  # exit code, which slurm/pretrain.sbatch takes as final
SKEW_S = 1.0  # clocks further apart than this are said
PAUSE_S = 0.2


def wait_for_others(port: int, seconds: float, node: str, others: list[str]) -> int:
    """Accept a line `NODE TIME` from every other node; print what is wrong. Returns the exit code."""
    missing, end = set(others), time.monotonic() + seconds
    with socket.create_server(("", port)) as server:
        while missing and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(5)
                    name, theirs = connection.recv(1000).decode().split()
                    apart = float(theirs) - time.time()
                    connection.sendall(b"welcome")
                    # The other side closes first, so that the port is free for torchrun at once
                    connection.recv(1)
                    missing.discard(name)
                    if abs(apart) > SKEW_S:
                        way = "ahead of" if apart > 0 else "behind"
                        say(
                            f"the clock of {name} is {abs(apart):.1f} s {way} that of {node}: set the clocks (chronyc "
                            "makestep)"
                        )
    if missing:
        say(
            f"{', '.join(sorted(missing))} did not reach port {port} of {node} in {seconds:.0f} s: a firewall between the "
            "nodes, or a wrong address (scontrol show node)"
        )
    return UNREACHED if missing else 0


def go_to_first(address: str, port: int, seconds: float, node: str) -> int:
    """Connect to the first node until it answers; print what is wrong. Returns the exit code."""
    end, why = time.monotonic() + seconds, "no answer"
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((address, port), timeout=min(5.0, left)) as connection:
                connection.sendall(f"{node} {time.time()!r}".encode())
                if connection.recv(7) == b"welcome":
                    return 0
        except OSError as error:
            why = error.strerror or str(error)
        time.sleep(PAUSE_S)
    say(f"{node} cannot reach port {port} of {address} in {seconds:.0f} s ({why})")
    return UNREACHED


def say(line: str) -> None:
    """Print one line on stderr, as slurm/pretrain.sbatch does."""
    print(f"pretrain: {line}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """Run with these arguments; the exit code."""
    role, address, port, seconds, node, *others = argv
    if role == "first":
        return wait_for_others(int(port), float(seconds), node, others)
    return go_to_first(address, int(port), float(seconds), node)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
