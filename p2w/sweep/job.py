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
    test_set: str = ""  # of a fine-tuning: what it is judged on, as `results.Transfer` says it
    fraction: float = 1.0

    def count(self) -> int:
        """Units that are finished. Raises UserError where the folder holds a fine-tuning on other data."""
        if self.pretrains:
            return int(self._state() in ("finished", "stopped early"))
        try:
            found = results.read(self.folder)
        except UserError:  # not begun
            return 0
        if self.test_set and (found.test_set, found.fraction) != (self.test_set, self.fraction):
            raise UserError(
                f"{self.folder}: is of target set {found.test_set} and --fraction {found.fraction:g}, the sweep's are "
                f"{self.test_set} and {self.fraction:g}; name another --out"
            )
        return min(self.units, len(found.trials))

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
