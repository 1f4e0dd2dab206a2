"""Which scans a folder, table or list names, what they are called, and reading ahead in a thread."""

import threading

import pytest
from ct_files import ct, dicom, write

from p2w.ct.dicom import salted_hash
from p2w.errors import UserError
from p2w.inference.cohort import ReadAhead, identifiers_of, list_cohort

HU = ct((4, 8, 8))


@pytest.fixture
def folder(tmp_path):
    for name in ("a/one.nii.gz", "a/two.mha", "b/three.nrrd"):
        write(tmp_path / "scans" / name, HU)
    dicom(tmp_path / "scans" / "c", HU, "1.2.3", tags={"0010|0020": "Doe"})
    return tmp_path / "scans"


def test_a_folder_is_searched(folder):
    cohort = list_cohort(str(folder), out=str(folder / "b"), groups=r"^a/(\w)", salt="s")
    assert [(scan.uid, scan.patient) for scan in cohort.scans] == [
        ("1.2.3", salted_hash("Doe", "s")),
        ("a_one", salted_hash("o", "s")),
        ("a_two", salted_hash("t", "s")),
    ]


def test_a_table_names_scans_and_patients(folder, tmp_path):
    table = folder.parent / "scans.csv"
    rows = ["scans/a/one.nii.gz,first,P1", "scans/c,,", "scans/none.nii,,"]
    table.write_text("\n".join(["Scan,name,patient", *rows]))
    cohort = list_cohort(str(table))
    assert [(s.uid, s.given_name, s.patient) for s in cohort.scans] == [
        ("first", "first", salted_hash("P1", "")),
        ("scans_c", "", salted_hash("Doe", "")),
    ]
    (name, why) = cohort.bad[0]
    assert name.endswith("line 4") and "scans/none.nii" in why


def test_a_list_and_a_file(folder, tmp_path):
    listed = folder / "list.txt"
    listed.write_text("a/one.nii.gz\n\n  c\n")
    assert [scan.name for scan in list_cohort(str(listed)).scans] == ["a/one.nii.gz", "c"]
    assert [scan.uid for scan in list_cohort(str(folder / "a" / "two.mha")).scans] == ["two"]


def test_several_channels_are_columns(folder):
    table = folder / "scans.csv"
    table.write_text("t1,flair\na/one.nii.gz,a/two.mha\n")
    (scan,) = list_cohort(str(table), channels=("flair", "t1")).scans
    assert [source.name for source in scan.sources] == ["a/two.mha", "a/one.nii.gz"]
    with pytest.raises(UserError, match="flair, t1"):
        list_cohort(str(folder), channels=("flair", "t1"))
    table.write_text("scan\na/one.nii.gz\n")
    with pytest.raises(UserError, match="no column flair"):
        list_cohort(str(table), channels=("flair", "t1"))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("scan\na/one.nii.gz\n./a/one.nii.gz\n", "line 3: .*is in line 2"),
        ("scan,name\n,x\n", "line 2: no path"),
        ("series\nx\n", "no column scan"),
        ("scan\nnone.nii\n", "not one scan .*none.nii"),
    ],
)
def test_tables_that_break_the_rules(folder, text, match):
    (folder / "scans.csv").write_text(text)
    with pytest.raises(UserError, match=match):
        list_cohort(str(folder / "scans.csv"))
    with pytest.raises(UserError, match="no such folder or file"):
        list_cohort(str(folder / "elsewhere"))


def test_a_name_stands_for_its_hash(folder):
    scans = list_cohort(str(folder), salt="s").scans
    assert scans[1].identifier("s") in identifiers_of("a/one.nii.gz", "s")
    assert scans[1].identifier("s") in identifiers_of("a_one", "s")
    assert scans[0].identifier("s") in identifiers_of("1.2.3", "s")
    assert scans[0].identifier("") not in identifiers_of("1.2.3", "s")


def test_the_state_changes_with_the_file(folder):
    path = folder / "a" / "two.mha"
    before = list_cohort(str(path)).scans[0].state()
    assert list_cohort(str(path)).scans[0].state() == before
    write(path, ct((5, 8, 8)))
    assert list_cohort(str(path)).scans[0].state() != before


def test_reading_ahead_keeps_order_bounds_and_errors():
    made = []

    def items():
        for number in range(6):
            made.append(number)
            yield number
        raise OSError("gone")

    seen = []
    with pytest.raises(OSError, match="gone"), ReadAhead(items(), 2) as ahead:
        for number in ahead:
            assert len(made) <= number + 3
            seen.append(number)
    assert seen == [0, 1, 2, 3, 4, 5]
    with ReadAhead(iter(range(100))) as ahead:
        assert next(iter(ahead)) == 0
    assert not any(thread.name == "p2w-read-ahead" for thread in threading.enumerate())
