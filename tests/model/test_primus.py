"""Primus: sizes, one block against NumPy in float64, and what rotary positions promise."""

import math

import numpy as np
import pytest
import torch
from layers_float64 import Layers

from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.model.decoder import EncoderDecoder, build_decoder
from p2w.model.primus import EvaBlock, Primus, PrimusDecoder, rotary_angles

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "width", "channels", "depth", "heads"),
    [
        ("primus", 32, 396, 12, 6),
        ("primus:heads=12", 32, 792, 12, 12),
        ("primus:heads=12,depth=16", 35, 864, 16, 12),
        ("primus:heads=16,depth=24", 32, 1056, 24, 16),
    ],
)
def test_sizes_are_the_published_ones(name, width, channels, depth, heads):
    with torch.device("meta"):
        encoder = build_encoder(name, width)
        (features,) = encoder(torch.zeros(1, 1, 16, 32, 24))
    assert encoder.channels == (channels,) and encoder.strides == (8,) and len(encoder.blocks) == depth
    assert encoder.blocks[0].attention.heads == heads
    assert features.shape == (1, channels, 2, 4, 3)


def block_float64(x, grid, pairs, state, heads):
    """Naive block on (N, C): positions as complex numbers, loops over heads, queries and keys."""
    layers = Layers(state)
    norm, linear = layers.norm, layers.linear
    count, channels = x.shape
    each = channels // heads
    turns = np.array(
        [
            [where * 10_000.0 ** (-k / pairs) for where in (z, y, xx) for k in range(pairs)]
            for z in range(grid[0])
            for y in range(grid[1])
            for xx in range(grid[2])
        ]
    )

    def turned(values):
        """Channel k is the real part, channel k + each / 2 the imaginary one."""
        return (values[:, : each // 2] + 1j * values[:, each // 2 :]) * np.exp(1j * turns)

    q, k, v = np.split(linear(norm(x, "norm1"), "attention.qkv"), 3, axis=1)
    mixed = np.zeros_like(x)
    for head in range(heads):
        mine = slice(head * each, (head + 1) * each)
        qs, ks = turned(q[:, mine]), turned(k[:, mine])
        for i in range(count):
            score = np.exp([(qs[i] @ ks[j].conj()).real / math.sqrt(each) for j in range(count)])
            mixed[i, mine] = sum(score[j] * v[j, mine] for j in range(count)) / score.sum()
    x = x + layers.weights["scale1"] * linear(norm(mixed, "attention.norm"), "attention.out")
    gate, value = (linear(norm(x, "norm2"), f"mlp.{name}") for name in ("gate", "value"))
    return x + layers.weights["scale2"] * linear(
        norm(gate / (1 + np.exp(-gate)) * value, "mlp.norm"), "mlp.out"
    )


def test_one_block_against_numpy():
    torch.manual_seed(0)
    grid, heads, pairs = (2, 1, 3), 2, 1
    block = EvaBlock(heads * 6 * pairs, heads)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0.3, 0.5)
    x, angles = torch.randn(2, 6, 12), rotary_angles(grid, pairs, CPU)
    found = block(x, (angles.cos()[None, None], angles.sin()[None, None])).detach().numpy()
    for one, out in zip(x, found, strict=True):
        asked = block_float64(one.double().numpy(), grid, pairs, block.state_dict(), heads)
        np.testing.assert_allclose(out, asked, rtol=2e-4, atol=2e-4)


def test_angles_are_the_same_in_a_larger_grid_and_scores_follow_distances():
    small, large = (rotary_angles(grid, 2, CPU) for grid in ((2, 3, 4), (4, 8, 8)))
    assert small.shape == (24, 6) and len({tuple(row.tolist()) for row in small}) == 24
    torch.testing.assert_close(small.view(2, 3, 4, 6), large.view(4, 8, 8, 6)[:2, :3, :4])
    moved = large.view(4, 8, 8, 6)[1:3, 2:5, 3:7]  # all angles grow by the same vector: differences stay
    torch.testing.assert_close(moved - moved[0, 0, 0], small.view(2, 3, 4, 6))


def test_tokens_that_are_left_out_change_nothing_and_all_are_the_whole():
    torch.manual_seed(0)
    encoder = Primus(3, depth=2, heads=2).eval()
    x = torch.rand(2, 1, 16, 16, 16)
    everything = torch.arange(8).expand(2, -1)
    torch.testing.assert_close(
        encoder.visible_tokens(x, everything), encoder(x)[0].flatten(2).transpose(1, 2)
    )
    kept = torch.tensor([[0, 3, 6], [1, 2, 7]])
    seen = encoder.visible_tokens(x, kept)
    other = x.clone()
    other[0, :, :8, :8, 8:] = 9  # token 1 of the first sample
    assert torch.equal(encoder.visible_tokens(other, kept), seen)
    alone = encoder.visible_tokens(x[1:], kept[1:])
    torch.testing.assert_close(alone, seen[1:])
    backwards = encoder.visible_tokens(x, kept.flip(1))
    torch.testing.assert_close(
        backwards.flip(1), seen
    )  # a token's place is its own, not its number in the list


@pytest.mark.parametrize("skips", [False, True])
def test_its_own_decoder_gives_volumes_of_any_multiple_of_a_patch(skips):
    encoder = Primus(1, depth=1, heads=1)
    decoder = build_decoder(encoder, skips, out_channels=2)
    assert type(decoder) is PrimusDecoder
    assert EncoderDecoder(encoder, decoder)(torch.rand(2, 1, 8, 24, 16)).shape == (2, 2, 8, 24, 16)
    with pytest.raises(UserError, match="multiple of 8"):
        encoder(torch.zeros(1, 1, 8, 8, 12))


@pytest.mark.parametrize("name", ["primus:depth=0", "primus:heads=0"])
def test_settings_have_bounds(name):
    with pytest.raises(UserError, match="at least 1"):
        build_encoder(name, 32)
