"""`p2w report RUN`: one self-contained page of a run folder, RUN/report.html, that opens from disk without a network.

    p2w report runs/paper runs/ours        writes runs/paper/report.html and runs/ours/report.html

Training and fine-tuning write it at their end, and so does the analysis of a run. The page of a pretraining shows the state
of the run, curves, reconstructions with a slider, the figures and numbers of the analysis, data set, hardware, interruptions
and settings; that of a fine-tuning, or of all folds of a cross-validation, pictures of test samples, the metrics with their
intervals, curves of the trials, task and starting point, and the command that tells what the pretraining is worth.
What is missing is left out, or listed with the command that makes it. `#whole=1&scale=0&plane=coronal&slice=7` after the
page's address selects what the slider shows.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from p2w.errors import UserError
from p2w.files import write_atomic, write_remedy
from p2w.report import finetune_page, page, run_reader

NAME = "report.html"


@dataclass(frozen=True)
class ReportOptions:
    """Command line of `p2w report`."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders, of p2w train or p2w finetune."""


def write_report(run: Path) -> Path:
    """Write `RUN/report.html` atomically and return its path.

    Raises UserError when `run` is no run folder, OSError when the page cannot be written.
    """
    path = run / NAME
    if run_reader.folders_of(run):
        text = finetune_page.render_fine_tuning(run_reader.read_trials(run))
    else:
        text = page.render_report(run_reader.read_run(run))
    # A run folder is untrusted: its JSON may contain lone surrogates, which UTF-8 cannot encode.
    write_atomic(path, text.encode("utf-8", "replace"))
    return path


def main(argv: list[str]) -> int:
    """The command. Pages are written one by one: a folder that is no run ends it, after the pages of those before."""
    options = tyro.cli(ReportOptions, args=argv, prog="p2w report", description=__doc__)
    if not options.runs:
        raise UserError("p2w report: no run folder named; p2w report RUN [RUN ...]")
    for run in options.runs:
        try:
            path = write_report(run)
        except OSError as error:
            raise UserError(f"{run / NAME}: not written ({error.strerror}); {write_remedy(error)}") from error
        print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB", file=sys.stdout, flush=True)
    return 0
