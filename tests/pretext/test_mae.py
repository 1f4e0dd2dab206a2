"""Masked volumes: exactly the asked share of whole patches is hidden, and only they count."""

import dataclasses

import numpy as np
import pytest
import torch

from p2w.config import Config, PretextConfig, check_config
from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.pretext import build_pretext
from p2w.pretext.mae import MaeConfig
from p2w.rng import SampleKeys

CONFIG = Config(pretext=PretextConfig(name="mae", size=(8, 16, 16)), mae=MaeConfig(patch=(2, 4, 8)))


def sample(config=CONFIG, ids=(3, 4, 5)):
    wholes = torch.randint(
        -1000, 1001, (6, 16, 16, 32), dtype=torch.int16, generator=torch.Generator().manual_seed(0)
    )
    return build_pretext(config).sample(wholes[list(ids)], SampleKeys(0, 1, torch.tensor(ids)))


def test_three_quarters_of_the_patches_are_hidden_each_as_a_whole():
    views = sample()
    patches = views.mask.view(3, 4, 2, 4, 4, 2, 8).permute(0, 1, 3, 5, 2, 4, 6).reshape(3, 32, 64)
    assert torch.equal(patches.all(2), patches.any(2)) and (patches.all(2).sum(1) == 24).all()
    assert len(torch.unique(patches[:, :, 0], dim=0)) == 3


@pytest.mark.parametrize("fill", ["mean", "zero"])
def test_hidden_voxels_say_nothing_and_seen_ones_are_the_whole(fill):
    views = sample(dataclasses.replace(CONFIG, mae=MaeConfig(patch=(2, 4, 8), fill=fill)))
    for seen, whole, mask in zip(views.input, views.target, views.mask, strict=True):
        assert torch.equal(seen[~mask], whole[~mask])
        expected = float(whole[~mask].double().mean()) if fill == "mean" else 0.0
        np.testing.assert_allclose(seen[mask].numpy(), expected, atol=1e-6)


def test_every_patch_is_hidden_as_often_as_any():
    masks = build_pretext(CONFIG).mask(SampleKeys(0, 0, torch.arange(2000)))[:, 0, ::2, ::4, ::8].float()
    assert (masks.mean(0) - 0.75).abs().max() < 0.05


def test_loss_is_of_hidden_voxels_alone_and_a_mean_over_wholes():
    views, pretext = sample(), build_pretext(CONFIG)
    output = torch.rand_like(views.target)
    error, mask = (output.double() - views.target.double()).numpy() ** 2, views.mask.numpy()
    loss = float(pretext.loss(output, views)[0])
    assert loss == pytest.approx(error[mask].mean(), rel=1e-6)
    ones = [float(pretext.loss(output[i : i + 1], views.rows(slice(i, i + 1)))[0]) for i in range(3)]
    assert loss == pytest.approx(np.mean(ones), rel=1e-6)
    assert float(pretext.loss(torch.where(views.mask, views.target, 1 - views.target), views)[0]) == 0


def test_views_depend_on_the_key_alone_and_the_network_answers_with_a_volume():
    together = sample(ids=(3, 4, 5))
    assert torch.equal(sample(ids=(5, 3)).input, together.input[[2, 0]])
    network = build_pretext(CONFIG).build(build_encoder("unet3d", 2))
    assert network(together.input).shape == together.target.shape


def test_patches_and_ratios_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"mae\.patch=\(3, 8, 8\): must divide pretext\.size"):
        build_pretext(dataclasses.replace(CONFIG, mae=MaeConfig(patch=(3, 8, 8))))
    with pytest.raises(UserError, match=r"mae\.patch=\(0, 8, 8\): needs three numbers of at least 1"):
        check_config(dataclasses.replace(CONFIG, mae=MaeConfig(patch=(0, 8, 8))))
    with pytest.raises(UserError, match=r"mae\.ratio=1\.0: hides 32 of 32 patches"):
        build_pretext(dataclasses.replace(CONFIG, mae=MaeConfig(patch=(2, 4, 8), ratio=1.0)))
