"""What a folder of shards asks of the settings and the scans of any kind of data set."""

from typing import Any, Protocol


class Chosen(Protocol):
    """Settings of any kind of data set."""

    @property
    def format(self) -> str:
        """Of the shards: tar or arrow."""

    def plain(self) -> dict[str, Any]:
        """As JSON writes them; another run must have the same."""


class Scanned(Protocol):
    """What one shard is cut from: a scan, or a case of a target task."""

    @property
    def uid(self) -> str:
        """Names the shard."""

    @property
    def name(self) -> str:
        """What the user sees."""
