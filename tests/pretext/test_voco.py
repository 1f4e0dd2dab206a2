"""VoCo: crops lie where the keys say, labels are their overlaps, and the loss is that of its definition."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from p2w import geometry
from p2w.config import Config, ModelConfig, PretextConfig
from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.pretext import build_pretext
from p2w.pretext.voco import VocoConfig, overlaps
from p2w.rng import SampleKeys, uniforms

CONFIG = Config(
    pretext=PretextConfig(name="voco", size=(8, 32, 16)), model=ModelConfig("unet3d", 2),
    voco=VocoConfig(grid=(1, 4, 2), crops=3),
)  # fmt: skip
WHOLES = torch.randint(
    -1000, 1001, (6, 16, 64, 32), dtype=torch.int16, generator=torch.Generator().manual_seed(0)
)


def sample(ids=(3, 4, 5), config=CONFIG, real=None):
    return build_pretext(config).sample(WHOLES[list(ids)], SampleKeys(0, 1, torch.tensor(ids), real))


def share(low, high, cell_low, cell_high):
    """Share of one box, by hand: the product of its overlaps along z, y, x."""
    parts = [
        max(0.0, min(b, d) - max(a, c)) / (b - a)
        for a, b, c, d in zip(low, high, cell_low, cell_high, strict=True)
    ]
    return math.prod(parts)


def test_shares_are_those_of_boxes_cut_by_hand():
    grid = (2, 4, 3)
    corner = torch.rand(5, 7, 3, generator=torch.Generator().manual_seed(1)) * (torch.tensor(grid) - 1)
    found = overlaps(corner, grid)
    cells = list(itertools.product(*map(range, grid)))
    expected = [
        [[share(c, [v + 1 for v in c], cell, [v + 1 for v in cell]) for cell in cells] for c in row]
        for row in corner.double().tolist()
    ]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert torch.allclose(found.sum(2), torch.ones(5, 7), atol=1e-5)


def test_crops_lie_where_their_keys_say_and_bases_tile_the_whole():
    views = sample()
    others, bases = views.extra_inputs
    assert (
        views.input.shape == (3, 1, 8, 8, 8)
        and others.shape == (3, 2, 8, 8, 8)
        and bases.shape == (3, 8, 8, 8, 8)
    )
    wholes = WHOLES[[3, 4, 5]]
    whole = geometry.crop_resize(wholes, geometry.whole_boxes(wholes), (8, 32, 16))
    assert torch.equal(bases[:, 5], whole[:, 0, :, 16:24, 8:])
    u = uniforms(SampleKeys(0, 1, torch.tensor([3, 4, 5])), 0, 9).view(3, 3, 3).float()
    low = u * torch.tensor([0.0, 3.0, 1.0]) * 16
    boxes = torch.cat((low, low + 16), 2)
    for number, crop in enumerate((views.input[:, 0], others[:, 0], others[:, 1])):
        expected = geometry.crop_resize(wholes, boxes[:, number].contiguous(), (8, 8, 8))[:, 0]
        assert torch.allclose(crop, expected, atol=1e-5)
    assert torch.allclose(views.target, overlaps(low / 16, (1, 4, 2)), atol=1e-6)
    assert torch.equal(sample(ids=(5, 3)).extra_inputs[0], others[[2, 0]])


def test_crops_of_a_padded_whole_stay_in_its_real_part():
    real = torch.tensor([[8.0, 64.0, 32.0]] * 3)
    padded = WHOLES.clone()
    padded[:, 8:] = -1000
    config = build_pretext(CONFIG)
    keys = SampleKeys(0, 1, torch.tensor((3, 4, 5)), real)
    other = padded.clone()
    other[:, 8:] = 777
    one, two = (config.sample(batch[[3, 4, 5]], keys) for batch in (padded, other))
    for a, b in zip((one.input, *one.extra_inputs), (two.input, *two.extra_inputs), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_loss_is_that_of_its_definition_and_a_mean_over_wholes():
    pretext, views = build_pretext(CONFIG), sample()
    generator = torch.Generator().manual_seed(2)
    output = (torch.rand(3, 3, 8, generator=generator), 2 * torch.rand(3, 28, generator=generator) - 1)
    place = [
        -math.log(1 - abs(float(views.target[b, k, n]) - float(output[0][b, k, n])))
        for b, k, n in itertools.product(range(3), range(3), range(8))
    ]
    loss, terms = pretext.loss(output, views)
    assert float(terms["place"]) == pytest.approx(np.mean(place), rel=1e-4)
    assert float(loss) == pytest.approx(np.mean(place) + float(output[1].double().abs().mean()), rel=1e-4)
    ones = [
        float(pretext.loss(tuple(t[i : i + 1] for t in output), views.rows(slice(i, i + 1)))[0])
        for i in range(3)
    ]
    assert float(loss) == pytest.approx(np.mean(ones), rel=1e-5)
    alike = (torch.ones(3, 3, 8, requires_grad=True), torch.ones(3, 28))
    pretext.loss(alike, views)[0].backward()
    assert (
        torch.isfinite(alike[0].grad).all() and alike[0].grad.any()
    )  # where all crops look alike, it still learns


def test_cosines_are_those_of_crops_embedded_one_by_one():
    torch.manual_seed(0)
    network = build_pretext(CONFIG).build(build_encoder("unet3d", 2)).eval()
    views = sample()
    crops = torch.cat((views.input, *views.extra_inputs), 1)
    with torch.no_grad():
        network.head[0].weight.mul_(100)
        cosine, between = network(views.input, *views.extra_inputs)
        for row in range(3):
            z = torch.cat([network(crop[None, None]) for crop in crops[row]]).double()
            assert torch.allclose(cosine[row].double(), (z[:3] @ z[3:].T).clamp(min=0), atol=1e-5)
            pairs = [float(z[3 + i] @ z[3 + j]) for i in range(8) for j in range(i + 1, 8)]
            np.testing.assert_allclose(between[row].numpy(), pairs, atol=1e-5)


def test_no_gradient_of_the_place_flows_through_base_crops():
    config = dataclasses.replace(CONFIG, voco=dataclasses.replace(CONFIG.voco, spread=0.0))
    pretext = build_pretext(config)
    network = pretext.build(build_encoder("unet3d", 2)).eval()
    views = sample(config=config)
    crop, (others, bases) = views.input, views.extra_inputs
    crop.requires_grad_()
    bases.requires_grad_()
    pretext.loss(network(crop, others, bases), views)[0].backward()
    assert crop.grad.any() and (bases.grad is None or not bases.grad.any())


def test_grids_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"voco\.grid=\(1, 5, 2\): must divide pretext\.size"):
        build_pretext(dataclasses.replace(CONFIG, voco=VocoConfig(grid=(1, 5, 2))))
    with pytest.raises(UserError, match=r"voco\.grid=\(1, 1, 1\): a single base crop"):
        build_pretext(dataclasses.replace(CONFIG, voco=VocoConfig(grid=(1, 1, 1))))
    with pytest.raises(UserError, match=r"crops of \(8, 4, 8\) voxels, .*--pretext\.size 16 128 32"):
        build_pretext(dataclasses.replace(CONFIG, voco=VocoConfig(grid=(1, 8, 2)))).build(
            build_encoder("unet3d", 2)
        )
