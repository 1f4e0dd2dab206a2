"""p2w table1 and table2 on forged transfer folders: known numbers, marks, missing cells, refusals, files byte for byte."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from finetune_folders import write_transfer
from scipy.stats import ttest_rel

from p2w.errors import UserError
from p2w.reproduce import commands, paper_numbers
from p2w.reproduce.render import tex
from p2w.reproduce.table import load_table
from p2w.reproduce.table_builder import percent, significance_marks

GOLDEN = Path(__file__).parent / "golden"
EVIL = "<script>alert(1)</script>_&%$#{}~^\\[x]"
OURS, GENESIS, SCRATCH = [0.97, 0.98, 0.99, 0.96], [0.95, 0.97, 0.98, 0.93], [0.80, 0.85, 0.75, 0.70]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Three rows of NCC and one of NCS, the paths relative, so that golden files hold for every machine."""
    monkeypatch.chdir(tmp_path)
    write_transfer(Path("runs/ncc/p2w"), label="parts-2-whole", auc=OURS)
    write_transfer(Path("runs/ncc/mg"), label="models_genesis", auc=GENESIS)
    write_transfer(Path("runs/ncc/scratch"), label="random", auc=[*SCRATCH, None, None])
    write_transfer(Path("runs/ncs/p2w"), task="ncs", auc=[0.7, 0.8], metric="mean_iou", planned=10)
    return Path("runs")


def made(name="table1", *more, where="runs"):
    command = {"table1": commands.main_table1, "table2": commands.main_table2}[name]
    assert command([where, *more]) == 0
    return load_table(Path(where) / "tables" / f"{name}.json")


def test_numbers_marks_and_missing_cells(runs, capsys):
    table = made()
    cell = table.cell("Parts2Whole", "ncc")
    assert (cell.mean, cell.sd, cell.n) == pytest.approx((97.5, 1.2909944, 4))
    assert (cell.mark, cell.paper_mean, cell.paper_mark, cell.missing) == ("best", 98.67, "best", "")
    genesis = table.cell("Models Genesis", "ncc")
    assert genesis.p == pytest.approx(ttest_rel(OURS, GENESIS).pvalue) and genesis.test == "paired t-test"
    assert genesis.p_used == pytest.approx(genesis.p) and genesis.p < 0.05 and genesis.mark == ""
    scratch = table.cell("Scratch", "ncc")
    assert (scratch.n, scratch.missing, scratch.p_used) == (4, "4 of 6", pytest.approx(2 * scratch.p))
    assert table.cell("I3D", "ncc").missing == "no run" and table.cell("I3D", "ncc").paper_mean == 98.26
    assert table.cell("Parts2Whole", "ncs").missing == "2 of 10"
    here = next(claim for claim in table.claims if claim.source == "here")
    assert (here.ours, here.other, here.pairs) == ("Parts2Whole", "Models Genesis", [4])
    said = capsys.readouterr()
    assert "97.50±1.29" in said.out and "4 of 6 trials" in said.out and "paper 98.67±0.23" in said.out
    assert "runs/ncc/scratch: 4 of 6 trials are finished; left out: 4, 5" in said.err


def test_marks_follow_the_correction():
    """ECC of the paper: Scratch differs from the best by itself, and no longer among five comparisons."""
    column = {row: cells["ecc"] for row, cells in paper_numbers.TABLE1.items()}
    plain, corrected = significance_marks(column, correct=False), significance_marks(column, correct=True)
    assert plain["Models Genesis"].mark == corrected["Models Genesis"].mark == "best"
    assert {row for row, mark in plain.items() if mark.mark == "equivalent"} == {"MedicalNet", "Parts2Whole"}
    assert corrected["Scratch"].mark == "equivalent" and plain["Scratch"].mark == ""
    assert corrected["Scratch"].p == plain["Scratch"].p < 0.05 <= corrected["Scratch"].p_used
    assert significance_marks({"alone": column["I3D"]}, True) == {}


def test_files_are_what_they_were(runs):
    made("table1", "--against", "Scratch")
    for name in ("table1.csv", "table1.tex"):
        text = (runs / "tables" / name).read_text()
        assert text == (GOLDEN / name).read_text(), f"if the change is meant, copy {name} to {GOLDEN}"
    rows = list(csv.DictReader((runs / "tables" / "table1.csv").open()))
    assert len(rows) == 30 and rows[5]["values"] == "97.0 98.0 99.0 96.0"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
def test_latex_compiles(runs):
    write_transfer(Path("runs/ncc/evil"), label=EVIL, auc=OURS[:3])
    made("table1")
    for parts in paper_numbers.TABLE2:
        write_transfer(Path("two") / parts.label.replace("/", "-"), auc=OURS, volume_fraction=[parts.low, parts.high],
                       skips=parts.skips, fraction=0.45)  # fmt: skip
    made("table2", where="two")
    head, files = r"\documentclass{article}\usepackage{booktabs}", ("runs/tables/table1", "two/tables/table2")
    body = "".join(rf"\input{{{file}}}" for file in files)
    Path("all.tex").write_text(rf"{head}\begin{{document}}{body}\end{{document}}")
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "all.tex"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_page_holds_all_tables_of_its_folder_and_no_foreign_markup(runs, capsys):
    write_transfer(runs / "ncc" / "evil", label=EVIL, auc=[0.5, 0.6])
    made("table1", "--out", "runs/tables")
    write_transfer(Path("two/a"), auc=OURS, volume_fraction=[0.0625, 0.25], fraction=0.45)
    assert commands.main_table2(["two", "--out", "runs/tables"]) == 0
    page = (runs / "tables" / "tables.html").read_text()
    assert "Table 1" in page and "Table 2" in page and "98.67±0.23" in page and "<b>97.50±1.29</b>" in page
    assert (
        "<script" not in page and "&lt;script&gt;" in page and not re.search(r'(src|href)="(?!data:)', page)
    )
    (runs / "tables" / "table1.json").write_text('{"name": "table1"}')
    assert commands.main_table2(["two", "--out", "runs/tables"]) == 0
    page = (runs / "tables" / "tables.html").read_text()
    assert "Table 1" not in page and "Table 2" in page
    assert "table1.json: damaged" in capsys.readouterr().err


def test_table_2_knows_a_row_by_its_pretraining(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds = {
        "skips": ([0.0625, 1], True),
        "wide": ([0.0625, 1.0], False),
        "ours": ([0.063, 0.25], None),
        "auto": ([1, 1], False),
    }
    for name, (share, skips) in kinds.items():
        write_transfer(
            Path("runs") / name, label="any", auc=OURS, volume_fraction=share, skips=skips, fraction=0.45
        )
    write_transfer(Path("runs/s"), label="nothing", source="random", auc=SCRATCH, fraction=0.45)
    write_transfer(Path("runs/file"), label="unknown", source="file.pt", auc=SCRATCH, fraction=0.45)
    write_transfer(Path("runs/all"), label="all data", auc=OURS, volume_fraction=[0.0625, 1], fraction=1.0)
    table = made("table2")
    filled = [row for row in table.rows if table.cell(row, "ncc").planned]
    assert filled == ["[1/16,1] w/ skips", "[1/16,1]", "[1/16,1/4]", "Scratch", "[1,1]"]
    assert table.columns[0].fraction == 0.45 and any(
        "Left out: 1 run with other" in note for note in table.notes
    )


def test_other_tasks_metrics_and_shares(runs):
    write_transfer(runs / "s1", task="sarcoma", auc=[0.5, 0.6], fraction=0.1)
    write_transfer(runs / "s2", task="sarcoma", label="random", auc=[0.4, 0.5], fraction=0.1)
    table = made("table1", "--metric", "sarcoma=iou")
    (column,) = [column for column in table.columns if column.task == "sarcoma"]
    assert (column.metric, column.fraction, column.head) == (
        "iou",
        0.1,
        "sarcoma IoU at 0.5, 10 % of the data",
    )
    assert table.cell("Parts2Whole", "sarcoma").mean == pytest.approx(55)
    shutil.rmtree(runs / "ncs")
    write_transfer(runs / "ncs", task="ncs", auc=[0.5, 0.6], metric="dice")
    table = made("table1", "--metric", "ncs=dice")
    assert table.cell("Parts2Whole", "ncs").paper_mean is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--metric", "ncc=iou"], "no metric iou, its trials have auc"),
        (["--fraction", "0.3"], "no run with 0.3 of the training data"),
        (["--fraction", "2"], "must be above 0"),
        (["--fraction", "ncc=x"], "is no number"),
        (["--fraction", "ncc=1", "ncc=0.1"], "once a task"),
        (["--correction", "bonferroni"], "must be holm or none"),
    ],
)
def test_refusals_of_options(runs, more, said):
    with pytest.raises(UserError, match=re.escape(said)):
        commands.main_table1([str(runs), *more])


def test_what_cannot_stand_in_one_table_is_refused(runs):
    with pytest.raises(UserError, match="no folder named"):
        commands.main_table1([])
    twin = write_transfer(runs / "ncc" / "again", label="Parts2Whole", auc=OURS)
    with pytest.raises(UserError, match=r"row Parts2Whole: two runs, .*again and .*p2w"):
        commands.main_table1([str(runs)])
    shutil.rmtree(twin)
    write_transfer(runs / "ncc" / "other", label="other", auc=OURS, fingerprint="another")
    with pytest.raises(UserError, match="two target sets"):
        commands.main_table1([str(runs)])
    shutil.rmtree(runs / "ncc" / "other")
    write_transfer(runs / "ncc" / "other", label="other", auc=OURS, fold=1)
    with pytest.raises(UserError, match=r"two target sets, ncc-0 in .* and ncc-0 fold 1 in"):
        commands.main_table1([str(runs)])


def test_folds_are_one_cell_and_their_mean_is_a_trial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folds = {0: (0.5, 0.6, 0.7), 1: (0.7, 0.8, 0.9), 2: (0.6, 0.7, None)}
    for label in ("Parts2Whole", "Scratch"):
        for fold, scores in folds.items():
            if label == "Parts2Whole" or fold < 2:  # the other lacks a fold
                where = Path(f"runs/bms/{label}/fold-{fold}")
                write_transfer(where, "bms", label, scores, fold=fold)
                settings = json.loads((where / "transfer.json").read_text())
                settings["task"]["folds"] = 3
                (where / "transfer.json").write_text(json.dumps(settings))
    table = made()
    ours, other = table.cell("Parts2Whole", "bms"), table.cell("Scratch", "bms")
    assert ours.values == pytest.approx([60, 70]) and ours.missing == "2 of 3" and other.missing == "0 of 3"
    assert "BMS: a trial is the mean over 3 folds." in table.notes and ours.folder == "runs/bms/Parts2Whole"
    shutil.rmtree("runs/bms/Parts2Whole/fold-1")
    shutil.rmtree("runs/bms/Parts2Whole/fold-2")
    shutil.rmtree("runs/bms/Scratch/fold-1")
    table = made()
    assert table.cell("Scratch", "bms").n == 3 and "BMS: of 3 folds only 0 tested on." in table.notes


def test_rows_of_different_recipes_are_named(runs, capsys):
    for row, rate in (("p2w", 1e-3), ("mg", 1e-2), ("scratch", 1e-3)):
        path = runs / "ncc" / row / "transfer.json"
        told = json.loads(path.read_text()) | {
            "recipe": {"lr": rate, "batch": 24, "held_gib": rate, "seed": 0}
        }
        path.write_text(json.dumps(told))
    said = [note for note in made().notes if note.startswith("Warning")]
    assert len(said) == 1 and "NCC: rows differ by more than their starting point: lr 0.0" in said[0]
    assert "0.01 (Models Genesis)" in said[0] and "0.001 (Parts2Whole)" in said[0]
    assert "batch" not in said[0] and "held_gib" not in said[0]


def test_a_folder_that_cannot_be_written_is_one_line(runs):
    Path("file").write_text("")
    with pytest.raises(UserError, match="not written"):
        commands.main_table1([str(runs), "--out", "file"])


def test_tex_escapes_everything():
    assert "?" in tex("漢") and tex("a_b & [c]") == r"a\_b \& {[}c{]}"
    assert json.loads(json.dumps(tex(EVIL))) == tex(EVIL)


def test_metrics_with_a_unit_of_their_own_are_not_turned_into_percent():
    trials = {0: (7, 0.25), 1: (8, 3.5)}
    assert percent(trials, "iou") == percent(trials, "r2:age") == {0: (7, 25.0), 1: (8, 350.0)}
    assert percent(trials, "mae:age") == percent(trials, "hd95_mm") == trials
