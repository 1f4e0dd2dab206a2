"""Pretexts by name: what the network is shown, what it must answer, and the loss between the two.

A new pretext is one file here, one line in PRETEXTS, one test file. The train loop knows none by name.
"""

from collections.abc import Callable

from p2w.config import Config
from p2w.errors import UserError
from p2w.pretext.parts2whole import Parts2Whole
from p2w.pretext.protocol import Pretext, Views

__all__ = ["PRETEXTS", "Pretext", "Views", "build_pretext"]

PRETEXTS: dict[str, Callable[[Config], Pretext]] = {
    "parts2whole": lambda config: Parts2Whole(config.pretext),
}


def build_pretext(config: Config) -> Pretext:
    """Make the pretext `config.pretext.name`. Raises UserError when the table has no such pretext."""
    name = config.pretext.name
    if name not in PRETEXTS:
        raise UserError(f"pretext.name={name}: unknown; one of {', '.join(sorted(PRETEXTS))}")
    return PRETEXTS[name](config)
