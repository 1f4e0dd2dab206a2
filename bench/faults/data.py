"""Faults in the data of a run, each with the documented remedy, applied as a script would."""

import contextlib
import os
import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq

from faults.runs import Run, hold, wait_for


def refused(run: Run, life, *said: str) -> None:
    """The life must end by itself with code 2 and name all of `said`, in a line of its own."""
    before = len(run.said())
    wait_for(lambda: not life.running(), "the refusal")
    codes, text = life.codes(), run.said()[before:]
    hold(2 in codes, f"exit codes {codes} instead of a refusal\n{text}")
    for word in said:
        hold(word in text, f"the refusal does not say {word!r}:\n{text}")
    hold("Traceback" not in text, text)


@contextlib.contextmanager
def aside(path: Path):
    """A copy to put back afterwards."""
    copy = path.with_name(f"{path.name}.sound")
    shutil.copyfile(path, copy)
    try:
        yield
    finally:
        os.replace(copy, path)


def shard_gone(run: Run, rng: random.Random) -> str:
    """A shard is missing or short when the command is repeated: refused at once, named; then it is put back."""
    path = rng.choice(sorted((run.sets / run.plan.form).glob(f"*.{run.plan.form}")))
    with aside(path):
        if rng.random() < 0.5:
            path.unlink()
        else:
            os.truncate(path, rng.randrange(path.stat().st_size))
        refused(run, run.fork(), path.name)
    return "killed"


def damage_shard(run: Run, rng: random.Random) -> str:
    """A bit of a sub-scan is another: the run must stop when it meets it, naming shard and key; then it is repaired."""
    folder = run.sets / run.plan.form
    row = rng.choice(
        [row for row in pq.read_table(folder / "manifest.parquet").to_pylist() if row["split"] == "train"]
    )
    path, at = folder / row["shard"], row["offset"] + rng.randrange(row["nbytes"])
    with aside(path):
        data = bytearray(path.read_bytes())
        data[at] ^= 1 << rng.randrange(8)
        beside = path.with_suffix(".beside")
        beside.write_bytes(data)
        os.replace(beside, path)
        refused(run, run.fork(), path.name, row["key"], "checksum differs")
    return "killed"


def other_set(run: Run, rng: random.Random) -> str:
    """One rank is started with another data set: refused, and the rank named; then the command is typed as it was."""
    form = "arrow" if run.plan.form == "tar" else "tar"
    odd = rng.randrange(run.plan.ranks)
    life = run.fork(argvs={str(odd): run.argv(form)})
    wait_for(lambda: not life.running(), "the refusal")
    codes = life.codes()
    hold(any(codes), f"ranks with different data sets trained: {codes}")
    return "killed"
