"""`p2w doctor`: what this machine has, against what a run needs."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from p2w.config import Config

if TYPE_CHECKING:
    from p2w.train.estimate import RunCost


GIB = 2**30


@dataclass(frozen=True)
class CheckResult:
    """One row of the report. A problem prevents a run, or will stop it; a note costs speed or needs attention."""

    status: Literal["ok", "note", "problem"]
    name: str
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> CheckResult:
    """A result without a problem."""
    return CheckResult("ok", name, found)


def note(name: str, found: str, remedy: str = "") -> CheckResult:
    """A result with which a run would work, but with a drawback."""
    return CheckResult("note", name, found, remedy)


def problem(name: str, found: str, remedy: str) -> CheckResult:
    """A result with which a run would not work, or not for long; `remedy` is what to type."""
    return CheckResult("problem", name, found, remedy)


def refused(name: str, error: Exception) -> CheckResult:
    """A UserError as a problem: its remedy is the text after the first semicolon, or else after the last colon."""
    text = " ".join(str(error).split())
    for found, mark, remedy in (text.partition("; "), text.rpartition(": ")):
        if mark:
            return problem(name, found, remedy)
    return problem(name, text, "")


@dataclass(frozen=True)
class CheckContext:
    """The run for which the machine is checked: a recipe on `ranks` processes of this machine, its data and run folder."""

    recipe: str
    config: Config
    shards: str | None  # None: not given on the command line
    run: Path
    ranks: int
    cuda: bool  # whether a run would use CUDA devices

    @cached_property
    def cost(self) -> "RunCost":
        """Memory and computation of one rank of the run. Raises UserError for an unknown network."""
        from p2w.pretext import build_pretext_and_network  # noqa: PLC0415  (for two checks only, as is torch's FLOP counter)
        from p2w.train.estimate import run_cost  # noqa: PLC0415

        config = self.config
        samples = max(1, config.data.batch // self.ranks // config.optim.accumulate)
        return run_cost(
            config,
            lambda: build_pretext_and_network(config),
            samples,
            4 if config.train.precision == "fp32" else 2,
        )


def size(count: float) -> str:
    """A number of bytes as text, such as `3.2 GiB` or `12.0 MiB`."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:,.1f} MiB"
