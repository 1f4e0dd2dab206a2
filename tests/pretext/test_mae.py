"""Masked volumes: exactly the asked share of whole patches is hidden, and only they count; MAE computes the others alone."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from p2w.config import Config, ModelConfig, PretextConfig, check_config, config_to_json, read_config
from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.pretext import build_pretext
from p2w.pretext.mae import MaeConfig
from p2w.rng import SampleKeys

CONFIG = Config(pretext=PretextConfig(name="simmim", size=(8, 16, 16)), mae=MaeConfig(patch=(2, 4, 8)))


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


def mae(size=(16, 16, 24), **settings):
    config = Config(
        pretext=PretextConfig(name="mae", size=size), model=ModelConfig("vit3d:depth=2", 2),
        mae=MaeConfig(decoder_width=12, decoder_depth=1, **settings),
    )  # fmt: skip
    torch.manual_seed(0)
    pretext = build_pretext(config)
    return config, pretext, pretext.build(build_encoder(config.model.name, config.model.width)).eval()


def test_the_transformer_computes_the_seen_tokens_alone():
    """12 tokens, 9 hidden: attention sees 3; what it gives does not depend on the order or on voxels that are hidden."""
    _, pretext, network = mae()
    wholes = torch.randint(-1000, 1001, (2, 16, 32, 32), dtype=torch.int16)
    views = pretext.sample(wholes, SampleKeys(0, 0, torch.arange(2)))
    hidden = views.extra_inputs[0]
    assert hidden.shape == (2, 12) and (hidden.sum(1) == 9).all()
    cells = views.mask.unfold(2, 8, 8).unfold(3, 8, 8).unfold(4, 8, 8).flatten(5).flatten(1, 4)
    assert torch.equal(cells.all(2), hidden) and torch.equal(cells.any(2), hidden)
    counted = []
    for block in network.encoder.blocks:
        block.register_forward_hook(lambda module, given, out: counted.append(given[0].shape[1]))
    output = network(views.input, *views.extra_inputs)
    assert counted == [3, 3] and output.shape == views.target.shape
    assert network(views.input).shape == views.target.shape and counted[2:] == [12, 12]
    loss, _ = pretext.loss(output, views)
    expected = ((output.double() - views.target.double()) ** 2)[views.mask].mean()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_dropping_tokens_is_attention_that_is_masked():
    """The kept tokens come out as if all were computed and the hidden ones could not be attended to."""
    _, _, network = mae()
    encoder, x = network.encoder, torch.rand(2, 1, 16, 16, 24)
    kept = torch.tensor([[1, 4, 7], [0, 2, 11]])
    with torch.no_grad():
        found = encoder.visible_tokens(x, kept)
        _, tokens, _ = encoder._embed(x)
        for row in range(2):
            one = tokens[row, kept[row]].double()
            for block in encoder.blocks.double():
                seen = block.norm1(one)
                q, k, v = block.attention.qkv(seen).view(3, 3, 6, -1).permute(1, 2, 0, 3)
                mixed = (q @ k.transpose(1, 2) / q.shape[2] ** 0.5).softmax(2) @ v
                one = one + block.attention.out(mixed.transpose(0, 1).flatten(1))
                one = one + block.narrow(torch.nn.functional.gelu(block.wide(block.norm2(one))))
            expected = encoder.norm.double()(one)
            assert torch.allclose(found[row].double(), expected, atol=1e-5)
        encoder.float()
        every = torch.arange(12).expand(2, -1)
        assert torch.equal(encoder.visible_tokens(x, every), encoder(x)[-1].flatten(2).transpose(1, 2))


def test_each_patch_of_the_output_is_where_its_token_is():
    *_, network = mae()
    with torch.no_grad():
        network.to_voxels.weight.zero_()
        network.to_voxels.bias.copy_(torch.arange(512) / 100)
        found = network(torch.rand(1, 1, 16, 16, 24))
    patch = torch.sigmoid(torch.arange(512) / 100).view(8, 8, 8)
    assert torch.allclose(found[0, 0], patch.repeat(2, 2, 3))


def test_mae_takes_a_transformer_and_simmim_any_encoder():
    _, pretext, _ = mae()
    with pytest.raises(
        UserError, match=r"pretext\.name=mae: .*--model\.name vit3d or primus, or --pretext\.name simmim"
    ):
        pretext.build(build_encoder("unet3d", 2))
    with pytest.raises(UserError, match=r"mae\.decoder_width=16: must be a multiple of 6"):
        build_pretext(dataclasses.replace(mae()[0], mae=MaeConfig(decoder_width=16))).build(
            build_encoder("vit3d:depth=1", 2)
        )


def test_a_run_of_what_was_called_mae_is_one_of_simmim(tmp_path):
    path, tree = tmp_path / "config.json", json.loads(config_to_json(mae()[0]))
    path.write_text(json.dumps(tree))
    assert read_config(path) == mae()[0]
    for setting in ("decoder_depth", "decoder_width"):
        del tree["mae"][setting]
    path.write_text(json.dumps(tree))
    assert read_config(path).pretext.name == "simmim"
    path.write_text(json.dumps({"pretext": {"name": "mae"}}))
    assert read_config(path).pretext.name == "mae"
