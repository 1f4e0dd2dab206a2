"""Does a run learn what the paper says? Features of parts told apart by whole, and pictures of it.

    torchrun --standalone --nproc_per_node=2 -m p2w analyze --run-dir runs/paper
    torchrun --nproc_per_node=8 -m p2w analyze --run-dir runs/paper --against random,histogram,genesis=runs/mg@35000
    p2w analyze --run-dir demo/run --max-wholes 200 --negatives 1000          a quick look

Compares the run's network with others on the wholes set aside for validation. `--against` takes `random` (the run's
network as its training began), `histogram` and `pixels` (features without a network: what intensity statistics and
position alone would tell), and run folders as RUN, RUN@STEP, LABEL=RUN or LABEL=RUN@STEP. Writes RUN/analysis/summary.json,
RUN/analysis/reconstructions.npz and RUN/figures/*.png and *.pdf. The same command continues an analysis that was
interrupted, at any number of ranks; the numbers do not depend on it.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from p2w.analysis.feature_sources import AnalysedRun, name_of, parse_against
from p2w.analysis.measure import AnalysisSettings
from p2w.analysis_run import Analysis, analyze
from p2w.config import Amp
from p2w.errors import UserError, program, refuse_old_options
from p2w.log import Log
from p2w.rank_errors import run_on_ranks
from p2w.shards.manifest import candidate_data_paths, data_fingerprint
from p2w.stream.local import ShardSet
from p2w.stream.stream import open_set
from p2w.train.optim import choose_precision
from p2w.train.run_dir import RunDir
from p2w.world import World


@dataclass(frozen=True)
class Args:
    """Command line of p2w analyze."""

    run: Annotated[Path, tyro.conf.arg(aliases=["--run-dir"])]
    """Folder of the run. Under torchrun with Python 3.11 spell it --run-dir, see p2w train --help."""
    against: str = "random"
    """What to compare it with, separated by commas."""
    step: int | None = None
    """Which checkpoint; default: the best by validation, where one is marked, else the newest."""
    shards: str = ""
    """Folder or URL of the data set; default: where the run was last trained."""
    split: str = "val"
    """Which wholes: val or train."""
    checkpoints: bool = True
    """Follow contrastive loss and validation MSE over all checkpoints that the run has kept (Fig. 2c)."""
    precision: Amp = "fp32"
    """Precision of the networks' arithmetic."""
    settings: Annotated[AnalysisSettings, tyro.conf.arg(name="")] = field(default_factory=AnalysisSettings)


def parse(argv: list[str], speaks: bool = True) -> Args:
    """Command line -> arguments; one process a node `speaks`. Raises UserError."""
    refuse_old_options(argv, {"--amp": "--precision"})
    return tyro.cli(Args, args=argv, prog=program("analyze"), description=__doc__, console_outputs=speaks)


def build(argv: list[str], world: World) -> Analysis:
    """Everything that can be refused before a process group starts. Raises UserError."""
    args = parse(argv, speaks=world.speaks)
    args.settings.check()
    precision = choose_precision(args.precision, world.device).apply()
    run = AnalysedRun.open(args.run)
    step = run.step(args.step)
    against = parse_against(args.against, run, world, precision)
    label = name_of(args.run)
    if label in [subject.label for subject in against]:
        raise UserError(
            f"--against {args.against}: {label} is the run itself; name the other one as LABEL={label}"
        )
    shards = _shards(args)
    found = len(shards.ids(args.split))
    if found < 2:
        raise UserError(
            f"{shards.where}: {found} sub-scan(s) in split {args.split!r}, and parts of different wholes are compared; "
            "cut the set with a larger --val-fraction, or pass --split train"
        )
    log = Log(args.run, world.is_main, 0)
    return Analysis(
        run, step, label, against, args.checkpoints, args.settings, shards, args.split, world, precision, log
    )


def _shards(args: Args) -> ShardSet:
    """The data set that the run was trained on. Raises UserError for any other."""
    last = RunDir(args.run).last_start()
    if not args.shards and not last.get("shards"):
        raise UserError(f"{args.run / 'run.json'}: does not say where the data set lies; pass --shards")
    paths = [args.shards] if args.shards else candidate_data_paths(args.run, last)
    for path in paths:
        shards = open_set(path)
        if last.get("data") in (None, data_fingerprint(shards.meta)):
            return shards
    raise UserError(
        f"{path}: is data set {data_fingerprint(shards.meta)}, the run was trained on {last['data']}: its "
        "validation wholes would be others; pass the --shards it was trained on"
    )


def show(summary: dict[str, Any], run: Path) -> None:
    """Print a short table, and the paths of the results."""
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=f"{summary['wholes']} wholes, {summary['seconds']:.0f} s", title_justify="left")
    for head in ("network", "step", "AUC", "d'", "contrastive loss", "top-1", "top-5", "MRR"):
        table.add_column(head, justify="left" if head == "network" else "right")
    for label, found in summary["networks"].items():
        pairs, hits = found["similarity"], found["retrieval"]
        table.add_row(
            label, str(found["step"] or ""), f"{pairs['auc']:.3f}", f"{pairs['d_prime']:.2f}",
            f"{found['contrastive_loss']:.3f}", f"{hits['top1']:.3f}", f"{hits['top5']:.3f}", f"{hits['mrr']:.3f}",
        )  # fmt: skip
    table.add_row(
        "chance", "", "0.500", "0.00", "", *(f"{hits[f'chance_{n}']:.3f}" for n in ("top1", "top5", "mrr"))
    )
    Console().print(table)
    over = summary["over_checkpoints"]
    if over:
        (low, high), r = over["ci95"], over["pearson_r"]
        interval = "" if math.isnan(low) else f", 95 % interval {low:.2f} to {high:.2f}"
        value = "undefined" if math.isnan(r) else f"{r:.3f}{interval}"
        print(f"Pearson r of contrastive loss and validation MSE: {value}, n = {over['n']} checkpoints")
    print(
        f"numbers  {run / 'analysis' / 'summary.json'}\nfigures  {run / 'figures'}\nreport   {run / 'report.html'}"
    )


def work(analysis: Analysis, world: World) -> int:
    """Analyse and print; the exit code."""
    summary = analyze(replace(analysis, world=world))
    if world.is_main:
        show(summary, analysis.run.path)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse, build, run."""
    return run_on_ranks(build, work, argv)
