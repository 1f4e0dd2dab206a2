"""Each transform against float64 written out plainly; masks move with images; numbers depend on their keys alone."""

import itertools
import math

import numpy as np
import pytest
import torch

from p2w.errors import UserError
from p2w.finetune.augment import PROBABILITIES, USUAL, Augmentation, augment, draw, source_matrix
from p2w.rng import SampleKeys

SIZE = (6, 9, 8)


@pytest.fixture
def batch():
    """Four samples of two channels, a label map of 0 to 3, and keys."""
    torch.manual_seed(0)
    x, target = torch.rand(4, 2, *SIZE), torch.randint(0, 4, (4, 1, *SIZE), dtype=torch.uint8)
    return x, target, SampleKeys(5, 3, torch.tensor([10, 11, 12, 13]))


def linear(volume, at):
    """The value of a volume [z, y, x] at a place in voxels, between eight voxels; beyond the border its value."""
    at = [min(max(place, 0.0), edge - 1.0) for place, edge in zip(at, volume.shape, strict=True)]
    low = [math.floor(place) for place in at]
    total = 0.0
    for corner in itertools.product((0, 1), repeat=3):
        index = tuple(min(v + c, n - 1) for v, c, n in zip(low, corner, volume.shape, strict=True))
        shares = [f - v if c else 1 - f + v for f, v, c in zip(at, low, corner, strict=True)]
        total += float(volume[index]) * math.prod(shares)
    return total


def nearest(volume, at):
    """The value of the nearest voxel, and whether another is as near to a thousandth of a voxel."""
    at = [min(max(place, 0.0), edge - 1.0) for place, edge in zip(at, volume.shape, strict=True)]
    tie = any(abs(place % 1 - 0.5) < 1e-3 for place in at)
    return volume[tuple(int(place + 0.5) for place in at)], tie


@pytest.mark.parametrize("spacing", [None, (5.0, 1.0, 2.0)])
def test_rotation_and_scaling_are_one_pass_and_masks_move_along(batch, spacing):
    x, target, keys = batch
    settings = Augmentation(rotation=0.7, scaling=0.7)
    mm = None if spacing is None else torch.tensor([spacing] * 4)
    found, mask = augment(x, target, settings, keys, mm)
    drawn = draw(settings, keys)
    assert 0 < int(drawn.moved.sum()) < 4 or torch.unique(drawn.factor).numel() > 2
    assert mask.dtype == target.dtype and set(mask.unique().tolist()) <= {0, 1, 2, 3}
    of = np.diag(spacing or (1.0, 1.0, 1.0))
    for n in range(4):
        if not drawn.moved[n]:
            assert torch.equal(found[n], x[n]) and torch.equal(mask[n], target[n])
            continue
        about_z, about_y, about_x = drawn.angles[n].tolist()
        turn = _about(0, 1, about_x) @ _about(2, 0, about_y) @ _about(1, 2, about_z)
        back = np.linalg.inv(of) @ np.linalg.inv(turn) @ of / float(drawn.factor[n])
        centre = (np.array(SIZE) - 1) / 2
        for voxel in itertools.product(*map(range, SIZE)):
            at = centre + back @ (np.array(voxel) - centre)
            assert float(found[n, 1][voxel]) == pytest.approx(linear(x[n, 1].numpy(), at), abs=2e-5)
            value, tie = nearest(target[n, 0].numpy(), at)
            assert tie or mask[n, 0][voxel] == value


def _about(first, second, angle):
    """Turns the axis `second` (of z, y, x) towards `first` by an angle: right-handed about the third."""
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = math.cos(angle)
    matrix[first, second], matrix[second, first] = math.sin(angle), -math.sin(angle)
    return matrix


def test_a_rotation_keeps_lengths_in_mm(batch):
    """A quarter turn about x of voxels of 2 x 1 x 1 mm: half as many slices as rows."""
    keys = SampleKeys(0, 0, torch.arange(1))
    drawn = draw(Augmentation(rotation=1), keys)
    object.__setattr__(drawn, "angles", torch.tensor([[0.0, 0.0, math.pi / 2]], dtype=torch.float64))
    matrix = source_matrix(drawn, torch.tensor([[2.0, 1.0, 1.0]]))[0]
    assert (matrix @ torch.tensor([1.0, 0, 0]).double()).abs().tolist() == pytest.approx([0, 2, 0])
    assert (matrix @ torch.tensor([0, 1.0, 0]).double()).abs().tolist() == pytest.approx([0.5, 0, 0])


def test_mirrors_are_exact_and_along_the_axes_asked_for(batch):
    x, target, keys = batch
    found, mask = augment(x, target, Augmentation(flip=0.5, flip_axes="zx"), keys)
    flips = draw(Augmentation(flip=0.5, flip_axes="zx"), keys).flips
    assert flips.any() and not flips[:, 1].any() and not flips.all()
    for n in range(4):
        axes = [k + 1 for k in range(3) if flips[n, k]]
        assert torch.equal(found[n], x[n].flip(axes)) and torch.equal(mask[n], target[n].flip(axes))


def low_resolution(line, share):
    """A line of n values: the nearest of the centres of m cells, and linear interpolation between these."""
    n = len(line)
    m = min(max(math.floor(share * n + 0.5), 1), n)
    kept = [line[math.floor((j + 0.5) * n / m)] for j in range(m)]
    at = [min(max((i + 0.5) * m / n - 0.5, 0), m - 1) for i in range(n)]
    return np.interp(at, range(m), kept)


def blurred(line, sigma, radius):
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    return np.convolve(np.pad(line, radius, mode="edge"), weights / weights.sum(), mode="valid")


def along_all_axes(volume, how):
    for axis in range(3):
        volume = np.apply_along_axis(how, axis, volume)
    return volume


NAIVE = {
    "brightness": lambda v, a: v + a,
    "contrast": lambda v, a: (v - v.mean()) * a + v.mean(),
    "gamma": lambda v, a: (v**a - (v**a).mean()) / (v**a).std() * v.std() + v.mean(),
    "blur": lambda v, a: along_all_axes(v, lambda line: blurred(line, a, 3)),
    "low_resolution": lambda v, a: along_all_axes(v, lambda line: low_resolution(line, a)),
}


@pytest.mark.parametrize("name", NAIVE)
def test_an_intensity_transform_is_what_it_says(batch, name):
    x, target, keys = batch
    x, keys = torch.cat((x, x * 0.7)), SampleKeys(5, 3, torch.arange(8))
    settings = Augmentation(**{name: 0.5})
    found, mask = augment(x, target, settings, keys)
    chosen, amount = draw(settings, keys).amount[name]
    assert 0 < int(chosen.sum()) < 8 and mask is target
    for n, channel in itertools.product(range(8), range(2)):
        before = x[n, channel].numpy().astype(np.float64)
        after = NAIVE[name](before, float(amount[n])).clip(0, 1) if chosen[n] else before
        np.testing.assert_allclose(found[n, channel].numpy(), after, atol=3e-6)


def test_noise_has_its_deviation_and_ranges_are_kept():
    x, keys = torch.full((64, 1, 8, 8, 8), 0.5), SampleKeys(1, 0, torch.arange(64))
    settings = Augmentation(noise=0.5, noise_std=0.05)
    found, _ = augment(x, torch.zeros(64), settings, keys)
    chosen, std = draw(settings, keys).amount["noise"]
    assert torch.equal(found[~chosen], x[~chosen]) and 20 < int(chosen.sum()) < 44
    measured = found[chosen].flatten(1).double().std(1)
    torch.testing.assert_close(measured, std[chosen], rtol=0.15, atol=1e-4)
    drawn = draw(Augmentation(**dict.fromkeys(PROBABILITIES, 1.0)), SampleKeys(0, 0, torch.arange(4000)))
    ends = {name: (float(v.min()), float(v.max())) for name, (_, v) in drawn.amount.items()}
    wanted = {
        "brightness": (-0.025, 0.025), "contrast": (0.75, 1.25), "gamma": (1 / 1.5, 1.5), "blur": (0.5, 1.0),
        "low_resolution": (0.5, 1.0), "noise": (0, 0.025),
    }  # fmt: skip
    assert ends == {name: pytest.approx(pair, abs=2e-3) for name, pair in wanted.items()}
    assert float(drawn.factor.max()) == pytest.approx(1.4, abs=2e-3)
    assert float(drawn.angles.abs().max()) == pytest.approx(math.radians(30), abs=2e-3)


def test_a_sample_comes_out_the_same_in_any_batch_and_one_transform_moves_no_other(batch):
    x, target, keys = batch
    whole, masks = augment(x, target, USUAL, keys)
    for rows in ([0, 2], [3], [1]):
        own = SampleKeys(keys.seed, keys.epoch, keys.ids[rows])
        part, mask = augment(x[rows], target[rows], USUAL, own)
        torch.testing.assert_close(part, whole[rows], rtol=0, atol=1e-6)
        assert torch.equal(mask, masks[rows])
    other = augment(x, target, USUAL, SampleKeys(5, 4, keys.ids))[0]
    assert not torch.allclose(other, whole)
    alone, every = draw(Augmentation(gamma=0.5), keys), draw(USUAL, keys)
    assert torch.equal(alone.amount["gamma"][1], every.amount["gamma"][1])
    assert whole.min() >= 0 and whole.max() <= 1


def test_nothing_happens_by_default_and_labels_of_samples_stay(batch):
    x, target, keys = batch
    assert not Augmentation().on and USUAL.on
    found, mask = augment(x, target, Augmentation(), keys)
    assert found is x and mask is target
    labels = torch.arange(4.0)
    assert augment(x, labels, USUAL, keys)[1] is labels


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"flip": 1.5}, "flip 1.5: must be from 0 to 1"),
        ({"flip_axes": "zz"}, "flip-axes zz: some of the letters"),
        ({"flip_axes": ""}, "flip-axes"),
        ({"rotation_degrees": 181.0}, "rotation-degrees"),
        ({"scaling_factor": 0.9}, "scaling-factor 0.9: must be from 1 to 10"),
        ({"noise_std": math.nan}, "noise-std"),
        ({"low_resolution_share": 0.0}, "low-resolution-share"),
    ],
)
def test_senseless_numbers_are_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        Augmentation(**wrong).check()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_does_the_same_without_waiting(batch):
    x, target, keys = batch
    device = torch.device("cuda")
    there = SampleKeys(keys.seed, keys.epoch, keys.ids.to(device))
    spacing = torch.tensor([[2.0, 1.0, 1.0]] * 4)
    right, mask = augment(x, target, USUAL, keys, spacing)
    given = x.to(device), target.to(device), USUAL, there, spacing.to(device)
    augment(*given)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, moved = augment(*given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), right, rtol=0, atol=1e-4)
    assert (moved.cpu() != mask).float().mean() < 1e-3
