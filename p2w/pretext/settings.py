"""Settings that all pretexts share, and bounds of settings. Without torch, so that `p2w.config` is cheap to import.

The settings of one pretext are a frozen dataclass in that pretext's own file. Marks in help texts: [P] published with the
task's own paper, [C] read in public code, [I] inferred, [?] our choice.
"""

import math
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from p2w.errors import UserError

Shows = Literal["part", "crop", "whole"]
"""What a pretext feeds to the encoder; the voxel spacing that the network sees follows from it.

`part`: parts of `pretext.volume_fraction`, resized to `pretext.size`. `crop`: `pretext.size` native voxels, not resized.
`whole`: the whole sub-scan, resized to `pretext.size`.
"""


@dataclass(frozen=True)
class Bounds:
    """Smallest and largest value of a setting, both allowed: `ratio: Annotated[float, Bounds(0, 1)] = 0.75`.

    Without `high` there is no largest value. For a setting of three numbers, `low` holds for each of them, and `usual` is
    the example in the message, as it is typed on the command line.
    """

    low: float
    high: float | None = None
    usual: str = ""


def check_bounds(group: str, settings: Any) -> None:
    """Check every field of a dataclass of settings; `group` is its name in `Config`.

    Raises UserError, which names value, rule and option, for a number outside the `Bounds` of its annotation, for an
    integer of 2^63 or more, and for a float that is not finite.
    """
    for field, hint in typing.get_type_hints(type(settings), include_extras=True).items():
        bounds = [one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Bounds)]
        check_value(f"{group}.{field}", getattr(settings, field), bounds[0] if bounds else None)


def check_value(name: str, value: Any, bounds: Bounds | None) -> None:
    """Check one setting, `name` with its group. Raises UserError as `check_bounds` does."""
    if value is None:  # left open
        return
    option = f"--{name.replace('_', '-')}"
    if bounds and isinstance(value, tuple):
        if min(value) < bounds.low:
            raise UserError(
                f"{name}={value}: needs three numbers of at least {bounds.low}; pass e.g. {option} {bounds.usual}"
            )
        return
    if bounds and bounds.high is None and not value >= bounds.low:
        raise UserError(f"{name}={value}: must be at least {bounds.low}; pass {option}")
    if isinstance(value, int) and value >= 2**63:
        raise UserError(f"{name}={str(value)[:20]}…: must be below 2^63; pass {option}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}={value}: must be finite; pass {option}")
    if bounds and bounds.high is not None and not bounds.low <= value <= bounds.high:
        raise UserError(f"{name}={value}: must be from {bounds.low} to {bounds.high}; pass {option}")


@dataclass(frozen=True)
class PretextConfig:
    """The pretext, and how its input is cut and scaled."""

    name: str = "parts2whole"
    """Which proxy task."""
    size: tuple[int, int, int] = (32, 64, 64)
    """Size of part and whole at the network, voxels z y x [I]; multiples of the encoder's stride, 8 for the paper's."""
    volume_fraction: tuple[float, float] = (1 / 16, 1 / 4)
    """A part's volume as a share of its whole, uniform between the two [P]. `1 1` is an autoencoder."""
    max_aspect: Annotated[float, Bounds(1)] = 4.0
    """How far a part's edges may depart from the whole's proportions: largest ratio of two edges, each as a share of the
    whole's; at most what its volume allows [?]. 1 keeps the whole's proportions."""
    antialias: bool = True
    """Filter when a resize shrinks; without it, reconstruction can read aliasing [?]."""
    window_hu: tuple[float, float] = (-1000.0, 1000.0)
    """HU that become 0 and 1 [I]."""
    skips: bool = False
    """Skip connections from encoder to decoder; the paper's ablation, off in its method [P]."""

    def check(self) -> None:
        """Raise UserError, with value, rule and remedy, where two numbers do not make a range."""
        low, high = self.volume_fraction
        if not 0 < low <= high <= 1:
            raise UserError(
                f"pretext.volume_fraction={low} {high}: needs 0 < low <= high <= 1; the paper has 0.0625 0.25"
            )
        floor, ceiling = self.window_hu
        if not -math.inf < floor < ceiling < math.inf:
            raise UserError(
                f"pretext.window_hu={floor} {ceiling}: the first must be below the second; the usual is -1000 1000"
            )


class RunConfig(Protocol):
    """What a pretext is built from: the `p2w.config.Config` of a run, which also has the groups of single pretexts."""

    @property
    def pretext(self) -> PretextConfig:
        """Settings that all pretexts share."""

    @property
    def model(self) -> Any:
        """Settings of the encoder."""

    @property
    def data(self) -> Any:
        """Settings of the batches."""

    @property
    def optim(self) -> Any:
        """Settings of the optimizer."""
