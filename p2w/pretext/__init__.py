"""Pretexts by name: what the network is shown, what it must answer, and the loss between the two.

A new pretext is one file here, one line in PRETEXTS, one test file. The train loop knows none by name.
"""

from collections.abc import Callable

from p2w.config import Config
from p2w.errors import UserError
from p2w.pretext import contrast
from p2w.pretext.autoencoder import Autoencoder
from p2w.pretext.mae import Mae
from p2w.pretext.models_genesis import ModelsGenesis
from p2w.pretext.parts2whole import Parts2Whole
from p2w.pretext.parts2whole_contrast import Parts2WholeContrast
from p2w.pretext.protocol import Pretext, Views
from p2w.pretext.rubiks_cube import RubiksCube
from p2w.pretext.rubiks_cube_pp import RubiksCubePp

__all__ = ["PRETEXTS", "Pretext", "Views", "build_pretext"]

PRETEXTS: dict[str, Callable[[Config], Pretext]] = {
    "parts2whole": lambda config: Parts2Whole(config.pretext, config.intensity, config.position),
    "autoencoder": lambda config: Autoencoder(config.pretext, config.intensity, config.position),
    "models_genesis": lambda config: ModelsGenesis(config.pretext, config.genesis),
    "rubiks_cube": lambda config: RubiksCube(config.pretext, config.rubik),
    "rubiks_cube_pp": lambda config: RubiksCubePp(config.pretext, config.rubik),
    "mae": lambda config: Mae(config.pretext, config.mae),
    "parts2whole_contrast": Parts2WholeContrast,
    "simclr": lambda config: contrast.Contrast(config, contrast.Batch),
    "moco": lambda config: contrast.Contrast(config, contrast.Queue),
    "instdisc": lambda config: contrast.Contrast(config, contrast.Bank),
    "pirl": lambda config: contrast.Contrast(config, contrast.TransformedBank),
    "exemplar": lambda config: contrast.Contrast(config, contrast.Classes),
    "swav": lambda config: contrast.Contrast(config, contrast.Prototypes),
    "amdim": lambda config: contrast.Contrast(config, contrast.Cells),
}


def build_pretext(config: Config) -> Pretext:
    """Make the pretext `config.pretext.name`. Raises UserError when the table has no such pretext."""
    name = config.pretext.name
    if name not in PRETEXTS:
        raise UserError(f"pretext.name={name}: unknown; one of {', '.join(sorted(PRETEXTS))}")
    return PRETEXTS[name](config)
