"""What is trained on what: methods, data sets, folds of patients, seeds, and the commands that make a run.

On real scans patients are left out in FOLDS folds, so that each is tested on once, by networks that never saw it. On
phantoms one set of scans is set aside. A method's `--seeds` pretrainings on each set differ in weights, order and parts.
All train the network and window of recipe `demo` on cubes of 16 voxels, for the arithmetic of STEPS steps of Parts2Whole as
p2w.train.estimate counts it.
"""

import functools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
from jobs import REPO, Job

from p2w.pretext import PRETEXTS, build_pretext_and_network
from p2w.resources import usable_cores
from p2w.shards.grouping import split_groups
from p2w.train.estimate import run_cost

sys.path.insert(0, str(REPO))
from p2w.commands.train import parse

STEPS, SEEDS, FOLDS, PHANTOMS = 300, 3, 4, 40
MOST = STEPS * 3 // 2
EVERY = STEPS // 10  # steps between the checkpoints that are kept, where a method's course is followed
REAL = ("chest", "luna16", "dicom", "nifti")  # folders of the real scans: eleven scans of as many patients
REFERENCE = "parts2whole"
# The rows of the leaderboard: a name for the table, and the flags that make it. A pretext of one's own is a line here.
METHODS: dict[str, list[str]] = {
    REFERENCE: [],
    "parts2whole_intensity": ["--intensity.strength", "0.25"],
    "parts2whole_position": ["--position.weight", "0.1"],
    "autoencoder": ["--pretext.name", "autoencoder"],
    "parts2whole_contrast": ["--pretext.name", "parts2whole_contrast"],
    "simclr": ["--pretext.name", "simclr"],
    "models_genesis": ["--pretext.name", "models_genesis", "--pretext.skips"],
    "simmim": ["--pretext.name", "simmim"],
    "spark": ["--pretext.name", "spark"],
    "voco": ["--pretext.name", "voco", "--voco.grid", "2", "2", "2"],
    "dino": ["--pretext.name", "dino"],
    "mae": ["--pretext.name", "mae", "--model.name", "vit3d"],  # leaves tokens out, which takes a transformer
    "mae_primus": ["--pretext.name", "mae", "--model.name", "primus"],
    "rubiks_cube": ["--pretext.name", "rubiks_cube"],
    "rubiks_cube_pp": ["--pretext.name", "rubiks_cube_pp"],
    **{name: ["--pretext.name", name] for name in ("exemplar", "moco", "instdisc", "pirl", "swav", "amdim")},
}
# Parts2Whole for longer than the others: whether what it lacks is steps. Only where `--methods` names it.
LONGER = {"parts2whole_1200": 1200}
# Reconstruction and contrast in one pass: weight and temperature of the contrastive loss, and random intensity curves.
CANDIDATES: dict[str, list[str]] = {
    f"unified_w{weight:g}_t{temperature:g}_i{strength:g}": [
        *("--pretext.name", "parts2whole_contrast", "--intensity.strength", f"{strength:g}"),
        *("--contrast.weight", f"{weight:g}", "--contrast.temperature", f"{temperature:g}"),
    ]
    for weight, temperature, strength in (
        (0.01, 0.1, 0), (0.03, 0.1, 0), (0.1, 0.1, 0), (0.01, 0.3, 0), (0.03, 0.3, 0), (0.1, 0.3, 0),
        (0.03, 0.1, 0.25), (0.1, 0.1, 0.25),
    )
}  # fmt: skip
# What the words of docs/evidence.md need; the leaderboard has all.
EVIDENCE = (REFERENCE, "autoencoder", "simclr", "parts2whole_contrast", "models_genesis", "simmim")
FOLLOWED = (REFERENCE, "autoencoder")  # measured at every checkpoint
# Phantoms whose patients and scanners differ more, so that it can be learned whose chest a part is of.
VARIED = "varied"
ON_VARIED = (REFERENCE, "simclr", "parts2whole_contrast", "autoencoder")
RECIPE = (
    f"demo --pretext.size 16 16 16 --optim.lr 1e-3 --train.probe-every {STEPS * 99} --train.keep 99 "
    "--train.checkpoint-minutes 0"
).split()


@dataclass(frozen=True)
class Pretraining:
    """One network: a method, the data set that it is trained on, and a seed."""

    method: str
    data: str
    seed: int

    @property
    def kind(self) -> str:
        """`real`, `phantom` or `varied`."""
        return self.data.partition("-")[0]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.data}-{self.method}-seed{self.seed}"


SELECTION_SEED = 10  # of the pretrainings among which unified.py chooses; no table of results has it


def flags_of(method: str) -> list[str]:
    """The flags of a row, or of a candidate for one."""
    if method in LONGER:
        return METHODS[REFERENCE]
    return METHODS[method] if method in METHODS else CANDIDATES[method]


def data_sets(real: bool) -> list[str]:
    """The data sets: the folds of the real scans first, then phantoms."""
    return [*([f"real-{fold}" for fold in range(FOLDS)] if real else []), "phantom"]


def plan(methods: Iterable[str], sets: Sequence[str], seeds: int) -> list[Pretraining]:
    """All pretrainings, those first that say most if time ends early: of every method one seed on every fold."""
    kinds: dict[str, list[str]] = {}
    for data in sets:
        kinds.setdefault(data.partition("-")[0], []).append(data)
    return [
        Pretraining(method, data, seed)
        for seed in range(seeds)
        for some in kinds.values()
        for method in methods
        for data in some
    ]


def fold_seeds(scans: Sequence[str], folds: int) -> list[tuple[float, int]]:
    """For each fold the --val-fraction and --split-seed that set its scans aside; together they set each aside once.

    Which scans are a fold follows from their uids alone: the first seeds, from 0, whose sets do not overlap. Raises
    ValueError for fewer scans than folds.
    """
    if len(scans) < folds:
        raise ValueError(f"{len(scans)} scans: {folds} folds need at least as many")
    sizes = [len(scans) // folds + (fold < len(scans) % folds) for fold in range(folds)]
    left, found, seed = set(scans), [], 0
    for size in sizes:
        share = size / len(scans)
        while not (val := split_groups({scan: scan for scan in scans}, share, seed)) <= left:
            seed += 1
        left -= val
        found.append((share, seed))
    return found


def phantom_jobs(folder: Path, data: str = "phantom") -> list[list[Job]]:
    """40 phantom chests, or as many varied ones, a quarter of them set aside."""
    luna, out = folder / ("LUNA16" if data == "phantom" else f"LUNA16-{data}"), folder / data
    make: list[object] = [
        "-m", "p2w.phantom", "--out", luna, "--scans", PHANTOMS, "--workers", usable_cores(),
    ]  # fmt: skip
    cut: list[object] = ["preprocess/shard_luna.py", "--luna", luna, "--out", out, "--subsets", "0-9"]
    done = out / "manifest.parquet"
    make += ["--varied"] if data == VARIED else []
    return [[Job(f"{data}-scans", make, done)], [Job(f"{data}-cut", [*cut, "--val-fraction", "0.25"], done)]]


def link_scans(folder: Path, real: Path) -> Path:
    """A folder with nothing else in it: the scans' uids, and so the folds, follow from their paths below it."""
    links = folder / "realscans"
    links.mkdir(parents=True, exist_ok=True)
    for name in REAL:
        if not (links / name).exists():
            (links / name).symlink_to(real / name)
    return links


def cut_job(folder: Path, fold: int, share: float, seed: int) -> Job:
    """Cut the real scans, those of a fold set aside."""
    out = folder / f"real-{fold}"
    cut: list[object] = ["preprocess/shard_scans.py", "--scans", folder / "realscans", "--out", out]
    split = ["--group", "scan", "--val-fraction", f"{share:.4f}", "--split-seed", seed]
    return Job(out.name + "-cut", [*cut, *split], out / "manifest.parquet")


def folds_of(folder: Path) -> list[tuple[float, int]]:
    """The folds of the scans that `real-0` was cut from."""
    table = pq.read_table(folder / "real-0" / "manifest.parquet", columns=["scan_uid"])  # type: ignore[no-untyped-call]
    return fold_seeds(sorted(set(table["scan_uid"].to_pylist())), FOLDS)


def cost(method: str) -> float:
    """Arithmetic of one step as a multiple of Parts2Whole's."""
    return _flops(method) / _flops(REFERENCE)


@functools.cache
def _flops(method: str) -> int:
    """Arithmetic of a sample, forward and backward."""
    config = parse([*RECIPE, *flags_of(method)])[0].config
    return run_cost(config, lambda: build_pretext_and_network(config), 1, 4).flops_per_sample


def steps_of(method: str) -> int:
    """Steps for the arithmetic of STEPS of Parts2Whole, and at most MOST: small steps take longer than that tells."""
    if method in LONGER:
        return LONGER[method]
    return min(MOST, round(STEPS / cost(method)))


def train_command(folder: Path, one: Pretraining) -> list[str]:
    """The command that trains it, all its settings in full; the schedule falls to its end whatever the number of steps."""
    steps = steps_of(one.method)
    every = EVERY if one.method in FOLLOWED else steps
    length = ["--train.steps", steps, "--train.validate-every", steps, "--train.checkpoint-every", every]
    where = ["--shards", folder / one.data, "--run-dir", folder / "runs" / one.name]
    seeds = ["--train.seed", seed_of(one), "--data.seed", seed_of(one)]
    return [
        sys.executable,
        "launch/train.py",
        *map(str, [*RECIPE, *length, *flags_of(one.method), *where, *seeds]),
    ]


def seed_of(one: Pretraining) -> int:
    """No two folds begin with the same weights: what is tested over folds holds for other weights too."""
    fold = int(one.data.partition("-")[2] or 0)
    return 100 * fold + one.seed


def check() -> None:
    """Every method's pretext is in the table of pretexts. Raises ValueError for one that is not."""
    for name, flags in METHODS.items():
        pretext = flags[flags.index("--pretext.name") + 1] if "--pretext.name" in flags else REFERENCE
        if pretext not in PRETEXTS:
            raise ValueError(f"{name}: no pretext {pretext}; one of {', '.join(PRETEXTS)}")
