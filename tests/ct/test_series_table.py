"""The table of series, and expressions over its columns."""

import csv
import io
import json

import pytest
from ct_files import ct, write
from dicom_files import body, write_series

from p2w.ct.discover import SearchOptions, find_scans
from p2w.ct.orientation import BadScan
from p2w.ct.series_table import choose, parse_expression, series_rows, table_csv, table_json, table_text
from p2w.errors import UserError

pytest.importorskip("pydicom", reason="pip install 'parts2whole[test]' brings pydicom")


def action(grid):
    if grid.size[2] < 10:
        raise BadScan("too small")
    return "cut"


@pytest.fixture
def study(tmp_path):
    tags = {
        "PatientID": "MEIER 0815",
        "PatientName": "Meier^Eva",
        "StudyInstanceUID": "1.7",
        "StudyDate": "20190304",
    }
    thick = {**tags, "ConvolutionKernel": "B30f", "SliceThickness": "5", "ContrastBolusAgent": "Ultravist"}
    write_series(tmp_path / "thick", body(), [5 * i for i in range(12)], series="1.2.1", **thick)
    thin = {
        **tags,
        "ConvolutionKernel": ["B70f", "3"],
        "SliceThickness": "1",
        "SeriesDescription": "Thorax 1.0",
    }
    write_series(tmp_path / "thin", body(), [1 * i for i in range(12)], series="1.2.2", **thin)
    write_series(tmp_path / "few", body()[:5], series="1.2.3", **tags)
    write_series(tmp_path / "mr", body(), series="1.2.4", Modality="MR", **tags)
    write(tmp_path / "other.nii.gz", ct((12, 20, 16)))
    return tmp_path


def find(folder, salt="a"):
    return find_scans([str(folder)], "", options=SearchOptions(salt=salt))


def test_the_table_says_what_headers_say_and_what_would_be_done(study):
    rows = {row["name"]: row for row in json.loads(table_json(series_rows(find(study), action)))}
    thin = rows["thin (series 1.2.2)"]
    assert (thin["kernel"], thin["slice_thickness"], thin["spacing_z"], thin["slices"]) == (
        "B70f\\3",
        1,
        1,
        12,
    )
    assert (thin["year"], thin["description"], thin["contrast"]) == (2019, "Thorax 1.0", None)
    assert rows["thick (series 1.2.1)"]["contrast"] == "Ultravist"
    assert (
        rows["few (series 1.2.3)"]["action"] == "refuse" and rows["few (series 1.2.3)"]["why"] == "too small"
    )
    assert (
        rows["mr (series 1.2.4)"]["action"] == "leave out" and rows["mr (series 1.2.4)"]["modality"] == "MR"
    )
    assert rows["other.nii.gz"]["patient"] is None and rows["other.nii.gz"]["spacing_z"] == 2.5
    assert len({row["patient"] for row in rows.values()} - {None}) == 1
    table = list(csv.DictReader(io.StringIO(table_csv(series_rows(find(study), action)))))
    assert [row["name"] for row in table] == sorted(rows) and table[0]["slices"] == "5"


def test_the_table_names_nobody(study):
    for form in (table_text, table_json, table_csv):
        text = form(series_rows(find(study), action))
        assert not any(word in text for word in ("MEIER", "Meier", "0815", "0304", str(study)))
    patients = [series_rows(find(study, salt), action)[0].values["patient"] for salt in "aab"]
    assert patients[0] == patients[1] != patients[2]


@pytest.mark.parametrize(
    ("expression", "chosen"),
    [
        ("slice_thickness <= 3", ["1.2.2"]),
        ("slice_thickness <= 3 or contrast", ["1.2.1", "1.2.2"]),
        ("not (contrast or kernel ~ '^b70')", ["1.2.3", "other"]),
        ("kernel ~ 'B30' and spacing_z == 5", ["1.2.1"]),
        ("slice_thickness > 0 and slices >= 12", ["1.2.1", "1.2.2"]),  # what no header says is not compared
        ('year != 2018 and name != "few (series 1.2.3)"', ["1.2.1", "1.2.2"]),
        ("action == 'cut'", ["1.2.1", "1.2.2", "other"]),
    ],
)
def test_select(study, expression, chosen):
    found = choose(find(study), action, expression)
    assert [source.uid for source in found.sources] == chosen
    assert found.files - found.passed_over.total() == sum(len(source.files) for source in found.sources)
    assert len(found.left_out) == 5 - len(chosen)


def test_scans_of_one_name_are_chosen_each_by_itself(tmp_path):
    for patient, count in (("A", 12), ("B", 6)):
        tags = {"PatientID": patient, "StudyInstanceUID": f"1.{count}"}
        write_series(tmp_path, body()[:count], first=20 * count, prefix=patient, **tags)
    assert len({source.name for source in find(tmp_path).sources}) == 1
    found = choose(find(tmp_path), lambda grid: "cut", "slices > 6")
    (source,) = found.sources
    assert len(source.files) == 12 and len(found.left_out) == 1
    assert found.passed_over == {"files of scans that were not chosen": 6}
    assert len(choose(find(tmp_path), lambda grid: "cut", one_per_study="thinnest").sources) == 2


def test_the_thinnest_of_a_study(study):
    found = choose(find(study), action, one_per_study="thinnest")
    assert [source.uid for source in found.sources] == ["1.2.2", "other"]
    with pytest.raises(UserError, match="none of 4 scans is chosen"):
        choose(find(study), action, "slices > 1000")


@pytest.mark.parametrize(
    "text",
    [
        "", "slices", "slices >", "slices > 'a'", "kernel > 3", "kernel < 'a'", "slices ~ 'a'", "foo == 1", "slices > 2)",
        "(slices > 2", "slices > 2 slices", "and", "kernel ~ '('", "__import__('os')", "slices > 2 ; 1", "not", "(" * 99,
        "kernel == 'a", "slices > 1e", "slices == -1",
    ],
)  # fmt: skip
def test_what_is_no_expression(text):
    if text == "slices":  # a column by itself: whether it is known
        assert parse_expression(text)({"slices": 3.0}) and not parse_expression(text)({"slices": None})
        return
    with pytest.raises(UserError, match="--select") as error:
        parse_expression(text)
    assert "\n" not in str(error.value)
