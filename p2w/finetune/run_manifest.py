"""RUN/transfer.json: what the trials of a run have in common; trials side by side; what the command prints.

The same command finds its run there; another one is refused.
"""

import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from p2w import __version__
from p2w.errors import UserError, command_line
from p2w.files import hold_lock, write_atomic
from p2w.finetune import recipe as recipes
from p2w.finetune import results
from p2w.finetune.results import RUN_MANIFEST
from p2w.finetune.samples import epoch_batches
from p2w.finetune.trials import FineTuning
from p2w.resources import usable_cores
from p2w.train.optim import Precision
from p2w.world import World, variables

MOST_BY_CLASS = 60  # lines of metrics by class that `show_results` prints


def plain_fine_tuning(fine_tuning: FineTuning) -> dict[str, Any]:
    """What transfer.json says of a run, as plain values."""
    start = fine_tuning.start()
    init = {"label": fine_tuning.label, **fine_tuning.init.plain(), "data": start.pretrained_on}
    return {
        "task": {
            "name": str(fine_tuning.source.meta["task"]),
            "kind": fine_tuning.kind.name,
            "folds": fine_tuning.source.folds,
            "fingerprint": task_fingerprint(fine_tuning.source.meta),
            "where": str(fine_tuning.source.where),
        },
        "init": init,
        "network": start.network,
        "width": start.width,
        "feeding": start.encoder.input_norm,
        "fraction": fine_tuning.fraction,
        "decoder": fine_tuning.decoder,
        "fold": fine_tuning.fold,
        "trials": fine_tuning.trials,
        "recipe": recipes.plain_recipe(fine_tuning.recipe),
        "samples": {split: len(rows) for split, rows in fine_tuning.rows.items()},
    }


def task_fingerprint(meta: dict[str, Any]) -> str:
    """A short name of a target set: a hash of what its manifest says of its samples and their splits."""
    described = {
        key: meta.get(key) for key in ("task", "kind", "shape", "window", "settings", "split", "shards")
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def check_run_manifest(fine_tuning: FineTuning) -> dict[str, Any]:
    """The content for transfer.json. Raises UserError when the folder holds another run's."""
    now = plain_fine_tuning(fine_tuning)
    path = fine_tuning.folder / RUN_MANIFEST
    if not path.exists():
        if (fine_tuning.folder / "config.json").exists() or (fine_tuning.folder / "checkpoints").exists():
            raise UserError(
                f"{fine_tuning.folder}: is a run of p2w train; a fine-tuning gets its own folder: "
                "name it with --run-dir"
            )
        return now
    try:
        before = json.loads(path.read_text())
        same = [kept_settings(tree) for tree in (before, now)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); name another folder with --run-dir") from error
    differing = [name for name in same[1] if same[0].get(name) != same[1][name]]
    if differing:
        said = "; ".join(f"{name} was {same[0].get(name)}, now {same[1][name]}" for name in differing[:3])
        raise UserError(
            f"{path}: {said}. A run keeps its settings: repeat its own command, or name another folder with --run-dir"
        )
    return now


def recorded_init(folder: Path) -> str | None:
    """The starting point in the transfer.json of a folder; None where there is none, or it cannot be read."""
    try:
        return str(json.loads((folder / RUN_MANIFEST).read_text())["init"]["source"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def kept_settings(tree: dict[str, Any]) -> dict[str, Any]:
    """The settings that may not change when the run continues, by dotted name."""
    flat = {
        f"recipe.{k}": v
        for k, v in recipes.current_names(tree["recipe"]).items()
        if k not in recipes.MAY_CHANGE
    }
    flat |= {name: tree[name] for name in ("network", "width", "fraction", "decoder", "fold")}
    flat["task"] = tree["task"]["fingerprint"]
    return flat | {"init": tree["init"]["source"], "label": tree["init"]["label"]}


def write_run_manifest(fine_tuning: FineTuning, tree: dict[str, Any], world: World) -> None:
    """Rank 0 makes the folder and writes transfer.json, unless it is there. Raises UserError where it cannot.

    Under a lock: the tasks of a job array all begin at once.
    """
    path = fine_tuning.folder / RUN_MANIFEST
    command = {"command": command_line(), "cwd": os.getcwd(), "p2w": __version__, **world.machine()}
    try:
        fine_tuning.folder.mkdir(parents=True, exist_ok=True)
        with hold_lock(str(fine_tuning.folder / ".lock"), "transfer"):
            before = json.loads(path.read_text()) if path.exists() else {"trials": 0}
            if before["trials"] < fine_tuning.trials:
                write_atomic(path, json.dumps(tree | {"started": command}, indent=2))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a folder you may write with --run-dir") from error


def run_workers(argv: list[str], workers: int) -> int:
    """Start `workers` processes of `p2w finetune` with these arguments and wait for them.

    A signal is passed on. Returns the worst exit code. Each has its share of the cores, and with GPUs one of them in turn.
    """
    command = [sys.executable, "-m", "p2w", "finetune", *_without_workers(argv), "--quiet"]
    threads = max(1, usable_cores() // workers)
    devices = torch.cuda.device_count()
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    # A terminal sends it to all
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        for worker in range(workers):
            device = {"LOCAL_RANK": str(worker % devices)} if devices else {}
            children.append(subprocess.Popen(command, env=variables(OMP_NUM_THREADS=str(threads), **device)))
        return max(abs(child.wait()) for child in children)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _without_workers(argv: list[str]) -> list[str]:
    """The arguments without `--workers N`."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if skip:
            skip = False
        elif word == "--workers":
            skip = True
        elif not word.startswith("--workers="):
            kept.append(word)
    return kept


def show_fine_tuning_plan(
    fine_tuning: FineTuning, tree: dict[str, Any], precision: Precision, world: World
) -> None:
    """Print what the command would do."""
    recipe = fine_tuning.recipe
    network, start = fine_tuning.build(0)
    millions = [sum(one.numel() for one in part.parameters()) / 1e6 for part in (network, network.encoder)]
    counts = [len(fine_tuning.training_rows(index)) for index in range(fine_tuning.trials)]
    steps = len(epoch_batches(counts[0], recipe.batch, recipe.epoch_steps, 0, 0))
    seeds = f"{fine_tuning.seed(0)} to {fine_tuning.seed(fine_tuning.trials - 1)}"
    lines = {
        "task": f"{tree['task']['name']} ({tree['task']['kind']}), {tree['task']['where']}",
        "samples": ", ".join(f"{len(rows):,} {split}" for split, rows in fine_tuning.rows.items()),
        "fraction": f"{fine_tuning.fraction:g} of the training patients: {min(counts):,} to {max(counts):,} samples a trial",
        "start": f"{fine_tuning.label}: {start.source}",
        "leak": tree["leak"],
        "network": f"{start.network}, width {start.width}: {millions[0]:.2f} M parameters, encoder {millions[1]:.2f} M",
        "decoder": tree["decoder"],
        "an epoch": f"{steps} steps of up to {recipe.batch} samples, at most {recipe.max_epochs:,} epochs",
        "passes": _passes(fine_tuning, steps, counts[0]),
        "processes": f"{world.describe()}; {precision.name} ({precision.reason})",
        "trials": f"{fine_tuning.trials}, seeds {seeds} -> {fine_tuning.folder}",
        "recipe": "  ".join(f"{name} {value}" for name, value in _named_settings(tree["recipe"]).items()),
    }
    if fine_tuning.fold is not None:
        lines["fold"] = (
            f"{fine_tuning.fold} of {fine_tuning.source.folds}: {tree['samples']['test']} samples to test"
        )
    print("\n".join(f"{name:12}{text}" for name, text in lines.items()))


def _named_settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings that a plan prints: all but those of transforms and parts that are off."""
    named = recipes.current_names(recipe)
    off = {name for name in recipes.SINCE if named[name] == recipes.DEFAULTS[name]}
    off |= {n for n in named if n.startswith("augment.") and named[n] == recipes.DEFAULTS[n]}
    return {name: value for name, value in named.items() if name not in off}


def _passes(fine_tuning: FineTuning, steps: int, count: int) -> str:
    """How often samples go through the network in an epoch: what it costs, whatever a pass takes on this machine."""
    recipe, val = fine_tuning.recipe, len(fine_tuning.rows["val"])
    trained = sum(map(len, epoch_batches(count, recipe.batch, recipe.epoch_steps, 0, 0)))
    at_most = recipe.max_epochs * steps
    return f"{trained:,} samples trained on and {val:,} validated an epoch; at most {at_most:,} steps a trial"


def show_results(run: Path) -> None:
    """Print mean and standard deviation of each metric over the trials that are finished so far."""
    found = results.read_fine_tuning(run)
    names = list(dict.fromkeys(name for trial in found.trials for name in trial.metrics))
    by_class = [name for name in names if ":" in name]
    if len(by_class) > MOST_BY_CLASS:
        names = [name for name in names if ":" not in name]
        print(f"{len(by_class)} further metrics, by class: see {results.RESULT} of each trial")
    for name in names:
        scale = 100 if results.is_share(name) else 1
        values = [scale * trial.metrics[name] for trial in found.trials if name in trial.metrics]
        spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        print(
            f"{name:14} {statistics.fmean(values):6.2f}{spread}   ({len(values)} of {found.planned} trials)"
        )
