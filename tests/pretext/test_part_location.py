"""Where a part lies: known boxes have known places, and the loss is the weighted miss."""

import dataclasses

import numpy as np
import pytest
import torch

from p2w import geometry
from p2w.config import Config, PretextConfig
from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.pretext import build_pretext
from p2w.pretext.parts2whole import PositionConfig, part_locations
from p2w.rng import SampleKeys

CONFIG = Config(pretext=PretextConfig(size=(8, 16, 16)), position=PositionConfig(weight=0.5))


def test_places_of_known_boxes():
    whole, corner = [0.0, 0, 0, 16, 32, 64], [0.0, 16, 48, 8, 32, 64]
    found = part_locations(torch.tensor([whole, corner]), (16, 32, 64)).numpy()
    np.testing.assert_allclose(found[0], 0, atol=1e-7)
    np.testing.assert_allclose(found[1], [-0.5, 0.5, 0.75, *np.log([1 / 2, 1 / 2, 1 / 4])], atol=1e-6)


def test_loss_is_mse_plus_the_weighted_miss_and_the_input_alone_gives_the_volume():
    keys, wholes = (
        SampleKeys(0, 0, torch.tensor([7, 8])),
        torch.randint(-1000, 1001, (2, 16, 16, 16), dtype=torch.int16),
    )
    pretext = build_pretext(CONFIG)
    views = pretext.sample(wholes, keys)
    network = pretext.build(build_encoder("unet3d", 2))
    volume, misses = network(views.input, *views.extra_inputs)
    assert torch.equal(network(views.input), volume)
    boxes = geometry.sample_boxes(keys, 0, (16, 16, 16)).double().numpy()
    centre, edge = (boxes[:, :3] + boxes[:, 3:]) / 16 - 1, np.log((boxes[:, 3:] - boxes[:, :3]) / 16)
    guess = network.place(network.encoder.pooled(views.input)).detach().double().numpy()
    miss = guess - np.concatenate((centre, edge), 1)
    np.testing.assert_allclose(misses.detach().numpy(), miss, atol=1e-5)
    mse = np.mean((volume.detach().double().numpy() - views.target.double().numpy()) ** 2)
    loss, extras = pretext.loss((volume, misses), views)
    assert float(loss.detach()) == pytest.approx(mse + 0.5 * np.mean(miss**2), rel=1e-5)
    assert float(extras["location"]) == pytest.approx(np.mean(miss**2), rel=1e-5)
    loss.backward()
    assert all((weight.grad is not None) is weight.requires_grad for weight in network.parameters())
    validated = network.eval()(views.input, *views.extra_inputs)
    assert isinstance(validated, torch.Tensor) and not pretext.loss(validated, views)[1]


def test_without_weight_nothing_is_added_and_an_autoencoder_has_no_place_to_ask_for():
    plain = build_pretext(dataclasses.replace(CONFIG, position=PositionConfig()))
    assert not plain.sample(
        torch.zeros(1, 16, 16, 16, dtype=torch.int16), SampleKeys(0, 0, torch.tensor([1]))
    ).extra_inputs
    assert not hasattr(plain.build(build_encoder("unet3d", 2)), "place")
    other = dataclasses.replace(CONFIG, pretext=PretextConfig(name="autoencoder"))
    with pytest.raises(UserError, match=r"position\.weight=0\.5: pretext\.name=autoencoder shows no part"):
        build_pretext(other)
