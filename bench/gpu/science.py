"""Does pretraining on this GPU help? Phantoms, a run that is stopped and continued, fine-tuning compared with scratch.

    python3 bench/gpu/science.py data             in the background: made on the machine's cores, nothing of it on the card
    python3 bench/gpu/science.py pretrain         recipe `paper`, stopped by SIGTERM, then the same command again
    python3 bench/gpu/science.py finetune         nodule classification from that run and from scratch, then the table
    python3 bench/gpu/science.py transfer_data    in the background: varied phantoms, nodules to segment, organs by place
    python3 bench/gpu/science.py transfer         2,500 steps on these phantoms, then both tasks with a tenth of the labels

The commands are those that users type; each takes its share of the time that the stage has (STAGE_ENDS). Repeated, they go
on where they stopped. Rows as in rows.py; report.html, metrics.jsonl, table1.txt and trials.tgz go to OUT.
"""

import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from rows import CUDA, DAY, OUT, REPO, failures, say, seconds_left, stages

from p2w.resources import usable_cores
from p2w.stats import Trials, compare

PYTHON = sys.executable
SHARDS, NCC, RUNS = DAY / "shards", DAY / "ncc", DAY / "runs"
PRETRAINED = RUNS / "p2w"
STARTS = (("Scratch", "random"), ("Parts2Whole", str(PRETRAINED)))
STOPPED = 143  # exit code of launch/finetune.py after SIGTERM
SAVING_S = 20.0  # between SIGTERM and the end: the step under way, a checkpoint, the report
WORKERS = str(min(10, max(1, usable_cores() - 4))) if CUDA else "2"

# Sizes on a card and of a rehearsal. The paper's network on a card sees the paper's sizes.
SCANS = ["240", "--shape", "128", "256", "256"] if CUDA else ["2", "--shape", "64", "256", "256"]
PATIENTS = ["200", "--shape", "64", "128", "128"] if CUDA else ["6", "--shape", "32", "64", "64"]
CUT = ["--val-fraction", "0.1"] if CUDA else ["--val-fraction", "0.5"]
NEGATIVES = (
    ["20"]
    if CUDA
    else [
        "4",
        "--size",
        "16",
        "16",
        "16",
        "--train-subsets",
        "0-3",
        "--val-subsets",
        "4",
        "--test-subsets",
        "5-9",
    ]
)
TRAIN = (
    ["paper", "--train.steps", "4000", "--optim.lr", "3e-4", "--train.validate-every", "500", "--train.probe-every",
     "500", "--train.checkpoint-every", "500", "--data.reader-threads", "6", "--data.cache-on-device"]
    if CUDA
    else ["demo", "--train.steps", "12", "--data.batch", "4", "--pretext.size", "16", "16", "16", "--model.width", "4",
          "--train.validate-every", "6", "--train.probe-every", "6", "--train.log-every", "1", "--data.cache-on-device"]
)  # fmt: skip
STOP_AFTER = 0.4 if CUDA else None  # of the stage's time; in a rehearsal after the first logged step
TRIALS = (
    ["--trials", "6", "--fraction", "0.1", "--workers", "3", "--recipe.max-epochs", "24", "--recipe.patience", "24"]
    if CUDA
    else ["--trials", "2", "--fraction", "0.5", "--workers", "1", "--recipe.max-epochs", "1", "--recipe.epoch-steps",
          "2", "--recipe.batch", "8"]
)  # fmt: skip

# Of `transfer`: pretraining at the paper's size, and fine-tuning as docs/targets.md has it.
VARIED = DAY / "varied"
VARIED_SCANS = ["160", "--shape", "128", "256", "256"] if CUDA else ["2", "--shape", "64", "256", "256"]
VARIED_TASKS = ["anatomy", "ncs"] if CUDA else ["anatomy"]
# Of six small patients, none in the training split has a heart.
VARIED_PATIENTS = ["60", "--shape", "64", "128", "128"] if CUDA else ["8", "--shape", "32", "64", "64"]
TASK_CUTS = {
    "ncs": ["ncs", "--source", str(VARIED / "raw" / "LIDC-IDRI"), "--spacing", "1.5", "1.5", "1.5", "--crops", "4"],
    "organs": ["custom", "--layout", "nnunet", "--source", str(VARIED / "raw" / "Anatomy"), "--spacing", "3.2", "1.8", "1.8",
               "--around", "foreground", "--crops", "6"],
}  # fmt: skip
if not CUDA:
    del TASK_CUTS["ncs"]
TASK_SIZE = [] if CUDA else ["--size", "16", "16", "16"]
COMPARED = {"ncs": "mean_iou", "organs": "dice"}
LONG_TRAIN = (
    ["paper", "--train.steps", "2500", "--optim.lr", "3e-4", "--optim.schedule", "cosine", "--train.validate-every", "500",
     "--train.checkpoint-every", "500", "--data.reader-threads", "6", "--data.cache-on-device"]
    if CUDA
    else [*TRAIN[:2], "4", *TRAIN[3:]]
)  # fmt: skip
TENTH = ["--recipe.schedule", "cosine", "--recipe.encoder-lr", "0.1", "--recipe.precision", "auto"]
TENTH += (
    ["--trials", "4", "--fraction", "0.1", "--workers", "4", "--recipe.max-epochs", "24", "--recipe.patience", "24",
     "--recipe.warmup-epochs", "2"]
    if CUDA
    else ["--trials", "2", "--fraction", "1", "--recipe.max-epochs", "1", "--recipe.epoch-steps", "2", "--recipe.batch", "8"]
)  # fmt: skip
TRANSFERRED = {"Scratch": [], "encoder": [], "encoder and up-path": ["--decoder", "up-path"]}


def run(command: list[str], seconds: float = float("inf")) -> int:
    """Run a Python command from the repository's root, and end it with SIGTERM after `seconds`; its exit code."""
    print(f"$ {' '.join(command)}", flush=True)
    process = subprocess.Popen([PYTHON, *command], cwd=REPO)
    try:
        return process.wait(None if seconds == float("inf") else max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return stop(process)


def stop(process: subprocess.Popen[bytes]) -> int:
    """Send a process SIGTERM, as a scheduler does; returns its exit code."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(SAVING_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def data() -> None:
    """Make phantoms and their shards, then those of the target task; finished steps are skipped."""
    source, targets = DAY / "LUNA16", DAY / "targets"
    steps = {
        "phantoms": ["-m", "p2w.phantom", "--out", str(source), "--scans", *SCANS],
        "shards": ["preprocess/shard_luna.py", "--luna", str(source), "--out", str(SHARDS), "--subsets", "0-9",
                   "--min-std", "0", *CUT],
        "patients": ["-m", "p2w.phantom.target_tasks", "--out", str(targets), "--tasks", "ncc", "--patients", *PATIENTS],
        "candidates": ["preprocess/prepare_target.py", "ncc", "--source", str(targets / "LUNA16"), "--out", str(NCC),
                       "--max-negatives", *NEGATIVES],
    }  # fmt: skip
    make(steps)


def transfer_data() -> None:
    """Make the varied phantoms, their shards, and the two tasks of other patients; finished steps are skipped."""
    source, raw = VARIED / "LUNA16", VARIED / "raw"
    steps = {
        "varied phantoms": ["-m", "p2w.phantom", "--out", str(source), "--varied", "--seed", "4000", "--scans",
                            *VARIED_SCANS],
        "varied shards": ["preprocess/shard_luna.py", "--luna", str(source), "--out", str(VARIED / "shards"), "--subsets",
                          "0-9", "--min-std", "0", *CUT],
        "varied patients": ["-m", "p2w.phantom.target_tasks", "--out", str(raw), "--tasks", *VARIED_TASKS, "--patients",
                            *VARIED_PATIENTS],
        **{f"cut {task}": ["preprocess/prepare_target.py", *cut, "--out", str(VARIED / task), *TASK_SIZE]
           for task, cut in TASK_CUTS.items()},
    }  # fmt: skip
    make(steps)


def make(steps: dict[str, list[str]]) -> None:
    """Run the steps that are not finished, one after the other; a step that fails ends them."""
    for name, command in steps.items():
        done = DAY / f"{name}.ok"
        if done.exists():
            continue
        began = time.time()
        code = run([*command, "--workers", WORKERS])
        say(name, exit_code=code, seconds=round(time.time() - began, 1))
        if code:
            failures.append(name)
            return
        done.touch()


def ready(name: str, share: float) -> None:
    """Wait for a file or folder of `data`. Raises RuntimeError if it is missing after this share of the time."""
    began, limit = time.time(), seconds_left() * share
    while not (DAY / f"{name}.ok").exists():
        if time.time() - began > limit:
            raise RuntimeError(f"{name}: not made within {limit:.0f} s; see the log of the background")
        time.sleep(0.5)
    say(f"waited for {name}", seconds=round(time.time() - began, 1))


def records() -> list[dict[str, Any]]:
    """The run's metrics.jsonl."""
    path = PRETRAINED / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def status() -> dict[str, Any]:
    """The content of the run's status.json."""
    return json.loads((PRETRAINED / "status.json").read_text())


def pretrain() -> None:
    """Train, stop by SIGTERM, continue with the same command; report the results."""
    ready("shards", 0.5)
    command = ["launch/train.py", *TRAIN, "--shards", str(SHARDS), "--run-dir", str(PRETRAINED)]
    whole = seconds_left() - SAVING_S
    print(f"$ {' '.join(command)}", flush=True)
    began = time.time()
    process = subprocess.Popen([PYTHON, *command], cwd=REPO)
    while process.poll() is None:
        logged = any("train/loss" in record for record in records())
        if (time.time() - began > STOP_AFTER * whole) if STOP_AFTER else logged:
            break
        if seconds_left() < SAVING_S:
            break
        time.sleep(0.1)
    code = stop(process) if process.poll() is None else process.returncode
    stopped = status()
    say("pretraining told to stop", exit_code=code, seconds=round(time.time() - began, 1), **stopped)
    began = time.time()
    code = run(command, seconds_left() - SAVING_S - 5)
    ended, losses = status(), [record for record in records() if "train/loss" in record]
    before = [record["train/loss"] for record in losses if record["step"] <= stopped["step"]][-5:]
    after = [record["train/loss"] for record in losses if record["step"] > stopped["step"]][:5]
    say("pretraining continued", exit_code=code, seconds=round(time.time() - began, 1), **ended,
        losses_before=before, losses_after=after)  # fmt: skip
    looks = [record for record in records() if "val/mse" in record or "val/loss" in record]
    wanted = ("val/mse", "val/loss", "val/loss_mean_image", "similarity/auc", "similarity/rank")
    for name, record in (("first", looks[0]), ("last", looks[-1])) if looks else ():
        say(
            "pretraining",
            when=name,
            step=record["step"],
            **{key: record[key] for key in wanted if key in record},
        )
    rates = [record["speed/samples_per_s"] for record in losses if "speed/samples_per_s" in record]
    if rates:
        say("pretraining", when="rate", samples_s=sorted(rates)[len(rates) // 2])
    for name in ("report.html", "metrics.jsonl"):
        if (PRETRAINED / name).exists():
            shutil.copy(PRETRAINED / name, OUT / name)
    if stopped["state"] not in ("told to stop", "finished") or ended["step"] <= stopped["step"] or code:
        failures.append("pretrain")


def finetune() -> None:
    """Nodule classification with a tenth of the patients, from the run and from random weights; then the table."""
    ready("candidates", 0.5)
    starts = STARTS if (PRETRAINED / "checkpoints").is_dir() else STARTS[:1]
    if len(starts) < len(STARTS):
        failures.append("nothing was pretrained")
    folders = []
    for place, (label, init) in enumerate(starts):
        folder = RUNS / f"ncc-{label}"
        width = ["--width", "4"] if init == "random" and not CUDA else []
        amp = ["--recipe.precision", "auto", "--label", label, "--init", init, *width, *TRIALS]
        began = time.time()
        share = (seconds_left() - 15) / (len(starts) - place)
        code = run(["launch/finetune.py", "--task", str(NCC), "--run-dir", str(folder), *amp], share)
        found = [json.loads(path.read_text()) for path in sorted(folder.glob("trial-*/result.json"))]
        metrics = [trial.get("metrics", {}) for trial in found]
        names = sorted(set.intersection(*[set(one) for one in metrics])) if metrics else []
        mean = {name: sum(one[name] for one in metrics) / len(metrics) for name in names}
        say(
            "fine-tuning", start=label, exit_code=code, trials=len(found),
            seconds=round(time.time() - began, 1), **mean,
        )  # fmt: skip
        if code not in (0, STOPPED) or not found:
            failures.append(label)
        folders.append(str(folder))
    table = subprocess.run(
        [PYTHON, "-m", "p2w", "table1", *folders, "--out", str(RUNS / "tables")],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(table.stdout[-3000:], table.stderr[-2000:], flush=True)
    (OUT / "table1.txt").write_text(table.stdout)
    if table.returncode:
        failures.append("table1")
    with tarfile.open(OUT / "trials.tgz", "w:gz") as archive:
        for folder in map(Path, folders):
            for path in sorted(folder.rglob("*.json*")):
                archive.add(path, path.relative_to(RUNS))


def transfer() -> None:
    """Pretrain, then fine-tune from scratch, from the encoder, and from encoder and up-path, with paired trials."""
    ready("varied shards", 0.4)
    pretrained = RUNS / "varied"
    began = time.time()
    command = [
        "launch/train.py", *LONG_TRAIN, "--shards", str(VARIED / "shards"), "--run-dir", str(pretrained),
    ]  # fmt: skip
    code = run(command, 0.5 * seconds_left())
    say("transfer: pretraining", exit_code=code, seconds=round(time.time() - began, 1))
    if not (pretrained / "checkpoints").is_dir():
        failures.append("nothing was pretrained")
        return
    for place, task in enumerate(TASK_CUTS):
        ready(f"cut {task}", 0.3)
        found: dict[str, Trials] = {}
        for order, (start, options) in enumerate(TRANSFERRED.items()):
            folder = RUNS / f"{task}-{start.replace(' ', '-')}"
            init = ["--init", str(pretrained)] if start != "Scratch" else ["--init", "random"]
            width = ["--width", "4"] if start == "Scratch" and not CUDA else []
            runs_left = len(TRANSFERRED) * (len(TASK_CUTS) - place) - order
            words = [
                "--task", str(VARIED / task), "--run-dir", str(folder), "--label", start, *init, *width,
                *options, *TENTH,
            ]  # fmt: skip
            began = time.time()
            code = run(["launch/finetune.py", *words], (seconds_left() - 10) / runs_left)
            results = [json.loads(path.read_text()) for path in sorted(folder.glob("trial-*/result.json"))]
            found[start] = {one["trial"]: (one["seed"], one["metrics"][COMPARED[task]]) for one in results}
            values = [value for _, value in found[start].values()]
            say(
                "transfer", task=task, start=start, metric=COMPARED[task], trials=len(values), exit_code=code,
                mean=sum(values) / len(values) if values else None, seconds=round(time.time() - began, 1),
            )  # fmt: skip
            if code not in (0, STOPPED) or not values:
                failures.append(f"{task} from {start}")
        for start in TRANSFERRED:
            if start != "Scratch" and found[start] and found["Scratch"]:
                # Of these weights: one pretraining says nothing of what another seed of it would change.
                apart = compare(found[start], found["Scratch"])
                say(
                    "transfer against scratch", task=task, start=start, difference=apart.difference, low=apart.low,
                    high=apart.high, p=apart.p, test=apart.method,
                )  # fmt: skip


if __name__ == "__main__":
    stages({
        "data": data, "pretrain": pretrain, "finetune": finetune, "transfer_data": transfer_data,
        "transfer": transfer,
    })  # fmt: skip
