"""Models Genesis: each deformation against a slow sequential reference or a known answer; then all of them together."""

import dataclasses

import numpy as np
import pytest
import torch

from p2w import rng
from p2w.config import Config, PretextConfig
from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.pretext import build_pretext, models_genesis
from p2w.pretext.models_genesis import GenesisConfig
from p2w.pretext.volume_ops import flipped
from p2w.rng import SampleKeys

SIZE = (8, 16, 24)
NOTHING = GenesisConfig(flip=0.0, shuffle=0.0, curve=0.0, paint=0.0, blocks=300)


def pretext(**settings):
    genesis = dataclasses.replace(NOTHING, **settings)
    return build_pretext(Config(pretext=PretextConfig(name="models_genesis", size=SIZE), genesis=genesis))


def keys(ids, epoch=1):
    return SampleKeys(3, epoch, torch.as_tensor(ids))


def noise(count, shape=(16, 32, 40)):
    return torch.randint(
        -1000, 1001, (count, *shape), dtype=torch.int16, generator=torch.Generator().manual_seed(0)
    )


def test_the_cube_is_a_crop_at_native_voxels_and_undeformed_it_is_its_own_target():
    wholes, names = noise(4), keys(range(4))
    views = pretext().sample(wholes, names)
    assert torch.equal(views.input, views.target) and views.input.shape == (4, 1, *SIZE)
    u = rng.uniforms(names, models_genesis.CUBE, 3).numpy()
    for row in range(4):
        z, y, x = (
            int(u[row, k] * (there - edge + 1))
            for k, (edge, there) in enumerate(zip(SIZE, (16, 32, 40), strict=True))
        )
        crop = wholes[row, z : z + 8, y : y + 16, x : x + 24].double()
        assert (views.target[row, 0] - (crop + 1000) / 2000).abs().max() < 1e-6


def one_after_the_other(volume, starts, sizes, orders):
    """The sequential reference: each block takes its voxels from the original and overwrites what was there."""
    made = volume.copy()
    for (z, y, x), (d, h, w), order in zip(starts, sizes, orders, strict=True):
        window = volume[z : z + d, y : y + h, x : x + w].ravel()
        made[z : z + d, y : y + h, x : x + w] = window[order].reshape(d, h, w)
    return made


def test_shuffling_all_blocks_at_once_is_shuffling_one_after_the_other():
    shape, count = (20, 32, 40), 60
    volumes = torch.arange(2 * 20 * 32 * 40).view(2, 1, *shape)
    found = models_genesis.local_shuffle(volumes, keys([1, 2]), 7, count)
    starts, sizes = (
        torch.stack(one, -1).numpy() for one in models_genesis.draw_blocks(keys([1, 2]), 7, count, shape)
    )
    seeds = (rng.uniforms(keys([1, 2]), 8, count) * 2**53).long()
    volume = torch.from_numpy(sizes.prod(-1))
    for row in range(2):
        orders = []
        for block in range(count):
            n = int(volume[row, block])
            order = models_genesis.permuted(
                torch.arange(n)[None], torch.full((1, n), block), volume[row][None], seeds[row][None]
            )[0].numpy()
            assert sorted(order) == list(range(n))  # a permutation
            orders.append(order)
        expected = one_after_the_other(volumes[row, 0].numpy(), starts[row], sizes[row], orders)
        assert np.array_equal(found[row, 0].numpy(), expected)
        assert (
            sizes[row].max(0).tolist() <= [2, 3, 4]
            and sizes[row].min() >= 1
            and len(np.unique(expected)) > 20_000
        )


@pytest.mark.parametrize("n", [2, 6, 24])
def test_permutations_of_a_block_take_every_place_to_every_place(n):
    count = 20_000
    slot, block = torch.arange(n).expand(count, n), torch.zeros(count, n, dtype=torch.int64)
    seeds = (rng.uniforms(keys(range(count)), 5, 1) * 2**53).long()
    order = models_genesis.permuted(slot, block, torch.full((count, 1), n), seeds)
    table = torch.stack([torch.bincount(order[:, k], minlength=n) for k in range(n)]).double() / count
    assert (table - 1 / n).abs().max() < 5 * np.sqrt(1 / n / count) + 0.004
    # Pairs too: the place of one voxel tells little of another's.
    pair = torch.bincount(order[:, 0] * n + order[:, -1], minlength=n * n).view(n, n).double() / count
    assert (pair - (1 - torch.eye(n)) / (n * (n - 1))).abs().sum() < (0.05 if n < 24 else 0.3)


def test_shuffling_has_the_statistics_of_the_sequential_way_with_numpys_permutations():
    """How many voxels keep their value, and how far values travel, over many volumes."""
    shape, count, rows = (10, 20, 30), 500, 40
    place = np.indices(shape).reshape(3, -1).T
    index = torch.arange(6000).view(1, 1, *shape).expand(rows, 1, *shape)
    found = models_genesis.local_shuffle(index, keys(range(rows)), 7, count).numpy().reshape(rows, -1)
    random, slow = np.random.default_rng(0), []
    most = np.array(shape) // 10
    for _ in range(rows):
        sizes = random.integers(1, most + 1, (count, 3))
        starts = random.integers(0, np.array(shape) - sizes + 1)
        orders = [random.permutation(n) for n in sizes.prod(1)]
        slow.append(one_after_the_other(index[0, 0].numpy(), starts, sizes, orders).ravel())

    def statistics(made):
        step = np.abs(place[made] - place)
        return [
            (made == np.arange(6000)).mean(),
            *(step[..., k].mean() for k in range(3)),
            (step.sum(-1) > 1).mean(),
        ]

    np.testing.assert_allclose(statistics(found), statistics(np.array(slow)), rtol=0.03, atol=1e-3)


def test_flips_are_up_to_three_and_the_target_is_flipped_too():
    u = rng.uniforms(keys(range(20_000)), 1, 6)
    rate = models_genesis.flips(u, 0.4).double().mean(0)
    odd = 0.0  # of k flips along three axes, an axis gets an odd number with (1 - 3^-k) / 2
    for k, share in ((1, 0.4 * 0.6), (2, 0.16 * 0.6), (3, 0.064)):
        odd += share * (1 - 3.0**-k) / 2
    assert (rate - odd).abs().max() < 0.015
    views, plain = (
        pretext(flip=1.0).sample(noise(8), keys(range(8))),
        pretext().sample(noise(8), keys(range(8))),
    )
    assert torch.equal(views.input, views.target) and not torch.equal(views.target, plain.target)
    volume, axes = torch.rand(1, 2, 3, 4), torch.tensor([[True, False, True]])
    assert torch.equal(flipped(volume, axes), volume.flip(1, 3))


def test_curves_are_monotone_and_half_of_them_fall():
    tables = models_genesis.curves(keys(range(2000)), 0.5)
    falls = tables[:, 0] > 0.5
    assert abs(falls.double().mean() - 0.5) < 0.05
    assert (tables[~falls].diff(dim=1) >= -1e-6).all() and (tables[falls].diff(dim=1) <= 1e-6).all()
    views = pretext(curve=1.0).sample(noise(3), keys(range(3)))
    for seen, cube in zip(views.input.flatten(1), views.target.flatten(1), strict=True):
        sorted_by_cube = seen[cube.argsort()]
        assert (sorted_by_cube.diff() >= -1e-5).all() or (sorted_by_cube.diff() <= 1e-5).all()


def blocks_one_by_one(coin, u, outside, shape):
    """Painted voxels (d, h, w), with loops and stops, from the same draws."""
    union = np.zeros(shape, bool)
    for n in range(5):
        if not (outside and n == 0) and u[n, 6] >= 0.95:
            break
        cut = []
        for k, edge in enumerate(shape):
            low, high = (edge - 4 * edge // 7, edge - 3 * edge // 7) if outside else (edge // 6, edge // 3)
            length = low + int(u[n, k] * (high - low + 1))
            margin = min(3, (edge - length) // 2)
            start = margin + int(u[n, 3 + k] * (edge - length - 2 * margin + 1))
            cut.append(slice(start, start + length))
        union[tuple(cut)] = True
    return ~union if outside else union


def test_painting_against_loops_and_at_the_published_rates():
    p, names = pretext(paint=0.9, outpaint=0.8), keys(range(60))
    coin = rng.uniforms(names, models_genesis.COINS, 9)[:, 2]
    u = rng.uniforms(names, models_genesis.BLOCKS, 35).view(60, 5, 7).numpy()
    painted = p.painted(coin, names)
    kinds = []
    for row in range(60):
        c = float(coin[row])
        expected = blocks_one_by_one(c, u[row], c < 0.72, SIZE) if c < 0.9 else np.zeros(SIZE, bool)
        assert np.array_equal(painted[row, 0].numpy(), expected)
        kinds.append("none" if c >= 0.9 else "out" if c < 0.72 else "in")
    assert set(kinds) == {"none", "out", "in"}
    views, plain = p.sample(noise(8), keys(range(8))), pretext().sample(noise(8), keys(range(8)))
    changed = views.input != plain.input
    mask = p.painted(rng.uniforms(keys(range(8)), models_genesis.COINS, 9)[:, 2], keys(range(8)))
    assert torch.equal(changed, mask) and torch.equal(views.target, plain.target)
    assert abs(float(views.input[mask].mean()) - 0.5) < 0.02  # uniform noise
    assert abs(float(views.input[mask].std()) - 12**-0.5) < 0.02


def test_all_together_depend_on_the_key_alone():
    p, wholes = build_pretext(Config(pretext=PretextConfig(name="models_genesis", size=SIZE))), noise(6)
    together = p.sample(wholes, keys(range(6)))
    torch.manual_seed(99)
    again = p.sample(wholes[[4, 2]], keys([4, 2]))
    assert torch.equal(again.input, together.input[[4, 2]]) and torch.equal(
        again.target, together.target[[4, 2]]
    )
    assert not torch.equal(p.sample(wholes, keys(range(6), epoch=2)).input, together.input)
    assert together.input.min() >= 0 and together.input.max() <= 1


def test_the_network_and_sizes_that_do_not_fit():
    network = pretext().build(build_encoder("unet3d", 2))
    assert network(torch.rand(1, 1, *SIZE)).shape == (1, 1, *SIZE)
    with pytest.raises(UserError, match=r"no cube of that size fits sub-scans of \(16, 12, 24\) voxels"):
        pretext().sample(noise(1, (16, 12, 24)), keys([0]))
    assert pretext(cube="whole").sample(noise(1, (16, 12, 24)), keys([0])).input.shape == (1, 1, *SIZE)
