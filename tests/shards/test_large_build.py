"""Merging sets of very many scans: rows in tables give the same bytes, and a share that ends early reads no record."""

from pathlib import Path

import pytest

from p2w.ct.discover import ScanListing, ScanSource
from p2w.files import canonical_json
from p2w.shards import build
from p2w.shards.build_folder import JobShare
from p2w.shards.manifest_schema import MANIFEST_NAME
from p2w.shards.scan_shards import ScanFolder, ShardingSettings
from p2w.shards.tiling import Tiling


@pytest.fixture
def record_of(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    from bench.merge import record_of

    return record_of


@pytest.fixture(params=["skip", "pad"])
def recorded(tmp_path, request, record_of):
    """A folder with the records of seven scans, one bad and one without sub-scans, and their listing."""
    folder = ScanFolder(str(tmp_path / "set"), ShardingSettings(Tiling(short=request.param)))
    folder.prepare(JobShare())
    sources = [ScanSource(f"1.2.{number}", f"{number}.mhd", ()) for number in (5, 3, 20, 1, 2, 7, 8)]
    for source in sources:
        record = record_of(source.uid) | {"name": source.name}
        if request.param == "pad":
            record["rows"] = [row | {"real_z": 64, "real_y": 9, "real_x": 128} for row in record["rows"]]
        if source.uid == "1.2.20":
            record |= {"rows": [], "shard": None}
        if source.uid == "1.2.7":
            record = {"uid": source.uid, "name": source.name, "subset": -1, "bad": "is cut off"}
        (tmp_path / "set" / "scans" / f"{source.uid}.json").write_bytes(canonical_json(record))
    (tmp_path / "set" / ".run").mkdir(exist_ok=True)
    return folder, ScanListing(sources), tmp_path / "set"


def test_rows_in_tables_give_the_same_bytes(recorded, monkeypatch):
    folder, listing, root = recorded
    meta = build.merge_records(listing, folder)
    names = [MANIFEST_NAME, "report.json", "README.md", "train.txt", "val.txt"]
    expected = {name: (root / name).read_bytes() for name in names}
    monkeypatch.setattr(build, "LARGE_SHARDS", 1)
    for chunk in (2, 1000):
        monkeypatch.setattr(build, "RECORDS_A_CHUNK", chunk)
        assert build.merge_records(listing, folder) == meta
        assert {name: (root / name).read_bytes() for name in names} == expected


def test_no_record_is_read_while_one_is_missing(recorded, record_of, monkeypatch):
    folder, listing, root = recorded
    assert build.unfinished_sources(listing, folder) == []
    (root / "scans" / "1.2.3.json").unlink()
    (root / "scans" / "1.2.8.json").write_bytes(b"{")  # damaged
    monkeypatch.setattr(folder, "record", None)
    assert build.unfinished_sources(listing, folder) == ["3.mhd"]
    monkeypatch.undo()
    (root / "scans" / "1.2.3.json").write_bytes(canonical_json(record_of("1.2.3")))
    assert build.unfinished_sources(listing, folder) == ["8.mhd"]
