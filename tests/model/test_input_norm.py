"""What each network is fed, from the same batch in [0, 1], and how its weights lie in memory."""

import numpy as np
import pytest
import torch

from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.model.decoder import EncoderDecoder, build_decoder
from p2w.model.encoder import normalise_input, set_memory_format
from p2w.train.isolated_layer import in_channels_last


@pytest.mark.parametrize("setting", ["auto", "on", "off"])
@pytest.mark.parametrize("faster", [True, False])
def test_the_memory_format_is_the_encoders_unless_it_is_asked_for(setting, faster):
    encoder = build_encoder("unet3d", 2)
    encoder.channels_last = faster
    network = EncoderDecoder(encoder, build_decoder(encoder, False))
    last = faster if setting == "auto" else setting == "on"
    layout, _, reason = set_memory_format(network, setting).partition(" (")
    assert layout == f"channels {'last' if last else 'first'}"
    assert reason == ("auto: faster for UNet3dEncoder)" if setting == "auto" else "asked for)")
    assert in_channels_last(network) == last


def batch():
    x = torch.rand(3, 2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    x[0, 0, :2] = 0
    x[1, 1] = 0  # nothing at all
    x[2, 0] = 0.25  # no spread
    return x


def test_ranges():
    x, before = batch(), batch()
    assert torch.equal(normalise_input(x, "unit", 2), x)
    assert torch.equal(normalise_input(x, "symmetric", 2), 2 * x - 1)
    assert torch.equal(normalise_input(x, "hu", 2), 2000 * x - 1000)
    assert torch.equal(x, before)
    assert normalise_input(x.half(), "hu", 2).dtype == torch.float32


def test_positive_z_against_numpy():
    """Mean and deviation over voxels > 0 of each sample and channel (MedicalNet); zeros are shifted with the rest."""
    x = batch()
    y = normalise_input(x, "positive-z", 2).numpy()
    for b, c in np.ndindex(3, 2):
        one = x[b, c].double().numpy()
        inside = one[one > 0]
        expected = (one - inside.mean()) / inside.std() if inside.size and inside.std() > 1e-6 else 0 * one
        np.testing.assert_allclose(y[b, c], expected, atol=1e-4)


def test_one_grey_channel_is_repeated_and_other_numbers_are_refused():
    grey = batch()[:, :1]
    three = normalise_input(grey, "symmetric", 3)
    assert three.shape == (3, 3, 4, 5, 6) and torch.equal(three[:, 0], three[:, 2])
    with pytest.raises(UserError, match="2 channels for a network of 3"):
        normalise_input(batch(), "unit", 3)


def test_each_network_says_what_it_wants():
    names = ("unet3d", "resnet10", "i3d", "dense_vnet")
    assert [build_encoder(name, 2).input_norm for name in names] == ["unit", "positive-z", "symmetric", "hu"]
