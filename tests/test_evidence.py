"""bench/evidence: what its numbers say of features with a known answer, and that its page keeps what people wrote."""

import json
import sys

import numpy as np
import pytest
import torch
from processes import REPO

from p2w.analysis.similarity import auc, pair_cosines
from p2w.finetune.task_types import task_type
from p2w.model import build_encoder
from p2w.pretext import PRETEXTS
from p2w.reproduce.table import BEST, Cell, Claim, Column, Table
from p2w.stats import compare_pretrainings, paired

sys.path.insert(0, str(REPO / "bench" / "evidence"))
import gate
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


def test_the_difference_shown_is_the_measured_one_with_holms_p_and_not_the_papers(monkeypatch):
    column = Column("ncc", "NCC", "auc", "AUC", 0.1, "")
    cells = [Cell("Scratch", "ncc", 66.95, 12.5, 10, 10), Cell("Parts2Whole", "ncc", 67.9, 6.1, 10, 10, BEST)]
    claims = [
        Claim("ncc", "Parts2Whole", "Scratch", 0.95, "", [], 0.3, 9, 0.8, 0.96, "", "here", -6.2, 8.1),
        Claim("ncc", "Parts2Whole", "Scratch", 4.42, "", [], 2.8, 9, 0.022, 0.044, "", "paper"),
    ]
    written = {}
    monkeypatch.setattr(targets_page, "put", lambda block, text: written.update({block: text}))
    rows = ["Scratch", "Parts2Whole"]
    targets_page.write("table1", Table("table1", "", rows, [column], cells, claims, []), "Scratch")
    assert written["table1"].splitlines()[2:] == [
        "| Scratch | 66.95 ± 12.50 |",
        "| Parts2Whole | **67.90 ± 6.10** |",
        "| Parts2Whole - Scratch | +0.95 (-6.20 to 8.10), p = 0.960 |",
        "| Parts2Whole - Scratch in the paper | +4.42, p = 0.044 |",
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


def test_several_pretrainings_are_one_row_and_its_test_has_them_as_replicates(monkeypatch):
    """Two pretrainings, far apart, of trials that are not: by all six trials it would be significant."""
    column, rows = (
        Column("ncc", "NCC", "auc", "AUC", 0.1, ""),
        ["Scratch", "Parts2Whole seed 0", "Parts2Whole seed 1"],
    )
    values = {"Scratch": [60.0, 61.0, 62.0], rows[1]: [70.0, 71.0, 72.0], rows[2]: [62.0, 63.0, 64.0]}
    cells = [
        Cell(row, "ncc", float(np.mean(own)), 1.0, 3, 3, trials=[0, 1, 2], seeds=[5, 6, 7], values=own)
        for row, own in values.items()
    ]
    written = {}
    monkeypatch.setattr(targets_page, "put", lambda block, text: written.update({block: text}))
    seen = Table("table1", "", rows, [column], cells, [], [])
    targets_page.write("table1", seen, "Scratch", {"ncc": gate.Gate(95.0, 91.0)})
    _, _, scratch, ours, difference, paper, every, zeroed = written["table1"].splitlines()
    assert scratch == "| Scratch | 61.00 ± 1.00 |"
    assert ours == "| Parts2Whole | 67.00 ± 5.66 (2 pretrainings) |"
    expected = paired([70 - 61, 62 - 60 - 0.0], [-1 + 0.0, 0.0])  # 10 and 2: their t-test
    assert f"p = {expected.p:.3f}" in difference and "+6.00 (" in difference and expected.p > 0.3
    assert paper == "| Parts2Whole - Scratch in the paper | - |"
    assert every == "| Scratch, all labels | 95.00 |" and zeroed.endswith("| costs 4.0: does not count |")


def test_a_task_counts_only_where_zeroing_coarse_levels_costs_five_points():
    assert gate.Gate(90.0, 85.0).passes and not gate.Gate(90.0, 85.1).passes
    torch.manual_seed(0)
    x = torch.rand(2, 1, 8, 16, 16)
    network = task_type("segmentation").network(build_encoder("unet3d", 2)).train()
    before, features = network(x), network.encoder(x)
    assert gate.without_coarse_levels(network) is network
    after = network.encoder(x)
    assert [bool((level == 0).all()) for level in after] == [False, False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(after[:2], features[:2], strict=True))
    assert not torch.allclose(network(x), before)


def test_rates_are_chosen_by_the_loss_on_validation_patients(tmp_path, monkeypatch):
    found = {
        ("A", 1e-4): {"ncc": 0.5, "ncs": 0.04},
        ("A", 1e-3): {"ncc": 0.6, "ncs": 0.02},  # better by a half on one, worse by a fifth on the other
        ("B", 1e-4): {"ncc": 0.3, "ncs": 0.01},
        ("B", 1e-3): {"ncc": 0.4, "ncs": 0.01},
    }
    assert targets.choose_rates(found) == {"A": 1e-3, "B": 1e-4}
    for index, (loss, score) in enumerate(((0.5, 0.9), (0.3, 0.1))):
        place = tmp_path / f"trial-{index:02d}"
        place.mkdir()
        (place / "result.json").write_text(json.dumps({"best_val_loss": loss, "metrics": {"auc": score}}))
    assert targets.validation_loss(tmp_path) == pytest.approx(0.4)
    assert targets.rate_of(tmp_path, "Parts2Whole") == targets.RATE
    (tmp_path / "rates").mkdir()
    (tmp_path / "rates" / "chosen.json").write_text('{"Parts2Whole": 1e-4}')
    assert targets.rate_of(tmp_path, "Parts2Whole") == 1e-4
    written = {}
    monkeypatch.setattr(targets_page, "put", lambda block, text: written.update({block: text}))
    targets_page.rates(found, {"A": 1e-3, "B": 1e-4})
    assert written["rates"].splitlines()[3] == "| **A, 0.001** | 0.6000 | 0.0200 |"


def test_methods_are_tested_against_random_with_holms_p_and_one_seed_is_no_test(tmp_path):
    def trials(folder, values):
        for index, value in enumerate(values):
            place = folder / f"trial-{index:02d}"
            place.mkdir(parents=True)
            one = {"trial": index, "seed": index, "metrics": {"auc": value, "mean_iou": value}}
            (place / "result.json").write_text(json.dumps(one))

    for task in methods_page.TASKS:
        trials(tmp_path / "transfer" / task / "scratch", [0.5, 0.6, 0.55])
        for seed in range(3):
            trials(tmp_path / "transfer" / task / f"simclr-seed{seed}", [0.8 + 0.01 * seed, 0.9, 0.85])
        trials(tmp_path / "transfer" / task / "mae-seed0", [0.8, 0.9, 0.7])
    found = methods_page.against_random(tmp_path, ["simclr", "mae"], methods.folder_of)
    one = compare_pretrainings(
        {s: {0: (0, 0.8 + 0.01 * s), 1: (1, 0.9), 2: (2, 0.85)} for s in range(3)},
        {None: {0: (0, 0.5), 1: (1, 0.6), 2: (2, 0.55)}},
    )
    assert found["simclr", "ncc"].startswith(f"{one.difference:+.3f} ({one.low:.3f} to {one.high:.3f}), p ")
    assert found["simclr", "ncc"].endswith("p < 0.001" if 2 * one.p < 0.001 else f"p = {2 * one.p:.3f}")
    assert found["mae", "ncs"] == "+0.250, one pretraining is no replicate"
