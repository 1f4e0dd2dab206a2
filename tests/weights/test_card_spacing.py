"""The spacing in a card is the one that the network sees: measured on ramps, for every pretext and its crop or whole."""

from dataclasses import replace

import pytest
import torch

from p2w.errors import UserError
from p2w.pretext import PRETEXTS, build_pretext, pretext_class
from p2w.recipes import named
from p2w.rng import SampleKeys
from p2w.weights import card

SHAPE, SIZE = (64, 128, 96), (16, 32, 32)
MM = [1.25, 0.7, 0.7]
KINDS = [*PRETEXTS, "models_genesis whole"]


def config_of(kind):
    """A small run of the pretext, without the deformations that would bend a ramp."""
    name, _, cube = kind.partition(" ")
    config = named("demo")
    return replace(
        config,
        pretext=replace(config.pretext, name=name, size=SIZE),
        genesis=replace(config.genesis, cube=cube or "crop", flip=0.0, shuffle=0.0, curve=0.0, paint=0.0),
        rubik=replace(config.rubik, masked=0.0),
    )


def spacing_seen(config, wholes):
    """mm (z, y, x) of the network's voxels, (3, wholes): from how fast a ramp of HU along each axis rises in its input."""
    keys, rows = SampleKeys(0, 0, torch.arange(wholes)), []
    for axis, edge in enumerate(SHAPE):
        ramp = torch.linspace(-1000, 1000, edge).round().short()
        whole = ramp.view([-1 if a == axis else 1 for a in range(3)]).expand(wholes, *SHAPE).contiguous()
        step = build_pretext(config).sample(whole, keys).input.diff(dim=2 + axis).abs().flatten(1)
        rises = torch.where(step > 1e-4, step, float("nan"))  # what is hidden is level
        rows.append(rises.nanmedian(dim=1).values * (edge - 1) * MM[axis])
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_sees_the_spacing_of_the_card(kind):
    config = config_of(kind)
    told = card._spacing(config, {"shape": list(SHAPE), "spacing_mm": [MM, MM, MM]})
    part = build_pretext(config).shows == "part"
    seen = spacing_seen(config, 48 if part else 8)  # parts are of random sizes, all else of one
    volumes = seen.prod(dim=0)
    low, middle, high = (torch.tensor(told[f"network{end}"]) for end in ("_smallest", "", "_largest"))
    assert 0.9 * low.prod() < volumes.min() and volumes.max() < 1.1 * high.prod()
    if not part:
        for mm, stated in zip(seen, middle, strict=True):
            torch.testing.assert_close(mm, stated.expand(len(mm)), rtol=0.02, atol=0)
    else:
        assert volumes.min() < 1.5 * low.prod() and volumes.max() > high.prod() / 1.5


@pytest.mark.parametrize("said", ["patch", "", None])
def test_a_pretext_that_does_not_say_what_it_shows_is_refused(said, monkeypatch):
    monkeypatch.setattr(pretext_class("mae"), "shows", said)
    with pytest.raises(UserError, match=r"pretext mae: shows .* must be one of part, crop, whole"):
        card._spacing(config_of("mae"), {"shape": list(SHAPE), "spacing_mm": [MM, MM, MM]})
