"""SparK: the encoder computes what convolutions that visit seen voxels alone would, and the loss is of hidden voxels."""

import dataclasses

import pytest
import torch
from torch.nn import functional

from p2w.config import Config, ModelConfig, PretextConfig
from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.pretext import build_pretext
from p2w.pretext.spark import SeenPatches, SparkConfig, sparse
from p2w.rng import SampleKeys

CONFIG = Config(pretext=PretextConfig(name="spark", size=(16, 16, 24)), model=ModelConfig("unet3d", 2))


def spark(config=CONFIG):
    torch.manual_seed(0)
    pretext = build_pretext(config)
    return pretext, pretext.build(build_encoder(config.model.name, config.model.width))


def sample(pretext, ids=(3, 4, 5)):
    wholes = torch.randint(
        -1000, 1001, (6, 16, 32, 32), dtype=torch.int16, generator=torch.Generator().manual_seed(0)
    )
    return pretext.sample(wholes[list(ids)], SampleKeys(0, 1, torch.tensor(ids)))


def test_three_fifths_of_the_patches_are_hidden_and_hold_zeros():
    views = sample(spark()[0])
    hidden = views.extra_inputs[0]
    assert hidden.shape == (3, 12) and (hidden.sum(1) == 7).all()
    cells = views.mask.unfold(2, 8, 8).unfold(3, 8, 8).unfold(4, 8, 8).flatten(5).flatten(1, 4)
    assert torch.equal(cells.all(2), hidden) and torch.equal(cells.any(2), hidden)
    assert not views.input[views.mask].any() and torch.equal(
        views.input[~views.mask], views.target[~views.mask]
    )


def seen_of(hidden, grid):
    kept = hidden.int().argsort(dim=1, stable=True)[:, : int((~hidden[0]).sum())]
    return SeenPatches(kept, ~hidden.view(-1, *grid))


@pytest.mark.parametrize("edges", [(2, 2, 3), (4, 4, 6), (4, 2, 9)])
def test_positions_are_those_of_the_mask(edges):
    hidden = torch.tensor(
        [[0, 1, 1, 0, 1, 0, 1, 1, 0, 1, 0, 1], [1, 0, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0]], dtype=torch.bool
    )
    hidden[1, 1] = True
    hidden[1, 0] = False
    seen, x = seen_of(hidden, (2, 2, 3)), torch.zeros(2, 5, *edges)
    mask = seen.mask(x)
    for row in range(2):
        expected = mask[row, 0].flatten().nonzero()[:, 0]
        assert torch.equal(seen.positions(x)[row, 0].sort().values, expected)


def visit_seen_sites(conv, x, mask):
    """A convolution by hand, float64: at seen sites alone, over seen neighbours alone; zeros elsewhere."""
    out = torch.zeros(len(x), conv.out_channels, *x.shape[2:], dtype=torch.float64)
    reach = conv.kernel_size[0] // 2
    weight, bias, given, seen = (
        one.detach().numpy() for one in (conv.weight.double(), conv.bias.double(), x, mask)
    )
    for b, z, y, w in mask[:, 0].nonzero().tolist():
        total = bias.copy()
        for dz in range(-reach, reach + 1):
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    at = (z + dz, y + dy, w + dx)
                    if all(0 <= i < edge for i, edge in zip(at, x.shape[2:], strict=True)) and seen[b, 0][at]:
                        tap = weight[:, :, dz + reach, dy + reach, dx + reach]
                        total += tap @ given[(b, slice(None), *at)]
        out[b, :, z, y, w] = torch.from_numpy(total)
    return out


def test_the_first_level_is_a_convolution_over_seen_sites_with_norms_over_seen_sites():
    """Two layers of convolution, batch norm by the seen voxels of the batch, ReLU; float64 by hand."""
    pretext, network = spark(
        dataclasses.replace(CONFIG, pretext=PretextConfig(name="spark", size=(8, 16, 16)))
    )
    views = sample(pretext, ids=(1, 2))
    network.double().train()
    seen = seen_of(views.extra_inputs[0], pretext.grid)
    given = views.input.double()
    with torch.no_grad(), sparse(network.encoder, seen):
        found = network.encoder(given)
    mask = seen.mask(given)
    x = given[:, :, :, :, :]
    for block in network.encoder.down_tr64.ops:
        x = visit_seen_sites(block.conv1, x, mask)
        inside = x.movedim(1, -1)[mask[:, 0]]
        mean, variance = inside.mean(0), inside.var(0, unbiased=False)
        x = (x - mean.view(1, -1, 1, 1, 1)) / (variance + block.bn1.eps).sqrt().view(1, -1, 1, 1, 1)
        x = (x * block.bn1.weight.view(1, -1, 1, 1, 1) + block.bn1.bias.view(1, -1, 1, 1, 1)).relu() * mask
        x = x.detach()
    assert torch.allclose(found[0], x, atol=1e-10)
    for level in found:
        assert not level[~seen.mask(level).expand_as(level)].any()


@pytest.mark.parametrize(
    ("name", "patch", "size"),
    [
        ("unet3d", (8, 8, 8), (16, 16, 24)),
        ("resnet10", (8, 8, 8), (16, 16, 24)),
        ("resencl", (32, 32, 32), (32, 64, 64)),
    ],
)
def test_hidden_voxels_change_nothing_and_the_hooks_are_gone_afterwards(name, patch, size):
    config = dataclasses.replace(
        CONFIG,
        model=ModelConfig(name, 2),
        pretext=PretextConfig(name="spark", size=size),
        spark=SparkConfig(patch),
    )
    pretext, network = spark(config)
    views = sample(pretext, ids=(3, 4))
    other = torch.where(views.mask, torch.rand_like(views.input), views.input)
    network.eval()
    with torch.no_grad():
        one, two = (network(x, *views.extra_inputs) for x in (views.input, other))
        assert torch.equal(one, two)
        assert not torch.equal(network(views.input), network(other))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.modules())


def test_with_everything_seen_the_encoder_is_the_dense_one():
    _, network = spark()
    network.eval()
    x = torch.rand(2, 1, 16, 16, 24)
    seen = SeenPatches(torch.arange(12).expand(2, -1), torch.ones(2, 2, 2, 3, dtype=torch.bool))
    with torch.no_grad():
        dense = network.encoder(x)
        with sparse(network.encoder, seen):
            found = network.encoder(x)
    for a, b in zip(dense, found, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_loss_is_of_hidden_voxels_and_every_parameter_learns():
    pretext, network = spark()
    views = sample(pretext)
    output = network(views.input, *views.extra_inputs)
    loss, _ = pretext.loss(output, views)
    expected = functional.mse_loss(output.double()[views.mask], views.target.double()[views.mask])
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    still = [name for name, p in network.named_parameters() if p.requires_grad and not p.grad.any()]
    assert not still


def test_channels_last_gives_the_same_and_keeps_the_layout():
    pretext, network = spark()
    views = sample(pretext)
    expected = network(views.input, *views.extra_inputs)
    _, last = spark()
    last.to(memory_format=torch.channels_last_3d)
    kept = []
    last.encoder.down_tr64.register_forward_hook(
        lambda module, given, out: kept.append(out.is_contiguous(memory_format=torch.channels_last_3d))
    )
    found = last(views.input.to(memory_format=torch.channels_last_3d), *views.extra_inputs)
    assert torch.allclose(found, expected, atol=1e-5) and kept == [True]


def test_transformers_and_patches_that_strides_cut_are_refused():
    pretext = build_pretext(CONFIG)
    with pytest.raises(UserError, match=r"pretext\.name=spark: .*--pretext\.name mae"):
        pretext.build(build_encoder("vit3d:depth=1", 2))
    cut = dataclasses.replace(CONFIG, spark=SparkConfig(patch=(4, 8, 8)))
    with pytest.raises(
        UserError, match=r"spark\.patch=\(4, 8, 8\): must be a multiple .* --spark\.patch 8 8 8"
    ):
        build_pretext(cut).build(build_encoder("unet3d", 2))
    with pytest.raises(UserError, match=r"spark\.patch=\(8, 8, 16\): must divide pretext\.size"):
        build_pretext(dataclasses.replace(CONFIG, spark=SparkConfig(patch=(8, 8, 16))))
