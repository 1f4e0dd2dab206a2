"""Does pretraining transfer to tasks that ask where in the body a voxel lies? Fills tables of docs/targets.md.

    make transfer                                               # a forecast of the hours: docs/targets.md
    python bench/evidence/transfer.py --folder evidence --parts frozen gate
    python bench/evidence/transfer.py --page-only               # from what is in the folder, missing cells as "not run"

`frozen` (E1): encoders frozen after pretraining, batch norm recalibrated, a linear decoder of the coarsest features; random,
autoencoder, Models Genesis, SimMIM, Parts2Whole, three pretrainings each with three decoders. `confirmed`: the same with six
other seeds. `gate`: whether coarse levels matter on that task with all labels. `tuned` (E2): fine-tuning with a tenth of the
labels at the scale of pretraining, wholes of 32x64x64 voxels. `power`: how many trials Table 2 would take. The same command
continues one that was stopped; runs come in the order of their worth, and the page is written after each round. One process
of one thread.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import designs
import torch
import transfer_page
from frozen_decoder import Crops, coarsest, decode
from jobs import REPO, Job
from targets import call
from transfer_page import CONTROL, MORE_SEEDS, OURS, RANDOM, SEEDS

from p2w.commands import train
from p2w.files import write_atomic
from p2w.model import Encoder
from p2w.tasks.reader import open_target
from p2w.weights.start import load_start
from p2w.world import World

DECODERS = 3  # of each pretraining
METHODS = {  # in the order in which they are run
    OURS: "parts2whole",
    RANDOM: "",
    "Autoencoder": "autoencoder",
    "SimMIM": "simmim",
    "Models Genesis": "models_genesis",
}
RATES = (5e-4, 2e-3)  # of pretraining: the one with the lowest error on validation patients, by method
MATCHED_RATE = 3e-4  # of the pretrainings of E2: docs/targets.md, "The rate decides"
SCANS, PATIENTS = 60, 60
STOPPED = 143  # exit code of a training that was told to stop


@dataclass(frozen=True)
class Size:
    """The network's input and its width, the wholes that parts are cut from, and mm of a target's voxels."""

    name: str
    shape: tuple[int, int, int]  # of a phantom
    tile: tuple[int, int, int]
    stride: tuple[int, int, int]  # from one whole to the next
    crop: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    width: int
    batch: int
    steps: int  # of Parts2Whole; as much arithmetic of the others
    organs: str = "anatomy"


# Crops of 102 mm; wholes of about 150 x 170 x 170 mm, so that the largest parts are of the crops' scale.
SMALL = Size("context", (64, 64, 64), (32, 32, 32), (16, 16, 16), (16, 16, 16), (6.4, 6.4, 6.4), 8, 16, 600)
# The paper's factor of 2 between wholes and network; crops of 102 x 115 x 115 mm.
MATCHED = Size(
    "matched", (64, 128, 128), (32, 64, 64), (16, 32, 32), (16, 32, 32), (6.4, 3.6, 3.6), 8, 16, 1800
)


def words(values: tuple[float, ...]) -> list[str]:
    """A vector as the command line takes it."""
    return [f"{value:g}" for value in values]


def make_sets(folder: Path, size: Size, seed: int = 3000) -> None:
    """Varied phantoms: sub-scans to pretrain on, and organs told by place of other patients."""
    place, shape = folder / size.name, words(size.shape)
    steps: dict[Path, list[object]] = {
        place / "raw" / "Anatomy" / "dataset.json": [
            "-m", "p2w.phantom.target_tasks", "--out", place / "raw", "--tasks", size.organs, "--patients", PATIENTS,
            "--shape", *shape, "--seed", seed,
        ],
        place / "LUNA16" / "annotations.csv": [
            "-m", "p2w.phantom", "--out", place / "LUNA16", "--scans", SCANS, "--shape", *shape, "--seed", seed + 1000,
            "--varied",
        ],
        place / "shards" / "manifest.parquet": [
            "preprocess/shard_luna.py", "--luna", place / "LUNA16", "--out", place / "shards", "--subsets", "0-9",
            "--val-fraction", 0.2, "--tile", *words(size.tile), "--stride", *words(size.stride),
        ],
        place / "targets" / "organs" / "manifest.parquet": [
            "preprocess/prepare_target.py", "custom", "--layout", "nnunet", "--source", place / "raw" / "Anatomy",
            "--out", place / "targets" / "organs", "--size", *words(size.crop), "--spacing", *words(size.spacing_mm),
            "--around", "foreground", "--crops", 8, "--fractions", 0.5, 0.2, 0.3,
        ],
    }  # fmt: skip
    for done, command in steps.items():
        if not done.exists():
            call([sys.executable, *command])


def pretrained(folder: Path, size: Size, method: str, seed: int, rate: float) -> Path:
    """The run of one pretraining, trained where it is not finished."""
    run = folder / size.name / "starts" / f"{METHODS[method]}-seed{seed}-lr{rate:g}"
    job = Job("", (), run / "status.json")
    if job.finished:
        return run
    flags = list(designs.METHODS[METHODS[method]])
    if METHODS[method] == "simmim":  # 64 patches, as at the sizes of the recipes
        flags += ["--mae.patch", *(str(edge // 4) for edge in size.crop)]
    steps = round(size.steps / designs.cost(METHODS[method]))
    began = time.process_time()
    argv = [
        "demo", *flags, "--pretext.size", *words(size.crop), "--model.width", str(size.width),
        "--train.steps", str(steps), "--train.validate-every", str(steps), "--train.probe-every", str(steps),
        "--train.checkpoint-every", str(steps), "--train.log-every", "50", "--data.batch", str(size.batch),
        "--optim.lr", f"{rate:g}", "--train.seed", str(seed), "--data.seed", str(seed),
        "--shards", str(folder / size.name / "shards"), "--run", str(run),
    ]  # fmt: skip
    world = World.from_env()
    train.work(train.build(argv, world), world)  # in this process: starting one takes as long as thirty steps
    if not job.finished:
        sys.exit(STOPPED)
    spent = {"steps": steps, "cpu_s": round(time.process_time() - began, 1)}
    write_atomic(run / "cost.json", json.dumps(spent))
    return run


def encoder_of(folder: Path, size: Size, method: str, seed: int, rate: float) -> Encoder:
    """A pretrained encoder; of RANDOM the one that the pretrainings of this seed begin with."""
    if method == RANDOM:
        torch.manual_seed(seed)
        return load_start("random", "unet3d", size.width).encoder
    if method == CONTROL:
        return load_start(
            str(folder / size.name / "full" / "organs" / "trial-00" / "model.safetensors")
        ).encoder
    return load_start(str(pretrained(folder, size, method, seed, rate))).encoder


def frozen_cell(folder: Path, size: Size, crops: Crops, method: str, seed: int) -> None:
    """All decoders of one pretraining, whose rate is chosen at seed 0 by the error on validation patients."""
    done = folder / size.name / "frozen" / f"{method.replace(' ', '-')}-seed{seed}.json"
    if done.exists():
        return
    world, began = World.from_env(), time.process_time()
    rates = RATES if METHODS.get(method) else (0.0,)
    if seed:
        rates = (json.loads(done.with_name(done.name.replace(f"seed{seed}", "seed0")).read_text())["chosen"],)
    tried = {}
    for rate in rates:
        features = coarsest(encoder_of(folder, size, method, seed, rate), crops, world)
        tried[rate] = [decode(features, crops, number) for number in range(DECODERS)]
    errors = {rate: statistics.fmean(one["val_error"] for one in found) for rate, found in tried.items()}
    chosen = min(errors, key=lambda rate: errors[rate])
    found = {
        "method": method,
        "seed": seed,
        "val_errors": errors,
        "chosen": chosen,
        "decoders": tried[chosen],
    }
    done.parent.mkdir(exist_ok=True)
    write_atomic(done, json.dumps(found | {"cpu_s": round(time.process_time() - began, 1)}, indent=1))
    told = [(round(100 * one["test"]["dice"], 2), round(100 * one["explained"], 2)) for one in tried[chosen]]
    print(
        f"{time.strftime('%H:%M:%S')} {method} seed {seed}: {errors}, Dice and explained {told}", flush=True
    )


def frozen(folder: Path, workers: int = 1) -> None:
    """E1, seed by seed, so that a row of all methods is there early."""
    make_sets(folder, SMALL)
    crops = Crops.read(open_target(folder / SMALL.name / "targets" / "organs"))
    last = [*METHODS][-1]  # Models Genesis comes last: with so little time, rather three seeds of the others
    first = [method for method in METHODS if method != last]
    rounds = [(seed, first) for seed in range(SEEDS)] + [(seed, [last]) for seed in range(SEEDS)]
    for seed, methods_now in rounds:
        for method in methods_now:
            frozen_cell(folder, SMALL, crops, method, seed)
        transfer_page.write(folder)
        if (folder / SMALL.name / "full" / "organs" / "trial-00" / "model.safetensors").exists():
            frozen_cell(folder, SMALL, crops, CONTROL, 0)


def confirmed(folder: Path, workers: int = 1) -> None:
    """E1 once more with MORE_SEEDS other seeds, at the rates that the first chose; seed by seed."""
    frozen(folder)
    crops = Crops.read(open_target(folder / SMALL.name / "targets" / "organs"))
    for seed in range(SEEDS, SEEDS + MORE_SEEDS):
        for method in METHODS:
            frozen_cell(folder, SMALL, crops, method, seed)
        transfer_page.write(folder)


def fine_tune(
    task: Path, out: Path, label: str, trials: int, *more: object, script: str = "launch/finetune.py"
) -> None:
    """Fine-tune on a task where it is not done."""
    if not (out / f"trial-{trials - 1:02d}" / "result.json").exists():
        call([
            sys.executable, script, "--task", task, "--label", label, "--trials", trials, "--run-dir", out, *more,
        ])  # fmt: skip


def judge_task(place: Path, task: str, width: int) -> None:
    """A task with all labels, as it is and with coarse levels zeroed: the network with skips that is fine-tuned."""
    for name, script in (("full", "launch/finetune.py"), ("gate", "bench/evidence/gate.py")):
        more = ("--init", "random", "--width", width, *transfer_page.ALL_LABELS.split())
        fine_tune(
            place / "targets" / task, place / name / task, name, transfer_page.GATE_TRIALS, *more,
            script=script,
        )  # fmt: skip


def gates(folder: Path, workers: int = 1) -> None:
    """Whether coarse levels matter on the task of the frozen encoders."""
    make_sets(folder, SMALL)
    judge_task(folder / SMALL.name, "organs", SMALL.width)
    transfer_page.write(folder)


def tuned(folder: Path, workers: int = 1) -> None:
    """E2: fine-tuning with a tenth of the labels; Parts2Whole beside scratch comes first, task by task."""
    make_sets(folder, MATCHED)
    place = folder / MATCHED.name
    for task, command in tuned_sets(place).items():
        if not (place / "targets" / task / "manifest.parquet").exists():
            call([sys.executable, *command])
    trials = transfer_page.TUNED_TRIALS
    tenth = (*transfer_page.TENTH.split(), "--workers", workers)
    width = ("--init", "random", "--width", MATCHED.width)
    for methods in ((OURS,), ("Autoencoder", "Models Genesis")):
        for task in transfer_page.TUNED_TASKS:
            target, out = place / "targets" / task, place / "tuned" / task
            fine_tune(target, out / "Scratch", "Scratch", trials, *width, *tenth)
            for method, seed in itertools.product(methods, range(SEEDS)):
                start = pretrained(folder, MATCHED, method, seed, MATCHED_RATE)
                fine_tune(target, out / f"{method} seed {seed}", method, trials, "--init", start, *tenth)
                transfer_page.write(folder)
    for task in transfer_page.TUNED_TASKS:
        judge_task(place, task, MATCHED.width)
        transfer_page.write(folder)


def tuned_sets(place: Path) -> dict[str, list[object]]:
    """The commands that make the tasks of E2 besides organs, at the voxel size of the wholes."""
    raw = place / "raw-tasks"
    size, spacing = words(MATCHED.crop), words(MATCHED.spacing_mm)
    return {
        "raw": [
            "-m", "p2w.phantom.target_tasks", "--out", raw, "--tasks", "ncs", "lcs", "--patients", 100, "--seed", 1000,
        ],
        "ncs": [
            "preprocess/prepare_target.py", "ncs", "--source", raw / "LIDC-IDRI", "--out", place / "targets" / "ncs",
            "--size", *size, "--spacing", 2, 1.5, 1.5, "--crops", 4,
        ],
        "lcs": [
            "preprocess/prepare_target.py", "lcs", "--source", raw / "LiTS", "--out", place / "targets" / "lcs", "--size",
            *size, "--spacing", *spacing, "--max-tiles", 8, "--train", "0-59", "--val", "60-69", "--test", "70-99",
        ],
    }  # fmt: skip


PARTS = {"frozen": frozen, "confirmed": confirmed, "gate": gates, "tuned": tuned}


def main() -> None:
    """Run the chosen parts and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=REPO / "evidence", help="data, runs and logs")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=("gate", "confirmed", "tuned"), help="what to do"
    )
    parser.add_argument("--workers", type=int, default=1, help="trials of a fine-tuning side by side")
    parser.add_argument("--page-only", action="store_true", help="write the page from what is there")
    args = parser.parse_args()
    folder = args.folder.resolve()
    os.chdir(REPO)
    for part in () if args.page_only else args.parts:
        PARTS[part](folder, args.workers)
    transfer_page.write(folder)


if __name__ == "__main__":
    main()
