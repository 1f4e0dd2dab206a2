"""Faults in the data of a run. Each is repaired by the command that the error names, typed by a script."""

import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from faults.launched_run import ENV, REPO
from faults.runs import Run, hold, wait_for


def refused(run: Run, life, *said: str) -> str:
    """Check that the run exits with code 2, without a traceback, and names all of `said`; returns its last lines."""
    before = len(run.said())
    wait_for(lambda: not life.running(), "the refusal")
    codes, text = life.codes(), run.said()[before:]
    hold(2 in codes, f"exit codes {codes} instead of a refusal\n{text}")
    for word in said:
        hold(word in text, f"the refusal does not say {word!r}:\n{text}")
    hold("Traceback" not in text, text)
    return text


def repair(run: Run, text: str, path: Path, sound: Path) -> None:
    """Run the command in the error message, with the folder of the scans; the shard must be the same bytes as before."""
    found = re.search(r"p2w (verify \S+ --repair --luna) FOLDER", text)
    hold(found is not None, f"the error names no command that repairs:\n{text}")
    command = [sys.executable, "-m", "p2w", *shlex.split(found[1]), str(run.sets / "luna"), "--workers", "1"]
    done = subprocess.run(
        command, cwd=REPO, env={**os.environ, **ENV}, capture_output=True, text=True, check=False
    )
    hold(done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
    hold(path.read_bytes() == sound.read_bytes(), f"{path} was repaired to other bytes")
    sound.unlink()


def put_aside(path: Path) -> Path:
    """A copy for comparison, which the next start restores if the soak is ended."""
    sound = path.with_name(f"{path.name}.sound")
    shutil.copyfile(path, sound)
    return sound


def shard_gone(run: Run, rng: random.Random) -> str:
    """A shard is missing or truncated when the command is repeated: the run must name it; then it is cut again."""
    path = rng.choice(sorted((run.sets / run.plan.form).glob(f"*.{run.plan.form}")))
    sound = put_aside(path)
    if rng.random() < 0.5:
        path.unlink()
    else:
        os.truncate(path, rng.randrange(path.stat().st_size))
    repair(run, refused(run, run.fork(), path.name), path, sound)
    return "killed"


def damage_shard(run: Run, rng: random.Random) -> str:
    """One bit of a sub-scan is flipped: the run must stop when it reads it and name shard and key; then it is repaired."""
    folder = run.sets / run.plan.form
    rows = [row for row in pq.read_table(folder / "manifest.parquet").to_pylist() if row["split"] == "train"]
    row = rng.choice(rows)
    path, at = folder / row["shard"], row["offset"] + rng.randrange(row["nbytes"])
    sound = put_aside(path)
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << rng.randrange(8)
    beside = path.with_suffix(".beside")
    beside.write_bytes(data)
    os.replace(beside, path)
    repair(run, refused(run, run.fork(), path.name, row["key"], "checksum differs"), path, sound)
    return "killed"


def other_set(run: Run, rng: random.Random) -> str:
    """One rank is started with another data set: the run must refuse and name the rank; then the right command is run."""
    odd = rng.randrange(run.plan.ranks)
    life = run.fork(argvs={str(odd): run.argv("arrow" if run.plan.form == "tar" else "tar")})
    wait_for(lambda: not life.running(), "the refusal")
    codes = life.codes()
    hold(any(codes), f"ranks with different data sets trained: {codes}")
    return "killed"
