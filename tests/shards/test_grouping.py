"""All scans of a patient lie on one side of the split, whoever tells who they are of; the manifest names nobody."""

import hashlib
import json

import pytest

from p2w.ct.dicom import SeriesInfo, salted_hash
from p2w.ct.discover import ScanListing, ScanSource
from p2w.errors import UserError
from p2w.shards.grouping import GroupingOptions, group_of, split_groups
from p2w.shards.scan_shards import ScanFolder, ShardingSettings
from p2w.shards.training_scans import training_scans
from p2w.tasks.leak import first_leak

NAMES = ["anna/a.nii", "anna/b.nii", "bert/x/c.nii", "bert/d.nii", "carl.nii"]


def listing(names=NAMES, patients=None):
    infos = [SeriesInfo(patient=salted_hash(name, "")) for name in patients or [""] * len(names)]
    uids = [name.replace("/", "_").removesuffix(".nii") for name in names]
    return ScanListing(
        [
            ScanSource(uid, name, (name,), info=info)
            for uid, name, info in zip(uids, names, infos, strict=True)
        ]
    )


def members(found, level="patient"):
    """The names of the scans of each group, in the listing's order."""
    groups = group_of(found.sources, level)
    each = {}
    for source in found.sources:
        each.setdefault(groups[source.uid], []).append(source.name)
    return sorted(each.values())


PEOPLE = [["anna/a.nii", "anna/b.nii"], ["bert/x/c.nii", "bert/d.nii"], ["carl.nii"]]


def test_dicom_tells_patients_without_being_asked():
    found = listing(patients=["A", "A", "B", "B", ""])
    line = GroupingOptions().apply(found)
    assert line == "split by patient: 5 scans of 3 (DICOM); 1 without one count as one each"
    assert members(found) == PEOPLE
    assert GroupingOptions(group="scan").apply(found) == "split by scan"


def test_without_anyone_who_tells_it_is_by_scan():
    found = listing()
    assert (
        GroupingOptions().apply(found) == "split by scan: nothing tells which are of one patient (--groups)"
    )
    assert GroupingOptions().level(found.sources) == "scan"
    for level in ("patient", "study"):
        with pytest.raises(UserError, match=f"--group {level}: no scan says its {level}: name a table"):
            GroupingOptions(group=level).apply(listing())


def test_a_regular_expression_tells_patients():
    found = listing()
    line = GroupingOptions(groups="^([^/]+)/").apply(found)
    assert line == "split by patient: 5 scans of 3 (--groups '^([^/]+)/'); 1 without one count as one each"
    assert members(found) == PEOPLE
    whole = listing()
    GroupingOptions(groups="^[a-z]+").apply(whole)  # no group: what matches as a whole
    assert members(whole) == PEOPLE
    with pytest.raises(UserError, match=r"--groups '\(': neither a file.csv nor a regular expression"):
        GroupingOptions(groups="(")
    with pytest.raises(UserError, match=r"matches no scan's path, such as 'anna/a\.nii'"):
        GroupingOptions(groups="^XX").apply(listing())


def test_a_table_tells_patients_and_studies(tmp_path):
    table = tmp_path / "who.csv"
    table.write_text("﻿scan,patient,study\nanna,A,1\nbert/x/c.nii,B,2\nbert_d,B,3\n", encoding="utf-8")
    options = GroupingOptions(groups=str(table))
    found = listing()
    assert (
        options.apply(found) == "split by patient: 5 scans of 3 (--groups); 1 without one count as one each"
    )
    assert members(found) == PEOPLE
    assert members(found, "study") == [
        ["anna/a.nii", "anna/b.nii"],
        ["bert/d.nii"],
        ["bert/x/c.nii"],
        ["carl.nii"],
    ]
    assert "who.csv" not in json.dumps(options.plain())  # nor the folder that it lies in


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,patient\na,b\n", "its first line has name, patient: it must name the columns scan, patient"),
        ("", "its first line has nothing"),
        ("scan,patient\n", "no line below the first"),
        ("scan,patient\nanna,\n", "line 2: scan 'anna', patient '': both are needed"),
        ("scan,patient\nanna,A\nanna,B\n", "line 3: scan 'anna' is there twice"),
        ('scan,patient\n"' + "x" * 200_000 + '",A\n', "is no CSV table .field larger than"),
        ("scan,patient\nzoe,Z\n", "not one of its 1 scans is there .*'zoe'"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(tmp_path, text, message):
    table = tmp_path / "who.csv"
    table.write_text(text)
    with pytest.raises(UserError, match=message):
        GroupingOptions(groups=str(table)).apply(listing())
    with pytest.raises(UserError, match="cannot be read"):
        GroupingOptions(groups=str(tmp_path / "gone.csv")).apply(listing())


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.1, 0.34, 0.9])
def test_a_group_is_never_split_and_the_share_is_kept(seed, fraction):
    sizes = [1, 5, 2, 3, 1, 4]
    groups = {f"s{number}.{i}": f"g{number}" for number, size in enumerate(sizes) for i in range(size)}
    val = split_groups(groups, fraction, seed)
    assert not {groups[uid] for uid in val} & {groups[uid] for uid in set(groups) - val}
    wanted = round(fraction * 16)
    assert len(val) <= max(wanted, 1) if fraction else not val
    assert len(val) >= (1 if fraction else 0) and len(val) < 16
    assert wanted - len(val) < 5  # what remains is less than the largest group
    assert val == split_groups(dict(reversed(groups.items())), fraction, seed)


def test_one_large_patient_is_trained_on_and_another_validates():
    groups = {f"a{i}": "a" for i in range(9)} | {"b0": "b", "b1": "b"}
    assert split_groups(groups, 0.1, 0) == {"b0", "b1"}
    assert split_groups({f"a{i}": "a" for i in range(9)}, 0.1, 0) == set()


def test_a_group_for_each_scan_is_the_split_of_earlier_versions():
    uids = [f"1.2.{number}" for number in range(37)]
    order = sorted(uids, key=lambda uid: hashlib.sha256(f"3:{uid}".encode()).digest())
    assert split_groups({uid: uid for uid in uids}, 0.1, 3) == set(order[:4])


def _manifest(found, options):
    settings = ShardingSettings(grouping=options, val_fraction=0.4)
    row = {"key": "k", "z": 0, "y": 0, "x": 0}
    good = [
        {
            "uid": source.uid,
            "name": source.name,
            "subset": -1,
            "nbytes": 5,
            "checksum": source.uid,
            "left_out": 0,
        }
        | {"shape": [1, 1, 1], "spacing_mm": [1.0] * 3, "origin_xyz_mm": [0.0] * 3, "direction_xyz": [1.0]}
        | {"rows": [row | {"scan_uid": source.uid}]}
        for source in found.sources
    ]
    return ScanFolder("nowhere", settings).content(found, good).meta


def test_the_manifest_has_salted_hashes_and_never_names():
    found, options = (
        listing(["q/1.nii", "q/2.nii", "r/3.nii"], ["Muller", "Muller", "Smith"]),
        GroupingOptions(),
    )
    meta = _manifest(found, options)
    assert meta["split"]["rule"].startswith("by patient: of the patients ordered by sha256(seed:patient)")
    told = [source["patient"] for source in meta["sources"]]
    assert told[0] == told[1] != told[2] and all(len(one) == 16 for one in told)
    assert told[0] != salted_hash("Muller", "")  # a table of hashed names made once is of no use
    other = _manifest(listing(["q/1.nii", "s/9.nii"], ["Muller", "Muller"]), options)
    assert other["sources"][0]["patient"] != told[0]  # nor are two sets linked by their manifests
    assert "Muller" not in json.dumps(meta) and "Smith" not in json.dumps(meta)
    plain = _manifest(listing(["q/1.nii", "q/2.nii", "r/3.nii"]), options)
    assert sorted(plain["split"]) == ["rule", "seed", "train_scans", "val_fraction", "val_scans"]
    assert all("patient" not in source for source in plain["sources"])


class Target:
    """As much of a target set as the leak check reads."""

    where, folds = "target", 0

    def __init__(self, patient):
        source = {
            "uid": "t",
            "patient": patient,
            "files": [{"role": "ct", "file": "f", "nbytes": 1, "checksum": "c"}],
        }
        self.meta = {"sources": [source], "split": {"scans": {"train": [], "val": [], "test": ["t"]}}}


def test_a_test_patient_who_was_pretrained_on_is_a_leak():
    names, patients = ["q/1.nii", "q/2.nii", "r/3.nii"], ["Muller", "Muller", "Smith"]
    meta = _manifest(listing(names, patients), GroupingOptions())
    trained = "Muller" if "q_1" in meta["split"]["train_scans"] else "Smith"
    validated = "Smith" if trained == "Muller" else "Muller"
    assert "of a patient who is tested on, in scan t" in first_leak(
        Target(trained), training_scans(meta), None
    )
    by_hash = Target("Nobody")  # as p2w prepare general --images dicom names patients: after a series
    by_hash.meta["sources"][0]["patient_hash"] = salted_hash(trained, "")
    assert "of a patient who is tested on, in scan t" in first_leak(by_hash, training_scans(meta), None)
    by_hash.meta["sources"][0]["patient_hash"] = salted_hash(validated, "")
    assert first_leak(by_hash, training_scans(meta), None) is None
    assert first_leak(Target(validated), training_scans(meta), None) is None
    assert first_leak(Target("Nobody"), training_scans(meta), None) is None
    secret = _manifest(listing(names, patients), GroupingOptions(salt="x"))
    assert secret["split"]["secret"] and first_leak(Target(trained), training_scans(secret), None) is None
    meta["sources"][0]["patient"] = 7
    with pytest.raises(UserError, match="makes no sense"):
        first_leak(Target("Nobody"), training_scans(meta), None)


def test_a_secret_salt_is_written_nowhere():
    told = json.dumps(ShardingSettings(grouping=GroupingOptions(salt="hush")).plain())
    assert "hush" not in told and "salt" in told
    assert "salt" not in json.dumps(ShardingSettings().plain())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scan,patient,patient\nanna,A,B\n", "the column patient twice"),
        ("scan,patient\nan,na,A\n", "line 2: has more values than the first line"),
        ('scan,patient\nanna,"A\nbert,B\n', "is no CSV table .unexpected end of data"),
    ],
)
def test_a_table_that_would_lose_rows_or_values_is_refused(tmp_path, text, message):
    table = tmp_path / "who.csv"
    table.write_text(text)
    with pytest.raises(UserError, match=message):
        GroupingOptions(groups=str(table)).apply(listing())
