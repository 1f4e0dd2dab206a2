"""Autoencoder: the whole in, the whole out; what Parts2Whole is at `--pretext.volume-fraction 1 1`, by its own name.

The control of the paper's idea: the same network, loss and data, nothing to complete.
"""

from dataclasses import replace

from torch import Tensor

from p2w.config import PretextConfig
from p2w.errors import UserError
from p2w.pretext.parts2whole import Parts2Whole
from p2w.pretext.protocol import Views
from p2w.pretext_config import IntensityConfig, PositionConfig


class Autoencoder(Parts2Whole):
    """The part is the whole, whatever `pretext.volume_fraction` says; with `intensity.strength` it restores intensities."""

    def __init__(self, config: PretextConfig, intensity: IntensityConfig, position: PositionConfig) -> None:
        if position.weight:
            raise UserError(
                f"position.weight={position.weight}: pretext.name=autoencoder shows no part whose place could be asked for; "
                "pass --position.weight 0"
            )
        super().__init__(replace(config, volume_fraction=(1.0, 1.0)), intensity)

    def panels(self, views: Views) -> dict[str, Tensor]:
        """What is seen and what is asked."""
        return {"input": views.input, "whole": views.target}
