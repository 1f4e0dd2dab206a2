"""bench/evidence: what its numbers say of features with a known answer, and that its page keeps what people wrote."""

import sys

import numpy as np
import pytest
import torch
from processes import REPO

from p2w.analysis.similarity import auc, pair_cosines
from p2w.pretext import PRETEXTS
from p2w.reproduce.table import BEST, Cell, Claim, Column, Table

sys.path.insert(0, str(REPO / "bench" / "evidence"))
import methods
import methods_page
import page
import shortcuts
import targets
import targets_page


def test_separability_is_that_of_all_pairs_and_kinds_are_told_apart():
    rng = np.random.default_rng(0)
    scan, tile = np.arange(12) // 3, np.arange(12) % 3
    of_scan, of_tile = rng.normal(size=(4, 6)), rng.normal(size=(3, 6))
    noise = 0.1 * rng.normal(size=(12, 4, 12))
    features = np.concatenate((of_scan[scan], of_tile[tile]), 1)[:, None] + noise
    found = shortcuts.separability(features, scan, tile)
    assert found["all"] == pytest.approx(auc(*pair_cosines(features)), abs=1e-9)
    only_tile = np.pad(of_tile[tile], ((0, 0), (0, 6)))[:, None] + noise  # knows the tile and not the scan
    told = shortcuts.separability(only_tile, scan, tile)
    assert told["one_scan"] > 0.95 and 0.3 < told["one_tile"] < 0.7
    assert shortcuts.separability(features, np.arange(12), tile)["one_scan"] is None


def test_what_is_in_the_features_can_be_read_from_wholes_that_were_not_fitted():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(20, 6, 5))
    place = features[..., :2] @ np.array([[1.0, 0.5], [0.0, 1.0]])
    chance = rng.normal(size=(20, 6, 1))
    read = shortcuts.readable(features, np.concatenate((place, chance), 2))
    assert min(read[:2]) > 0.99 and read[2] < 0.1


def test_changes_take_away_what_they_say():
    parts = torch.rand(3, 1, 4, 8, 8) * 0.2 + torch.tensor([0.1, 0.3, 0.5]).view(3, 1, 1, 1, 1)
    even = shortcuts.standardised(parts).flatten(1)
    assert (even.mean(1) - even.mean()).abs().max() < 0.01 and (even.std(1) - even.std()).abs().max() < 0.01
    bent = shortcuts.RandomGamma()(parts)
    assert torch.equal(bent, shortcuts.RandomGamma()(parts)) and not torch.equal(bent, parts)
    flat, curved = parts.flatten(1).argsort(1), bent.flatten(1).argsort(1)
    assert torch.equal(flat, curved)


def test_a_page_keeps_the_words_between_its_blocks():
    text = "why\n<!-- real networks -->\nold\n<!-- /real networks -->\nbecause"
    assert page.fill(text, "real networks", "new") == text.replace("old", "new")
    with pytest.raises(SystemExit, match="0 blocks <!-- real times -->"):
        page.fill(text, "real times", "new")


@pytest.mark.slow
def test_every_pretext_is_compared_at_the_arithmetic_of_parts2whole(tmp_path):
    shown = {
        flags[flags.index("--pretext.name") + 1]
        for flags in methods.METHODS.values()
        if "--pretext.name" in flags
    }
    assert shown | {"parts2whole"} == set(PRETEXTS)
    folders = {methods.folder_of(tmp_path, name, 0) for name in methods.METHODS}
    assert len(folders) == len(methods.METHODS)
    assert methods.share("parts2whole") == 1 and methods.share("+ contrast") == pytest.approx(2, rel=0.01)
    assert methods.share("simclr") < 0.5  # no decoder
    assert "--train.steps 100 " in " ".join(map(str, methods.train_job(tmp_path, "+ contrast", 0).command))


def test_a_cell_is_mean_and_deviation_over_seeds_and_what_was_not_run_is_a_dash():
    assert methods_page._cell([0.5, 0.7]) == "0.600 ± 0.141"
    assert methods_page._cell([0.5, None]) == "0.500" and methods_page._cell([None]) == "-"


def test_the_target_sets_and_sweeps_are_commands_that_exist(tmp_path, monkeypatch):
    made = {job.name for stage in targets.set_jobs(tmp_path, tmp_path) for job in stage}
    assert made == {"targets-raw", *(f"cut-{task}" for task in targets.CUT)}
    asked = []
    monkeypatch.setattr(targets, "call", lambda command: asked.extend(map(str, command)))
    targets.sweep(tmp_path, tmp_path, "table1", ("ncc",), "--trials", 10, "--inits", "Scratch=random")
    assert asked[1:3] == ["launch/sweep.py", "table1"] and (REPO / asked[1]).is_file()
    assert asked[-4:] == ["--trials", "10", "--inits", "Scratch=random"]


def test_the_difference_shown_is_the_measured_one_and_not_the_papers(monkeypatch):
    column = Column("ncc", "NCC", "auc", "AUC", 0.1, "")
    cells = [Cell("Scratch", "ncc", 66.95, 12.5, 10, 10), Cell("Parts2Whole", "ncc", 67.9, 6.1, 10, 10, BEST)]
    claims = [
        Claim("ncc", "Parts2Whole", "Scratch", 0.95, "", [], 0.3, 9, 0.8, 1, "", "here"),
        Claim("ncc", "Parts2Whole", "Scratch", 4.42, "", [], 2.8, 9, 0.022, 1, "", "paper"),
    ]
    written = {}
    monkeypatch.setattr(targets_page, "put", lambda block, text: written.update({block: text}))
    rows = ["Scratch", "Parts2Whole"]
    targets_page.write("table1", Table("table1", "", rows, [column], cells, claims, []), "Scratch")
    assert written["table1"].splitlines()[2:] == [
        "| Scratch | 66.95 ± 12.50 |",
        "| Parts2Whole | **67.90 ± 6.10** |",
        "| Parts2Whole - Scratch | +0.95, p = 0.8 |",
        "| Parts2Whole - Scratch in the paper | +4.42, p = 0.022 |",
    ]


def test_the_control_sets_what_was_taught_beside_scratch_on_the_tasks_that_were_run(monkeypatch):
    def seen(**means):
        column = Column("general", "general", "iou", "IoU at 0.5", 0.1, "")  # what tables call the sarcomas
        cells = [Cell(row, "general", mean, 1.0, 2, 2, BEST) for row, mean in means.items()]
        return Table("table1", "", list(means), [column], cells, [], [])

    written = {}
    monkeypatch.setattr(targets_page, "put", lambda block, text: written.update({block: text}))
    targets_page.control(seen(Scratch=20.0, Other=9.0), seen(NCS=19.0, Full=26.0), seen(Scratch=28.0))
    assert [line.split("|")[-2].strip() for line in written["control"].splitlines()] == [
        "general IoU at 0.5", "--:", "20.00 ± 1.00", "19.00 ± 1.00", "26.00 ± 1.00", "28.00 ± 1.00",
    ]  # fmt: skip
