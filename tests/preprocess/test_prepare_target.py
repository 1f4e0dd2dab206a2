"""preprocess/prepare_target.py as a user types it, on phantoms in the formats of the real data."""

import csv
import json
import os
import runpy
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from ct_sets import write_structured_set

from p2w.errors import UserError
from p2w.phantom.target_tasks import write_targets
from p2w.shards.manifest import data_fingerprint, manifest_bytes, open_manifest
from p2w.shards.training_scans import training_scans
from p2w.shards.verify import main as verify
from p2w.tasks.leak import check_run, check_shards, first_leak
from p2w.tasks.reader import open_target

NAME = "prepare_target"
ROOT = Path(__file__).parents[2]
SIZE = ("--size", 8, 16, 16, "--workers", 1)
SUBSETS = ("--train-subsets", "0-1", "--val-subsets", 2, "--test-subsets", "3-9")
LITS = ("--train", "0-1", "--val", 2, "--test", 3)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """Four patients of each task."""
    root = tmp_path_factory.mktemp("targets") / "T"
    names = list(write_targets(root, ("ncc", "ncs", "lcs", "ecc", "bms"), 4, 1000, (32, 64, 64)))
    assert len(names) == 20
    return root


@pytest.fixture(scope="session")
def ncc(command, phantoms, tmp_path_factory):
    out = tmp_path_factory.mktemp("ncc") / "set"
    code, said, err = command.call(
        NAME, "ncc", "--source", phantoms / "LUNA16", "--out", out, *SIZE, *SUBSETS
    )
    assert code == 0, said + err
    return out


@pytest.fixture
def inside(monkeypatch, capsys):
    """The command in this process, for what ends before any worker starts: exit code and stderr."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", [NAME, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "preprocess" / f"{NAME}.py"), run_name="__main__")
        return end.value.code, capsys.readouterr().err

    return call


def disjoint(target, fold=None):
    split = target.splits(fold)
    by = {name: {target.patient[r] for r in target.rows(name, fold)} for name in ("train", "val", "test")}
    assert all(by.values()) and not (
        by["train"] & by["val"] or by["train"] & by["test"] or by["val"] & by["test"]
    )
    assert len(split) == len(target)


def test_ncc_cuts_where_the_table_says(phantoms, ncc):
    target = open_target(ncc)
    table = (phantoms / "LUNA16" / "candidates_V2.csv").read_text().splitlines()
    assert len(target) == len(table) - 1
    disjoint(target)
    assert target.channels == 1 and target.size_zyx == (8, 16, 16) and target.window == (-1000, 1000)
    for row in range(0, len(target), 7):  # scan 3 is stored with a flipped direction matrix
        uid, x, y, z, label = table[int(target.of[row].rpartition(":")[2]) - 1].split(",")
        assert uid == target.scan_uid[row] and int(label) == target.label[row]
        (path,) = (phantoms / "LUNA16").glob(f"subset*/{uid}.mhd")
        image = sitk.ReadImage(str(path))
        at = image.TransformPhysicalPointToIndex((float(x), float(y), float(z)))
        voxels, labels = target.read([row])
        assert voxels[0, 0, 4, 8, 8] == np.clip(image[at], -1000, 1000) and labels[0] == int(label)
        flipped = image.GetDirection()[0] < 0
        if all(3 < i < n - 4 for i, n in zip(at, image.GetSize(), strict=True)):
            step = -1 if flipped else 1
            assert voxels[0, 0, 4, 8, 11] == np.clip(image[at[0] + 3 * step, at[1], at[2]], -1000, 1000)
    assert {
        bool(sitk.ReadImage(str(p)).GetDirection()[0] < 0) for p in (phantoms / "LUNA16").glob("*/*.mhd")
    } == {True, False}


def test_ncc_versions_and_a_cap_on_negatives(command, phantoms, tmp_path):
    common = (NAME, "ncc", "--source", phantoms / "LUNA16", "--out", tmp_path / "a", *SIZE, *SUBSETS)
    code, said, _ = command.call(*common, "--candidates", "V1", "--max-negatives", 5, "--format", "arrow")
    assert code == 0, said
    target = open_target(tmp_path / "a")
    assert "candidates.csv" in target.meta["tables"] and target.meta["settings"]["max_negatives"] == 5
    negatives = [target.scan_uid[row] for row in np.flatnonzero(target.label == 0)]
    assert {negatives.count(uid) for uid in set(negatives)} == {5}
    code, _, err = command.call(*common)
    assert code == 2 and "was cut with" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "task, folder, more, kind",
    [
        ("ncs", "LIDC-IDRI", ("--spacing", 2, 2, 2, "--crops", 2), "segmentation"),
        ("lcs", "LiTS", LITS, "segmentation"),
        ("ecc", "CTPA", (), "classification"),
        ("bms", "BraTS", ("--channels", "flair", "t1ce", "--crops", 2), "segmentation"),
    ],
)
def test_the_other_tasks(command, phantoms, tmp_path, task, folder, more, kind):
    code, said, err = command.call(
        NAME, task, "--source", phantoms / folder, "--out", tmp_path / "a", *SIZE, *more
    )
    assert code == 0, said + err
    target = open_target(tmp_path / "a")
    assert target.kind == kind and len(target) >= 8
    voxels, y = target.read(range(len(target)))
    assert voxels.shape == (len(target), target.channels, 8, 16, 16)
    low, high = target.window
    assert voxels.min() >= low and voxels.max() <= high
    if kind == "segmentation":
        assert (
            y.shape == (len(target), 1, 8, 16, 16)
            and set(y.unique().tolist()) == {0, 1}
            and y.flatten(1).any(1).all()
        )
        assert np.allclose(y.float().mean((1, 2, 3, 4)), target.foreground)
    else:
        assert set(y.tolist()) == {0, 1}
    for fold in range(target.folds) if target.folds else [None]:
        disjoint(target, fold)
    if target.folds:
        tested = np.concatenate([target.rows("test", fold) for fold in range(3)])
        assert sorted(tested) == list(range(len(target)))
        assert (target.rows("val") == target.rows("val", 0)).all()
    else:
        with pytest.raises(UserError, match="one split and no folds"):
            target.rows("test", 0)


def test_lcs_masks_lie_where_simpleitk_puts_them(command, phantoms, tmp_path):
    assert (
        command.call(NAME, "lcs", "--source", phantoms / "LiTS", "--out", tmp_path / "a", *SIZE, *LITS)[0]
        == 0
    )
    target = open_target(tmp_path / "a")
    assert set(target.scan_uid) == {f"volume-{n}" for n in range(4)}
    for row in range(0, len(target), 3):
        number = target.scan_uid[row].rpartition("-")[2]
        image, mask = (
            sitk.ReadImage(str(phantoms / "LiTS" / f"{n}-{number}.nii.gz"))
            for n in ("volume", "segmentation")
        )
        voxels, masks = target.read([row])
        at = mask.TransformPhysicalPointToIndex(target.centre_mm[row][::-1].tolist())
        assert masks[0, 0, 4, 8, 8] == (mask[at] in (1, 2)) and voxels[0, 0, 4, 8, 8] == np.clip(
            image[at], -1000, 1000
        )


def test_killed_and_repeated_gives_the_same_bytes(command, phantoms, ncc, tmp_path):
    arguments = (NAME, "ncc", "--source", phantoms / "LUNA16", "--out", tmp_path / "a", *SIZE, *SUBSETS)
    process = command.start(*arguments)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "a" / "scans").glob("*.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    finished = (tmp_path / "a" / "manifest.parquet").exists()
    code, said, err = command.call(*arguments)
    assert code == 0 and (finished or "are finished" in said), said + err
    assert command.contents(tmp_path / "a") == command.contents(ncc)


def test_two_shares_give_the_same_bytes(command, phantoms, ncc, tmp_path):
    arguments = (NAME, "ncc", "--source", phantoms / "LUNA16", "--out", tmp_path / "a", *SIZE, *SUBSETS)
    code, said, err = command.call(*arguments, "--shard-of", "1/2")
    assert code == 0 and "2 of 4 cases are not cut yet" in said, said + err
    code, _, err = command.call(*arguments, "--merge")
    assert code == 2 and "2 of 4 cases are not cut yet" in err and "without --merge" in err
    code, said, err = command.call(*arguments, "--shard-of", "0/2")
    assert code == 0 and command.contents(tmp_path / "a") == command.contents(ncc), said + err


def test_a_bad_scan_is_named_and_the_others_go_on(command, phantoms, tmp_path):
    source = tmp_path / "LUNA16"
    shutil.copytree(phantoms / "LUNA16", source)
    header = min(source.glob("subset2/*.mhd"))
    os.truncate(header.with_suffix(".raw"), 1000)
    table = source / "candidates_V2.csv"
    uid = next(source.glob("subset0/*.mhd")).stem
    table.write_text(table.read_text() + f"{uid},9999,0,0,1\nnowhere,1,2,3,0\n")
    arguments = (NAME, "ncc", "--source", source, "--out", tmp_path / "a", *SIZE, *SUBSETS)
    code, said, _ = command.call(*arguments)
    assert code == 1 and f"bad case: subset2/{header.name}: truncated" in said and "outside the scan" in said
    assert "1 candidates of 1 scans that are not there" in said
    assert len(set(open_target(tmp_path / "a").scan_uid)) == 3
    assert command.call(*arguments, "--strict")[0] == 2


@pytest.mark.parametrize(
    "arguments, line",
    [
        (("nccc",), "no task nccc"),
        (("ncc", "--source", "/nowhere", "--out", "x"), "/nowhere"),
        (("ncs", "--source", "{T}/CTPA", "--out", "x"), "no readers' XML"),
        (("lcs", "--source", "{T}/BraTS", "--out", "x"), "no volume-N.nii"),
        (("lcs", "--source", "{T}/LiTS", "--out", "x", "--train", "0-2", "--val", "2-3"), "share volumes"),
        (("bms", "--source", "{T}/BraTS", "--out", "x", "--folds", "9"), "4 patients cannot be divided"),
        (("bms", "--source", "{T}/BraTS", "--out", "x", "--crops", "2", "--jitter", "0"), "the same crop"),
        (("ecc", "--source", "{T}/BraTS", "--out", "x"), "candidates.csv: no such file"),
        (("general", "--source", "{T}/BraTS", "--out", "x"), "no image there is called"),
        (("general", "--source", "{T}/BraTS", "--out", "x", "--images", "*_*"), "exactly one"),
        (("ncc", "--source", "{T}/LUNA16", "--out", "x", "--test-subsets", "0"), "subset 0 is in"),
        (("ncc", "--source", "{T}/LUNA16", "--out", "x", "--size", "1", "8", "8"), "--size 1 8 8"),
    ],
)
def test_bad_input_is_one_line(inside, phantoms, arguments, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = [text.replace("{T}", str(phantoms)) for text in arguments]
    code, err = inside(*told)
    assert code == 2 and err.count("\n") == 1 and (line in err or "has to have one *" in err), err
    assert not (tmp_path / "x" / "manifest.parquet").exists()


@pytest.mark.parametrize(
    "row, line",
    [
        ("patient000,PA000,1,2,x,1,0", "line 82: z 'x' is no number"),
        ("patient000,PA000,1,2,3,2,0", "class '2'"),
        ("patient000,PA000,1,2,3,1,1", "a patient has one"),
        ("patient009,PA000,1,2,3,1,0", "is of patient patient009"),
        ("patient000,PA000,1,2,3,1", "6 values"),
    ],
)
def test_bad_tables_are_one_line(inside, phantoms, tmp_path, row, line):
    table = tmp_path / "t.csv"
    text = (phantoms / "CTPA" / "candidates.csv").read_text()
    table.write_text(text + row + "\n")
    line = line.replace("82", str(text.count("\n") + 1))
    code, err = inside("ecc", "--source", phantoms / "CTPA", "--out", tmp_path / "x", "--table", table)
    assert code == 2 and line in err and err.count("\n") == 1, err


def test_damaged_sets_are_refused(ncc, tmp_path, capsys):
    out = tmp_path / "set"
    shutil.copytree(ncc, out)
    target = open_target(out)
    shard = out / f"{target.scan_uid[0]}.tar"
    data = bytearray(shard.read_bytes())
    data[1500] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="checksum differs"):
        open_target(out).read(range(len(target)))
    assert verify([str(ncc)]) == 0 and verify([str(out)]) == 1
    assert f"1 sub-scan: {target.scan_uid[0]}/00000" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"delete the shard.*p2w prepare ncc"):
        verify([str(out), "--repair", "--luna", "x"])
    shard.unlink()
    with pytest.raises(UserError, match=r"is missing.*p2w prepare ncc"):
        open_target(out)
    (out / "manifest.parquet").unlink()
    with pytest.raises(UserError, match=r"no manifest.parquet there.*p2w prepare TASK"):
        open_target(out)


def test_shards_open_with_stock_readers(ncc):
    import io
    import tarfile

    target = open_target(ncc)
    with tarfile.open(ncc / f"{target.scan_uid[0]}.tar") as tar:
        record = np.load(io.BytesIO(tar.extractfile(f"{target.key[0]}.npy").read()))
    assert (record == target.read([0])[0][0].numpy()).all()


def test_leaks_are_found_by_uid_and_by_file(ncc, tmp_path):
    target = open_target(ncc)
    test = target.meta["split"]["scans"]["test"][0]
    source = next(one for one in target.meta["sources"] if one["uid"] == test)
    file = {key: source["files"][0][key] for key in ("nbytes", "checksum")}
    clean = [{"uid": "other", "nbytes": 1, "checksum": "crc32c:0"}]

    def leak(*trained, sources):
        meta = {"split": {"train_scans": list(trained)}, "sources": sources}
        return first_leak(target, training_scans(meta), None)

    assert leak("other", sources=clean) is None
    assert leak(sources=[{"uid": test, **file}]) is None  # it only validates on it
    assert leak(test, sources=[{"uid": test, **file}]) == f"pretraining trained on test scan {test}"
    assert "is scan other there" in leak("other", sources=[{"uid": "other", **file}])
    assert "no pretraining" in check_run(target, None)
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"starts": [{"shards": "/gone"}]}')
    with pytest.raises(UserError, match=r"/gone: no such folder.*--allow-leak"):
        check_run(target, run)
    assert "not checked" in check_run(target, run, allow_leak=True)
    other = write_structured_set(tmp_path / "other", train=1, val=1, per=2)  # in the place of the run's own
    (run / "run.json").write_text(json.dumps({"starts": [{"shards": str(other), "data": "0123"}]}))
    with pytest.raises(
        UserError, match=r"other: is another data set now than .*run was trained on.*--allow-leak"
    ):
        check_run(target, run)
    one = {"uid": test, "file": "a.nii", "nbytes": 2, "checksum": "1", "subset": -1, "left_out": 0}
    one |= {"shape": [1] * 3, "spacing_mm": [1.0] * 3, "origin_xyz_mm": [0.0] * 3, "direction_xyz": [1.0] * 9}
    meta = open_manifest(other).meta | {"sources": [one], "shards": []}
    meta["split"] = {"rule": "scan", "train_scans": ["other"]}
    (other / "manifest.parquet").write_bytes(manifest_bytes([], meta))
    own = {"shards": str(other), "fingerprint": data_fingerprint(open_manifest(other).meta)}
    assert "no test scan is among the 1 scans" in check_shards(target, "encoder.safetensors", own)


def test_general_with_a_table_and_a_split_of_its_own(command, phantoms, tmp_path):
    rows = list(csv.DictReader((phantoms / "CTPA" / "candidates.csv").open()))
    with (tmp_path / "t.csv").open("w") as file:
        file.write("scan,X,Y,Z,class,split\n")
        for row in rows:
            split = {"PA000": "train", "PA001": "train", "PA002": "val"}.get(row["series"], "test")
            file.write(f"{row['series']},{row['x']},{row['y']},{row['z']},{row['label']},{split}\n")
    code, said, err = command.call(
        NAME,
        "general",
        "--source",
        phantoms / "CTPA",
        "--out",
        tmp_path / "a",
        *SIZE,
        "--table",
        tmp_path / "t.csv",
    )
    assert code == 0, said + err
    target = open_target(tmp_path / "a")
    assert target.kind == "classification" and {target.scan_uid[r] for r in target.rows("test")} == {"PA003"}


SARCOMA = Path(os.environ.get("P2W_REAL_DATA", "/nowhere")) / "sarcoma"


@pytest.mark.skipif(not SARCOMA.is_dir(), reason="P2W_REAL_DATA does not name real scans")
def test_general_on_real_sarcomas(command, tmp_path):
    patterns = ("--images", "*_ct.nii.gz", "--masks", "*_gtv.nii.gz")
    code, said, err = command.call(
        NAME, "general", "--source", SARCOMA, "--out", tmp_path / "a", "--workers", 1, *patterns
    )
    assert code == 0, said + err
    target = open_target(tmp_path / "a")
    assert len(set(target.patient)) == 8 and target.size_zyx == (32, 64, 64)
    disjoint(target)
    _, masks = target.read(range(len(target)))
    for row in range(0, len(target), 5):
        mask = sitk.GetArrayFromImage(sitk.ReadImage(str(SARCOMA / f"{target.patient[row]}_gtv.nii.gz")))
        first = target.first_voxel[row]
        padded = np.pad(mask, 64)[
            tuple(slice(f + 64, f + 64 + n) for f, n in zip(first, (32, 64, 64), strict=True))
        ]
        assert (padded == masks[row, 0].numpy()).all() and padded.any()


def test_the_set_of_a_run_that_was_moved_is_found(ncc, tmp_path, monkeypatch):
    """`--shards shards` was typed in the project's folder; since then the project, the run, or the user has moved."""
    target, old = open_target(ncc), tmp_path / "old"
    shards = write_structured_set(old / "data" / "shards", train=1, val=1, per=2)
    meta = open_manifest(shards).meta | {"sources": [], "shards": []}
    meta["split"] = {"rule": "scan", "train_scans": ["other"]}
    (shards / "manifest.parquet").write_bytes(manifest_bytes([], meta))
    start = {"shards": "data/shards", "data": data_fingerprint(open_manifest(shards).meta), "cwd": str(old)}
    run = old / "runs" / "paper"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"starts": [start]}))
    elsewhere = tmp_path / "elsewhere"
    write_structured_set(
        elsewhere / "data" / "shards", train=1, val=1, per=2
    )  # of the same name, and another set
    monkeypatch.chdir(elsewhere)
    assert str(shards) in check_run(target, run)  # the user is elsewhere
    moved = shutil.copytree(run, tmp_path / "kept" / "paper")
    assert str(shards) in check_run(target, moved)  # the run has moved
    (old / "pre.safetensors").write_text("weights of the run, beside it")
    whole = shutil.move(old, tmp_path / "new")
    assert f"{whole}/data/shards" in check_run(target, Path(whole) / "runs" / "paper")  # the whole project
    given = {"shards": start["shards"], "fingerprint": start["data"]}  # the card of an exported file
    assert f"{whole}/data/shards" in check_shards(target, f"{whole}/pre.safetensors", given)
    (Path(whole) / "runs" / "paper" / "run.json").write_text(
        json.dumps({"starts": [start | {"shards": f"{old}/data/shards"}]})
    )
    assert f"{whole}/data/shards" in check_run(target, Path(whole) / "runs" / "paper")  # it was typed in full
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"{old}/data/shards: no such folder.*--allow-leak"):
        check_run(target, moved)
