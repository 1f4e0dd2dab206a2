"""Monitors: their numbers against naive float64, the subset of volumes, the log line, and their share of the time."""

import itertools
import math

import numpy as np
import pytest
import torch
from ct_sets import write_structured_set

from p2w import geometry
from p2w.analysis import monitors, plots
from p2w.analysis.monitors import VALIDATION_SEED, Monitors, SimilarityMonitor, read_sub_scans
from p2w.analysis.similarity import similarity_file
from p2w.config import Config, DataConfig, PretextConfig
from p2w.log import Log
from p2w.model import build_encoder
from p2w.rng import SampleKeys
from p2w.stream.stream import open_set
from p2w.world import World

HERE = World(0, 1, 0, 1, "here", torch.device("cpu"), "test")
CONFIG = Config(data=DataConfig(batch=3), pretext=PretextConfig(size=(8, 16, 16), volume_fraction=(1.0, 1.0)))


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return build_encoder("unet3d", 2).eval()


@pytest.fixture
def probe(tiny_set, tmp_path, encoder):
    def make(config=CONFIG, split="val"):
        return SimilarityMonitor(
            config, encoder, open_set(str(tiny_set)), split, HERE, Log(tmp_path, True, 1)
        )

    return make


@torch.no_grad()
def naive_features(shards, encoder):
    """Of every validation whole and its parts, one at a time. Parts are the paper's although CONFIG's are the whole."""
    features = []
    for sub_scan in shards.ids("val"):
        whole, _ = read_sub_scans(shards, np.array([sub_scan]))
        for part in (1, 2, 3):
            keys = SampleKeys(VALIDATION_SEED, 0, torch.tensor([sub_scan]))
            boxes = geometry.sample_boxes(keys, part, shards.shape, (1 / 16, 1 / 4), 4.0)
            view = geometry.crop_resize(whole, boxes, (8, 16, 16))
            features.append(encoder.pooled(view)[0].double().numpy())
    return np.array(features)


def test_the_numbers_of_a_probe_against_loops(probe, tiny_set, encoder):
    features = naive_features(open_set(str(tiny_set)), encoder)
    owner = np.arange(len(features)) // 3
    cosine = [[a @ b / math.sqrt(a @ a) / math.sqrt(b @ b) for b in features] for a in features]
    pairs = list(itertools.combinations(range(len(features)), 2))
    positive = [cosine[i][j] for i, j in pairs if owner[i] == owner[j]]
    negative = [cosine[i][j] for i, j in pairs if owner[i] != owner[j]]
    with torch.no_grad():
        seen = dict(probe()(0))
    assert seen["similarity/positive"] == pytest.approx(np.mean(positive), abs=1e-6)
    assert seen["similarity/negative"] == pytest.approx(np.mean(negative), abs=1e-6)
    wins = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert seen["similarity/auc"] == pytest.approx(
        np.mean(wins), abs=0.002
    )  # features differ in a bit by batch
    over, under = (
        [],
        [],
    )  # unbiased for (tr S)² and tr S²: all fours of different wholes, by the parts' number
    for part in range(3):
        for i, j, k, m in itertools.permutations(features[part::3], 4):
            over.append((i - j) @ (i - j) * ((k - m) @ (k - m)))
            under.append(((i - j) @ (k - m)) ** 2)
    assert seen["similarity/rank"] == pytest.approx(np.mean(over) / np.mean(under), rel=0.002)
    losses = []  # its expectation: 5,000 negatives are 5,000 / n times all n parts of the other wholes
    for i, j in itertools.permutations(range(len(features)), 2):
        if owner[i] == owner[j]:
            others = [math.exp(cosine[i][k] / 0.7) for k in range(len(features)) if owner[k] != owner[i]]
            own = math.exp(cosine[i][j] / 0.7)
            losses.append(-math.log(own / (own + 5000 * np.mean(others))))
    assert seen["contrast/loss"] == pytest.approx(np.mean(losses), abs=0.01)


def test_a_probe_is_the_same_for_any_batch_and_at_any_step(probe):
    with torch.no_grad():
        one, again = (dict(probe()(step)) for step in (0, 7))
        other = dict(probe(Config(data=DataConfig(batch=16), pretext=CONFIG.pretext))(0))
    assert one == again
    assert other == pytest.approx(one, abs=1e-3)  # a pair that moves in its last bits may pass another


def test_a_network_that_is_lost_yields_nothing_and_the_run_goes_on(probe, tmp_path, encoder):
    """Features that are not finite: no cosine, no file for the histogram, no error; validation says that it is lost."""
    one = probe()
    names = [
        "similarity/positive",
        "similarity/negative",
        "similarity/auc",
        "similarity/rank",
        "contrast/loss",
    ]
    with torch.no_grad():
        assert [name for name, _ in one(0)] == names
        one.save(0)
        encoder.down_tr512.ops[1].conv1.bias.fill_(float("nan"))
        assert list(one(1)) == []
        one.save(1)
    assert similarity_file(tmp_path, 0).exists() and not similarity_file(tmp_path, 1).exists()


def test_a_single_whole_cannot_be_compared(tmp_path, encoder):
    shards = open_set(str(write_structured_set(tmp_path / "set", val=1, per=1)))
    assert list(SimilarityMonitor(CONFIG, encoder, shards, "val", HERE, Log(tmp_path, True, 1))(0)) == []


def test_a_probe_that_takes_too_long_is_warned_of_once(probe, tmp_path, capsys, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(monitors.time, "monotonic", lambda: 5.0 * next(clock))  # every reading is 5 s later
    taken = Monitors(probe(), every=40, log=Log(tmp_path, True, 1))
    with torch.no_grad():
        shares = [dict(taken(step)).get("speed/looking_share") for step in range(0, 400, 40)]
    said = capsys.readouterr().err
    assert shares[0] is None and all(0.2 < share < 0.6 for share in shares[2:])
    assert said.count("warning: probing takes") == 1 and "--train.probe-every" in said
    assert "step 80  parts of one image " in said and ", AUC " in said and ", contrast " in said


def test_the_strip_shows_middle_slices_of_every_volume():
    part, guess, whole = (torch.full((5, 1, 16, 32, 32), value) for value in (0.2, 0.4, 0.6))
    whole[1, 0, 8] = 1.0  # the middle axial slice, so one row of the coronal one
    pixels = plots.image_strip({"part": part, "reconstruction": guess, "whole": whole})
    assert pixels.shape == (4 * 130, 6 * 130) and pixels.dtype == np.uint8
    panels = pixels.reshape(4, 130, 6, 130)[:, 1:-1, :, 1:-1]
    assert (
        (panels[:, :, :2] == 51).all()
        and (panels[:, :, 2:4] == 102).all()
        and (panels[0, :, 4:] == 153).all()
    )
    assert (panels[1, :, 4] == 255).all()
    bright = (panels[1, :, 5] == 255).all(1)
    assert bright.sum() == 128 // 16 and bright.nonzero()[0].mean() == pytest.approx(7.5 * 8 - 0.5, abs=1)
