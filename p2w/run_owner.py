"""Which process trains in a run folder, also where locks do not reach from node to node (NFS without lockd, no flock).

    RUN/.owner      host, pid, boot id and start of the process, and a random word; its time of change is the heartbeat

The owner touches the file every BEAT_S. Another start is refused while that goes on. The rule of taking over: the process is
dead for certain (this host and boot, and no such process), or it has given no sign of life for STALE_S. Ages are differences
between times that the file system itself has given, so clocks of nodes do not matter. An owner that finds another's word in
the file, as a node does that was frozen, leaves without writing anything more.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import time
from pathlib import Path
from typing import Any

from p2w.files import is_held, write_atomic

BEAT_S = 5.0
STALE_S = 60.0
POLL_S = 0.25


def this_process() -> dict[str, Any]:
    """Host, pid, boot id, and start of this process in clock ticks since the boot."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot_id": boot_id(),
        "started": started(os.getpid()),
    }


def boot_id() -> str:
    """A word that Linux draws at each boot; "" where it does not."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def started(pid: int) -> int:
    """When a process of this machine was started, in clock ticks since the boot; 0 for none, or a zombie."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if fields[0] in "ZX" else int(fields[19])
    return 0


def is_dead(process: dict[str, Any]) -> bool:
    """Whether a process is gone for certain: it was of this host and boot, and its pid is nobody's or another's now.

    In another container of the host its id means another process, so the process namespace must be the same too.
    """
    here = this_process()
    if not process.get("boot_id") or any(process.get(key) != here[key] for key in ("host", "boot_id")):
        return False
    if process.get("namespace", _namespace()) != _namespace():
        return False
    found = started(int(process.get("pid", 0)))
    return found == 0 or found != process.get("started")


def runs_here(process: dict[str, Any]) -> bool:
    """Whether a process is seen to run on this host; one that is stopped does not."""
    here = this_process()
    if any(process.get(key) != here[key] for key in ("host", "boot_id")) or is_dead(process):
        return False
    with contextlib.suppress(OSError, IndexError):
        state = Path(f"/proc/{process.get('pid')}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in "TtZX"
    return False


def run_state(folder: Path, status: dict[str, Any]) -> str:
    """The state in a run's status.json; `killed` for a run that says `running` and whose process gives no sign of life."""
    state = str(status.get("state", "unknown"))
    if state != "running":
        return state
    if "pid" not in status:  # written by an earlier version
        return state if is_held(folder / ".lock") else "killed"
    if is_dead(status):
        return "killed"
    owner = Owner(folder)
    return state if runs_here(status) or min(owner.age(), _since_change(owner.path)) < STALE_S else "killed"


def _since_change(path: Path) -> float:
    """Seconds since a file was changed, by this host's clock: for readers that may not write beside it."""
    with contextlib.suppress(OSError):
        return max(0.0, time.time() - path.stat().st_mtime)
    return float("inf")


def _namespace() -> str:
    """The process namespace, in which a pid means something."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def described(process: dict[str, Any]) -> str:
    """Host and pid as text."""
    return f"{process.get('host', '?')}, pid {process.get('pid', '?')}"


class Owner:
    """The file of a run folder. `take` makes this process the owner, `beat` keeps it, `release` ends it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".owner"
        self.word = secrets.token_hex(8)

    def read(self) -> dict[str, Any]:
        """The process that the file names; empty for none, or a file that cannot be read."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self.path.read_text())
            return found if isinstance(found, dict) else {}
        return {}

    def age(self) -> float:
        """Seconds since the owner's last sign of life, by the clock of the file system; infinite without a file."""
        probe = self.path.with_name(f".owner.{self.word}")
        try:
            probe.touch()
            now = probe.stat().st_mtime
            return max(0.0, now - self.path.stat().st_mtime)
        except OSError:
            return float("inf")
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()

    def other(self, locked: bool = False, have_lock: bool = False) -> dict[str, Any]:
        """The process that trains in the folder and is not this one; empty when there is none, or it may be taken over.

        Waits for a sign of life, up to STALE_S after the last one; where another process has the lock (`locked`) and is seen
        to run on this host, that is one. Where this process has it, in earnest (`have_lock`), those of this boot are dead.
        """
        found = self.read()
        if not found or found.get("word") == self.word or found.get("released") or is_dead(found):
            return {}
        if have_lock and boot_id() and found.get("boot_id") == boot_id():
            return {}
        if locked and runs_here(found):
            return found
        before = self._changed()
        while self.age() < STALE_S:
            time.sleep(POLL_S)
            found = self.read()
            if not found or found.get("released"):
                return {}
            if self._changed() != before:
                return found
        return {}

    def take(self) -> None:
        """Write this process into the file. Raises OSError."""
        mine = {**this_process(), "namespace": _namespace(), "word": self.word}
        write_atomic(self.path, json.dumps(mine))

    def beat(self) -> dict[str, Any]:
        """Give a sign of life. Returns the process that has taken over; empty while this one is the owner.

        Raises FileNotFoundError where the folder is gone.
        """
        found = self.read()
        if found and found.get("word") != self.word:
            return found
        if not found and self.path.parent.is_dir() and not self.path.exists():
            self.take()
        os.utime(self.path)
        return {}

    def release(self) -> None:
        """Say that this process is done, so that the next one need not wait."""
        with contextlib.suppress(OSError):
            if self.read().get("word") == self.word:
                write_atomic(self.path, json.dumps({**this_process(), "word": self.word, "released": True}))

    def _changed(self) -> int:
        with contextlib.suppress(OSError):
            return self.path.stat().st_mtime_ns
        return 0


# For slurm/pretrain.sbatch: says who else trains in the folder, exit code 3 when somebody does
if __name__ == "__main__":
    other = Owner(Path(sys.argv[1])).other(is_held(Path(sys.argv[1]) / ".lock"))
    print(described(other) if other else "", end="")
    sys.exit(3 if other else 0)
