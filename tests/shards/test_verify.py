"""Every byte of a set is watched: flips and truncations at random places, in shards of both formats and the manifest."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from stream_sets import write_set
from web import nginx

from p2w.errors import UserError
from p2w.shards import verify
from p2w.shards.manifest import DamagedManifest, manifest_bytes, open_manifest
from p2w.shards.manifest_schema import MANIFEST_NAME
from p2w.stream.stream import open_set

TRIALS = 150


def call(capsys, *argv):
    """Exit code and what was said."""
    code = verify.main([str(arg) for arg in argv])
    return code, capsys.readouterr().out


def hit(manifest, shard, first, end):
    """Keys of the sub-scans of which a byte lies in [first, end)."""
    rows = [row for row in manifest.table.to_pylist() if row["shard"] == shard]
    return [row["key"] for row in rows if row["offset"] < end and row["offset"] + row["nbytes"] > first]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["tar", "arrow"])
def test_every_flip_and_truncation_of_a_shard_is_found(tmp_path, capsys, form):
    write_set(tmp_path, form)
    manifest = open_manifest(tmp_path)
    assert call(capsys, tmp_path)[0] == 0
    rng = np.random.default_rng(5)
    for trial in range(TRIALS):
        shard = manifest.meta["shards"][rng.integers(len(manifest.meta["shards"]))]
        path = tmp_path / shard["name"]
        whole = path.read_bytes()
        at = int(rng.integers(len(whole)))
        if trial % 3:
            damaged = bytearray(whole)
            damaged[at] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            keys = hit(manifest, shard["name"], at, at + 1)
        else:
            os.truncate(path, at)
            keys = hit(manifest, shard["name"], at, len(whole))
        (fault,) = verify.verify_shards(manifest, 2)
        assert (fault.shard["name"], fault.keys) == (shard["name"], keys)
        said = capsys.readouterr().out
        assert str(path) in said and all(key in said for key in keys[:8])
        assert keys or "only headers, padding or metadata" in said
        path.write_bytes(whole)
    assert verify.verify_shards(manifest, 2) == []


def test_all_that_is_damaged_is_named_with_the_command_that_repairs(tmp_path, capsys):
    write_set(tmp_path / "a set")
    manifest = open_manifest(tmp_path / "a set")
    os.truncate(tmp_path / "a set" / "1.2.0000.tar", 0)
    (tmp_path / "a set" / "1.2.0002.tar").unlink()
    os.truncate(tmp_path / "a set" / "1.2.0003.tar", 100_000)  # grown: all its sub-scans are sound
    code, said = call(capsys, tmp_path / "a set")
    assert code == 1 and "3 shards are damaged" in said
    assert "1.2.0000.tar: has 0 bytes" in said and "1.2.0002.tar: is missing; 7 sub-scans" in said
    assert "1.2.0003.tar: has 100,000 bytes" in said and "only headers, padding" in said
    assert "1.2.0001" not in said
    assert f"p2w verify '{tmp_path / 'a set'}' --repair --scans FOLDER" in said
    assert all(row["key"] in said for row in manifest.table.to_pylist() if row["shard"] == "1.2.0002.tar")


def test_every_flip_and_truncation_of_the_manifest_is_found(tmp_path, capsys):
    write_set(tmp_path)
    whole = (tmp_path / MANIFEST_NAME).read_bytes()
    assert open_manifest(whole).table.num_rows == 19
    rng = np.random.default_rng(6)
    seal = whole.rindex(b"p2w-manifest-crc32c=")
    for at in [*range(seal, seal + 28), *rng.integers(len(whole), size=600), len(whole) - 1, 0]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.integers(8)
        with pytest.raises(DamagedManifest) as error:
            open_manifest(bytes(damaged))
        assert "\n" not in str(error.value)
    for end in rng.integers(len(whole), size=100):
        with pytest.raises(DamagedManifest):
            open_manifest(whole[:end])
    (tmp_path / MANIFEST_NAME).write_bytes(damaged)
    code, said = call(capsys, tmp_path)
    assert code == 1 and said.startswith("damaged:") and "repeat the preprocess command" in said
    with pytest.raises(
        UserError, match=r"manifest\.parquet is damaged.*copy it again"
    ):  # nor does training take it
        open_set(os.fspath(tmp_path))


def test_a_set_without_the_manifests_own_checksum_is_still_read(tmp_path):
    """Sets of an earlier time: the same file, less the seal."""
    write_set(tmp_path)
    manifest = open_manifest(tmp_path)
    meta = {key: value for key, value in manifest.meta.items() if key != "seal"}
    table = manifest.table.replace_schema_metadata({b"p2w": json.dumps(meta).encode()})
    pq.write_table(table, tmp_path / MANIFEST_NAME)
    assert open_manifest(tmp_path).table.num_rows == 19 and len(open_set(os.fspath(tmp_path))) == 19


def test_equal_content_gives_equal_manifests(tmp_path):
    write_set(tmp_path)
    manifest = open_manifest(tmp_path)
    rows = manifest.table.to_pylist()
    assert manifest_bytes(rows[::-1], manifest.meta) == (tmp_path / MANIFEST_NAME).read_bytes()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nowhere"], "no such folder"),
        (["--repair"], "--luna FOLDER or with --scans"),
        (["--luna", "x"], "--repair goes with"),
        (["s3://host/set"], "only a folder"),
        (["--workers", "-1"], "1 or more"),
    ],
)
def test_wrong_arguments_are_one_line_of_error(argv, says):
    with pytest.raises(UserError, match=says) as error:
        verify.main(argv)
    assert "\n" not in str(error.value)


def test_a_shard_that_is_a_link_to_elsewhere_is_damage(tmp_path, capsys):
    write_set(tmp_path / "set")
    shutil.move(tmp_path / "set" / "1.2.0001.tar", tmp_path / "1.2.0001.tar")
    (tmp_path / "set" / "1.2.0001.tar").symlink_to(tmp_path / "1.2.0001.tar")
    with pytest.raises(UserError, match="leads outside the folder"):
        open_set(os.fspath(tmp_path / "set"))
    assert call(capsys, tmp_path / "set")[0] == 1
    (tmp_path / "link").symlink_to(tmp_path / "set")  # a link to the whole folder is no matter
    shutil.copy(tmp_path / "1.2.0001.tar", tmp_path / "set" / "inside")
    (tmp_path / "set" / "1.2.0001.tar").unlink()
    (tmp_path / "set" / "1.2.0001.tar").symlink_to("inside")
    assert call(capsys, tmp_path / "link")[0] == 0


@pytest.fixture
def served(tmp_path):
    with nginx(tmp_path) as found:
        yield found


@pytest.mark.parametrize("form", ["tar", "arrow"])
def test_a_set_below_a_url_is_verified_like_its_folder(served, capsys, form):
    folder, url, _ = served
    write_set(folder, form, shape=(8, 64, 64))
    manifest = open_manifest(folder)
    code, out = call(capsys, f"{url}/")
    assert code == 0 and f"{url}: sound: manifest, 4 shards, 19 sub-scans" in out
    rng = np.random.default_rng(7)
    for trial in range(24):
        shard = manifest.meta["shards"][rng.integers(4)]
        path = folder / shard["name"]
        whole = path.read_bytes()
        at = int(rng.integers(len(whole)))
        if trial % 3 == 0:
            os.truncate(path, at)
        elif trial % 3 == 1:
            path.write_bytes(whole + b"more")
        else:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        (local,), remote = (
            verify.verify_shards(manifest, 1),
            verify.verify_remote_shard(replace(manifest, root=url), shard),
        )
        assert remote and remote.keys == local.keys
        path.write_bytes(whole)
    path.unlink()
    capsys.readouterr()
    code, out = call(capsys, url)
    assert code == 1 and "404 Not Found" in out and "upload the shard again" in out


def test_what_cannot_be_verified_below_a_url_is_one_line(served, capsys):
    _, url, _ = served
    for argv, says in (
        ([url], "404 Not Found"), (["s3://bucket/set"], "a folder or an http"),
        ([url, "--repair", "--luna", "x"], "only a folder can be repaired"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says) as error:
            call(capsys, *argv)
        assert "\n" not in str(error.value)
