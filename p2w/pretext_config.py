"""Settings of the single proxy tasks, as frozen dataclasses: a group each in `p2w.config.Config`.

Marks as there: [P] published with the task's own paper, [C] read in public code, [I] inferred, [?] our choice.
"""

from dataclasses import dataclass
from typing import Any

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


def check_pretexts(flat: dict[str, Any]) -> None:
    """Raise UserError where a setting, `{"intensity.gamma": 2.0, …}`, is out of its range."""
    ranges = {
        "intensity.strength": (0, 1), "intensity.curve": (0, 1), "intensity.gamma": (1, 10),
        "intensity.contrast": (0, 0.99), "intensity.brightness": (0, 1), "intensity.noise": (0, 1),
        "contrast.temperature": (1e-3, 1e3), "contrast.sinkhorn_epsilon": (1e-3, 1e3), "contrast.momentum": (0, 1),
        "contrast.bank_momentum": (0, 1), "contrast.hidden": (0, 65536), "contrast.dim": (1, 65536),
        "contrast.weight": (0, 1e6), "contrast.queue": (1, 10**7), "contrast.bank": (2, 10**8),
        "contrast.prototypes": (2, 10**6), "contrast.sinkhorn_iterations": (1, 1000),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        if not low <= flat[name] <= high:
            raise UserError(
                f"{name}={flat[name]}: must be from {low} to {high}; pass --{name.replace('_', '-')}"
            )
