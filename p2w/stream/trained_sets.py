"""The data set that a run or weights were trained on, found again where it may be now and proven by its fingerprint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from p2w.errors import UserError
from p2w.shards.manifest import candidate_data_paths, data_fingerprint, open_manifest
from p2w.shards.mixture import is_mixture, parse_mixture


def open_trained_sets(
    near: Path, start: Mapping[str, Any], data: Any, of: str
) -> list[tuple[dict[str, Any], str]]:
    """Metadata of the set's manifest and where it is; of a mixture, of each of its sets.

    `near` and `start` are as `candidate_data_paths` takes them, `data` is the set's fingerprint (None: not known), and `of`
    names the run or weights in messages. Raises the UserError of the likeliest location where none holds the set.
    """
    refused: UserError | None = None
    for location in candidate_data_paths(near, start):
        try:
            return _open(location, data, of)
        except UserError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _open(where: str, data: Any, of: str) -> list[tuple[dict[str, Any], str]]:
    """The manifests there, which must still be those of the set `data` (a fingerprint; None: not known)."""
    if is_mixture(where):
        from p2w.stream.stream import open_set  # noqa: PLC0415 - torch, and webdataset for remote sets

        if data is not None and data_fingerprint(open_set(where).meta) != data:
            raise UserError(f"{where}: is another mixture now than {of} was trained on")
        return [found for part in parse_mixture(where) for found in _open(part.where, None, of)]
    if "://" in where:
        from p2w.stream.stream import open_set  # noqa: PLC0415 - webdataset serves remote sets only

        meta = open_set(where).meta
    else:
        meta = open_manifest(where).meta
    if data is not None and data_fingerprint(meta) != data:
        raise UserError(f"{where}: is another data set now than {of} was trained on")
    return [(meta, where)]
