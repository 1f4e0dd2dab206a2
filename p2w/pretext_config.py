"""Settings of the single proxy tasks, as frozen dataclasses: a group each in `p2w.config.Config`.

Marks as there: [P] published with the task's own paper, [C] read in public code, [I] inferred, [?] our choice.
"""

from dataclasses import dataclass
from typing import Any, Literal

from p2w.errors import UserError


@dataclass(frozen=True)
class IntensityConfig:
    """Intensities of what the network sees are changed, those of the target are not: the paper's future work.

    Read by the proxies that cut parts (parts2whole, autoencoder, the contrastive ones). Limits hold at strength 1 and shrink
    with it [?].
    """

    strength: float = 0.0
    """0 leaves parts as they are, 1 changes them as far as the limits below allow."""
    curve: float = 1.0
    """Weight of a random increasing Bezier curve against the identity, 0 to 1."""
    gamma: float = 2.0
    """Intensities to a power, log-uniform between 1 / this and this; 1 none."""
    contrast: float = 0.5
    """Distances from mid-grey times 1 plus or minus up to this, below 1."""
    brightness: float = 0.2
    """Plus or minus up to this, as a share of the window."""
    noise: float = 0.05
    """White Gaussian noise of a standard deviation up to this, as a share of the window."""


@dataclass(frozen=True)
class ContrastConfig:
    """Contrastive pretexts, and Parts2Whole with a contrastive loss; names which of them use a setting."""

    temperature: float = 0.7
    """Divides cosines [P: of its contrastive loss]."""
    hidden: int = 256
    """Width of the hidden layer between pooled features and embedding [?]; 0: the features are the embedding."""
    dim: int = 128
    """Channels of the embedding [?]."""
    weight: float = 0.01
    """parts2whole_contrast: of InfoNCE beside mean squared error [?]."""
    both: bool = True
    """parts2whole_contrast: reconstruct the whole from both parts, not from the first alone [?]."""
    queue: int = 4096
    """moco: parts remembered [?]."""
    momentum: float = 0.99
    """moco: share of itself that the following encoder keeps at a step [?]; MoCo's 0.999 is for runs of 100,000 steps."""
    bank: int = 32768
    """instdisc, pirl, exemplar: places for wholes [?]; with fewer than the set has sub-scans, some share one."""
    bank_momentum: float = 0.5
    """instdisc, pirl: share of itself that an entry keeps when its whole comes again [?]."""
    prototypes: int = 128
    """swav: prototypes [?]."""
    sinkhorn_iterations: int = 3
    """swav: how often assignments are balanced [?]."""
    sinkhorn_epsilon: float = 0.05
    """swav: how soft assignments are; smaller is harder [?]."""


@dataclass(frozen=True)
class PositionConfig:
    """Where a part lies and how large it is, as an extra target of parts2whole: beyond the paper."""

    weight: float = 0.0
    """Of the mean squared error of centre and log edges, beside that of the voxels; 0 does not ask [?]."""


@dataclass(frozen=True)
class GenesisConfig:
    """Deformations of models_genesis."""

    cube: Literal["crop", "whole"] = "crop"
    """What is deformed: a random crop of pretext.size native voxels [C], or the whole resized to it."""
    flip: float = 0.4
    """Probability of a flip along a random axis, and of another after it, up to three [C]; the target is flipped too."""
    shuffle: float = 0.5
    """Probability of shuffling voxels within small blocks [C]."""
    blocks: int = 10_000
    """Blocks that are shuffled, of edges up to a tenth of the cube's [C]."""
    curve: float = 0.9
    """Probability of a Bezier curve through the intensities [C]."""
    decreasing: float = 0.5
    """How many of those curves fall, so that bright becomes dark [C]."""
    paint: float = 0.9
    """Probability of noise painted over the cube [C]."""
    outpaint: float = 0.8
    """How many of those are painted outside of a few blocks; the others, inside of a few [C]."""


@dataclass(frozen=True)
class RubikConfig:
    """Puzzles of rubiks_cube and rubiks_cube_pp."""

    orders: int = 100
    """rubiks_cube: orders of its 2x2x2 cubes to tell apart, far from one another [P]."""
    gap: float = 0.1
    """rubiks_cube: share of an octant's edge that its cube leaves out, so that cubes do not fit edge to edge [?]."""
    masked: float = 0.5
    """rubiks_cube: probability that a cube is masked [?]."""
    hidden: float = 0.5
    """rubiks_cube: share of the voxels of a masked cube that are set to 0 [?]."""
    turn_weight: float = 1.0
    """rubiks_cube: weight of the turns beside the order [?]."""
    mask_weight: float = 1.0
    """rubiks_cube: weight of the masks beside the order [?]."""
    grid: tuple[int, int, int] = (2, 2, 2)
    """rubiks_cube_pp: cubes along z, y, x [?]; divides pretext.size."""
    adversary: float = 0.01
    """rubiks_cube_pp: weight of the critic beside the mean squared error; 0 builds none [?]."""
    critic_width: int = 16
    """rubiks_cube_pp: channels of the critic's first convolution [?]."""


@dataclass(frozen=True)
class MaeConfig:
    """Masks of mae."""

    patch: tuple[int, int, int] = (4, 8, 8)
    """Voxels z y x of a patch [?]; divides pretext.size."""
    ratio: float = 0.75
    """Share of the patches that are hidden [P: He et al. 2022]."""
    fill: Literal["mean", "zero"] = "mean"
    """What stands in hidden patches: the mean of what is seen of that whole, or 0 [?]."""


def check_pretexts(flat: dict[str, Any]) -> None:
    """Raise UserError where a setting, `{"intensity.gamma": 2.0, …}`, is out of its range."""
    ranges = {
        "intensity.strength": (0, 1), "intensity.curve": (0, 1), "intensity.gamma": (1, 10),
        "intensity.contrast": (0, 0.99), "intensity.brightness": (0, 1), "intensity.noise": (0, 1),
        "contrast.temperature": (1e-3, 1e3), "contrast.sinkhorn_epsilon": (1e-3, 1e3), "contrast.momentum": (0, 1),
        "contrast.bank_momentum": (0, 1), "contrast.hidden": (0, 65536), "contrast.dim": (1, 65536),
        "contrast.weight": (0, 1e6), "contrast.queue": (1, 10**7), "contrast.bank": (2, 10**8),
        "contrast.prototypes": (2, 10**6), "contrast.sinkhorn_iterations": (1, 1000),
        "position.weight": (0, 1000),
        "genesis.flip": (0, 1), "genesis.shuffle": (0, 1), "genesis.blocks": (1, 1_000_000), "genesis.curve": (0, 1),
        "genesis.decreasing": (0, 1), "genesis.paint": (0, 1), "genesis.outpaint": (0, 1),
        "rubik.orders": (2, 1000), "rubik.gap": (0, 0.5), "rubik.masked": (0, 1), "rubik.hidden": (0, 1),
        "rubik.turn_weight": (0, 1000), "rubik.mask_weight": (0, 1000), "rubik.adversary": (0, 1000),
        "rubik.critic_width": (1, 1024), "mae.ratio": (0, 1),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        if not low <= flat[name] <= high:
            raise UserError(
                f"{name}={flat[name]}: must be from {low} to {high}; pass --{name.replace('_', '-')}"
            )
    for name, usual in (("rubik.grid", "2 2 2"), ("mae.patch", "4 8 8")):
        if min(flat[name]) < 1:
            raise UserError(
                f"{name}={flat[name]}: needs three numbers of at least 1; pass e.g. --{name} {usual}"
            )
