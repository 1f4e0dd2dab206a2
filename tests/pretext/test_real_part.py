"""Sub-scans that were filled up with air: no pretext shows or asks for what is not the scan's own."""

from dataclasses import replace

import pytest
import torch

from p2w import geometry
from p2w.pretext import PRETEXTS, build_pretext
from p2w.recipes import named
from p2w.rng import SampleKeys

SHAPE = (32, 48, 40)
REAL = torch.tensor([[32.0, 48, 40], [15, 48, 40], [20, 33, 40], [9, 17, 11]])


def _pretext(name: str, **changes: object):
    config = named("demo")
    return build_pretext(replace(config, pretext=replace(config.pretext, name=name), **changes))


def _wholes(fill: int) -> torch.Tensor:
    voxels = torch.randint(-1000, 1001, (4, *SHAPE), generator=torch.Generator().manual_seed(0)).short()
    for whole, (z, y, x) in zip(voxels, REAL.int().tolist(), strict=True):
        whole[z:], whole[:, y:], whole[:, :, x:] = fill, fill, fill
    return voxels


def _tensors(views) -> list[torch.Tensor]:
    return [one for one in (views.input, views.target, views.mask, *views.extra_inputs) if one is not None]


@pytest.mark.parametrize("name", PRETEXTS)
def test_what_a_sub_scan_was_filled_up_with_reaches_neither_input_nor_loss(name: str) -> None:
    pretext, keys = _pretext(name), SampleKeys(0, 3, torch.arange(4), REAL)
    with_air, with_metal = (pretext.sample(_wholes(fill), keys, 2000) for fill in (-1000, 1000))
    for one, other in zip(_tensors(with_air), _tensors(with_metal), strict=True):
        assert torch.equal(one, other)
    ignored = pretext.sample(_wholes(1000), SampleKeys(0, 3, torch.arange(4)), 2000)
    assert not torch.equal(ignored.input, with_air.input)  # the test can fail


@pytest.mark.parametrize("name", PRETEXTS)
def test_full_sub_scans_of_a_set_with_short_ones_are_as_ever(name: str) -> None:
    pretext, ids = _pretext(name), torch.arange(4)
    full = torch.tensor(SHAPE).float().repeat(4, 1)
    voxels = torch.randint(-1000, 1001, (4, *SHAPE), generator=torch.Generator().manual_seed(1)).short()
    plain = pretext.sample(voxels, SampleKeys(5, 1, ids), 10)
    said = pretext.sample(voxels, SampleKeys(5, 1, ids, full), 10)
    for one, other in zip(_tensors(plain), _tensors(said), strict=True):
        assert torch.equal(one, other)


def test_a_whole_cube_and_the_location_of_a_part_are_those_of_the_real_part() -> None:
    settings = named("demo")
    genesis = replace(settings.genesis, cube="whole")
    position = replace(settings.position, weight=0.1)
    for name, groups in (("models_genesis", {"genesis": genesis}), ("parts2whole", {"position": position})):
        pretext, keys = _pretext(name, **groups), SampleKeys(0, 3, torch.arange(4), REAL)
        with_air, with_metal = (pretext.sample(_wholes(fill), keys) for fill in (-1000, 1000))
        for one, other in zip(_tensors(with_air), _tensors(with_metal), strict=True):
            assert torch.equal(one, other)
    # A part lies in the real part as the same part lies in a full whole.
    full = _pretext("parts2whole", position=position).sample(_wholes(0), SampleKeys(0, 3, torch.arange(4)))
    torch.testing.assert_close(with_air.extra_inputs[0], full.extra_inputs[0], atol=1e-5, rtol=1e-5)


def test_boxes_lie_in_the_real_part_and_have_the_wanted_volume() -> None:
    ids = torch.arange(2000)
    real = REAL.repeat(500, 1)
    boxes = geometry.sample_boxes(SampleKeys(1, 0, ids, real), 0, SHAPE, (0.1, 0.2))
    assert (boxes[:, :3] >= 0).all() and (boxes[:, 3:] <= real).all()
    share = (boxes[:, 3:] - boxes[:, :3]).double().prod(1) / real.double().prod(1)
    assert share.min() > 0.0999 and share.max() < 0.2001
    assert (boxes[1::4, 3] > 14).any() and (boxes[:, :3] < 0.5).any()  # all of the real part is reached
    whole = geometry.sample_boxes(SampleKeys(1, 0, ids, real), 0, SHAPE, (1, 1))
    assert torch.equal(whole, geometry.whole_boxes(torch.empty(2000, *SHAPE, device="meta"), real))
