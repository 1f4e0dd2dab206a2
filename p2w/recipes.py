"""Named runs. Each says its command, its hardware, what it costs and what to expect; every field can be overridden."""

from dataclasses import dataclass, replace

from p2w.config import Config, DataConfig, ModelConfig, OptimConfig, PretextConfig, TrainConfig
from p2w.errors import UserError


@dataclass(frozen=True)
class Recipe:
    """A configuration and one line that says what it is for."""

    summary: str
    config: Config


# torchrun --standalone --nproc_per_node=2 -m p2w train demo --shards demo/shards --run-dir demo/run
# Two CPU cores, some minutes. A quarter of the width at a half of the size: enough to watch it learn. Each rank has batch
# norm of its own 8 samples: over both, a step takes a third longer on two cores, and docs/evidence.md is measured without.
DEMO = Recipe(
    "a quarter of the width, 32x32x16 voxels: learns on two CPU cores in minutes",
    Config(
        data=DataConfig(batch=16, reader_threads=1),
        pretext=PretextConfig(size=(16, 32, 32)),
        model=ModelConfig(width=8),
        optim=OptimConfig(lr=2e-3, schedule="cosine", warmup_steps=20, sync_batchnorm="off"),
        train=TrainConfig(steps=600, validate_every=100, probe_every=100, checkpoint_every=100, log_every=5),
    ),
)

# torchrun --nproc_per_node=8 -m p2w train paper --shards shards --run-dir runs/paper
# sbatch slurm/pretrain.sbatch paper
# The paper's setting: LUNA16 subsets 0-6 cut with --z-margin 25 --min-std 0 (28,144 wholes, 1,759 steps an epoch),
# parts of 1/16 to 1/4, no skips, batch 16, MSE. Not published, so our choice: Adam 1e-3, halved when ten
# validations bring nothing, early stop after 50, at most 200 epochs, aspect range 0.5-2, antialiasing, the validation
# split by scan. 580 GFLOP forward and backward a sample; 0.65 s a sample on two CPU cores with bf16 (AMX).
PAPER = Recipe(
    "the paper's setting: 16.75 M parameters, parts and wholes of 64x64x32 voxels, batch 16",
    Config(
        optim=OptimConfig(lr=1e-3, schedule="plateau", plateau_patience=10),
        train=TrainConfig(
            steps=351_800, validate_every=1759, checkpoint_every=1759, early_stop=50, log_every=20
        ),
    ),
)

# torchrun --nproc_per_node=8 -m p2w train large --shards shards --run-dir runs/large
# The paper's network on whole sub-scans at full size, 128x128x64: eight times the arithmetic (4,642 GFLOP a sample).
LARGE = Recipe(
    "the paper's network at 128x128x64 voxels: eight times the arithmetic of `paper`",
    Config(
        pretext=PretextConfig(size=(64, 128, 128)),
        optim=OptimConfig(lr=1e-3, schedule="cosine", warmup_steps=1759),
        train=TrainConfig(steps=175_900, validate_every=1759, checkpoint_every=1759, log_every=20),
    ),
)

# torchrun --nproc_per_node=8 -m p2w train genesis --shards shards --run-dir runs/genesis
# What Parts2Whole is compared with: Models Genesis on the same wholes, with the length and optimizer of `paper`, and with
# skips as published; its cubes are 64x64x32 native voxels of the sub-scans.
GENESIS = Recipe(
    "Models Genesis on the same wholes: `paper` with skips, cubes of 64x64x32 native voxels",
    replace(PAPER.config, pretext=PretextConfig(name="models_genesis", skips=True)),
)

# torchrun --nproc_per_node=8 -m p2w train unified --shards shards --run-dir runs/unified
# Beyond the paper: two parts of each whole in one pass, reconstruction and InfoNCE. A step has twice the arithmetic of
# `paper`'s, so that half the steps cost as much. Weight 0.01 and temperature 0.1 are the pretext's, and were the best of
# eight settings on phantoms. What it gains and loses against `paper` at the size of two CPU cores: docs/evidence.md.
UNIFIED = Recipe(
    "`paper` with a contrastive loss beside the reconstruction: half the steps, for as much arithmetic",
    replace(
        PAPER.config,
        pretext=PretextConfig(name="parts2whole_contrast"),
        train=replace(PAPER.config.train, steps=175_900),
    ),
)

RECIPES = {"demo": DEMO, "paper": PAPER, "large": LARGE, "genesis": GENESIS, "unified": UNIFIED}


def named(name: str) -> Config:
    """The configuration of recipe `name`. Raises UserError when there is none."""
    if name not in RECIPES:
        raise UserError(f"recipe {name}: unknown; one of {', '.join(RECIPES)}, or the path of a config.json")
    return RECIPES[name].config
