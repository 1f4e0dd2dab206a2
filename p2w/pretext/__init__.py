"""Pretexts by name: what the network is shown, what it must answer, and the loss between the two.

A new pretext is one file here, one line in PRETEXTS, one test file: docs/add_a_pretext.md. The train loop does not depend on
which one it trains. This module imports no torch; a pretext's file is imported when it is first asked for.
"""

import functools
import importlib
from typing import TYPE_CHECKING

from p2w.errors import UserError
from p2w.pretext.settings import RunConfig

if TYPE_CHECKING:
    from p2w.model import Network
    from p2w.pretext.protocol import Pretext

# `pretext.name` -> module and class, imported when it is asked for.
PRETEXTS: dict[str, str] = {
    "parts2whole": "p2w.pretext.parts2whole:Parts2Whole",
    "autoencoder": "p2w.pretext.parts2whole:Autoencoder",
    "models_genesis": "p2w.pretext.models_genesis:ModelsGenesis",
    "rubiks_cube": "p2w.pretext.rubiks_cube:RubiksCube",
    "rubiks_cube_pp": "p2w.pretext.rubiks_cube:RubiksCubePp",
    "simmim": "p2w.pretext.mae:SimMim",
    "mae": "p2w.pretext.mae:Mae",
    "spark": "p2w.pretext.spark:Spark",
    "voco": "p2w.pretext.voco:Voco",
    "parts2whole_contrast": "p2w.pretext.contrastive.contrastive_pretext:Parts2WholeContrast",
    "simclr": "p2w.pretext.contrastive:SimClr",
    "moco": "p2w.pretext.contrastive:Moco",
    "instdisc": "p2w.pretext.contrastive:InstDisc",
    "pirl": "p2w.pretext.contrastive:Pirl",
    "exemplar": "p2w.pretext.contrastive:Exemplar",
    "swav": "p2w.pretext.contrastive:Swav",
    "dino": "p2w.pretext.contrastive:Dino",
    "amdim": "p2w.pretext.contrastive:Amdim",
}


def pretext_class(name: str) -> "type[Pretext]":
    """The class of pretext `name`. Raises UserError when the table has no such pretext."""
    if name not in PRETEXTS:
        raise UserError(f"pretext.name={name}: unknown; one of {', '.join(sorted(PRETEXTS))}")
    module, _, attribute = PRETEXTS[name].partition(":")
    kind: type[Pretext] = getattr(importlib.import_module(module), attribute)
    return kind


@functools.cache
def pretext_groups() -> dict[str, type]:
    """Group name -> dataclass of settings, of all pretexts; a group that two pretexts read is one class."""
    groups: dict[str, type] = {}
    for name in PRETEXTS:
        for group, kind in pretext_class(name).groups.items():
            if groups.setdefault(group, kind) is not kind:
                raise TypeError(f"pretext {name}: {group} is already the group of {groups[group].__name__}")
    return groups


def build_pretext(config: RunConfig) -> "Pretext":
    """Make the pretext `config.pretext.name`. Raises UserError when the table has no such pretext."""
    return pretext_class(config.pretext.name).from_config(config)


def build_pretext_and_network(config: RunConfig) -> "tuple[Pretext, Network]":
    """The proxy task and its network, freshly initialised. Raises UserError for names and sizes there are not."""
    from p2w.model import build_encoder  # noqa: PLC0415  torch: p2w.config imports this module, and must be cheap

    pretext = build_pretext(config)
    return pretext, pretext.build(build_encoder(config.model.name, config.model.width))
