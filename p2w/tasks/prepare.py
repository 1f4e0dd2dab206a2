"""A whole data set of a target task: forecast, workers over cases, manifest. No torch."""

import math
import os
import shutil
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import asdict, dataclass
from typing import Any

from p2w.errors import UserError
from p2w.progress import Progress, say
from p2w.shards.build import default_workers, result_of_worker
from p2w.shards.build_folder import JobShare
from p2w.shards.workers import worker_pool
from p2w.tasks.sample_writer import TargetFolder, TargetSettings, cut_case, merge_cases
from p2w.tasks.task import SAMPLE_KINDS, Case, Cases, Split, Task

RECORD_HEAD = 4096  # bytes beside the voxels, at most


@dataclass(frozen=True)
class PreparationJob:
    """What is prepared from which folder, and how."""

    source: str
    out: str
    size: tuple[int, int, int]
    format: str = "tar"
    share: JobShare = JobShare()  # noqa: RUF009 (frozen)
    workers: int = 0
    dry_run: bool = False
    strict: bool = False


def prepare_samples(task: Task, job: PreparationJob) -> int:
    """Do the job; the exit code: 0, or 1 when a case was bad. Raises UserError when it cannot go on."""
    task.check()
    if not os.path.isdir(job.source):
        raise UserError(f"{job.source}: no such folder; name the folder of the data with --source DIR")
    if os.path.realpath(job.source) == os.path.realpath(job.out):
        raise UserError(
            f"{job.out}: the set gets a folder of its own, not that of the data: name it with --out DIR"
        )
    say(f"looking through {job.source}")
    cases = task.find(job.source, job.out).sort()
    if not cases.cases:
        raise UserError(
            f"{job.source}: nothing for task {task.name} there that can be used{_first(cases.bad)}"
        )
    split = task.split(cases.cases)
    for where, why in cases.left_out:
        say(f"left out: {where}: {why}")
    settings = TargetSettings(task.name, asdict(task), job.size, job.format, cases.tables)  # type: ignore[call-overload]
    folder = TargetFolder(job.out, settings)
    mine = job.share.of(cases.cases)
    if job.dry_run:
        return _dry_run(task, cases, mine, split, job)
    with folder.share_lock(job.share):
        folder.prepare(job.share)
        folder.refuse_other_scans(cases.cases, cases.bad)
        for where, why in cases.bad:
            _bad(where, why, job.strict)
        bad = len(cases.bad) + _cut(task, mine, folder, job)
        with folder.merge_lock():
            missing = [case.name for case in cases.cases if folder.record(case.uid) is None]
            if not missing:
                meta = merge_cases(task, cases, split, folder)
                folder.remove_run_folder()
    if not missing:
        return _tell(meta, folder)
    where = f"{len(missing)} of {len(cases.cases)} cases are not cut yet (the first: {missing[0]})"
    say(f"{job.out}: share {job.share.name} is done; {where}; the last share to end writes the manifest")
    return 1 if bad else 0


def _first(bad: list[tuple[str, str]]) -> str:
    return f"; {len(bad)} bad, the first: {bad[0][0]}: {bad[0][1]}" if bad else ""


def _cut(task: Task, mine: list[Case], folder: TargetFolder, job: PreparationJob) -> int:
    """Cut what is not finished; how many cases of this share are bad."""
    todo = [case for case in mine if folder.finished(case) is None]
    if not todo:
        say(f"{job.out}: all {len(mine)} cases are cut already")
        return 0
    records = [folder.record(case.uid) for case in todo]
    if any(record is None or "bad" not in record for record in records):  # not for another try at a bad case
        folder.remove_manifest()
    say(f"{len(todo)} cases to cut ({len(mine) - len(todo)} are finished)")
    _check_disk(_known_samples(todo), task, job)
    workers = min(job.workers or default_workers(), len(todo))
    bad = samples = 0
    progress = Progress(len(todo), "cases")
    with progress, worker_pool(workers) as submit:
        waiting = {submit(cut_case, case, task, folder, job.share): case for case in todo}
        while waiting:
            done, _ = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                case = waiting.pop(future)
                record = result_of_worker(future, case, waiting)
                samples += len(record.get("rows", ()))
                progress.step(f"{samples:,} samples")
                if "bad" in record:
                    bad += 1
                    _bad(case.name, record["bad"], job.strict)
                elif record["left_out"]:
                    _name_left_out(case, record["left_out"])
            progress.tick()
    return bad


def _name_left_out(case: Case, left_out: list[str]) -> None:
    more = f" (and {len(left_out) - 1} more, see report.json)" if len(left_out) > 1 else ""
    say(f"left out: {case.name}: {left_out[0]}{more}")


def _known_samples(cases: list[Case]) -> int:
    """The number of samples as far as it is known before cutting: what tables name, and at least one for each case."""
    return sum(max(1, len(case.candidates)) for case in cases)


def record_bytes(task: Task, size: tuple[int, int, int]) -> int:
    """Bytes of one sample in a shard, at most."""
    channels = len(task.channel_names) + SAMPLE_KINDS[task.kind].masks
    return 2 * channels * math.prod(size) + RECORD_HEAD


def _check_disk(samples: int, task: Task, job: PreparationJob) -> None:
    need, free = samples * record_bytes(task, job.size), _free(job.out)
    if free < need:
        raise UserError(
            f"{job.out}: {free / 2**30:.2f} GiB free, the samples take at least {need / 2**30:.2f} GiB: make room, name "
            "another --out, or ask for fewer samples"
        )


def _free(path: str) -> int:
    path = os.path.abspath(path)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


def _dry_run(task: Task, cases: Cases, mine: list[Case], split: Split, job: PreparationJob) -> int:
    for where, why in sorted(cases.bad):
        say(f"bad: {where}: {why}")
    patients = {case.patient for case in cases.cases}
    say(
        f"task           {task.name}: {task.kind}, {', '.join(task.channel_names)}; {' | '.join(task.classes)}"
    )
    say(
        f"cases          {len(cases.cases):,} of {len(patients):,} patients, besides {len(cases.bad)} bad ones"
    )
    for name, count in _counts(cases.cases, split).items():
        say(f"  {name:13}{count}")
    one = record_bytes(task, job.size)
    depth, height, width = job.size
    say(f"sample         {depth} x {height} x {width} voxels (z, y, x), {one / 2**20:.2f} MiB")
    total = sum(len(case.candidates) for case in mine)
    if total:
        positive = sum(candidate.label == 1 for case in mine for candidate in case.candidates)
        classes = f", {positive:,} positive" if positive or not SAMPLE_KINDS[task.kind].masks else ""
        say(f"samples        {total:,}{classes}; {total * one / 2**30:.2f} GiB into {job.out}")
    else:
        say("samples        as many as the masks give; they are read when cutting")
    say(f"free there     {_free(job.out) / 2**30:.2f} GiB")
    _check_disk(_known_samples(mine), task, job)
    return 1 if cases.bad else 0


def _counts(cases: list[Case], split: Split) -> dict[str, str]:
    """How many cases, patients and candidates each split or fold has."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        name = f"fold {split.fold_of[case.patient]}" if split.folds else split.of[case.patient]
        found.setdefault(name, []).append(case)
    order = ["train", "val", "test", *(f"fold {i}" for i in range(split.folds))]
    told = {}
    for name in order:
        own = found.get(name, [])
        if not own and split.folds and name in ("train", "val", "test"):
            continue
        candidates = [candidate for case in own for candidate in case.candidates]
        many = (
            f", {len(candidates):,} marks, {sum(m.label == 1 for m in candidates):,} positive"
            if candidates
            else ""
        )
        told[name] = f"{len(own):,} cases of {len({case.patient for case in own}):,} patients{many}"
    return told


def _bad(where: str, why: str, strict: bool) -> None:
    if strict:
        raise UserError(f"bad case: {where}: {why} (--strict stops at the first)")
    say(f"bad case: {where}: {why}")


def _tell(meta: dict[str, Any], folder: TargetFolder) -> int:
    samples = sum(source["samples"] for source in meta["sources"])
    if samples == 0:
        folder.remove_manifest()
        raise UserError(f"{folder.root}: not one sample: all cases are bad or empty, see report.json there")
    size = sum(shard["nbytes"] for shard in meta["shards"]) / 2**30
    counts = ", ".join(f"{name} {count:,}" for name, count in meta["split"]["samples"].items())
    of = " where fold 0 is tested on" if meta["split"]["folds"] else ""
    say(f"{folder.root}: {samples:,} samples, {size:.2f} GiB; {counts}{of}")
    for name, count in meta["split"]["samples"].items():
        if not count:
            say(f"no samples for {name}: too few patients, or a fraction of 0")
    if meta["bad_scans"]:
        say(f"{len(meta['bad_scans'])} bad cases, see {os.path.join(folder.root, 'report.json')}")
    return 1 if meta["bad_scans"] else 0
