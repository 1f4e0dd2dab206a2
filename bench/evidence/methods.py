"""Fills docs/methods.md: which pretexts there are, and pictures of what each of them shows and asks.

    make methods                                             # pictures of all: about a minute of a core each
    python bench/evidence/methods.py --folder evidence --methods mae spark
    python bench/evidence/methods.py --names-only            # only the table: which pretexts there are

For a picture recipe `demo` is trained on the phantoms of run.py for STEPS steps. How good pretexts are is what
leaderboard.py measures.
"""

import argparse
import re
from pathlib import Path

import page
from designs import METHODS, phantom_jobs
from jobs import REPO, Job, work
from PIL import Image

from p2w.pretext import PRETEXTS, pretext_class

STEPS = 120
PICTURES = (
    "reconstruction.png",
    "views.png",
)  # of a run: of a pretext that reconstructs, and of one that does not


def train_job(folder: Path, name: str) -> Job:
    """Train a method long enough for a picture."""
    run = folder / "pictures" / name
    length = [f"--train.{what}={STEPS}" for what in ("steps", "validate-every", "probe-every")]
    where = ["--shards", folder / "phantom", "--run-dir", run]
    command: list[object] = ["launch/train.py", "demo", *length, *METHODS[name], *where]
    return Job(f"picture-{name}", command, run / "status.json")


def pictured(text: str) -> list[str]:
    """The methods whose pictures a page shows."""
    return re.findall(r"\(methods/(\w+)\.png\)", text)


def draw(run: Path, target: Path) -> None:
    """The first two of the four wholes of a run's picture, in 64 colours, at most 900 pixels wide."""
    source = next(path for name in PICTURES if (path := run / "figures" / name).exists())
    image = Image.open(source).convert("RGB")
    image = image.crop((0, 0, image.width, image.height * 52 // 100))
    image.thumbnail((900, 900))
    image.quantize(64, dither=Image.Dither.NONE).save(target, optimize=True)


def names() -> str:
    """A row for each pretext: its name, what is shown and asked, and its groups of settings, from its own file."""
    rows = [
        (f"`{name}`", kind.summary, ", ".join(f"`--{group}.*`" for group in kind.groups))
        for name, kind in ((name, pretext_class(name)) for name in PRETEXTS)
    ]
    return page.table(("`--pretext.name`", "shown -> asked", "settings"), rows).replace("--:", "---")  # words


def main() -> None:
    """Fill the table, train the methods and draw their pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=REPO / "evidence", help="data, runs and logs")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, help="whose pictures; default: all of the page"
    )
    parser.add_argument("--names-only", action="store_true", help="write the table of pretexts alone")
    args = parser.parse_args()
    path = REPO / "docs" / "methods.md"
    path.write_text(page.fill(path.read_text(), "pretexts", names()))
    if args.names_only:
        return
    folder = args.folder.resolve()
    jobs = {name: train_job(folder, name) for name in args.methods or pictured(path.read_text())}
    for stage in (*phantom_jobs(folder), [*jobs.values()]):
        work(stage, folder)
    for name, job in jobs.items():
        draw(job.done.parent, path.parent / "methods" / f"{name}.png")


if __name__ == "__main__":
    main()
