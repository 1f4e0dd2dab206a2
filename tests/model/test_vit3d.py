"""The transformer: sizes, positions, and one block against NumPy in float64."""

import math

import numpy as np
import pytest
import torch
from layers_float64 import Layers

from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.model.decoder import EncoderDecoder, build_decoder
from p2w.model.unet3d import UNet3dDecoder
from p2w.model.vit3d import HEADS, TransformerBlock, ViT3d, positions


def test_sizes_are_those_of_a_vit_s():
    with torch.device("meta"):
        encoder = build_encoder("vit3d", 32)
        features = encoder(torch.zeros(1, 1, 32, 64, 64))
    assert encoder.channels == (16, 32, 64, 384) and encoder.strides == (1, 2, 4, 8)
    assert [tuple(f.shape[1:]) for f in features] == [
        (16, 32, 64, 64), (32, 16, 32, 32), (64, 8, 16, 16), (384, 4, 8, 8),
    ]  # fmt: skip
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 2) == 21.56


@pytest.mark.parametrize("size", [(8, 8, 8), (16, 24, 40)])
def test_any_multiple_of_a_patch_goes_and_the_papers_decoder_fits(size):
    encoder = ViT3d(1)
    decoder = build_decoder(encoder, skips=True)
    assert type(decoder) is UNet3dDecoder
    network = EncoderDecoder(encoder, decoder)
    assert network(torch.rand(2, 1, *size)).shape == (2, 1, *size)
    with pytest.raises(UserError, match="multiple of 8"):
        encoder(torch.zeros(1, 1, 8, 8, 12))


def attention_float64(x, state):
    """Naive block on (N, C): loops over heads, queries and keys."""
    layers = Layers(state)
    norm, linear = layers.norm, layers.linear
    count, channels = x.shape
    each = channels // HEADS
    q, k, v = np.split(linear(norm(x, "norm1"), "attention.qkv"), 3, axis=1)
    mixed = np.zeros_like(x)
    for head in range(HEADS):
        mine = slice(head * each, (head + 1) * each)
        for i in range(count):
            score = np.exp([q[i, mine] @ k[j, mine] / math.sqrt(each) for j in range(count)])
            mixed[i, mine] = sum(score[j] * v[j, mine] for j in range(count)) / score.sum()
    x = x + linear(mixed, "attention.out")
    wide = linear(norm(x, "norm2"), "wide")
    gelu = np.array([value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in wide.flat])
    return x + linear(gelu.reshape(wide.shape), "narrow")


def test_one_block_against_numpy():
    torch.manual_seed(0)
    block = TransformerBlock(12)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0.3, 0.5)
    x = torch.randn(2, 5, 12)
    found = block(x).detach().numpy()
    for one, out in zip(x, found, strict=True):
        np.testing.assert_allclose(
            out, attention_float64(one.double().numpy(), block.state_dict()), rtol=2e-4, atol=2e-4
        )


def test_positions_tell_every_patch_apart_and_are_the_same_in_a_larger_grid():
    small, large = (positions(grid, 24, torch.device("cpu")) for grid in ((2, 3, 4), (4, 8, 8)))
    assert small.shape == (24, 24) and len({tuple(row.tolist()) for row in small}) == 24
    torch.testing.assert_close(small.view(2, 3, 4, 24), large.view(4, 8, 8, 24)[:2, :3, :4])
    assert torch.equal(
        large.view(4, 8, 8, 3, 8)[2, 5, 6, 1, 0], torch.tensor(5.0).sin()
    )  # y, the fastest wave


def test_tokens_meet_and_place_matters():
    """A change in one corner reaches the opposite one; the same patch elsewhere gives other features."""
    torch.manual_seed(0)
    encoder = ViT3d(1).eval()
    x = torch.zeros(1, 1, 16, 16, 16)
    before = encoder(x)[-1]
    assert not torch.allclose(before[..., 0, 0, 0], before[..., 1, 1, 1], atol=1e-4)
    x[..., :8, :8, :8] = 1
    assert not torch.equal(encoder(x)[-1][..., 1, 1, 1], before[..., 1, 1, 1])
