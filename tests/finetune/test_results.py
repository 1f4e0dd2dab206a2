"""Reading what fine-tuning left: whole, unfinished, damaged and hostile folders."""

import json

import pytest
from finetune_folders import write_transfer, write_trial

from p2w.errors import UserError
from p2w.finetune.results import collect, find_fine_tunings, read_fine_tuning


def test_a_whole_folder(tmp_path):
    folder = write_transfer(
        tmp_path / "a", "NCC", "Mine", [0.9, 0.8], seeds=[4, 5], step=70, val_mse=0.01, volume_fraction=[0.0625, 0.25],
        skips=False, fraction=0.45, metric="auc",
    )  # fmt: skip
    one = read_fine_tuning(folder)
    assert (one.task, one.kind, one.label, one.fraction, one.planned) == (
        "ncc",
        "classification",
        "Mine",
        0.45,
        2,
    )
    assert (one.step, one.val_mse, one.volume_fraction, one.skips) == (70, 0.01, (0.0625, 0.25), False)
    assert one.metric("auc") == {0: (4, 0.9), 1: (5, 0.8)} and one.metric("iou") == {}
    assert one.finished and one.problems == ()


def test_unfinished_trials_are_named_and_left_out(tmp_path):
    folder = write_transfer(tmp_path / "a", auc=[0.9, None, 0.8], planned=5)
    one = read_fine_tuning(folder)
    assert [trial.index for trial in one.trials] == [0, 2] and not one.finished
    assert one.problems == (f"{folder}: 2 of 5 trials are finished; left out: 1, 3, 4",)
    (folder / "trial-03").mkdir()
    write_trial(folder, 7, {"auc": 0.5}, 7)
    assert any("beyond the 5 trials" in line for line in read_fine_tuning(folder).problems)


def test_trials_with_one_seed_are_named(tmp_path):
    one = read_fine_tuning(write_transfer(tmp_path / "a", auc=[0.9, 0.8], seeds=[1, 1]))
    assert "share the seed 1" in one.problems[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"trial": 1, "seed"', "damaged"),
        ('{"trial": 0, "seed": 1, "state": "finished", "metrics": {"auc": 0.5}}', "of trial 0"),
        ('{"trial": 1, "seed": 1, "state": "finished", "metrics": {"auc": NaN}}', "NaN is no number"),
        ('{"trial": 1, "seed": 1, "state": "finished", "metrics": {"auc": 95}}', "not within 0 and 1"),
        ('{"trial": 1, "seed": 1, "state": "finished", "metrics": {"auc": "0.9"}}', "no numbers by name"),
        ('{"trial": 1, "seed": true, "state": "finished", "metrics": {"auc": 0.9}}', "'seed'"),
        ('{"trial": 1, "seed": 1, "state": "finished"}', "no numbers by name"),
        ("[" * 100_000, "nested"),
        ("\x00\xff", "damaged"),
    ],
)  # fmt: skip
def test_a_damaged_result_costs_its_trial_and_is_one_line(tmp_path, text, said):
    folder = write_transfer(tmp_path / "a", auc=[0.9, 0.8, 0.7])
    (folder / "trial-01" / "result.json").write_bytes(text.encode("latin-1"))
    one = read_fine_tuning(folder)
    assert [trial.index for trial in one.trials] == [0, 2]
    (line,) = one.problems
    assert said in line and "trial-01" in line and "\n" not in line


@pytest.mark.parametrize(
    "change",
    [
        {"trials": 0}, {"trials": 10**9}, {"fraction": 0}, {"fraction": 1.5}, {"trials": "ten"}, {"task": "ncc"},
        {"init": {"label": "x"}}, {"init": {"label": "x", "source": "y", "volume_fraction": [0.5]}},
        {"init": {"label": "x", "source": "y", "volume_fraction": [0, 1]}},
        {"init": {"label": "x", "source": "y", "val_mse": -1}}, {"init": {"label": "x", "source": "y", "step": 1.5}},
        {"init": {"label": "x", "source": "y", "val_mse": 10**400}},
    ],
)  # fmt: skip
def test_a_damaged_folder_is_one_line_and_the_others_are_read(tmp_path, change):
    folder, other = write_transfer(tmp_path / "a"), write_transfer(tmp_path / "b", label="other")
    path = folder / "transfer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="damaged"):
        read_fine_tuning(folder)
    there, problems = collect([tmp_path])
    assert [one.folder for one in there] == [other]
    assert len(problems) == 1 and str(path) in problems[0] and "\n" not in problems[0]


def test_folders_are_found_once_at_any_depth(tmp_path):
    one = write_transfer(tmp_path / "runs" / "ncc" / "a")
    two = write_transfer(tmp_path / "runs" / "b")
    assert sorted(find_fine_tunings([tmp_path, tmp_path / "runs" / "b", one])) == sorted([one, two])
    with pytest.raises(UserError, match="no such folder"):
        find_fine_tunings([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no transfer\.json"):
        find_fine_tunings([one, tmp_path / "empty"])
