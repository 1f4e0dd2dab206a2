"""The folder of a target task's data set while it is written: pretraining's, with the records of cases. No torch."""

import json
import os
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from p2w.data.folder import Folder
from p2w.data.manifest import VERSION, dump
from p2w.data.scan import source_files
from p2w.target.record import FILE, SCHEMA
from p2w.target.tasks.protocol import Case

ROW = {
    "key": str, "label": int, "scan_uid": str, "of": str, "z": int, "y": int, "x": int, "centre_z": float,
    "centre_y": float, "centre_x": float, "spacing_z": float, "spacing_y": float, "spacing_x": float,
    "foreground": float, "patient": str, "offset": int, "nbytes": int, "crc32c": int,
}  # fmt: skip
NAMED = {"uid": str, "name": str}
FINISHED = {
    "nbytes": int, "files": [FILE], "left_out": [str], "rows": [ROW], "shard": (None, {"nbytes": int, "crc32c": int}),
}  # fmt: skip


@dataclass(frozen=True)
class TargetSettings:
    """All that decides what the finished folder holds, besides the images themselves."""

    task: str
    options: dict[str, Any]
    size: tuple[int, int, int]  # z, y, x
    format: str
    tables: dict[str, str]  # tables that name samples, by the checksum of each

    def plain(self) -> dict[str, Any]:
        """As JSON writes it."""
        told = {"schema": VERSION, "task": self.task, "size_zyx": self.size, "format": self.format}
        options = {f"option {name}": value for name, value in self.options.items()}
        return json.loads(dump(told | options | {f"table {name}": crc for name, crc in self.tables.items()}))


class TargetFolder(Folder[TargetSettings]):
    """Paths and small files."""

    form = (NAMED | {"bad": str}, NAMED | FINISHED)
    columns = pa.schema([SCHEMA.field(name) for name in ROW])

    def nbytes(self, source: Case) -> int:
        """Of all files of a case."""
        images = [path for _, one in source.files for path in source_files(one)]
        return sum(os.path.getsize(path) for path in [*images, *(path for _, path in source.notes)])
