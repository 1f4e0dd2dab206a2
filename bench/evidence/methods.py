"""Which pretext should one take? All of them at equal compute. Fills docs/methods.md.

    make methods                                             # phantom; an hour and a half on two free cores
    python bench/evidence/methods.py --folder evidence --seeds 3
    python bench/evidence/methods.py --page-only             # from what is in the folder
    python bench/evidence/methods.py --names-only            # only the page's first table: which pretexts there are

Every method trains the demo's network on the same phantom scans, for the arithmetic of STEPS steps of Parts2Whole as
p2w.train.estimate counts it. compare.py measures their features on the same parts, launch/finetune.py fine-tunes them. The
same command continues one that was stopped, and shares its data with run.py.
"""

import argparse
import functools
import sys
from pathlib import Path

import methods_page
import page
from jobs import REPO, Job, work
from run import data_jobs

from p2w.pretext import PRETEXTS, build_pretext_and_network, pretext_class
from p2w.train.estimate import run_cost

sys.path.insert(0, str(REPO))
from p2w.commands.train import parse

STEPS, LONG, SEEDS = 200, 600, 3
# What the table compares, with several seeds …
CONTENDERS: dict[str, list[str]] = {
    "parts2whole": [],
    "+ intensity": ["--intensity.strength", "1"],
    "+ position": ["--position.weight", "0.1"],
    "+ contrast": ["--pretext.name", "parts2whole_contrast"],
    "+ contrast, intensity": ["--pretext.name", "parts2whole_contrast", "--intensity.strength", "1"],
    "simclr": ["--pretext.name", "simclr"],
    "models_genesis": ["--pretext.name", "models_genesis", "--pretext.skips"],
}
# … and what it shows beside them, with one.
OTHERS = tuple(
    name
    for name in PRETEXTS
    if name not in CONTENDERS and ["--pretext.name", name] not in CONTENDERS.values()
)
# … and once more for three times as long, since not all have learned by then.
LONGER = ("parts2whole", "+ intensity")
METHODS = CONTENDERS | {name: ["--pretext.name", name] for name in OTHERS}
METHODS["mae"] += ["--model.name", "vit3d"]  # leaves tokens out, which takes a transformer


def share(name: str) -> float:
    """Arithmetic of one step as a multiple of Parts2Whole's."""
    flops = [
        run_cost(config, lambda config=config: build_pretext_and_network(config), 1, 4).flops_per_sample
        for config in (parse(["demo", *flags])[0].config for flags in (METHODS[name], []))
    ]
    return flops[0] / flops[1]


def folder_of(folder: Path, name: str, seed: int, length: int = STEPS) -> Path:
    """Where a method's run lies."""
    place = folder / ("methods" if length == STEPS else f"methods-{length}")
    return place / f"{name.replace('+ ', 'with-').replace(', ', '-')}-seed{seed}"


def train_job(folder: Path, name: str, seed: int, length: int = STEPS) -> Job:
    """Pretrain for the arithmetic of `length` steps of Parts2Whole; the schedule falls to its end whatever their number."""
    run, steps = folder_of(folder, name, seed, length), round(length / share(name))
    train = f"demo --train.steps {steps} --train.validate-every {steps} --train.probe-every {steps}".split()
    where = ["--shards", folder / "phantom", "--run", run, "--train.seed", seed, "--data.seed", seed]
    return Job(
        f"{run.parent.name}-{run.name}",
        ["launch/train.py", *train, *METHODS[name], *where],
        run / "status.json",
    )


def compare_job(folder: Path, run: Path, untrained: bool = False) -> Job:
    """Measure its features."""
    place, out = (f"{run}@0", "untrained.json") if untrained else (run, "compared.json")
    command = ["bench/evidence/compare.py", place, folder / "phantom"]
    return Job(f"{run.parent.name}-{run.name}-{out[:-5]}", command, run / out)


def names() -> str:
    """A row for each pretext: its name, what is shown and asked, and its groups of settings, from its own file."""
    rows = [
        (f"`{name}`", kind.summary, ", ".join(f"`--{group}.*`" for group in kind.groups))
        for name, kind in ((name, pretext_class(name)) for name in PRETEXTS)
    ]
    return page.table(("`--pretext.name`", "shown -> asked", "settings"), rows).replace("--:", "---")  # words


def main() -> None:
    """Train and compare the methods, and fill docs/methods.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=REPO / "evidence", help="data, runs and logs")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="of the methods that the table compares")
    parser.add_argument("--page-only", action="store_true", help="write the page from what is there")
    parser.add_argument("--names-only", action="store_true", help="write the table of pretexts alone")
    args = parser.parse_args()
    path = REPO / "docs" / "methods.md"
    path.write_text(page.fill(path.read_text(), "pretexts", names()))
    if args.names_only:
        return
    folder, seeds = args.folder.resolve(), range(args.seeds)
    if not args.page_only:
        for stage in data_jobs(folder, None):
            work(stage, folder)
        todo = [(name, seed, STEPS) for seed in seeds for name in METHODS if not seed or name in CONTENDERS]
        todo += [(name, seed, LONG) for seed in seeds for name in LONGER]
        work([train_job(folder, *one) for one in todo], folder)
        bare = [compare_job(folder, folder_of(folder, "parts2whole", seed), True) for seed in seeds]
        work([*(compare_job(folder, folder_of(folder, *one)) for one in todo), *bare], folder)
    methods_page.write(REPO / "docs", folder, METHODS, share, folder_of)
    long = functools.partial(folder_of, length=LONG)
    methods_page.write(REPO / "docs", folder, LONGER, share, long, "longer")


if __name__ == "__main__":
    main()
