"""Tables of answers: what is read, and what is refused in one line."""

import math

import pytest

from p2w.errors import UserError
from p2w.tasks.answer_tables import read_answers, refuse_two_rows


def read(tmp_path, text, answer="class", columns=("label",), names=(), points=False, ending="csv"):
    path = tmp_path / f"t.{ending}"
    path.write_text(text)
    return read_answers(str(path), answer, columns, names, points)


def test_classes_are_found_or_declared_and_an_empty_cell_is_unknown(tmp_path):
    table = read(tmp_path, "scan,patient,label\na,p,benign\nb,p,malignant\nc,q,\nd,r,benign\n")
    assert table.classes == ("benign", "malignant") and table.kind == "multi-class classification"
    assert [row.label for row in table.rows] == [0, 1, 0] and table.unanswered == 1
    table = read(tmp_path, "scan\tlabel\na\t10\nb\t9\nc\t11\n", ending="tsv")
    assert table.classes == ("9", "10", "11") and [row.label for row in table.rows] == [1, 0, 2]
    named = read(tmp_path, "scan,label\na,1\nb,0\n", names=("yes=1", "no=0"))
    assert named.classes == ("yes", "no") and [row.label for row in named.rows] == [0, 1]


def test_labels_values_and_points(tmp_path):
    table = read(tmp_path, "scan,u,v\na,1,0\nb,,1\nc,0,\nd,,\n", "labels", ("u", "v"))
    assert [row.label for row in table.rows] == [-1] * 3 and table.unanswered == 1
    assert table.rows[0].targets == (1, 0) and math.isnan(table.rows[1].targets[0])
    table = read(tmp_path, "scan,age,x,y,z\na,61.5,1,2,3\na,70,4,5,6\n", "value", ("age",), points=True)
    assert table.kind == "regression" and [row.xyz for row in table.rows] == [(1, 2, 3), (4, 5, 6)]


@pytest.mark.parametrize(
    ("text", "more", "why"),
    [
        ("scan,label\na,nan\nb,1\n", {}, "line 2: label 'nan' is no answer: leave the cell empty"),
        ("scan,label\na,1\nb,NA\n", {"answer": "value"}, "line 3: label 'NA' is no answer"),
        ("scan,label\na,1\nb,inf\n", {"answer": "value"}, "'inf' is no answer"),
        ("scan,label\na,x\nb,2\n", {"answer": "value"}, "label 'x' is no number"),
        ("scan,label\na,5\nb,5\n", {"answer": "value"}, "is 5 wherever it is known: there is nothing to learn"),
        ("scan,label\na,0\nb,2\n", {"answer": "labels"}, "'2': 0, 1, or nothing"),
        ("scan,label\na,0\nb,0\n", {"answer": "labels"}, "both 0 and 1 are needed"),
        ("scan,label\na,0\nb,3\n", {}, "classes 0, 3 are not contiguous"),
        ("scan,label\na,0.5\nb,1.5\n", {}, "is a fraction: for numbers take --answer value"),
        ("scan,label\na,1\nb,01\n", {}, "one class in two ways"), ("scan,label\na,1\nb,1\n", {}, r"1 class\(es\)"),
        ("scan,label\na,x\nb,y\n", {"names": ("one=x",)}, "class 'y' is not declared: one=x"),
        ("scan,label\na,x\nb,y\n", {"names": ("one=x", "two=y", "three=z")}, "class three has no case"),
        ("scan,label\n", {}, "has no row"), ("scan,label\na,\nb,\n", {}, "no row has a value of label"),
        ("scan,grade\na,1\n", {}, "no column label"),
        ("scan,patient,label\na,p,0\na,q,1\n", {}, "scan a is of patient q, in line 2 of p"),
        ("scan,patient,split,label\na,p,train,0\nb,p,test,1\n", {}, "a patient has one"),
        ("scan,split,label\na,trian,0\nb,,1\n", {}, "split 'trian'"),
        ("scan,label\na,0,3\n", {}, "3 values, its head has 2"),
    ],
)  # fmt: skip
def test_one_line_for_what_cannot_be(tmp_path, text, more, why):
    with pytest.raises(UserError, match=why) as error:
        read(tmp_path, text, **more)
    assert "\n" not in str(error.value)


def test_two_rows_of_one_scan(tmp_path):
    table = read(tmp_path, "scan,label\na,0\nb,1\na,1\n")
    with pytest.raises(UserError, match="line 4: scan a is in line 2 too"):
        refuse_two_rows("t.csv", table.rows)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("scan,label,label\na,0,1\nb,1,0\n", "the column label twice"),
        ("scan,label,patient,PatientID\na,0,P,P\nb,1,P,Q\n", "line 3: patient 'P' and patientid 'Q' differ"),
        ('scan,label,patient\na,0,"P\nb,1,Q\nc,1,R\n', "is no CSV table .unexpected end of data"),
        ("scan;label\na;0\nb;1\n", "separated by commas"),
        ("scan,label\na,1\nb,0\nc,1.0\n", "one class in two ways .1, 1.0"),
        ("scan,label\na,benign\nb,Benign\nc,malignant\n", "one class in two ways .Benign, benign"),
    ],
)
def test_a_table_that_can_be_read_in_two_ways_is_refused(tmp_path, text, why):
    with pytest.raises(UserError, match=why) as error:
        read(tmp_path, text)
    assert "\n" not in str(error.value)


def test_columns_of_two_names_that_agree_and_crlf_and_a_bom_are_read(tmp_path):
    text = "\ufeffscan,path,label,patient,patientid\r\na,x/a,1,P,P\r\nb,x/b,0,Q,Q\r\n"
    assert [(row.scan, row.patient, row.label) for row in read(tmp_path, text).rows] == [
        ("a", "P", 1),
        ("b", "Q", 0),
    ]
