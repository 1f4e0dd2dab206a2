"""The small run that the tests of ``slurm/pretrain.sbatch`` submit, and what it logs."""

import json
from collections.abc import Callable
from pathlib import Path

STEPS = 16  # each of which sleeps a while, see site/sitecustomize.py
SMALL = [
    "demo", "--data.batch=4", "--model.width=2", "--pretext.size", "8", "16", "16", "--train.precision=fp32",
    f"--train.steps={STEPS}", "--train.log-every=1", "--train.validate-every=1000", "--train.checkpoint-every=1000",
    "--train.checkpoint-minutes=0", "--train.probe-every=0",
]  # fmt: skip
Start = Callable[..., str]  # of the fixture `pretrain`


def losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) as logged, in the order of the file."""
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]
