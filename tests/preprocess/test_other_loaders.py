"""Shards as others read them: the examples, with stock webdataset, datasets, DALI and pyarrow; and sets of version 1."""

import importlib.util
import json
import runpy
import shutil
import tarfile

import numpy as np
import pytest
import webdataset as wds
from ct_files import ct, write
from cut_here import cut_here
from processes import REPO

from p2w.ct.discover import find_scans
from p2w.errors import UserError
from p2w.shards.build import BuildOptions
from p2w.shards.manifest import read_manifest
from p2w.shards.scan_shards import ShardingSettings, build_shards
from p2w.shards.tiling import Tiling
from p2w.shards.verify import main as verify
from p2w.shards.writer import MARK
from p2w.stream.stream import open_set

TILE = (8, 16, 16)
NEEDS = {"datasets": "datasets", "dali": "nvidia.dali", "webdataset": "webdataset", "pyarrow": "pyarrow"}


def cut(scans, out, **settings):
    """In this process, without a worker, where there is no set yet; what is missing in one is cut by a worker."""
    chosen = ShardingSettings(Tiling(TILE, 0, 0.0), **settings)
    if not out.exists():
        cut_here(scans, out, chosen)
    else:
        build_shards(find_scans([str(scans)], str(out)), str(out), chosen, BuildOptions(workers=1))


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    root = tmp_path_factory.mktemp("scans")
    for number, name in enumerate(("one", "t*w[o]?", "three")):
        write(root / f"{name}.nii.gz", ct((16, 32, 16), number), spacing=(0.5, 0.75, 2.0))
    return root


@pytest.fixture(scope="module")
def sets(scans, tmp_path_factory):
    """One set of each format; the folder's name has a space."""
    root = tmp_path_factory.mktemp("my sets")
    for form in ("tar", "arrow"):
        cut(scans, root / form, format=form, val_fraction=0.34)
    return root


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_reads_what_training_reads(sets, name, tmp_path, monkeypatch):
    package, _, inner = NEEDS[name].partition(".")
    if importlib.util.find_spec(package) is None or (inner and importlib.util.find_spec(NEEDS[name]) is None):
        pytest.skip(f"needs {NEEDS[name]}, which is not installed here")
    for variable, value in (("HF_HUB_OFFLINE", "1"), ("HF_DATASETS_CACHE", str(tmp_path))):
        monkeypatch.setenv(variable, value)
    folder = sets / ("arrow" if name == "pyarrow" else "tar")
    samples = runpy.run_path(str(REPO / "examples" / f"load_shards_{name}.py"))["samples"]
    manifest, shards = read_manifest(folder), open_set(str(folder))
    rows = manifest.table.to_pylist()
    assert {row["split"] for row in rows} == {"train", "val"} and len(rows) == 3 * 8 // 2
    for split in ("train", "val"):
        found = list(samples(folder, "validation" if (name, split) == ("datasets", "val") else split))
        expected = {row["key"]: number for number, row in enumerate(rows) if row["split"] == split}
        assert [about["key"] for _, about in found] == list(expected)
        for voxels, about in found:
            stored = np.empty(TILE, np.int16)
            shards.read_into(expected[about["key"]], stored)
            np.testing.assert_allclose(voxels, (stored.astype(np.float64) + 1000) / 2000, atol=1e-6)
            assert voxels.dtype == np.float32
            assert [about[f"spacing_{axis}"] for axis in about["axis_order"]] == [2.0, 0.75, 0.5]
            assert about["window_hu"] == [-1000, 1000] and about["orientation"] == "LPS"


def test_a_sample_of_a_tar_says_how_its_voxels_are_to_be_read(sets):
    shard = str(sets / "tar" / (sets / "tar" / "train.txt").read_text().split()[0])
    first = next(iter(wds.WebDataset([shard], shardshuffle=False).decode()))
    assert first["npy"].shape == TILE and first["npy"].dtype == np.int16
    said = first["json"]
    assert (said["window_hu"], said["axis_order"], said["orientation"], said["spacing_unit"]) == (
        [-1000, 1000],
        "zyx",
        "LPS",
        "mm",
    )
    with tarfile.open(shard) as tar:
        assert [name.rpartition(".")[2] for name in tar.getnames()[:4]] == ["npy", "json"] * 2


def test_the_card_names_the_shards_of_each_split_and_leaves_a_readme_of_the_users_alone(
    sets, scans, tmp_path
):
    yaml = pytest.importorskip("yaml")
    for form in ("tar", "arrow"):
        _, front, text = (sets / form / "README.md").read_text().split("---\n", 2)
        (config,) = yaml.safe_load(front)["configs"]
        for said, name in zip(config["data_files"], ("train", "val"), strict=True):
            assert said["split"] == {"val": "validation"}.get(name, name)
            literal = [
                path.replace("[*]", "*").replace("[[]", "[").replace("[?]", "?") for path in said["path"]
            ]
            assert literal == (sets / form / f"{name}.txt").read_text().split("\n")[:-1]
        assert "8 x 16 x 16, axes z, y, x" in text
    again = tmp_path / "again"
    shutil.copytree(sets / "tar", again)
    before = (again / "README.md").read_bytes()
    (again / "README.md").write_text("mine")
    cut(scans, again, format="tar", val_fraction=0.34)
    assert (again / "README.md").read_text() == "mine"
    (again / "README.md").write_text(f"old\n{MARK}\n")
    cut(scans, again, format="tar", val_fraction=0.34)
    assert (again / "README.md").read_bytes() == before


def test_a_set_of_version_1_goes_on_and_is_repaired_in_its_own_bytes(command, scans, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    cut(scans, old, sample_version=1)
    cut(scans, new)
    assert "sample_version" not in json.loads((old / "settings.json").read_text())
    assert "sample_version" not in read_manifest(old).meta and read_manifest(new).meta["sample_version"] == 2
    first = command.contents(old)
    changed = {name for name, data in command.contents(new).items() if first[name] != data}
    shards = {name for name in first if name.endswith(".tar")}
    records = {f"scans/{name.removesuffix('.tar')}.json" for name in shards}
    assert shards <= changed <= shards | records | {"settings.json", "manifest.parquet", "README.md"}
    for folder in (old, new):
        before = command.contents(folder)
        (folder / "one.tar").unlink()
        assert verify([str(folder), "--repair", "--scans", str(scans)]) == 0
        assert command.contents(folder) == before
        (folder / "one.tar").unlink()
        (folder / "scans" / "one.json").unlink()
        cut(scans, folder)  # as the command does now
        assert command.contents(folder) == before
    with pytest.raises(UserError, match="val_fraction"):
        cut(scans, old, val_fraction=0.5)
