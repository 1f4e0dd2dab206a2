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
import frozen_decoder
import gate
import methods
import methods_page
import page
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
    text = transfer_page.frozen_table(tmp_path / "a")
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
        in transfer_page.frozen_table(tmp_path / "b")
    )
    frozen_runs(tmp_path / "c", Parts2Whole=ours, Random=[0.30, 0.31, 0.32], Autoencoder=[0.30])
    undecided = transfer_page.frozen_table(tmp_path / "c")
    assert "**Not decided.** Parts2Whole is ahead of Random" in undecided and "no replicate" in undecided
    assert set(transfer_page.tuned_table(tmp_path / "none").split("|")[6].split()) <= {"---", "--:"}


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
