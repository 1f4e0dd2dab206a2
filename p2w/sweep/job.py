"""One command of a sweep, and how much of it is done. Its folder is the truth: nothing else remembers."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from p2w.errors import UserError
from p2w.target import results


@dataclass(frozen=True)
class Job:
    """A command that fills `folder`: `units` trials of a fine-tuning, or one pretraining."""

    name: str
    folder: Path
    command: tuple[str, ...]  # begins with `python` or `torchrun`
    units: int
    pretrains: bool = False
    needs: str = ""  # name of the job whose result it starts from

    def count(self) -> int:
        """Units that are finished."""
        if self.pretrains:
            return int(self._state() in ("finished", "stopped early"))
        try:
            return min(self.units, len(results.read(self.folder).trials))
        except UserError:  # not begun
            return 0

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.count() == self.units

    @property
    def line(self) -> str:
        """As a shell takes it."""
        return shlex.join(self.command)

    def _state(self) -> str:
        try:
            return str(json.loads((self.folder / "status.json").read_text())["state"])
        except (OSError, ValueError, LookupError, TypeError):
            return ""
