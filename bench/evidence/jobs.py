"""Runs commands that write a file when they are done, one for each core at a time; finished ones are skipped."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from p2w.resources import usable_cores

REPO = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True, eq=False)
class Job:
    """A command, and the file that it writes at its end."""

    name: str
    command: Sequence[object]
    done: Path

    @property
    def finished(self) -> bool:
        """Whether the file exists."""
        if self.done.name == "status.json" and self.done.exists():
            return bool(json.loads(self.done.read_text())["state"] == "finished")
        return self.done.exists()


def work(jobs: list[Job], folder: Path, workers: int = 0) -> None:
    """Run the unfinished jobs in order, `workers` at a time (0: one for each core); the last line of each every minute."""
    waiting = [job for job in jobs if not job.finished]
    running: dict[Job, subprocess.Popen[bytes]] = {}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "COLUMNS": "200"}
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    said = time.monotonic()
    while waiting or running:
        while waiting and len(running) < (workers or usable_cores()):
            job = waiting.pop(0)
            with open(folder / "logs" / f"{job.name}.txt", "ab") as log:
                command = [sys.executable, *map(str, job.command)]
                running[job] = subprocess.Popen(command, cwd=REPO, env=env, stdout=log, stderr=log)
            print(f"{time.strftime('%H:%M:%S')}  {job.name} begins", flush=True)
        time.sleep(0.5)
        for job in [job for job, process in running.items() if process.poll() is not None]:
            if code := running.pop(job).returncode:
                for process in running.values():
                    process.terminate()
                sys.exit(
                    f"error: {job.name} ended with code {code}: see {folder / 'logs' / job.name}.txt, repeat the command"
                )
            print(f"{time.strftime('%H:%M:%S')}  {job.name} is done", flush=True)
        if time.monotonic() - said > 60:
            said = time.monotonic()
            for job in running:
                last = (folder / "logs" / f"{job.name}.txt").read_text().splitlines()[-1:]
                print(f"          {job.name}: {last[0] if last else 'no word yet'}", flush=True)
