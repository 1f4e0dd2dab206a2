"""The paper's protocol in numbers (Fig. 2a-c), each a setting, and the parts it asks for."""

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2w.analysis.contrast import NEGATIVES, TEMPERATURE, TESTS
from p2w.analysis.features import PartSet, log_bins
from p2w.config import PretextConfig
from p2w.errors import UserError
from p2w.geometry import Range

SMALLEST = 1 / 16  # the smallest part that is shown and measured [P]
GROWING = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # scales of the reconstructions


@dataclass(frozen=True)
class Settings:
    """Sizes of the analysis. Marked [P]: the paper's; the others are our choice."""

    parts: int = 16
    """Parts of each whole, from which pairs and contrastive tests are drawn."""
    pairs: int = 100
    """Positive pairs, and as many negative ones, of each whole [P]."""
    tests: int = TESTS
    """Contrastive tests of each whole [P]."""
    negatives: int = NEGATIVES
    """Negative pairs of a contrastive test [P]; drawn from the parts of all other wholes, with replacement."""
    temperature: float = TEMPERATURE
    """t of the contrastive loss [P]."""
    scales: int = 8
    """Ranges of part scale, from 1/16 to 1 and equally wide in log, in which separability is measured."""
    scale_parts: int = 6
    """Parts of each whole in each of these ranges; all their pairs are taken."""
    scatter_wholes: int = 10
    """Wholes shown by t-SNE [P]."""
    scatter_parts: int = 200
    """Parts of each of them, of scale 1/16 to 1 [P]."""
    volume_fraction: tuple[float, float] | None = None
    """Scale of the parts in pairs and tests; default: as the run was trained, 1/16 to 1/4 for one that saw no parts."""
    max_wholes: int = 0
    """Take this many wholes, evenly spread; 0 takes all."""
    batch: int = 16
    """Parts that go through the network at a time."""
    seed: int = 0
    """Another seed cuts other parts and draws other pairs."""

    def check(self) -> "Settings":
        """Raises UserError for numbers that make no sense."""
        least = {"parts": 2, "scale_parts": 2, "max_wholes": 0, "seed": 0}
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, int) and value < least.get(name, 1):
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} {value}: must be at least {least.get(name, 1)}")
        if self.max_wholes == 1:
            raise UserError("--max-wholes 1: parts of different wholes are compared, which takes at least 2")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"--temperature {self.temperature}: must be above 0; the paper has 0.7")
        if self.volume_fraction and not 0 < self.volume_fraction[0] <= self.volume_fraction[1] <= 1:
            raise UserError(
                f"--volume-fraction {self.volume_fraction}: needs 0 < low <= high <= 1; the paper has 0.0625 0.25"
            )
        return self

    def fraction(self, pretext: PretextConfig) -> Range:
        """Scale of the parts in pairs and tests."""
        if self.volume_fraction:
            return self.volume_fraction
        trained = pretext.volume_fraction
        return trained if trained[0] < 1 else PretextConfig().volume_fraction  # an autoencoder saw no parts

    def part_sets(self, pretext: PretextConfig) -> dict[str, PartSet]:
        """What is cut. The first thousand parts are left to validation and to what training itself looks at."""
        common = (pretext.aspect_range, self.seed)
        bins = log_bins(SMALLEST, self.scales)
        sets = (
            PartSet("parts", 1_000, self.parts, (self.fraction(pretext),), *common),
            PartSet("scales", 100_000, self.scale_parts, bins, *common),
            PartSet("scatter", 1_000_000, self.scatter_parts, ((SMALLEST, 1.0),), *common),
            PartSet("whole", 0, 1, ((1.0, 1.0),), *common),
        )
        return {one.name: one for one in sets}

    def wholes(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those that are analysed: all, or `max_wholes` evenly spread."""
        count = min(len(ids), self.max_wholes or len(ids))
        return ids[np.linspace(0, len(ids) - 1, count).astype(int)]

    def scattered(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those that t-SNE shows, one of each of `scatter_wholes` stretches: of different scans where there are as many."""
        stretches = np.array_split(ids, min(self.scatter_wholes, len(ids)))
        rng = np.random.default_rng([self.seed, 10])
        return np.array([rng.choice(stretch) for stretch in stretches], np.int64)
