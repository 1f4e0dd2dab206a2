"""Could pretraining an encoder matter on a task at all? Scratch on all labels, beside the same without its coarse features.

    python bench/evidence/gate.py --task TARGETS/ncs --init random --run-dir OUT ...     # launch/finetune.py, levels zeroed

A task counts as evidence for or against a pretraining only if setting the encoder's levels 3 and 4 to zero costs at least
MIN_COST points: else the fine levels, which learn within minutes, do all the work. `targets.py` runs it on every task and
prints it beside every table, with the result of all labels.
"""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import Job
from torch import Tensor, nn

from p2w.commands import finetune
from p2w.errors import UserError, exits
from p2w.finetune import trials
from p2w.finetune.results import read_fine_tuning
from p2w.finetune.task_types import task_type
from p2w.reproduce import paper_numbers

ZEROED, MIN_COST, TRIALS = (3, 4), 5.0, 2  # levels counted from 1, the finest; points in percent


@dataclass(frozen=True)
class Gate:
    """Mean scores of scratch on all labels in percent, as it is and with coarse levels zeroed."""

    all_labels: float
    zeroed: float

    @property
    def cost(self) -> float:
        """Points that zeroing costs."""
        return self.all_labels - self.zeroed

    @property
    def passes(self) -> bool:
        """Whether the task needs coarse features."""
        return self.cost >= MIN_COST

    def shown(self) -> str:
        """E.g. `costs 21.3` or `costs 0.4: does not count`."""
        return f"costs {self.cost:.1f}" + ("" if self.passes else ": does not count")


def without_coarse_levels(network: nn.Module) -> nn.Module:
    """The same network, whose decoder or head finds zeros in place of the encoder's levels ZEROED."""
    encoder: Any = network.encoder
    if len(encoder.channels) < max(ZEROED):
        raise UserError(f"encoder of {len(encoder.channels)} levels: levels {ZEROED} are to be zeroed")

    def zero(module: nn.Module, inputs: Any, features: list[Tensor]) -> list[Tensor]:
        return [level * 0 if number in ZEROED else level for number, level in enumerate(features, start=1)]

    encoder.register_forward_hook(zero)
    return network


def job(folder: Path, task: str, width: int, recipe: str) -> Job:
    """Fine-tune scratch with all labels and zeroed levels on a task."""
    out = folder / "gate" / task
    command: list[object] = [
        "bench/evidence/gate.py", "--task", folder / "targets" / task, "--init", "random", "--width", width,
        "--label", "levels 3 and 4 zeroed", "--trials", TRIALS, "--run-dir", out, *recipe.split(),
    ]  # fmt: skip
    return Job(f"gate-{task}", command, out / f"trial-{TRIALS - 1:02d}" / "result.json")


def read_gates(folder: Path) -> dict[str, Gate]:
    """The gate of every task that was run with all labels (FOLDER/full) and with zeroed levels (FOLDER/gate)."""
    found = {}
    for place in sorted((folder / "gate").glob("*/transfer.json")):
        task = place.parent.name
        scores = [_score(one) for one in (folder / "full" / task / "scratch", place.parent)]
        if not any(map(math.isnan, scores)):
            found[task] = Gate(*scores)
    return found


def _score(run: Path) -> float:
    """Mean over its finished trials in percent of the metric that the task is compared on; NaN without any."""
    if not (run / "transfer.json").exists():
        return math.nan
    result = read_fine_tuning(run)
    metric = paper_numbers.COMPARED.get(result.task, task_type(result.kind).compared)
    values = [value for _, value in result.metric(metric).values()]
    return 100 * statistics.fmean(values) if values else math.nan


def main() -> int:
    """launch/finetune.py with the arguments of this command, on networks with zeroed levels."""
    built = trials.network_of
    trials.network_of = lambda *given: without_coarse_levels(built(*given))  # type: ignore[assignment,return-value]
    return finetune.main()


if __name__ == "__main__":
    exits(main)()
