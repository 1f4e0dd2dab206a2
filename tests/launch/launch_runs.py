"""Runs of launch/train.py: through torchrun as users start it, or forked from a process that has its imports done."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parent.parent.parent

TINY = """
--data.batch 4 --data.reader-threads 1 --pretext.size 8 16 16 --model.width 2 --train.precision fp32 --optim.lr 1e-2
--optim.schedule plateau --optim.plateau-patience 0 --train.steps 30 --train.validate-every 6
--train.checkpoint-every 4 --train.checkpoint-minutes 0 --train.log-every 1 --train.probe-every 5
""".split()  # noqa: SIM905


class Forge:
    """A process that forks ranks of a script of launch/ on request, one run at a time."""

    def __init__(self) -> None:
        env = {
            **os.environ,
            "PYTHONPATH": str(REPO),
            "OMP_NUM_THREADS": "1",
            "P2W_DEVICE": "cpu",
            "COLUMNS": "200",
        }
        self.running: list[int] = []
        self.process = subprocess.Popen(
            ["timeout", "-k", "5", "900", sys.executable, "tests/launch/forge.py"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPO, env=env, start_new_session=True,
        )  # fmt: skip

    def start(self, folder: Path, *argv: object, ranks: int = 1, **how: object) -> list[int]:
        """Begin a run with its output in `folder`; returns the ranks' process ids. Call `wait` after.

        `script` is launch/train.py unless named. `spies` are (name, argument, …) of functions in spies.py. Training
        draws neither pictures nor report.html, which takes most of a tiny run's time, unless `draws`.
        """
        return self._ask(folder, argv, ranks=ranks, **how)

    def torchrun(
        self, folder: Path, *argv: object, ranks: int, restarts: int = 0, **how: object
    ) -> psutil.Process:
        """Begin the run under torchrun, forked as its ranks are; returns torchrun. Call `wait` after."""
        (agent,) = self._ask(folder, argv, ranks=ranks, torchrun=[f"--max-restarts={restarts}"], **how)
        return psutil.Process(agent)

    def _ask(
        self, folder: Path, argv: tuple, script: str = "launch/train.py", spies: tuple = (), draws: bool = False,
        **request: object,
    ) -> list[int]:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        if script == "launch/train.py" and not draws:
            spies = (("draw_nothing",), *spies)
        request = {"torchrun": [], **request, "script": script, "spies": spies}
        request |= {"argv": [str(arg) for arg in argv]}
        request |= {"out": str(folder / "out.txt"), "err": str(folder / "err.txt")}
        if self.running:  # left by a test that failed: the next one does not suffer for it
            for pid in self.running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.wait()
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        self.running = json.loads(self.process.stdout.readline())
        return self.running

    def wait(self) -> list[int]:
        """Exit codes of the ranks."""
        codes = json.loads(self.process.stdout.readline())
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
