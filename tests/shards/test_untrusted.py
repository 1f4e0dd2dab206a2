"""Untrusted files: each wrong value is one line of error, and a few mutations of each kind of bench/fuzz.py find nothing."""

import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ct_files import ct, dicom, write
from stream_sets import write_set

from p2w.ct.discover import ScanSource, find_scans
from p2w.ct.orientation import BadScan
from p2w.ct.scan import read_scan
from p2w.errors import UserError
from p2w.files import canonical_json, parse_json
from p2w.shards.build import errors_of_readers
from p2w.shards.build_folder import JobShare
from p2w.shards.manifest import manifest_bytes, open_manifest
from p2w.shards.manifest_schema import MANIFEST_NAME, SUB_SCAN_COLUMNS
from p2w.shards.scan_shards import ScanFolder, ShardingSettings, forecast_shards
from p2w.stream.stream import open_set

REPO = Path(__file__).parents[2]
SHARD = {"name": "1.2.0000.tar", "nbytes": 10240, "crc32c": 5}


def rows_with(**changes):
    """Change the second row."""
    return lambda rows, meta: rows[1].update(changes)


def meta_with(**changes):
    return lambda rows, meta: meta.update(changes)


def renamed(name):
    """Another name for the first shard, in its entry and its rows."""

    def change(rows, meta):
        for row in rows:
            row["shard"] = name if row["shard"] == "1.2.0000.tar" else row["shard"]
        meta["shards"][0]["name"] = name

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (renamed("../1.2.0000.tar"), "could lead outside"),
        (renamed("/etc/1.2.0000.tar"), "could lead outside"),
        (renamed("a\\b.tar"), "could lead outside"),
        (renamed("a\nb.tar"), "could lead outside"),
        (renamed("passwd"), "could lead outside"),
        (renamed("é" * 200 + ".tar"), "could lead outside"),
        (rows_with(offset=-64), "bytes from byte -64"),
        (rows_with(offset=2**62), "from byte 4,611"),
        (rows_with(nbytes=2**40), "1,099,511,627,776 bytes"),
        (rows_with(nbytes=-1), "-1 bytes"),
        (lambda rows, meta: rows[1].update(offset=rows[0]["offset"] + 64), "overlaps another"),
        (lambda rows, meta: rows[1].update(key=rows[0]["key"]), "two sub-scans have one key"),
        (rows_with(shard="other.tar"), r"'other\.tar' is not in its list"),
        (rows_with(offset=None), "column offset has missing values"),
        (meta_with(shape=[65536, 65536, 65536]), "room for 0"),
        (meta_with(shape=[2, 4, 2**80]), "three numbers of voxels"),
        (meta_with(shape=[2, -4, -8]), "three numbers of voxels"),
        (meta_with(shape="248"), "is not a list"),
        (meta_with(shape=[2, 4, True]), "is True"),
        (meta_with(shards={}), "is not a list"),
        (meta_with(shards=[[]]), "is not an object"),
        (meta_with(shards=[SHARD, SHARD]), "two shards have one name"),
        (meta_with(shards=[SHARD | {"nbytes": "10"}]), "'nbytes' of entry 0"),
        (meta_with(shards=[SHARD | {"nbytes": -5}]), "-5 bytes"),
        (meta_with(shards=[{"name": "1.2.0000.tar"}]), "lacks 'nbytes'"),
        (meta_with(sources=[{"uid": 1}]), "'sources' of its metadata"),
        (meta_with(tiling=7), "'tiling' of its metadata is not an object"),
    ],
)
def test_manifests_that_break_a_rule(tmp_path, change, says):
    """The manifest has a correct checksum of its own: whoever forges one can compute it."""
    write_set(tmp_path)
    manifest = open_manifest(tmp_path)
    rows, meta = manifest.table.to_pylist(), dict(manifest.meta)
    change(rows, meta)
    (tmp_path / MANIFEST_NAME).write_bytes(manifest_bytes(rows, meta))
    with pytest.raises(UserError, match=says) as error:
        open_set(os.fspath(tmp_path))
    assert "\n" not in str(error.value) and MANIFEST_NAME in str(error.value)


def test_a_small_manifest_of_endless_rows_is_not_unpacked(tmp_path):
    write_set(tmp_path)
    manifest = open_manifest(tmp_path)
    row = manifest.table.to_pylist()[0]
    columns = [pa.repeat(pa.scalar(row[kind.name], kind.type), 300_000) for kind in SUB_SCAN_COLUMNS]
    meta = {key: value for key, value in manifest.meta.items() if key != "seal"}
    table = pa.table(columns, schema=SUB_SCAN_COLUMNS.with_metadata({b"p2w": canonical_json(meta)}))
    pq.write_table(table, tmp_path / MANIFEST_NAME, compression="zstd")
    with pytest.raises(UserError, match=r"300,000 rows, its shards have room for \d+"):
        open_manifest(tmp_path)


DEEP, LONG = "[" * 100_000, "9" * 5000


@pytest.mark.parametrize(
    "text",
    ["{", "[1", '{"a": 1, "a": 2}', DEEP, '{"a": NaN}', "[1]", '{"a": "1"}', LONG, "\xff"],
    ids=range(9),
)
def test_json_of_another_form(text):
    with pytest.raises(ValueError, match=r".") as error:
        parse_json(text.encode("latin-1"), {"a": int})
    assert "\n" not in str(error.value)


def reads(path):
    """Why a scan is bad."""
    with pytest.raises(BadScan) as error, errors_of_readers():
        read_scan(ScanSource("a", path.name, (str(path),)))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        ("a.mhd", b"a.raw", b"/etc/passwd", "not in the header's folder"),
        ("a.mhd", b"a.raw", b"../a.raw", "not in the header's folder"),
        ("a.mhd", b"DimSize = 20 24 8", b"DimSize = 4294967296 4294967296 1", "damaged: voxels at byte 0"),
        ("a.mhd", b"DimSize = 20 24 8", b"DimSize = -20 -24 8", "wrong size"),
        ("a.mhd", b"NDims = 3", b"NDims = 1000000", "NDims 1000000"),
        ("a.mhd", b"a.raw", b"LO%" + b"x" * 5000, "a line that is not text"),  # overran a buffer of ITK's
        ("a.mhd", b"a.raw", b"LO%\x1b", "a line that is not text"),
        ("packed.mhd", b"DimSize = 20 24 8", b"DimSize = 20000 24000 8", "truncated"),
        ("a.nrrd", b"sizes: 20 24 8", b"sizes: 20000 24000 8", "truncated: the header promises 7,680,000,000"),
        ("packed.nrrd", b"sizes: 20 24 8", b"sizes: 2000000 24000 8", "truncated: the header promises"),
        ("a.nhdr", b"a.raw", b"/etc/passwd", "not in the header's folder"),
    ],
)  # fmt: skip
def test_headers_with_wrong_values(tmp_path, name, old, new, says):
    path = write(tmp_path / name, ct((8, 24, 20)))
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    assert re.search(says, reads(path))


@pytest.mark.slow
def test_a_compressed_stream_may_not_exceed_its_header(tmp_path):
    path = write(tmp_path / "packed.mhd", ct((8, 24, 20)))
    bomb = zlib.compress(bytes(32 << 20), 1)  # 32 MiB in 150 kB
    (tmp_path / "packed.zraw").write_bytes(bomb)
    text = "\n".join(line for line in path.read_text().splitlines() if "CompressedDataSize" not in line)
    path.write_text(text)
    assert "unpacks to more than the 7,680 bytes" in reads(path)
    write(tmp_path / "b.nii.gz", ct((8, 24, 20)))
    (tmp_path / "b.nii.gz").write_bytes(zlib.compress(bytes(32 << 20), 1, wbits=31))
    assert "\n" not in reads(tmp_path / "b.nii.gz")


def patched(path, tag, value):
    """The value of an element, in implicit little-endian; padded to an even length."""
    data = path.read_bytes()
    at = data.index(tag, 132)
    size = int.from_bytes(data[at + 4 : at + 8], "little")
    value += b" " * (len(value) % 2)
    path.write_bytes(data[: at + 4] + len(value).to_bytes(4, "little") + value + data[at + 8 + size :])


@pytest.mark.parametrize(
    ("tag", "value", "says"),
    [
        (b"\x28\x00\x10\x00\x02\x00", (60000).to_bytes(2, "little"), "pixels take 2,400,000 bytes"),
        (b"\x28\x00\x11\x00\x02\x00", (65535).to_bytes(2, "little"), "pixels take"),
        (b"\x20\x00\x32\x00", rb"nan\0\0", "not CT|without a position"),
        (b"\x20\x00\x32\x00", rb"1e999\0\0", "not CT|without a position"),
        (b"\x28\x00\x30\x00", rb"inf\1", "pixel spacing"),
    ],
)
def test_dicom_headers_with_wrong_values(tmp_path, tag, value, says):
    for path in dicom(tmp_path / "ct", ct((3, 24, 20)), "1.2.3"):
        patched(path, tag, value)
    found = find_scans([str(tmp_path)], "")
    assert not found.sources and all(re.search(says, why) for _, why in found.bad + found.left_out)
    assert found.bad or found.left_out


def test_dicom_sequences_without_end(tmp_path):
    (path,) = dicom(tmp_path / "ct", ct((1, 24, 20)), "1.2.3")
    data = path.read_bytes()
    at = data.index(b"\x08\x00\x60\x00")
    sequence, item = b"\x08\x00\x40\x11\xff\xff\xff\xff", b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    nest = (sequence + item) * 5000
    path.write_bytes(data[:at] + nest + data[at:])
    ((_, why),) = find_scans([str(tmp_path)], "").bad
    assert "sequences more than 100 deep" in why and "\n" not in why


@pytest.mark.slow
def test_compressed_dicom_of_other_sizes_than_its_header_gets_no_memory(tmp_path):
    """5 kB had GDCM take 3 GB for the size that JPEG 2000 carries itself."""
    for path in dicom(tmp_path / "ct", ct((3, 24, 20)), "1.2.3", compressor="JPEG2000"):
        data = bytearray(path.read_bytes())
        at = data.index(b"\xff\x4f\xff\x51") + 8  # SIZ: width, height, their offsets, then those of a tile
        for place, size in ((0, 30_000), (4, 30_000), (16, 30_000), (20, 30_000)):
            data[at + place : at + place + 4] = size.to_bytes(4, "big")
        path.write_bytes(data)
    code = (
        "import resource, sys\nfrom p2w.ct.discover import find_scans\nfrom p2w.shards.build import errors_of_readers\n"
        "from p2w.ct.orientation import BadScan\nfrom p2w.ct.scan import read_scan\n"
        "(source,) = find_scans([sys.argv[1]], '').sources\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    with errors_of_readers():\n        read_scan(source)\nexcept BadScan as error:\n    print(error)\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stdout + done.stderr


def test_invalid_text_in_a_manifest(tmp_path):
    write_set(tmp_path)
    manifest = open_manifest(tmp_path)
    meta = {key: value for key, value in manifest.meta.items() if key != "seal"}
    split = pa.array([b"\xe1\xe1"] * 19).cast(pa.binary()).view(pa.string())
    table = manifest.table.set_column(1, "split", split).replace_schema_metadata(
        {b"p2w": canonical_json(meta)}
    )
    pq.write_table(table, tmp_path / MANIFEST_NAME)
    with pytest.raises(UserError, match="UTF8"):
        open_manifest(tmp_path)


@pytest.mark.parametrize("offset", [float("nan"), float("inf"), -1e30, 1e30])
def test_invalid_nifti_offsets(tmp_path, offset):
    path = write(tmp_path / "a.nii", ct((8, 24, 20)))
    data = bytearray(path.read_bytes())
    data[108:112] = np.float32(offset).tobytes()
    path.write_bytes(data)
    assert len(forecast_shards(find_scans([str(tmp_path)], "").sources, ShardingSettings()).bad) == 1
    reads(path)


@pytest.mark.parametrize("text", ["[]", "7", "null", '{"tiling": 3}', "[" * 100_000, "\x00", '"x"'])
def test_settings_and_records_of_another_form(tmp_path, text):
    folder = ScanFolder(str(tmp_path / "set"), ShardingSettings())
    with folder.share_lock(JobShare()):
        folder.prepare(JobShare())
        Path(folder.sidecar("a")).write_text(text)
        assert folder.record("a") is None
        Path(folder.sidecar("a")).write_text(json.dumps({"uid": "b", "name": "x", "subset": -1, "bad": "y"}))
        assert folder.record("a") is None  # another scan's
        (tmp_path / "set" / "settings.json").write_text(text)
        (tmp_path / "set" / "a.tar").write_bytes(b"x")
        with pytest.raises(UserError, match="was cut with") as error:
            folder.prepare(JobShare())
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_slice_of_the_fuzzer_finds_nothing(tmp_path):
    """bench/fuzz.py has the whole; here every kind gets a few."""
    command = [sys.executable, "bench/fuzz.py", "--seconds", "10", "--out", str(tmp_path / "fuzz.json")]
    done = processes.run(command, cwd=REPO, capture_output=True, text=True, timeout=200)
    found = json.loads((tmp_path / "fuzz.json").read_text())
    assert found["findings"] == [] and done.returncode == 0, done.stdout
    assert sum(sum(counts.values()) for counts in found["outcomes"].values()) == found["cases"] > 0
