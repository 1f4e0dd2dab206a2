"""Recipes of fine-tuning at equal steps, from a random or a pretrained start: the figures in docs/finetune_recipes.md.

    python -m p2w.phantom.target_tasks --out T --tasks lcs --patients 24 --shape 32 64 64
    p2w prepare lcs --source T/LiTS --out lcs --train 0-11 --val 12-15 --test 16-23 --size 16 32 32
    p2w prepare general --source SARCOMA --out sarcoma --images '*_ct.nii.gz' --masks '*_gtv.nii.gz' --around object \
        --crops 4 --size 16 32 32 --spacing 5 5 5
    python bench/evidence/recipes.py --task lcs --width 2 --out recipes.jsonl
    python bench/evidence/recipes.py --task sarcoma --folds 4 --batch 5 --epochs 15 --epoch-steps 8 --out recipes.jsonl
    python bench/evidence/recipes.py … --init runs/pretrained        # the same from a run; its width and spacing are its own

A line a trial: Dice and soft Dice loss of the weights that validation chose, on the samples of each split. Settings are
chosen by the validation samples. The same command continues one that was stopped.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from p2w.finetune.augment import Augmentation
from p2w.finetune.cross_validation import with_folds
from p2w.finetune.recipe import FineTuneRecipe, recipe_of
from p2w.finetune.samples import Samples
from p2w.finetune.task_types import task_type
from p2w.finetune.trainer import FineTuner
from p2w.tasks.reader import TargetSet, open_target
from p2w.train.optim import Precision
from p2w.weights.start import RANDOM, load_start
from p2w.world import World

CPU = torch.device("cpu")


def recipes() -> dict[str, FineTuneRecipe]:
    """The paper's, modern, and modern with one thing changed."""
    modern = recipe_of("lcs", "modern")
    usual = modern.augment
    return {
        "paper": recipe_of("lcs"),
        "modern": modern,
        "modern, mirrored along all axes": replace(modern, augment=replace(usual, flip=0.5)),
        "modern, lr 5e-3": replace(modern, lr=5e-3),
        "modern, no augmentation": replace(modern, augment=Augmentation()),
        "modern, no rotation or scaling": replace(modern, augment=replace(usual, rotation=0.0, scaling=0.0)),
        "modern, no layer decay": replace(modern, layer_decay=1.0),
        "modern, no deep supervision": replace(modern, deep_supervision="off"),
        "modern, no averaged weights": replace(modern, ema=0.0),
        "modern, no oversampling": replace(modern, oversample=0.0),
    }


def trial(
    source: TargetSet, recipe: FineTuneRecipe, seed: int, fold: int | None, width: int, init: str
) -> dict[str, list[float]]:
    """Dice and loss by split, of one trial without early stop."""
    parts = {split: Samples(source, source.rows(split, fold), CPU, 1e9) for split in ("train", "val", "test")}
    torch.manual_seed(2 * seed)
    kind = task_type("segmentation")
    network = kind.network(load_start(init, width=width).encoder)
    world = World(0, 1, 0, 1, "here", CPU, "benchmark")
    tuner = FineTuner(network, kind, recipe, Precision("fp32", None, ""), world, seed)
    while not tuner.ended:
        tuner.epoch(parts["train"], parts["val"])
    tuner.take_best()
    found = {}
    for split, samples in parts.items():
        records = tuner.records(samples)
        metrics, _ = kind.judge(records, [source.patient[row] for row in samples.rows])
        found[split] = [round(metrics["dice"], 3), round(float(kind.loss_of(records)), 3)]
    return found


def main() -> None:
    """Every recipe in turn, seed after seed, or fold after fold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=["paper", "modern"], choices=recipes())
    parser.add_argument("--folds", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=4, help="of the network; with --init, that of the run")
    parser.add_argument("--init", default=RANDOM, help="a run, or any file that p2w finetune --init takes")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--epoch-steps", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = open_target(options.task)
    if options.folds:
        source = with_folds(source, options.folds)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = [json.loads(line)["trial"] for line in lines]
    for number in range(options.folds or options.seeds):
        for name in options.recipes:
            told = [options.task.name, name, number, options.width, options.epochs * options.epoch_steps]
            told += [Path(options.init).name] if options.init != RANDOM else []
            if told in done:
                continue
            recipe = replace(
                recipes()[name],
                batch=options.batch, epoch_steps=options.epoch_steps, max_epochs=options.epochs,
                patience=options.epochs,
            )  # fmt: skip
            fold, seed = (number, 0) if options.folds else (None, number)
            began = time.process_time()
            found = trial(source, recipe, seed, fold, options.width, options.init)
            line = json.dumps({"trial": told, **found, "cpu_s": round(time.process_time() - began, 1)})
            print(line, flush=True)
            with options.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
