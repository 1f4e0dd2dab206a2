"""bench/evidence: what its numbers say of features with a known answer, and that its page keeps what people wrote."""

import json
import sys

import numpy as np
import pytest
import torch
from processes import REPO

from p2w.analysis.features import extract, pixels
from p2w.analysis.similarity import auc, pair_cosines
from p2w.commands.train import parse
from p2w.config import PretextConfig
from p2w.finetune.task_types import task_type
from p2w.model import build_encoder
from p2w.pretext import PRETEXTS
from p2w.reproduce.table import BEST, Cell, Claim, Column, Table
from p2w.shards.grouping import split_groups
from p2w.stats import paired
from p2w.stream.stream import open_set
from p2w.world import World

sys.path.insert(0, str(REPO / "bench" / "evidence"))
import designs
import evidence_page
import frozen_decoder
import gate
import leaderboard
import measure_run
import methods
import page
import pretrainings
import run
import shortcuts
import targets
import targets_page
import transfer_page


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


def test_every_pretext_has_a_row_and_a_picture(tmp_path):
    shown = {
        flags[flags.index("--pretext.name") + 1]
        for flags in designs.METHODS.values()
        if "--pretext.name" in flags
    }
    assert shown | {designs.REFERENCE} == set(PRETEXTS)
    for name in designs.METHODS:
        command = methods.train_job(tmp_path, name).command
        assert parse([*map(str, command)][1:])[0].config.train.steps == methods.STEPS
    pictured = methods.pictured((REPO / "docs" / "methods.md").read_text())
    assert set(pictured) <= set(designs.METHODS) and len(set(pictured)) == len(pictured) > 9


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


def test_folds_set_each_scan_aside_once_as_the_cutting_command_splits_them():
    scans = [f"scan-{number}" for number in range(11)]
    folds = designs.fold_seeds(scans, 4)
    sets = [split_groups({scan: scan for scan in scans}, share, seed) for share, seed in folds]
    assert sorted(scan for one in sets for scan in one) == sorted(scans)
    assert [len(one) for one in sets] == [3, 3, 3, 2] and folds[0] == (run.FIRST_FOLD / run.PATIENTS, 0)
    assert designs.fold_seeds(scans[::-1], 4) == folds
    with pytest.raises(ValueError, match="2 scans: 3 folds"):
        designs.fold_seeds(scans[:2], 3)


def test_the_plan_has_one_seed_of_every_method_on_every_fold_before_a_second():
    sets = designs.data_sets(True)
    planned = designs.plan(["simclr", "spark"], sets, 2)
    assert len(set(planned)) == len(planned) == 2 * 2 * len(sets)
    assert {one.seed for one in planned[: len(planned) // 2]} == {0}
    assert [one.data for one in planned[: designs.FOLDS]] == sets[: designs.FOLDS]
    seeds = {designs.seed_of(one) for one in planned if one.method == "spark" and one.kind == "real"}
    assert len(seeds) == 2 * designs.FOLDS  # no two folds begin with the same weights
    designs.check()


@pytest.mark.slow
def test_every_row_of_the_leaderboard_is_a_pretext_that_takes_no_more_than_the_compute(tmp_path):
    for name in designs.METHODS:  # each parses, and builds its network
        assert designs.steps_of(name) <= designs.MOST
        assert designs.steps_of(name) * designs.cost(name) <= designs.STEPS + designs.cost(name)
    assert (
        designs.steps_of("parts2whole") == designs.STEPS and designs.steps_of("parts2whole_contrast") == 150
    )
    config = parse(designs.train_command(tmp_path, designs.Pretraining("dino", "real-1", 2))[2:])[0].config
    assert config.pretext.size == (16, 16, 16) and config.train.seed == config.data.seed == 102
    assert config.train.steps == designs.steps_of("dino") and config.pretext.name == "dino"


def of(method, data, seed, plain, top1=0.5, **more):
    numbers = {"plain": plain, "top1": top1}
    return {"method": method, "data": data, "seed": seed, "features": {method: numbers}, "wholes": 20, **more}


def test_seeds_of_a_fold_are_one_unit_and_the_test_is_that_of_folds():
    """Three seeds of two folds: six pretrainings, of which a test that took them for independent would make too much."""
    ours = [
        of("a", f"real-{fold}", seed, 0.8 + 0.1 * fold + 0.01 * seed)
        for fold in range(2)
        for seed in range(3)
    ]
    base = [of("b", f"real-{fold}", 0, 0.6) for fold in range(2)]
    found = [*ours, *base, of("a", "phantom", 0, 0.1)]
    a, b = (pretrainings.values(found, "real", name, "plain") for name in "ab")
    assert len(a) == 6 and pretrainings.units(a) == pytest.approx({"real-0": 0.81, "real-1": 0.91})
    assert pretrainings.compare(a, b) == paired([0.8, 0.9], [0.6, 0.6])  # of seed 0, which both have
    assert pretrainings.counted(found, "real", "a") == "6 in 2 folds"
    assert pretrainings.cell(a).startswith(
        "0.860 (0.225 to 1.495)"
    )  # t of one degree of freedom: 12.7 x 0.05
    assert pretrainings.cell(a, share=True).startswith("0.860 (0.225 to 1.000)")
    assert pretrainings.cell({}) == pretrainings.counted(found, "phantom", "b") == "not run"
    assert pretrainings.cell(pretrainings.values(found, "phantom", "a", "plain")) == "0.100"


def test_features_without_a_network_are_no_replicates_on_one_set_of_phantoms():
    """Three pretrainings measured the same histogram three times: an interval of no width, and p of 0, would be nonsense."""
    found = [of("a", "phantom", seed, 0.7 + 0.01 * seed) for seed in range(3)]
    for one in found:
        one["features"] |= {"histogram": {"plain": 0.640001 + 1e-6 * one["seed"]}, "pixels": {"plain": 0.65}}
    a, histogram, pixels = (
        pretrainings.values(found, "phantom", name, "plain") for name in ("a", "histogram", "pixels")
    )
    assert pretrainings.cell(histogram) == "0.640" and "(" in pretrainings.cell(a)
    said = pretrainings.tested(
        {"bare": pretrainings.compare(pixels, histogram), "net": pretrainings.compare(a, histogram)}
    )
    assert said["bare"] == "+0.010, the same in each pretraining: no test"
    assert said["net"] == pretrainings.tested({0: paired([0.70, 0.71, 0.72], [0.64] * 3)})[0]


def test_what_was_fine_tuned_is_a_column_and_a_pretraining_without_it_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrainings, "RESULTS", tmp_path / "results.json")
    for seed, tuned in ((0, 0.7), (1, None), (2, 0.9)):
        place = tmp_path / "runs" / f"phantom-a-seed{seed}"
        place.mkdir(parents=True)
        (place / "measured.json").write_text(json.dumps(of("a", "phantom", seed, 0.6)))
        if tuned:
            (place / "tuned.json").write_text(json.dumps({"a": tuned}))
    found = pretrainings.collect(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert pretrainings.values(found, "phantom", "a", "tuned") == {("phantom", 0): 0.7, ("phantom", 2): 0.9}
    (place / "measured.json").write_text(json.dumps(of("a", "phantom", designs.SELECTION_SEED, 0.6)))
    assert len(pretrainings.collect(tmp_path)) == 2  # what settings were chosen by is no result
    assert pretrainings.values(found, "phantom", "b", "tuned") == {}


def test_p_of_a_table_is_holms_and_what_was_not_run_says_so():
    values = {"a": [0.9, 0.8, 0.85, 0.95], "b": [0.6, 0.55, 0.5, 0.7], "c": [0.8, 0.8, 0.8, 0.8]}
    seen = {name: {(f"real-{at}", 0): one for at, one in enumerate(some)} for name, some in values.items()}
    tests = {name: pretrainings.compare(seen["a"], seen[name]) for name in "bc"}
    tests["d"] = pretrainings.compare(seen["a"], {})
    tests["e"] = pretrainings.compare(seen["a"], {("real-0", 0): 0.5})
    said = pretrainings.tested(tests)
    plain = paired(values["a"], values["b"])
    smaller = min(2 * plain.p, 1.0)
    assert said["b"] == f"+0.287 ({plain.low:+.3f} to {plain.high:+.3f}), " + (
        "p < 0.001" if smaller < 0.001 else f"p = {smaller:.3f}"
    )
    assert said["d"] == "not run" and said["e"] == "+0.400, one pretraining: no test"


def test_the_fall_of_the_loss_stands_beside_r_and_its_interval_is_over_pretrainings():
    falling = {"step": [1, 2, 3, 4, 5], "mse": [5.0, 4, 3, 2, 1], "auc": [0.5, 0.6, 0.7, 0.8, 0.9]}
    runs = [
        of(
            "parts2whole",
            f"real-{at}",
            0,
            0.9,
            course=falling | {"contrast": [8.5, 8.4, 8.3, 8.2, 8.1 - 0.1 * at]},
        )
        for at in range(2)
    ]
    rows = evidence_page.course(runs, "real").splitlines()
    assert rows[2].startswith("| autoencoder | not run")
    ours = rows[3].split(" | ")
    assert ours[1:5] == [
        "2 x 5", "8.500 -> 8.050", "0.450 (-0.185 to 1.085)", "0.250 (-0.385 to 0.885)",
    ]  # fmt: skip
    assert ours[5] == "0.500 -> 0.900" and ours[6].startswith(("0.99", "1.00"))


def test_varied_phantoms_have_their_own_runs_and_table_and_are_in_no_other(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "work", lambda jobs, folder, workers: asked.extend(jobs))
    run.run_varied(tmp_path, designs.ON_VARIED, 2, 1)
    scans, cut, *runs = [" ".join(map(str, job.command)) for job in asked]
    assert scans.endswith("--varied") and f"--out {tmp_path}/LUNA16-varied --scans 40" in scans
    assert cut.startswith(
        f"preprocess/shard_luna.py --luna {tmp_path}/LUNA16-varied --out {tmp_path}/varied "
    )
    assert [command.split()[2:] for command in runs[:2]] == [
        ["varied", name, "0"] for name in designs.ON_VARIED[:2]
    ]
    assert (
        asked[2].done == tmp_path / "runs" / "varied-parts2whole-seed0" / "measured.json" and len(runs) == 8
    )
    usual = [" ".join(map(str, job.command)) for stage in designs.phantom_jobs(tmp_path) for job in stage]
    assert not any("--varied" in command for command in usual) and f"{tmp_path}/LUNA16 " in usual[0]

    def measured(data, seed, **whose):
        one = of("parts2whole", data, seed, 0.8, mse_of_mean=0.05)
        one["features"] |= {name: {"plain": 0.6, "against_one_tile": value} for name, value in whose.items()}
        return one

    found = [
        measured("varied", 0, histogram=0.68, parts2whole=0.5),
        measured("varied", 1, histogram=0.68, parts2whole=0.6),
        measured("phantom", 0, parts2whole=0.52),
    ]
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in evidence_page.varied(found).splitlines()}
    ours = paired([0.5, 0.6], [0.68, 0.68])
    assert rows["| **parts2whole**"] == [
        "2", "0.600", "not run", "0.550 (0.000 to 1.000)",
        f"-0.130 ({ours.low:+.3f} to {ours.high:+.3f}), p = {ours.p:.3f}", "0.520 |",
    ]  # fmt: skip
    assert rows["| intensity histogram"][3:] == ["0.680", "", "not run |"]
    assert rows["| simclr"] == ["not run"] * 5 + ["not run |"]
    assert pretrainings.values(found, "phantom", "parts2whole", "plain") == {("phantom", 0): 0.6}
    assert "histogram" not in evidence_page.networks(found, "phantom").partition("| autoencoder")[2]


@pytest.mark.slow
def test_pages_are_made_of_what_is_there_and_name_what_is_not(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in ("evidence", "leaderboard"):
        (docs / f"{name}.md").write_text((REPO / "docs" / f"{name}.md").read_text())
    spent = {"training_s": 30.0, "measuring_s": 5.0, "mse": 0.03, "mse_of_mean": 0.05, "scans": 3}
    ours = [of("parts2whole", f"real-{fold}", 0, 0.9, **spent) for fold in range(2)]
    for one in ours:
        one["features"] |= {name: {"plain": 0.7, "top1": 0.3} for name in ("random", "histogram", "pixels")}
    leaderboard.write(docs, ours)
    board = (docs / "leaderboard.md").read_text().partition("<!-- /leaderboard -->")[0]
    assert "| parts2whole | not run | not run | not run | not run | not run | 2 in 2 folds | 0.900" in board
    assert (docs / "leaderboard.md").read_text().count("| spark | not run | not run") >= 1
    evidence_page.write(docs, tmp_path, ours)
    text = (docs / "evidence.md").read_text()
    assert "| random initialisation | 2 in 2 folds | 0.700 |" in text
    assert "| simclr | not run | not run" in text
    assert "| real-1 | 3 | 20 | 0.700 | 0.700 | 0.900 |" in text


def test_parts_are_cut_once_and_features_of_them_are_those_of_the_analysis(tiny_set):
    shards, view = open_set(str(tiny_set)), PretextConfig(size=(8, 8, 8))
    ids = measure_run.tested_wholes(shards)
    parts = measure_run.cut(shortcuts.FEW, view, shards, tuple(ids.tolist()))
    assert parts.shape == (len(ids), shortcuts.FEW.count, 1, 8, 8, 8)
    once = measure_run.encode(pixels, parts)
    assert np.array_equal(once, extract(pixels, view, shortcuts.FEW, shards, ids, World.from_env()))


def test_a_frozen_probe_reads_what_is_in_the_features_and_no_more():
    rng = np.random.default_rng(0)
    places = [rng.random((wholes, 4, 3)) for wholes in (32, 12)]
    features = [np.concatenate((one, one[..., :1] ** 2), 2) for one in places]
    assert measure_run.frozen_probe(features[0], places[0], features[1], places[1]) > 0.99
    noise = [rng.normal(size=(len(one), 4, 8)) for one in places]
    assert measure_run.frozen_probe(noise[0], places[0], noise[1], places[1]) < 0.05


def test_a_parts_place_is_a_share_of_its_scan():
    class Wholes:
        """Two tiles of one scan, (64, 128, 128) voxels each, and a scan of a single tile."""

        shape = (64, 128, 128)
        keys = ("a/z0000_y0000_x0000", "a/z0064_y0000_x0128", "b/z0000_y0000_x0000")

        def ids(self, split):
            return np.arange(3)

        def key(self, number):
            return self.keys[number]

    class Corner:
        """One part of each whole: its first eighth."""

        def boxes(self, ids, shards):
            return torch.tensor([0.0, 0, 0, 32, 64, 64]).expand(len(ids), 1, 6)

    found = measure_run.positions(Corner(), Wholes(), np.arange(3))
    assert found[:, 0].tolist() == [[0.125, 0.25, 0.125], [0.625, 0.25, 0.625], [0.25, 0.25, 0.25]]


def test_a_scan_of_many_wholes_outweighs_no_other():
    class Wholes:
        """Keys of 40 wholes of one scan and 5 of another."""

        def ids(self, split):
            return np.arange(45)

        def key(self, number):
            return f"big/{number}" if number < 40 else f"small/{number}"

    ids = measure_run.tested_wholes(Wholes())
    assert len(ids) == measure_run.PER_SCAN + 5 and list(ids[-5:]) == [40, 41, 42, 43, 44]
    scan, tile = measure_run.places(Wholes(), ids)
    assert list(scan) == [0] * measure_run.PER_SCAN + [1] * 5 and len(set(tile.tolist())) == len(ids)


def cut_masks(rng, patients, each=4):
    """Crops whose features say where in the crop the border between two classes lies, and crops' masks."""
    count = patients * each
    border = torch.from_numpy(rng.integers(2, 15, count))
    masks = 1 + (torch.arange(16).view(1, 16, 1, 1) < border.view(-1, 1, 1, 1)).short().expand(-1, -1, 16, 16)
    told = (
        torch.arange(16).view(1, 16) < border.view(-1, 1)
    ).float()  # one channel for each slice below a cell
    features = told.view(count, 2, 8).transpose(1, 2)[..., None, None].expand(-1, -1, -1, 2, 2)
    return features, masks[:, None], [f"p{at // each}" for at in range(count)]


def test_a_linear_decoder_draws_what_the_features_determine_and_nothing_from_noise():
    rng = np.random.default_rng(0)
    sets = {split: cut_masks(rng, patients) for split, patients in (("train", 9), ("val", 3), ("test", 4))}
    kind = task_type("multi-class segmentation").for_set({"classes": ["background", "above", "below"]})
    masks, owners = ({split: one[at] for split, one in sets.items()} for at in (1, 2))
    crops = frozen_decoder.Crops(kind, {}, masks, owners)
    told = frozen_decoder.decode({split: one[0] for split, one in sets.items()}, crops, 0)
    assert told["test"]["dice"] > 0.95 and told["explained"] > 0.9
    noise = {split: torch.randn(one[0].shape, generator=torch.manual_seed(1)) for split, one in sets.items()}
    assert frozen_decoder.decode(noise, crops, 0)["explained"] < 0.1
    drawn = [set(crops.drawn(seed).tolist()) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 6 * 4


def test_blocks_of_a_mask_are_put_together_again():
    masks = torch.randint(0, 3, (2, 1, 8, 16, 24), generator=torch.manual_seed(0))
    grid = torch.Size((2, 2, 3))
    below = frozen_decoder.blocks(masks, grid, 3)
    assert below.shape == (2 * 12, 4 * 8 * 8 * 3) and (below.view(24, -1, 3).sum(2) == 1).all()
    assert torch.equal(frozen_decoder.volumes(below, masks.shape, grid, 3).argmax(1, keepdim=True), masks)


def frozen_runs(place, **means):
    """Results of transfer.py's first part: for each method, the mean Dice of each pretraining; three decoders each."""
    (place / "frozen").mkdir(parents=True)
    for method, values in means.items():
        for seed, value in enumerate(values):
            decoders = [
                {"seed": at, "explained": value / 2, "test": {"dice": value + 0.001 * at}} for at in range(3)
            ]
            found = {
                "method": method.replace("_", " "),
                "seed": seed,
                "chosen": 5e-4,
                "decoders": decoders,
                "cpu_s": 60,
            }
            (place / "frozen" / f"{method}-seed{seed}.json").write_text(json.dumps(found))


def test_the_page_says_that_the_claim_fails_unless_every_difference_is_significant(tmp_path):
    ours = [0.50, 0.51, 0.505]
    frozen_runs(tmp_path / "a", Parts2Whole=ours, Random=[0.30, 0.32, 0.31], Autoencoder=[0.49, 0.52, 0.50])
    text = transfer_page.frozen_table(tmp_path / "a", range(3))
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert (
        "30.10" not in rows["Random"]
        and "31.10 ± 1.00 (n = 3 x 3)" in rows["Random"]
        and "+19.50 (" in rows["Random"]
    )
    assert "p < 0.001" in rows["Random"] and "not run" in rows["SimMIM"]
    assert (
        "**The claim fails here**: Parts2Whole is significantly ahead of Random, and not ahead of Autoencoder."
        in text
    )
    assert (
        "Open, with fewer than two pretrainings: Models Genesis, SimMIM." in text
        and "The gate was not run" in text
    )
    others = {name: [0.30, 0.32, 0.31] for name in ("Random", "Autoencoder", "Models_Genesis", "SimMIM")}
    frozen_runs(tmp_path / "b", Parts2Whole=ours, **others)
    assert (
        "**Parts2Whole is ahead of Random, Autoencoder, Models Genesis, SimMIM**"
        in transfer_page.frozen_table(tmp_path / "b", range(3))
    )
    frozen_runs(tmp_path / "c", Parts2Whole=ours, Random=[0.30, 0.31, 0.32], Autoencoder=[0.30])
    undecided = transfer_page.frozen_table(tmp_path / "c", range(3))
    assert "**Not decided.** Parts2Whole is ahead of Random" in undecided and "no replicate" in undecided
    assert set(transfer_page.tuned_table(tmp_path / "none").split("|")[6].split()) <= {"---", "--:"}


def test_pretrainings_that_confirm_are_tested_apart_from_the_first(tmp_path):
    names = ("Random", "Autoencoder", "Models_Genesis", "SimMIM")
    frozen_runs(
        tmp_path, Parts2Whole=[0.9, 0.8, 0.9, 0.2, 0.3, 0.25], **{one: [0.2, 0.21, 0.3] * 2 for one in names}
    )
    first, other = (transfer_page.frozen_table(tmp_path, seeds) for seeds in (range(3), range(3, 9)))
    assert "**Parts2Whole is ahead of" in first and "**The claim fails here**" in other
    later = transfer_page.frozen_table(tmp_path, range(3, 9), references=False)
    assert later.startswith(other[: other.index("| Trained on all labels")]) and "zeroing" not in later


def test_the_number_of_trials_is_that_of_the_textbook():
    """Cohen (1988): d = 0.5 takes 64 of each of two groups, or 34 pairs; d = 0.8 takes 26 of each."""
    assert transfer_page.trials_needed(2.0, 1.0, 0.05) == 64
    assert transfer_page.trials_needed(2.0, 1.0, 0.05, paired=True) == 34
    assert transfer_page.trials_needed(1.25, 1.0, 0.05) == 26
    page_text = (
        "<!-- table2 -->\n|  | NCC | NCS |\n| --- | --: | --: |\n| a | **9.00 ± 2.00** | 8.00 ± 1.00 |\n"
    )
    page_text += "| b | 6.00 ± 4.00 | 8.50 ± 1.00 |\n<!-- /table2 -->"
    line = transfer_page.power_table(page_text).splitlines()[2]
    assert (
        line.startswith("| NCC | 3.16 | 3.00 |")
        and str(transfer_page.trials_needed(10**0.5, 3.0, 0.05)) in line
    )
