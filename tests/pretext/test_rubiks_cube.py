"""Rubik's cube+: puzzles that are put together again by hand, and answers that are known."""

import itertools

import numpy as np
import pytest
import torch

from p2w.config import Config, PretextConfig
from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.pretext import build_pretext
from p2w.pretext.rubiks_cube import RubikConfig
from p2w.pretext.volume_ops import cube_permutations, join_cubes, split_cubes, turn_cubes
from p2w.rng import SampleKeys

SIZE = (16, 32, 32)
VIEW = PretextConfig(name="rubiks_cube", size=SIZE, antialias=False)


def keys(ids):
    return SampleKeys(0, 0, torch.as_tensor(ids))


def test_split_and_join_are_inverse_and_x_runs_fastest():
    volume = torch.arange(2 * 4 * 6 * 8).view(2, 1, 4, 6, 8)
    cubes = split_cubes(volume, (2, 3, 2))
    assert torch.equal(cubes[:, 1], volume[:, 0, :2, :2, 4:]) and torch.equal(
        cubes[:, 6], volume[:, 0, 2:, :2, :4]
    )
    assert torch.equal(join_cubes(cubes, (2, 3, 2)), volume)


def test_half_turns_are_those_of_numpy():
    cube = torch.rand(4, 1, 2, 4, 6)
    flags = torch.tensor(list(itertools.product([False, True], repeat=2)))[:, None]
    turned = turn_cubes(cube, flags)[:, 0].numpy()
    for row, (about_z, about_y) in enumerate(flags[:, 0].tolist()):
        expected = cube[row, 0].numpy()
        expected = np.rot90(expected, 2, (1, 2)) if about_z else expected
        expected = np.rot90(expected, 2, (0, 2)) if about_y else expected
        assert np.array_equal(turned[row], expected)


def test_orders_are_far_apart_and_always_the_same():
    orders = cube_permutations(100)
    assert orders.shape == (100, 8) and (np.sort(orders) == np.arange(8)).all()
    assert orders[0].tolist() == list(range(8)) and np.array_equal(cube_permutations(10), orders[:10])
    distance = (orders[:, None] != orders).sum(-1) + 9 * np.eye(100)
    assert distance[:8, :8].min() == 8  # a Latin square, the best there is
    assert distance.min() >= 6  # of random orders, some of 100 are nearer


def test_cubes_lie_where_the_target_says():
    """Octants of constant grey: order is read from the greys, turns from a corner, masks from zeros."""
    octant = torch.arange(8).view(1, 2, 2, 2).to(torch.int16) * 200 - 800
    wholes = (
        octant.repeat_interleave(16, 1)
        .repeat_interleave(16, 2)
        .repeat_interleave(16, 3)
        .expand(12, 32, 32, 32)
    )
    pretext = build_pretext(Config(pretext=VIEW, rubik=RubikConfig(hidden=0.5)))
    views = pretext.sample(wholes.contiguous(), keys(range(12)))
    cubes, orders = split_cubes(views.input, (2, 2, 2)), cube_permutations(100)
    seen = ((cubes.flatten(2).amax(2) * 10).round() - 1).long()
    assert np.array_equal(seen.numpy(), orders[views.target[:, 0].long().numpy()])
    share = (cubes == 0).flatten(2).double().mean(2)
    assert torch.equal(share > 0.25, views.target[:, 17:] == 1) and (share[share > 0] - 0.5).abs().max() < 0.1


def test_turns_are_those_of_the_target():
    """Ramps along z, y, x in one grey: each axis rises or falls by the flags."""
    z, y, x = (torch.arange(32).view([-1 if axis == k else 1 for k in range(3)]) for axis in range(3))
    whole = ((z % 16) * 60 + (y % 16) * 20 + (x % 16) * 3 - 900).to(torch.int16)
    pretext = build_pretext(Config(pretext=VIEW, rubik=RubikConfig(masked=0.0, gap=0.0)))
    views = pretext.sample(whole.expand(10, 32, 32, 32).contiguous(), keys(range(10)))
    cubes = split_cubes(views.input, (2, 2, 2))
    falls = [(cubes.select(2 + k, 0) > cubes.select(2 + k, -1)).flatten(2).all(2) for k in range(3)]
    about_z, about_y = (views.target[:, 1:17].view(10, 8, 2) == 1).unbind(-1)
    assert (
        torch.equal(falls[0], about_y)
        and torch.equal(falls[1], about_z)
        and torch.equal(falls[2], about_z ^ about_y)
    )
    assert 0.35 < about_z.double().mean() < 0.65 and 0.35 < about_y.double().mean() < 0.65


def test_the_right_answer_costs_nothing_and_the_loss_is_a_mean_over_wholes():
    pretext = build_pretext(Config(pretext=VIEW))
    views = pretext.sample(torch.randint(-1000, 1001, (3, 32, 32, 32), dtype=torch.int16), keys([1, 2, 3]))
    sure = 100 * (2 * views.target[:, 1:] - 1)
    order = 100.0 * torch.nn.functional.one_hot(views.target[:, 0].long(), 100)
    loss, extras = pretext.loss((order, sure[:, :16].view(3, 8, 2), sure[:, 16:]), views)
    assert float(loss) < 1e-6 and extras["order_accuracy"] == 1
    none = (torch.zeros(3, 100), torch.zeros(3, 8, 2), torch.zeros(3, 8))
    assert float(pretext.loss(none, views)[0]) == pytest.approx(np.log(100) + 2 * np.log(2))
    guess = (torch.randn(3, 100), torch.randn(3, 8, 2), torch.randn(3, 8))
    ones = [
        pretext.loss(tuple(g[i : i + 1] for g in guess), views.rows(slice(i, i + 1)))[0] for i in range(3)
    ]
    assert float(pretext.loss(guess, views)[0]) == pytest.approx(float(torch.stack(ones).mean()), rel=1e-5)


def test_the_network_uses_every_weight_and_the_encoder_sees_one_cube_at_a_time():
    pretext = build_pretext(Config(pretext=VIEW))
    network = pretext.build(build_encoder("unet3d", 2)).eval()
    views = pretext.sample(torch.randint(-1000, 1001, (2, 32, 32, 32), dtype=torch.int16), keys([1, 2]))
    order, turns, masked = network(views.input)
    assert order.shape == (2, 100) and turns.shape == (2, 8, 2) and masked.shape == (2, 8)
    other = views.input.clone()
    other[:, :, 8:] = 0  # the lower four
    assert torch.allclose(network(other)[1][:, :4], turns[:, :4], atol=1e-6)
    pretext.loss((order, turns, masked), views)[0].backward()
    assert all((weight.grad is not None) is weight.requires_grad for weight in network.parameters())


def test_views_depend_on_the_key_alone():
    pretext, wholes = (
        build_pretext(Config(pretext=VIEW)),
        torch.randint(-1000, 1001, (4, 32, 32, 32), dtype=torch.int16),
    )
    together, again = pretext.sample(wholes, keys(range(4))), pretext.sample(wholes[[3, 1]], keys([3, 1]))
    assert torch.equal(again.input, together.input[[3, 1]]) and torch.equal(
        again.target, together.target[[3, 1]]
    )


def test_a_size_whose_cubes_do_not_fit_the_encoder_is_refused():
    with pytest.raises(
        UserError, match=r"must be a multiple of 16, twice the encoder's stride, for rubiks_cube"
    ):
        build_pretext(Config(pretext=PretextConfig(name="rubiks_cube", size=(8, 16, 16)))).build(
            build_encoder("unet3d", 2)
        )
