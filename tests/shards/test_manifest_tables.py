"""Manifests of version 2: lists as tables, mapped rows; and manifests of version 1 as earlier versions wrote them."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stream_sets import write_set

from p2w.errors import UserError
from p2w.shards import manifest as manifests
from p2w.shards import manifest_index, verify
from p2w.shards.manifest import data_fingerprint, manifest_bytes, open_manifest
from p2w.shards.manifest_schema import MANIFEST_NAME
from p2w.shards.manifest_tables import TableList, json_pieces, table_of
from p2w.stream.stream import open_set

OLD = Path(__file__).parent / "manifest-version-1.parquet"  # of write_set(), by the version before tables


def source(uid, **more):
    place = {"shape": [8, 4, 2], "spacing_mm": [1.25, 0.75, 0.75], "origin_xyz_mm": [0.0, -1.5, 2.0]}
    told = {"uid": uid, "file": f"{uid}.mhd", "subset": -1, "nbytes": 128, "checksum": "crc32c:00000001"}
    return told | place | {"direction_xyz": [1.0, 0, 0, 0, 1, 0, 0, 0, 1], "left_out": 0} | more


def rows_and_meta(folder):
    """Rows and metadata of a small set, with all the lists that a manifest may have."""
    found = open_manifest(folder)
    uids = [shard["name"].removesuffix(".tar") for shard in found.meta["shards"]]
    meta = {key: value for key, value in found.meta.items() if key != "seal"}
    meta["sources"] = [source(uid) for uid in uids]
    meta["sources"][1] |= {"patient": "ab", "stored": {"shape": [1, 2, 3], "spacing_mm": [1.0, 1.0, 2.0]}}
    meta["bad_scans"] = [{"where": "x.mhd", "why": "is bad"}]
    meta["split"] = {"rule": "by scan", "seed": 0, "train_scans": uids[:-1], "val_scans": uids[-1:]}
    rows = found.table.to_pylist()
    return [row | {"key": key} for row, key in zip(rows, found.keys.to_pylist(), strict=True)], meta


@pytest.fixture
def both(tmp_path):
    """A set whose manifest is of version 2, and the manifest of version 1 with the same rows."""
    write_set(tmp_path)
    rows, meta = rows_and_meta(tmp_path)
    (tmp_path / MANIFEST_NAME).write_bytes(manifest_bytes(rows, meta, version=2))
    return tmp_path, open_manifest(manifest_bytes(rows, meta))


def test_both_versions_say_the_same(both):
    folder, old = both
    new = open_manifest(folder)
    assert (old.meta["schema"], new.meta["schema"]) == (1, 2)
    for key in set(old.meta) - {"schema", "seal", "split"}:
        assert new.meta[key] == old.meta[key], key
    assert {**new.meta["split"]} == old.meta["split"] and isinstance(new.meta["sources"], TableList)
    assert data_fingerprint(new.meta) == data_fingerprint(old.meta)
    assert new.keys.to_pylist() == old.table["key"].to_pylist() and "key" not in new.table.column_names
    for name in new.table.column_names:
        assert new.table[name].to_pylist() == old.table[name].to_pylist(), name
    assert new.keys[7] == old.keys[7] and new.keys.take([5, 1]).to_pylist() == [old.keys[5], old.keys[1]]
    for shard in old.meta["shards"]:
        assert verify._rows(new, shard) == verify._rows(old, shard)
        assert verify.verify_shard(new, shard, str(folder)) is None


def test_other_programs_read_the_rows(both):
    table = pq.read_table(both[0] / MANIFEST_NAME)
    assert table["offset"].to_pylist() == both[1].table["offset"].to_pylist()
    assert json.loads(table.schema.metadata[b"p2w"])["schema"] == 2


def test_the_version_follows_from_the_size(tmp_path, monkeypatch):
    write_set(tmp_path)
    rows, meta = rows_and_meta(tmp_path)
    for rest in ("LARGE_ROWS", "LARGE_SHARDS"):
        monkeypatch.setattr(manifests, rest, {"LARGE_ROWS": 19, "LARGE_SHARDS": 4}[rest])
        assert open_manifest(manifest_bytes(rows, meta)).meta["schema"] == 2
        monkeypatch.setattr(manifests, rest, 20)
        assert open_manifest(manifest_bytes(rows, meta)).meta["schema"] == 1
    shuffled = [rows[at] for at in np.random.default_rng(0).permutation(len(rows))]
    columns = pa.Table.from_pylist(shuffled, schema=manifests.SUB_SCAN_SCHEMA.schema)
    written = {manifest_bytes(given, meta, version=2) for given in (rows, shuffled, columns)}
    assert len(written) == 1


def test_a_manifest_of_an_earlier_version_is_read_as_before(tmp_path):
    write_set(tmp_path)
    found = open_manifest(OLD.read_bytes())
    assert found.meta["schema"] == 1 and data_fingerprint(found.meta) == "2e8b0bde5f4b4553"
    assert (tmp_path / MANIFEST_NAME).read_bytes() == OLD.read_bytes()  # small sets are written as ever


def test_long_lists_of_version_1_can_be_read(tmp_path, monkeypatch):
    """Arrow has a limit of 100 MB for a text of the metadata, which sets of 131,000 scans exceeded; here it is 8 kB."""
    plain = pq.ParquetFile
    write_set(tmp_path)
    rows, meta = rows_and_meta(tmp_path)
    data = manifest_bytes(rows, meta | {"note": "x" * 20_000}, version=1)
    with pytest.raises(OSError, match="limit"):
        plain(pa.BufferReader(data), thrift_string_size_limit=8000)
    asked = []
    monkeypatch.setattr(pq, "ParquetFile", lambda *a, **more: asked.append(more) or plain(*a, **more))
    assert open_manifest(data).meta["note"] and asked[0]["thrift_string_size_limit"] >= max(1e8, len(data))


def test_a_newer_version_is_refused_in_one_line(tmp_path):
    write_set(tmp_path)
    rows, meta = rows_and_meta(tmp_path)
    (tmp_path / MANIFEST_NAME).write_bytes(manifest_bytes(rows, meta | {"schema": 3}, version=1))
    with pytest.raises(UserError, match=r"manifest of version 3, and this p2w reads .* 2: update p2w$"):
        open_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows, meta: rows[1].update(offset=-64), "bytes from byte -64"),
        (lambda rows, meta: rows[1].update(offset=rows[0]["offset"] + 64), "overlaps another"),
        (lambda rows, meta: rows[1].update(shard="other.tar"), "'other.tar' is not in its list"),
        (lambda rows, meta: rows[1].update(key=rows[0]["key"]), "two sub-scans have one key"),
        (lambda rows, meta: rows[1].update(key=rows[0]["key"], z=0), "two sub-scans have one key"),
        (lambda rows, meta: rows[1].update(offset=None), "column offset has missing values"),
        (lambda rows, meta: meta["shards"].append(meta["shards"][0]), "two shards have one name"),
        (lambda rows, meta: meta["shards"][0].update(nbytes="10"), "'nbytes' of an entry is string"),
        (lambda rows, meta: meta["shards"][0].pop("crc32c"), "an entry lacks 'crc32c'"),
        (lambda rows, meta: meta["shards"][0].update(name="../a.tar"), "could lead outside"),
        (lambda rows, meta: meta["sources"][0].update(nbytes="x"), "'nbytes' of an entry is string"),
    ],
)
@pytest.mark.parametrize("mapped", [False, True])
def test_broken_rules_are_found_in_tables_too(tmp_path, monkeypatch, change, says, mapped):
    monkeypatch.setattr(manifests, "INDEX_ROWS", 1 if mapped else 1 << 40)
    write_set(tmp_path)
    rows, meta = rows_and_meta(tmp_path)
    change(rows, meta)
    (tmp_path / MANIFEST_NAME).write_bytes(manifest_bytes(rows, meta, version=2))
    with pytest.raises(UserError, match=says) as error:
        list(open_set(os.fspath(tmp_path)).meta["sources"])
    assert "\n" not in str(error.value) and MANIFEST_NAME in str(error.value)


@pytest.mark.parametrize("place", [{"at": 2}, {"at": 1 << 40}, {"nbytes": -5}, {"of": ["root"]}])
def test_tables_outside_the_file_are_refused(both, place, monkeypatch):
    rows, meta = rows_and_meta(both[0])
    split_off = manifests.split_off

    def forged(meta):
        rest, blobs = split_off(meta)
        rest["tables"][0].update(place)
        return rest, blobs

    monkeypatch.setattr(manifests, "split_off", forged)
    with pytest.raises(UserError, match=r"its table .* lies at byte"):
        open_manifest(manifest_bytes(rows, meta, version=2))


def mapped_file(folder):
    found = list(Path(folder).glob(".manifest-*.arrow"))
    assert len(found) <= 1
    return found[0] if found else None


def test_rows_are_mapped_once_and_made_anew_when_stale_or_damaged(both, monkeypatch):
    folder, old = both
    monkeypatch.setattr(manifests, "INDEX_ROWS", 1)
    first = open_manifest(folder)
    path = mapped_file(folder)
    made = path.stat().st_mtime_ns
    again = open_set(os.fspath(folder))
    assert mapped_file(folder) == path and path.stat().st_mtime_ns == made
    assert pa.ipc.open_file(path).read_all().num_rows == len(old.table)
    for name in first.table.column_names:
        assert first.table[name].to_pylist() == old.table[name].to_pylist(), name
    for view in (again.offsets, again.checksums, again.shard_numbers):
        assert not view.flags.owndata  # no rank has a copy of its own
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # a new file, because the old one is mapped
    path.write_bytes(data)
    assert open_manifest(folder).table.equals(first.table)
    assert path.read_bytes() != bytes(data)
    rows, meta = rows_and_meta(folder)
    rows[3]["mean_hu"] = 5.0
    (folder / MANIFEST_NAME).write_bytes(manifest_bytes(rows, meta, version=2))
    assert open_manifest(folder).table["mean_hu"].to_pylist()[3] == 5.0
    assert mapped_file(folder) not in (None, path)


def test_where_the_folder_cannot_be_written_rows_are_mapped_from_elsewhere(both, monkeypatch, tmp_path):
    folder, old = both
    monkeypatch.setattr(manifests, "INDEX_ROWS", 1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(manifest_index, "_own_folder", lambda: os.fspath(elsewhere))
    data = (folder / MANIFEST_NAME).read_bytes()
    assert open_manifest(data).table["offset"].to_pylist() == old.table["offset"].to_pylist()
    assert mapped_file(elsewhere)
    monkeypatch.setattr(manifest_index, "_own_folder", lambda: "")
    assert open_manifest(data).keys.to_pylist() == old.keys.to_pylist()  # in memory of its own


def test_lists_of_any_content_come_back_as_they_were():
    entries = [
        {"a": 1, "b": [1.5, 2.0], "c": {"x": 1}, "d": None},
        {"a": 2, "b": [], "c": {"x": 1, "y": "z"}, "e": [[1], ["two"]]},
        {"a": 3, "c": {}, "d": "t", "f": True},
    ]
    found = TableList(lambda: table_of(entries), 3, "it")
    assert list(found) == entries and found[-1] == entries[2] and found[:2] == entries[:2]
    with pytest.raises(IndexError):
        found[3]
    meta = {"z": {"list": found, "a": 1}, "b": "ü", "n": [1, 2]}
    plain = json.dumps(meta | {"z": {"list": entries, "a": 1}}, sort_keys=True)
    assert "".join(json_pieces(meta)) == plain
