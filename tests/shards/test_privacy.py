"""What a set or an export would tell is listed, and what names people, days, places and machines is pointed at."""

import getpass
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from stream_sets import write_set

from p2w.errors import UserError
from p2w.shards import privacy, verify


def said(capsys, path):
    code = verify.main([str(path), "--privacy"])
    return code, capsys.readouterr().out


def test_a_set_that_tells_nothing(tmp_path, capsys):
    write_set(tmp_path / "set", "tar", train=(3,), val=(2,))
    code, out = said(capsys, tmp_path / "set")
    assert code == 0, out
    assert "nothing tells which scans are of one patient" in out and "look at        nothing" in out


@pytest.mark.parametrize(
    ("split", "source", "line"),
    [
        (
            {"secret": False},
            {"patient": "ab"},
            "hashes of 1 scans' (whoever knows identifiers can try them out)",
        ),
        ({"secret": True}, {"patient": "ab"}, "hashes of 1 scans' (nobody without the secret salt)"),
        ({}, {}, "nothing tells which scans are of one patient"),
    ],
)
def test_what_a_manifest_tells_by_intention(split, source, line):
    meta = {"sources": [{"uid": "1.2", "file": "a/b.nii", **source}], "split": split}
    scans, paths, patients = privacy.set_lines(meta)
    assert scans == "scans          1, named by uid, such as 1.2"
    assert paths == "paths          1 below --scans, such as a/b.nii" and patients.endswith(line)
    task = {"task": "general", "sources": [{"uid": "1.2", "patient": "1.2", "patient_hash": "ab"}]}
    assert privacy.set_lines(task)[1:] == [
        "patients       1, named 1.2",
        "               and hashes of their PatientIDs: whoever knows identifiers can try them out",
    ]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("/home/anna/scans/a.nii", "absolute paths"),
        ("C:\\data\\anna", "absolute paths"),
        ("D:/data/anna", "absolute paths"),
        ("cannot read /raid/ct/a.nii", "absolute paths"),
        ("file:///volume1/nas/a.nii", "absolute paths"),
        ("DOE^JANE", "names of persons"),
        ("Müller^Jürgen", "names of persons"),
        ("born 1950-01-31", "dates of a day"),
        ("case 31.01.1950", "dates of a day"),
        ("case-20150607", "dates of a day"),
        ("1.3.12.2.1107.5.1.4.2015060710111200.7", "dates of a day"),
    ],
)
def test_what_identifies_is_found_in_every_kind_of_file(tmp_path, capsys, text, kind):
    (tmp_path / "a.json").write_text(json.dumps({"note": text}))
    table = pa.table({"column": [text]}).replace_schema_metadata({"note": text})
    pq.write_table(table, tmp_path / "b.parquet")
    save_file({"a": torch.zeros(1)}, tmp_path / "c.safetensors", {"p2w": json.dumps({"note": text})})
    for name in ("a.json", "b.parquet", "c.safetensors"):
        code, out = said(capsys, tmp_path / name)
        assert code == 1 and f"look at        {kind}" in out, (name, out)


@pytest.mark.parametrize(
    "text",
    [
        "a/b/c.nii",
        "1.3.6.1.4.1.14519.5.2.1.6279.6001.105756658031515062000744821260",
        "https://x.org/data/a",
        "<b>a</b></td></tr>",
        "2026-11-27T10:00:00",
        "/usr/bin/python3",
        "s3://bucket/data/a",
        "base64,/9j/4AAQSk+/Pz7/GQw/8=",
        "ORIGINAL/PRIMARY/AXIAL",
    ],
)
def test_what_tells_nothing_is_not_pointed_at(tmp_path, capsys, text):
    (tmp_path / "a.json").write_text(json.dumps({"note": text}))
    assert said(capsys, tmp_path)[0] == 0


def test_the_user_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "annamueller")
    (tmp_path / "a.txt").write_text("made by annamueller")
    assert privacy.suspects(tmp_path) == {"the user or machine that made it": {"annamueller": ["a.txt"]}}


def test_what_cannot_be_looked_at(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        verify.main([str(tmp_path / "gone"), "--privacy"])
    (tmp_path / "a.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match="nothing says what it tells"):
        verify.main([str(tmp_path), "--privacy"])
