"""Splits by patient: counts, disjointness, and the same for the same seed."""

from collections import Counter
from types import SimpleNamespace

import pytest

from p2w.files import canonical_json
from p2w.tasks import ncs
from p2w.tasks.prepare import TargetFolder, TargetSettings
from p2w.tasks.task import Case, assign_folds, by_fractions, split_of_fold


def test_the_numbers_of_lidc():
    """1,010 patients, eight of whom have two scans: 510 / 100 / 408 cases."""
    weight = {f"LIDC-IDRI-{n:04d}": 2 if n < 8 else 1 for n in range(1010)}
    part = by_fractions(weight, (510, 100, 408), 0)
    scans = Counter(i for patient, i in part.items() for _ in range(weight[patient]))
    assert scans == {0: 510, 1: 100, 2: 408}
    assert part == by_fractions(dict(reversed(weight.items())), (510, 100, 408), 0)
    assert part != by_fractions(weight, (510, 100, 408), 1)


@pytest.mark.parametrize("count", [3, 4, 7, 40])
def test_every_part_has_a_patient(count):
    part = by_fractions({str(n): 1 for n in range(count)}, (0.8, 0.05, 0.15), 3)
    assert set(part.values()) == {0, 1, 2} and len(part) == count


def test_folds_of_brats():
    fold_of = assign_folds((str(n) for n in range(285)), 3, 0)
    assert Counter(fold_of.values()) == {0: 95, 1: 95, 2: 95}
    tested = []
    for fold in range(3):
        split = split_of_fold(fold_of, fold, 0.15, 0)
        assert Counter(split.values()) == {"test": 95, "val": 28, "train": 162}
        tested += [name for name, own in split.items() if own == "test"]
    assert len(set(tested)) == 285


def test_ncs_tests_on_no_patient_that_pretraining_has(monkeypatch):
    manifest = SimpleNamespace(meta={"sources": [{"uid": f"scan{i}"} for i in range(6)]})
    monkeypatch.setattr(ncs, "open_manifest", lambda path: manifest)
    cases = [
        Case(f"scan{i}", f"scan{i}", f"patient{i % 10}", ()) for i in range(12)
    ]  # scan10, scan11: of 0 and 1
    of = ncs.Ncs(cases=(6, 2, 4), pretrained_on="shards").split(cases).of
    tested = {name for name, split in of.items() if split == "test"}
    assert tested == {f"patient{i}" for i in range(6, 10)} and set(of.values()) == {"train", "val", "test"}
    assert len(of) == 10 and ncs.Ncs(cases=(6, 2, 4)).split(cases).of != of


def test_a_set_that_was_pretrained_on_is_named_without_its_folder(tmp_path):
    options = {"pretrained_on": "/data/hospital/ward-7/shards", "seed": 0}
    settings = TargetSettings("ncs", options, (8, 8, 8), "tar", {})
    assert settings.plain()["option pretrained_on"] == settings.portable_options["pretrained_on"] == "shards"
    folder = TargetFolder(str(tmp_path), settings, ncs.Ncs())
    folder.adopt_version(canonical_json(settings.plain(), indent=1))
    assert folder.settings.plain()["option pretrained_on"] == "shards"
    earlier = canonical_json({**settings.plain(), "option pretrained_on": options["pretrained_on"]}, indent=1)
    folder.adopt_version(earlier)
    assert canonical_json(folder.settings.plain(), indent=1) == earlier
