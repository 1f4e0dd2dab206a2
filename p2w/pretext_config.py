"""Settings of the single proxy tasks, as frozen dataclasses: a group each in `p2w.config.Config`.

Marks as there: [P] published with the task's own paper, [C] read in public code, [I] inferred, [?] our choice.
"""

from dataclasses import dataclass
from typing import Any

from p2w.errors import UserError


@dataclass(frozen=True)
class IntensityConfig:
    """Intensities of what the network sees are changed, those of the target are not: the paper's future work.

    Read by the proxies that cut parts (parts2whole, autoencoder). Limits hold at strength 1 and shrink with it [?].
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


def check_pretexts(flat: dict[str, Any]) -> None:
    """Raise UserError where a setting, `{"intensity.gamma": 2.0, …}`, is out of its range."""
    ranges = {
        "intensity.strength": (0, 1), "intensity.curve": (0, 1), "intensity.gamma": (1, 10),
        "intensity.contrast": (0, 0.99), "intensity.brightness": (0, 1), "intensity.noise": (0, 1),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        if not low <= flat[name] <= high:
            raise UserError(
                f"{name}={flat[name]}: must be from {low} to {high}; pass --{name.replace('_', '-')}"
            )
