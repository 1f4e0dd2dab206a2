"""p2w probe and p2w neighbours, on features with a known answer."""

import csv
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from p2w.ct.dicom import salted_hash
from p2w.errors import UserError
from p2w.inference import neighbours as neighbours_command
from p2w.inference import probe
from p2w.inference.embeddings import centred_directions, neighbours, read_embeddings, salt_check
from p2w.inference.probe import divide, judge, linear_scores, nearest_scores

CLASSES = ["ill", "well"]


def write_table(path, values, patients=None, salt="", names=None):
    """As p2w embed writes it: scan k of uid "k", features `mean`, with zeros for the others."""
    count, channels = values.shape
    vector = pa.list_(pa.float32(), channels)
    rows = [
        {
            "scan": salted_hash(str(k), salt), "name": names[k] if names else "",
            "patient": patients[k] if patients else "",
            "mean": values[k], "max": np.zeros(channels), "std": np.ones(channels),
        }
        for k in range(count)
    ]  # fmt: skip
    fields = [("scan", pa.string()), ("name", pa.string()), ("patient", pa.string())]
    schema = pa.schema(fields + [(kind, vector) for kind in ("mean", "max", "std")])
    schema = schema.with_metadata({b"p2w": json.dumps({"salt": salt_check(salt)}).encode()})
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return path


def write_labels(path, labels, head="scan,label"):
    path.write_text("\n".join([head, *(f"{k},{label}" for k, label in enumerate(labels))]))
    return path


def two_groups(count=24, apart=4.0, seed=0):
    rng = np.random.default_rng(seed)
    truth = np.arange(count) % 2
    return rng.normal(0, 1, (count, 6)) + apart * truth[:, None], truth


@pytest.mark.parametrize("scores_of", [lambda *a: nearest_scores(*a, 5), lambda *a: linear_scores(*a, 1.0)])
def test_a_difference_is_found_and_noise_is_not(scores_of):
    values, truth = two_groups()
    patients = [str(k // 2 * 2 + k % 2) for k in range(24)]
    splits, _ = divide(truth, patients, 4, 0, CLASSES)
    found = judge(scores_of(values, truth, splits), truth, patients)
    assert found["balanced accuracy"][0] == found["AUC"][0] == 1.0
    assert found["AUC"][1] == pytest.approx(0.025 ** (1 / 12))  # 12 of 12 patients
    areas = []
    for seed in range(6):
        noise, truth = two_groups(200, apart=0.0, seed=seed)
        splits, _ = divide(truth, [str(k) for k in range(200)], 5, seed, CLASSES)
        areas.append(roc_auc_score(truth, scores_of(noise, truth, splits)[:, 1]))
    assert abs(np.mean(areas) - 0.5) < 0.04  # one AUC deviates by 0.04, the mean of six by 0.017


def test_a_patient_is_never_on_both_sides():
    """Features name the patient, and each patient has a label at random: seen patients would be told perfectly."""
    rng = np.random.default_rng(1)
    owner = np.repeat(np.arange(40), 4)
    truth = rng.permutation(np.arange(40) % 2)[owner]
    values = rng.normal(0, 1, (40, 30))[owner] + rng.normal(0, 0.01, (160, 30))
    patients = [f"P{one}" for one in owner]
    for folds in (5, 0):
        splits, how = divide(truth, patients, folds, 0, CLASSES)
        assert ("leave one" in how) == (folds == 0) and len(splits) == (folds or 40)
        for learn, judged in splits:
            assert not set(owner[learn]) & set(owner[judged])
        assert sorted(np.concatenate([judged for _, judged in splits])) == list(range(160))
        assert judge(nearest_scores(values, truth, splits, 3), truth, patients)["AUC"][0] < 0.75


def test_metrics_are_those_of_scikit_learn():
    rng = np.random.default_rng(2)
    scores, truth = rng.dirichlet((1, 1, 1), 60), rng.integers(0, 3, 60)
    found = judge(scores, truth, [str(k // 3) for k in range(60)])
    assert found["balanced accuracy"][0] == pytest.approx(balanced_accuracy_score(truth, scores.argmax(1)))
    assert found["AUC"][0] == pytest.approx(roc_auc_score(truth, scores, multi_class="ovr"))
    pair = scores[:, :2]
    area = judge(pair, truth % 2, [str(k) for k in range(60)])["AUC"]
    assert area[0] == pytest.approx(roc_auc_score(truth % 2, pair[:, 1])) and area[1] < area[0] < area[2]


def test_rare_classes_count_as_much_as_common_ones():
    """Two of 20 are in one class: among neighbours drawn by chance, votes by head would never name it."""
    values = np.repeat([[1.0, 0.0], [0.0, 1.0]], (18, 2), axis=0) + np.random.default_rng(0).normal(
        0, 0.01, (20, 2)
    )
    truth = np.r_[np.zeros(18, int), np.ones(2, int)]
    splits, _ = divide(truth, [str(k) for k in range(20)], 2, 0, CLASSES)
    assert nearest_scores(values, truth, splits, 5).argmax(1).tolist() == truth.tolist()


def test_from_tables_to_figures(tmp_path, capsys):
    values, truth = two_groups()
    table = write_table(tmp_path / "e.parquet", values, [f"P{k}" for k in range(24)], salt="s")
    labels = write_labels(tmp_path / "l.csv", [CLASSES[one] for one in truth] + ["ill"])
    argv = [str(table), "--labels", str(labels), "--salt", "s", "--out", str(tmp_path / "p.json")]
    assert probe.main([*argv, "--predictions", str(tmp_path / "p.csv")]) == 0
    said = capsys.readouterr().out
    assert "24 scans of 24 patients (ill: 12, well: 12); 6 features; 5 folds by patient" in said
    assert re.search(r"linear +balanced accuracy 1\.000 \[0\.\d+, 1\.000\]", said)
    assert "1 scans of" in said and "the first is 24" in said
    assert json.loads((tmp_path / "p.json").read_text())["linear"]["AUC"][0] == 1.0
    with open(tmp_path / "p.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 24 and float(rows[0]["linear ill"]) > 0.5 > float(rows[1]["linear ill"])
    with pytest.raises(UserError, match="another --salt"):
        probe.main([*argv[:3], "--salt", "other"])


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (["a"] * 6, "'a' is that of 6 patient.*of 1 class"),
        (["a", "a", "a", "a", "a", "b"], "'b' is that of 1 patient"),
        ([""] * 6, "not one of its scans"),
    ],
)
def test_labels_that_tell_nothing_are_refused(tmp_path, labels, match):
    table = write_table(tmp_path / "e.parquet", two_groups(6)[0])
    with pytest.raises(UserError, match=match):
        probe.main([str(table), "--labels", str(write_labels(tmp_path / "l.csv", labels))])


def test_tables_that_are_none(tmp_path):
    table = write_table(tmp_path / "e.parquet", two_groups(6)[0])
    (tmp_path / "l.csv").write_text("scan,label\n0,a\n./0.nii.gz,b\n")
    with pytest.raises(UserError, match=r"line 3: scan \./0\.nii\.gz is in line 2"):
        probe.main([str(table), "--labels", str(tmp_path / "l.csv")])
    with pytest.raises(UserError, match="no column kernel"):
        probe.main([str(table), "--labels", str(tmp_path / "l.csv"), "--label", "kernel"])
    with pytest.raises(UserError, match="no table of scans of p2w embed"):
        read_embeddings(tmp_path / "l.csv", "mean", "")
    values = two_groups(6)[0]
    values[2, 3] = np.nan
    with pytest.raises(UserError, match="not finite"):
        read_embeddings(write_table(tmp_path / "e.parquet", values), "mean", "")


def test_the_most_similar_scans_come_first():
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(4), 3)
    values = 100 + rng.normal(0, 1, (4, 8))[groups] + rng.normal(0, 0.01, (12, 8))
    directions = centred_directions(values)
    for query in range(12):
        found = neighbours(directions, query, 2)
        assert {groups[one] for one, _ in found} == {groups[query]} and query not in dict(found)
        assert found[0][1] >= found[1][1] > 0.9
        others = neighbours(directions, query, 20, [str(one) for one in groups])
        assert len(others) == 9 and groups[query] not in {groups[one] for one, _ in others}
    lengths = np.linalg.norm(centred_directions(np.c_[values, np.full(12, 7.0)]), axis=1)
    np.testing.assert_allclose(lengths, 1)  # a feature without spread is nothing


def test_neighbours_as_text_table_and_page(tmp_path, capsys):
    values, truth = two_groups(12)
    names = [f"scan <{k}>" for k in range(12)]
    table = write_table(tmp_path / "e.parquet", values, names=names)
    labels = write_labels(tmp_path / "l.csv", [CLASSES[one] for one in truth])
    page, out = tmp_path / "map.html", tmp_path / "n.csv"
    argv = [str(table), "--query", "3", "--out", str(out), "--page", str(page), "--labels", str(labels)]
    assert neighbours_command.main([*argv, "--k", "4"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "scan <3>" and len(said) == 7
    assert all(int(line.split("<")[1].rstrip(">")) % 2 for line in said[1:5])
    with open(out) as file:
        assert [row["neighbour"] for row in csv.DictReader(file)] == [
            line.split("  ")[-1] for line in said[1:5]
        ]
    text = page.read_text()
    assert text.count("<tr>") == 13 and "data:image/png;base64," in text
    assert "scan &lt;3&gt;" in text and "scan <3>" not in text
    for wrong, match in (
        (["--query", "none"], "is not among the 12 scans"),
        ([], "name a scan with --query"),
        (["--query", "3", "--other-patients"], "does not know the patients"),
    ):
        with pytest.raises(UserError, match=match):
            neighbours_command.main([str(table), *wrong])
