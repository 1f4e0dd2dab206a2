"""What an analysis has computed once, so that an interrupted one continues: RUN/analysis/cache/NAME-KEY.npz.

The key is a hash of all that the numbers follow from (weights, settings, data). Files are written whole or not at all, and
never changed; the folder may be deleted.
"""

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2w.errors import UserError
from p2w.log import write_atomic
from p2w.world import World

Key = tuple[str, tuple[Any, ...]]  # name, and the plain values that the array follows from


class Cache:
    """Arrays by key, in a folder that all ranks see; rank 0 writes."""

    def __init__(self, run: Path, world: World) -> None:
        self.folder, self.world = run / "analysis" / "cache", world

    def has(self, key: Key) -> bool:
        """Whether every rank sees it; a collective."""
        return not self.world.any(not self.path(key).is_file())

    def read(self, key: Key) -> NDArray[Any]:
        """Raises UserError when it is gone or damaged (zip keeps a checksum)."""
        path = self.path(key)
        try:
            with np.load(path) as saved:
                return np.asarray(saved["value"])
        except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: cannot be read ({error}); delete it and repeat the command") from error

    def write(self, key: Key, value: NDArray[Any]) -> None:
        """Rank 0 writes, the others wait; a collective. Raises UserError when the disk takes no more."""
        if self.world.is_main:
            self.keep(key, value)
        self.world.barrier()

    def keep(self, key: Key, value: NDArray[Any]) -> None:
        """The same for what rank 0 makes alone."""
        packed, path = io.BytesIO(), self.path(key)
        np.savez(packed, value=value)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, packed.getvalue())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; make room, then repeat the command") from error

    def path(self, key: Key) -> Path:
        """Where it is kept."""
        name, follows = key
        digest = hashlib.sha256(json.dumps(follows, sort_keys=True).encode()).hexdigest()[:20]
        return self.folder / f"{name}-{digest}.npz"
