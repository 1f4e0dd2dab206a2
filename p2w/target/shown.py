"""What launch/transfer.py prints: the dry run's page, and what a folder holds in the end."""

import statistics
from pathlib import Path
from typing import Any

from p2w.target import results
from p2w.target.subset import epoch_of
from p2w.target.transfer import Transfer
from p2w.train.optim import Precision
from p2w.world import World


def show_plan(transfer: Transfer, tree: dict[str, Any], precision: Precision, world: World) -> None:
    """What would be done."""
    network, start = transfer.build(0)
    millions = [sum(one.numel() for one in part.parameters()) / 1e6 for part in (network, network.encoder)]
    counts = [len(transfer.training_rows(index)) for index in range(transfer.trials)]
    steps = len(epoch_of(counts[0], transfer.recipe.batch, transfer.recipe.epoch_steps, 0, 0))
    seeds = f"{transfer.seed(0)} to {transfer.seed(transfer.trials - 1)}"
    lines = {
        "task": f"{tree['task']['name']} ({tree['task']['kind']}), {tree['task']['where']}",
        "samples": ", ".join(f"{len(rows):,} {split}" for split, rows in transfer.rows.items()),
        "fraction": f"{transfer.fraction:g} of the training patients: {min(counts):,} to {max(counts):,} samples a trial",
        "start": f"{transfer.label}: {start.source}",
        "leak": tree["leak"],
        "network": f"{start.network}, width {start.width}: {millions[0]:.2f} M parameters, encoder {millions[1]:.2f} M",
        "decoder": tree["decoder"],
        "an epoch": f"{steps} steps of up to {transfer.recipe.batch} samples, at most {transfer.recipe.max_epochs:,} epochs",
        "processes": f"{world.describe()}; {precision.name} ({precision.reason})",
        "trials": f"{transfer.trials}, seeds {seeds} -> {transfer.folder}",
        "recipe": "  ".join(f"{name} {value}" for name, value in tree["recipe"].items()),
    }
    print("\n".join(f"{name:12}{text}" for name, text in lines.items()))


def show_results(run: Path) -> None:
    """What the folder holds so far: mean and standard deviation over finished trials."""
    found = results.read(run)
    names = list(dict.fromkeys(name for trial in found.trials for name in trial.metrics))
    for name in names:
        values = [trial.metrics[name] for trial in found.trials if name in trial.metrics]
        spread = f" +- {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
        print(
            f"{name:14} {100 * statistics.fmean(values):6.2f}{spread}   ({len(values)} of {found.planned} trials)"
        )
