"""Pretexts by name: what the network is shown, what it must answer, and the loss between the two.

A new pretext is one file here, one line in PRETEXTS, one test file. The train loop knows none by name.
"""

from collections.abc import Callable

from p2w.config import PretextConfig
from p2w.errors import UserError
from p2w.pretext.parts2whole import Parts2Whole
from p2w.pretext.protocol import Pretext, Views

__all__ = ["PRETEXTS", "Pretext", "Views", "build_pretext"]

PRETEXTS: dict[str, Callable[[PretextConfig], Pretext]] = {"parts2whole": Parts2Whole}


def build_pretext(config: PretextConfig) -> Pretext:
    """Make the pretext `config.name`. Raises UserError when the table has no such pretext."""
    if config.name not in PRETEXTS:
        raise UserError(f"pretext.name={config.name}: unknown; one of {', '.join(sorted(PRETEXTS))}")
    return PRETEXTS[config.name](config)
