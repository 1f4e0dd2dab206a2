"""Pretexts by name: what the network is shown, what it must answer, and the loss between the two.

A new pretext is one file here, one line in PRETEXTS, one test file. The train loop knows none by name.
"""

from collections.abc import Callable

from p2w.config import Config
from p2w.errors import UserError
from p2w.model import Network, build_encoder
from p2w.pretext import contrastive
from p2w.pretext.contrastive.contrastive_pretext import Parts2WholeContrast
from p2w.pretext.mae import Mae
from p2w.pretext.models_genesis import ModelsGenesis
from p2w.pretext.parts2whole import Autoencoder, Parts2Whole
from p2w.pretext.protocol import Pretext, Views
from p2w.pretext.rubiks_cube import RubiksCube, RubiksCubePp

__all__ = ["PRETEXTS", "Pretext", "Views", "build_pretext"]


PRETEXTS: dict[str, Callable[[Config], Pretext]] = {
    "parts2whole": lambda config: Parts2Whole(config.pretext, config.intensity, config.position),
    "autoencoder": lambda config: Autoencoder(config.pretext, config.intensity, config.position),
    "models_genesis": lambda config: ModelsGenesis(config.pretext, config.genesis),
    "rubiks_cube": lambda config: RubiksCube(config.pretext, config.rubik),
    "rubiks_cube_pp": lambda config: RubiksCubePp(config.pretext, config.rubik),
    "mae": lambda config: Mae(config.pretext, config.mae),
    "parts2whole_contrast": Parts2WholeContrast,
    "simclr": lambda config: contrastive.ContrastivePretext(config, contrastive.InBatch),
    "moco": lambda config: contrastive.ContrastivePretext(config, contrastive.MocoQueue),
    "instdisc": lambda config: contrastive.ContrastivePretext(config, contrastive.MemoryBank),
    "pirl": lambda config: contrastive.ContrastivePretext(config, contrastive.PirlBank),
    "exemplar": lambda config: contrastive.ContrastivePretext(config, contrastive.InstanceClasses),
    "swav": lambda config: contrastive.ContrastivePretext(config, contrastive.Prototypes),
    "amdim": lambda config: contrastive.ContrastivePretext(config, contrastive.LocalGlobal),
}


def build_pretext(config: Config) -> Pretext:
    """Make the pretext `config.pretext.name`. Raises UserError when the table has no such pretext."""
    name = config.pretext.name
    if name not in PRETEXTS:
        raise UserError(f"pretext.name={name}: unknown; one of {', '.join(sorted(PRETEXTS))}")
    return PRETEXTS[name](config)


def build_pretext_and_network(config: Config) -> tuple[Pretext, Network]:
    """The proxy task and its network, freshly initialised. Raises UserError for names and sizes there are not."""
    pretext = build_pretext(config)
    return pretext, pretext.build(build_encoder(config.model.name, config.model.width))
