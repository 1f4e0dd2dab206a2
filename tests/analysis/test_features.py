"""Features of many parts against one part at a time; and features without a network."""

import itertools

import numpy as np
import pytest
import torch

from p2w import geometry
from p2w.analysis.features import PartSet, extract, histogram, log_bins, pixels
from p2w.analysis.measure import AnalysisSettings
from p2w.analysis.monitors import VALIDATION_SEED
from p2w.config import PretextConfig
from p2w.model import build_encoder
from p2w.rng import SampleKeys
from p2w.stream.stream import open_set
from p2w.world import World

VIEW = PretextConfig(size=(8, 16, 16))
ALONE = World(0, 1, 0, 1, "here", torch.device("cpu"), "test")


@pytest.mark.parametrize("batch", [3, 16])
def test_against_one_part_at_a_time(tiny_set, batch):
    shards, part_set = open_set(str(tiny_set)), PartSet("x", 40, 2, ((1 / 8, 1 / 4), (0.5, 1.0)), seed=5)
    ids = shards.ids("val")[[1, 4, 6]]
    torch.manual_seed(0)
    encoder, ticks = build_encoder("unet3d", 2).eval(), []
    found = extract(encoder.pooled, VIEW, part_set, shards, ids, ALONE, batch=batch, tick=ticks.append)
    assert found.shape == (3, 4, 32) and found.dtype == np.float32 and ticks == [4, 4, 4]
    for w, sub_scan in enumerate(ids):
        voxels = torch.empty(1, *shards.shape, dtype=torch.int16)
        shards.read_into(int(sub_scan), voxels[0])
        for p, (part, fraction) in enumerate(
            [(40, (1 / 8, 1 / 4)), (41, (1 / 8, 1 / 4)), (42, (0.5, 1)), (43, (0.5, 1))]
        ):
            keys = SampleKeys(VALIDATION_SEED + 5, 0, torch.tensor([int(sub_scan)]))
            box = geometry.sample_boxes(keys, part, shards.shape, fraction, 4.0)
            with torch.no_grad():
                expected = encoder.double()(geometry.crop_resize(voxels, box, (8, 16, 16)).double())[-1].mean(
                    (2, 3, 4)
                )
            encoder.float()
            np.testing.assert_allclose(found[w, p], expected[0], atol=1e-5)


def test_a_subset_of_wholes_does_not_meet_the_period_of_the_tiling():
    """Two tiles a scan: a stride over 80 wholes, as there was before, took 39 left halves and one right one."""
    ids = np.arange(160, 240)

    def subset(count, seed=0):
        return AnalysisSettings(max_wholes=count, seed=seed).wholes(ids).tolist()

    assert len(subset(40)) == 40 and subset(40) == sorted(set(subset(40))) == subset(40)
    for count, seed in itertools.product((16, 40, 60), range(5)):
        right = sum(one % 2 for one in subset(count, seed))
        assert abs(right - count / 2) < 2 * count**0.5  # four standard deviations of independent draws
    assert set(subset(16)) < set(subset(40)) and subset(40, seed=1) != subset(40)
    assert subset(0) == subset(80) == subset(1000) == ids.tolist()


def test_scales_are_in_their_ranges_and_the_whole_is_the_whole(tiny_set):
    shards = open_set(str(tiny_set))
    bins = log_bins(1 / 16, 4)
    assert bins[0][0] == 1 / 16 and bins[-1][1] == 1.0
    np.testing.assert_allclose([high / low for low, high in bins], 2)
    scale = PartSet("x", 9, 3, bins).scale(shards.ids("val"), shards)
    assert scale.shape == (8, 12)
    for place, (low, high) in enumerate(bins):
        some = scale[:, 3 * place : 3 * place + 3]
        assert (low - 1e-6 <= some).all() and (some <= high + 1e-6).all() and some.std() > 0
    whole = PartSet("whole", 0, 1, ((1.0, 1.0),)).boxes(shards.ids("val"), shards)
    assert (whole == torch.tensor([0, 0, 0, *shards.shape])).all()


def test_histogram_and_pixels_against_numpy():
    parts = torch.rand(3, 1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    parts[0, 0, 0, 0, :3] = torch.tensor([0.0, 1.0, 1.0])
    found = histogram(parts)
    for i in range(3):
        counts, _ = np.histogram(parts[i].numpy(), bins=64, range=(0, 1))
        np.testing.assert_allclose(found[i], counts / parts[i].numel(), atol=1e-7)
    blocks = parts.double().numpy()[:, 0].reshape(3, 4, 2, 8, 2, 8, 2).mean((2, 4, 6))
    np.testing.assert_allclose(pixels(parts), blocks.reshape(3, -1), atol=1e-6)
