"""The shards, whether the run's batch fits them, and what the run folder holds."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from p2w.data.local import DataError, LocalSet
from p2w.data.plan import Plan
from p2w.data.stream import ShardSet, open_set
from p2w.doctor.row import Case, Row, note, ok, problem, refused, size
from p2w.errors import UserError
from p2w.train.folder import RunFolder, fingerprint

SAMPLE = 24
LONGEST_S = 3.0  # reading the sample
CUT = "python preprocess/shard_luna.py   # or shard_scans.py --scans FOLDER --out shards"


def shards(case: Case) -> Iterator[Row]:
    """The set is whole by its manifest, a random sample of it is intact, and the run's batch fits it and the folder."""
    if case.shards is None and not Path("shards").exists():
        yield note(
            "shards", "no folder shards here, and none named", f"p2w doctor --shards DIR; to cut scans: {CUT}"
        )
        return
    where = case.shards or "shards"
    try:
        found = open_set(where)
    except UserError as error:
        yield refused("shards", error)
        return
    count = len(found.shard_names)
    split = f"{len(found.ids('train')):,} sub-scans to train, {len(found.ids('val')):,} to validate"
    yield ok(
        "shards",
        f"{where}: {split}, in {count:,} shards{', all there' if isinstance(found, LocalSet) else ''}",
    )
    yield from sample(found)
    yield from plan(case, found)
    yield from run_folder(case, found)


def sample(found: ShardSet) -> Iterator[Row]:
    """Checksums of sub-scans drawn at random, other ones each time."""
    full = f"p2w verify {found.where}"
    if not isinstance(found, LocalSet):
        yield ok("checksums", f"not sampled, the set is remote; training checks each sub-scan. All: {full}")
        return
    out = torch.empty(found.shape, dtype=torch.int16)
    drawn = np.random.default_rng().permutation(len(found))[:SAMPLE]
    began, done = time.perf_counter(), 0
    for sub_scan in drawn:
        try:
            found.read_into(int(sub_scan), out)
        except DataError as error:
            bad = refused("checksums", error)
            yield problem("checksums", bad.found, f"{bad.remedy}. All: {full}")
            return
        done += 1
        if time.perf_counter() - began > LONGEST_S:
            break
    rate = done * found.nbytes / (time.perf_counter() - began)
    yield ok("checksums", f"{done} of {len(found):,} sub-scans drawn are intact, {size(rate)}/s. All: {full}")


def plan(case: Case, found: ShardSet) -> Iterator[Row]:
    """Whether the ranks of this machine can share the recipe's batch of this set."""
    data, accumulate = case.config.data, case.config.optim.accumulate
    try:
        rows = Plan(found, "train", data.batch, data.seed, 0, case.ranks, training=True).rows
    except UserError as error:
        yield refused("batch", error)
        return
    share = f"batch {data.batch} = {case.ranks} rank(s) x {rows}"
    if rows % accumulate:
        yield problem(
            "batch", f"{share}, not a multiple of optim.accumulate={accumulate}", "--optim.accumulate 1"
        )
    else:
        yield ok("batch", f"{share}; {len(found.ids('train')) // data.batch:,} steps an epoch")


def run_folder(case: Case, found: ShardSet) -> Iterator[Row]:
    """Whether the command may continue what the run folder holds."""
    try:
        RunFolder(case.run).agrees(case.config, fingerprint(found.meta))
    except UserError as error:
        yield refused("run folder", error)
        return
    try:
        status = json.loads((case.run / "status.json").read_text())
        yield ok(
            "run folder",
            f"{case.run}: {status['state']} at step {status['step']}; the same command continues it",
        )
    except (OSError, ValueError, LookupError, TypeError):
        yield ok("run folder", f"{case.run}: {'holds no run yet' if case.run.exists() else 'new'}")
