"""Runs of launch/train.py: through torchrun as users start it, or forked from a process that has its imports done."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from processes import REPO, Forked, kill_group, torchrun

# An evaluation takes as long as five steps: there are three.
TINY = """
--data.batch 4 --data.reader-threads 1 --pretext.size 8 16 16 --model.width 2 --train.precision fp32 --optim.lr 1e-2
--optim.schedule plateau --optim.plateau-patience 0 --train.steps 30 --train.validate-every 15
--train.checkpoint-every 4 --train.checkpoint-minutes 0 --train.log-every 1 --train.probe-every 15
""".split()  # noqa: SIM905


class Forge:
    """Runs a script of launch/ as forks of a process that has its imports done, one run at a time; see fork_server.py.

    Unless `recalibrates`, features are measured with batch norms that have seen few wholes.
    """

    def __init__(self, recalibrates: bool = False) -> None:
        self.running: list[Forked] = []
        self.spies: tuple = () if recalibrates else (("recalibrate_on_few",),)

    def start(self, folder: Path, *argv: object, ranks: int = 1, **how: object) -> list[int]:
        """Begin a run with its output in `folder`; returns the ranks' process ids. Call `wait` after.

        `script` is launch/train.py unless named. `spies` are (name, argument, …) of functions in spies.py. Training and
        fine-tuning draw neither pictures nor report.html, which takes most of a tiny run's time, unless `draws`.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(ranks):
            place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_PORT": port}
            place |= {"LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
            env = {name: str(value) for name, value in place.items()} if ranks > 1 else {}
            self._start(folder, [], argv, env, first=rank == 0, **how)
        return [one.pid for one in self.running]

    def torchrun(
        self, folder: Path, *argv: object, ranks: int, restarts: int = 0, **how: object
    ) -> psutil.Process:
        """Begin the run under torchrun, forked as its ranks are; returns torchrun. Call `wait` after."""
        agent = torchrun(ranks, restarts=restarts)[1:-1]  # up to the script
        self._start(folder, agent, argv, {}, **how)
        return psutil.Process(self.running[0].pid)

    def _start(
        self, folder: Path, agent: list[str], argv: tuple, env: dict[str, str], script: str = "launch/train.py",
        spies: tuple = (), draws: bool = False, first: bool = True,
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        if script in ("launch/train.py", "launch/finetune.py") and not draws:
            spies = (("draw_nothing",), *spies)
        spies = (*self.spies, *spies)
        env = {
            **os.environ,
            "PYTHONPATH": str(REPO),
            "OMP_NUM_THREADS": "1",
            "P2W_DEVICE": "cpu",
            "COLUMNS": "200",
            **env,
        }
        if first and self.running:  # left by a test that failed: the next one does not suffer for it
            self.end()
        with open(folder / "out.txt", "ab") as out, open(folder / "err.txt", "ab") as err:
            self.running.append(
                Forked(
                    [sys.executable, *agent, script, *argv],
                    stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=REPO, env=env, start_new_session=True, spies=spies,
                )
            )  # fmt: skip

    def end(self) -> None:
        """Kill what still runs."""
        for one in self.running:
            kill_group(one)
        self.running = []

    def wait(self) -> list[int]:
        """Exit code of each rank, -9 for a SIGKILL; the first that fails ends the others, after ten seconds by force.

        Those that leave by themselves, as all do where a rank has refused something, have a second to do so.
        """
        calls = [(1.0, Forked.terminate), (11.0, Forked.kill)]  # seconds after the first failure
        failed = None
        while None in (codes := [one.poll() for one in self.running]):
            if failed is None and any(codes):
                failed = time.monotonic()
            if failed is not None and calls and time.monotonic() > failed + calls[0][0]:
                _, call = calls.pop(0)
                for one in self.running:
                    call(one)
            time.sleep(0.01)
        self.running = []
        return codes

    def run(self, folder: Path, *argv: object, ranks: int = 1, **how: object) -> tuple[list[int], str, str]:
        """A whole run: exit codes, stdout, stderr."""
        for name in ("out.txt", "err.txt"):
            (folder / name).unlink(missing_ok=True)
        self.start(folder, *argv, ranks=ranks, **how)
        return self.wait(), (folder / "out.txt").read_text(), (folder / "err.txt").read_text()


def wait_for(happened, what: str, seconds: float = 90.0) -> None:
    """Poll until `happened()`; fail after a while."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.02)


def weights(run: Path, step: int = 30) -> bytes:
    return (run / "checkpoints" / f"step-{step:08d}" / "model.safetensors").read_bytes()


def metrics(run: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "time" and "speed/" not in k} for record in records]


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())
