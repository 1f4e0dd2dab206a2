"""Where fine-tuning starts: what is new is the same for every starting point, what is transferred is what was trained."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from target_sets import write_target_set

from p2w.errors import UserError
from p2w.finetune.init import resolve_init
from p2w.finetune.recipe import FineTuneRecipe
from p2w.finetune.run_manifest import plain_fine_tuning
from p2w.finetune.samples import Samples
from p2w.finetune.trials import FineTuning, trial_card
from p2w.model import build_encoder
from p2w.model.decoder import build_decoder
from p2w.tasks.reader import open_target


@pytest.fixture(scope="module")
def balls(tmp_path_factory):
    return open_target(write_target_set(tmp_path_factory.mktemp("balls") / "set"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An encoder and a decoder without skips, with our card."""
    torch.manual_seed(5)
    encoder = build_encoder("unet3d", 2)
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    state |= {f"decoder.{k}": v for k, v in build_decoder(encoder, False).state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "pre.safetensors"
    card = {"encoder": {"name": "unet3d", "width": 2}, "training": {"step": 7, "figures": {"val/loss": 0.5}}}
    pretext = {"name": "parts2whole", "volume_fraction": [0.25, 1.0], "skips": False}
    card["training"] |= {"config": {"pretext": pretext}, "data": {"fingerprint": "f", "shards": "s"}}
    save_file(state, path, {"p2w": json.dumps(card)})
    return path, state


def transfer_of(source, init, folder, **more):
    given = {"network": None, "width": None if init != "random" else 2, "trials": 3, "fraction": 1.0}
    given |= {"pretrained_decoder": False, "fold": None, "recipe": FineTuneRecipe(), "folder": folder} | more
    return FineTuning(source, resolve_init(str(init)), "label", **given)


def states(transfer, index):
    network, _ = transfer.build(index)
    return network.encoder.state_dict(), network.decoder.state_dict()


def same(one, two):
    return one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)


def test_decoders_from_scratch_are_alike_and_seeds_are_not(balls, exported, tmp_path):
    scratch, ours = (transfer_of(balls, init, tmp_path) for init in ("random", exported[0]))
    (encoder, decoder), (trained, beside) = states(scratch, 0), states(ours, 0)
    assert same(decoder, beside) and not same(encoder, trained)
    assert all(
        (trained[k.removeprefix("encoder.")] == v).all()
        for k, v in exported[1].items()
        if k.startswith("enc")
    )
    assert same(states(scratch, 0)[0], encoder) and not same(states(scratch, 1)[1], decoder)
    shifted = replace(scratch, recipe=FineTuneRecipe(seed=1))
    assert same(states(shifted, 0)[1], states(scratch, 1)[1])
    assert decoder["up_tr256.ops.0.conv1.weight"].shape[1] == 16 * 2 + 8 * 2  # joined by a skip


def test_a_pretrained_decoder_keeps_its_skips(balls, exported, tmp_path):
    ours = transfer_of(balls, exported[0], tmp_path, pretrained_decoder=True)
    network, _ = ours.build(0)
    assert network.decoder.skips is False
    assert all((network.state_dict()[k] == v).all() for k, v in exported[1].items())
    with pytest.raises(UserError, match="holds no decoder"):
        transfer_of(balls, "random", tmp_path, pretrained_decoder=True).build(0)


def test_a_decoder_made_of_skips_is_taken_too(balls, tmp_path):
    """Dense V-Net's: there is none without skips that could be tried first."""
    torch.manual_seed(5)
    encoder = build_encoder("dense_vnet", 2)
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    state |= {f"decoder.{k}": v for k, v in build_decoder(encoder, True).state_dict().items()}
    save_file(
        state,
        tmp_path / "pre.safetensors",
        {"p2w": json.dumps({"encoder": {"name": "dense_vnet", "width": 2}})},
    )
    tuning = transfer_of(balls, tmp_path / "pre.safetensors", tmp_path, pretrained_decoder=True)
    network, start = tuning.build(0)
    assert all((network.state_dict()[k] == v).all() for k, v in state.items())
    assert trial_card(tuning, 0, network, start)["skips"] is True


def test_the_card_of_a_trial_names_no_absolute_path(balls, exported, tmp_path):
    tuning = transfer_of(balls, exported[0], tmp_path)
    given = {"pretrained_on": "/home/jane/shards", "images": "*/ct.nii", "spacing": [1.0, 1.0, 1.0]}
    settings, tuning.source.meta["settings"] = tuning.source.meta["settings"], given
    try:
        told = trial_card(tuning, 0, *tuning.build(0))["task"]
    finally:
        tuning.source.meta["settings"] = settings
    assert told["settings"] == given | {"pretrained_on": "shards"} and told["task"] == "toy"


def test_what_is_known_of_the_pretraining(balls, exported, tmp_path):
    told = plain_fine_tuning(transfer_of(balls, exported[0], tmp_path))
    assert told["init"]["step"] == 7 and told["init"]["val_mse"] == 0.5 and told["init"]["skips"] is False
    assert (
        told["init"]["volume_fraction"] == (0.25, 1.0) and told["network"] == "unet3d" and told["width"] == 2
    )
    assert resolve_init("random").plain()["step"] is None
    with pytest.raises(UserError, match="RUN@STEP"):
        resolve_init(f"{tmp_path}@first")


@pytest.mark.parametrize("held", [0, 1e9])
def test_samples_are_the_sets_own_in_unit_range(balls, held):
    rows = balls.rows("train")
    samples = Samples(balls, rows, torch.device("cpu"), held)
    assert (samples.cached is None) == (held == 0) and len(samples) == 24
    places = [[3, 1], np.array([23]), range(4, 6)]
    for some, (x, target) in zip(places, samples.batches(places), strict=True):
        voxels, masks = balls.read(rows[list(some)])
        expected = np.clip((voxels.numpy().astype(float) + 1000) / 2000, 0, 1)
        np.testing.assert_allclose(x.numpy(), expected, atol=1e-6)
        assert (target == masks).all()
    assert list(samples.batches([])) == []


def test_an_up_path_in_a_decoder_with_skips_begins_as_it_was_pretrained(balls, exported, tmp_path):
    """Level by level the same features as those of the decoder without skips; the last convolution is of the task."""
    network, start = transfer_of(balls, exported[0], tmp_path, up_path=True).build(0)
    plain = build_decoder(start.encoder, False)
    plain.load_state_dict({k[8:]: v for k, v in exported[1].items() if k.startswith("decoder.")})
    inner = network.decoder
    assert (
        inner.skips
        and plain_fine_tuning(transfer_of(balls, exported[0], tmp_path, up_path=True))["decoder"] == "up-path"
    )
    network.eval(), plain.eval()
    with torch.no_grad():
        *skips, ours = start.encoder(torch.rand(1, 1, 16, 16, 16))
        theirs = ours
        for level, skip in zip(("up_tr256", "up_tr128", "up_tr64"), reversed(skips), strict=True):
            ours, theirs = getattr(inner, level)(ours, skip), getattr(plain, level)(theirs, None)
            assert torch.allclose(ours, theirs, atol=1e-6)
    first = inner.up_tr64.ops[0].conv1.weight
    assert first.requires_grad and (first[:, plain.up_tr64.ops[0].conv1.in_channels :] == 0).all()


def test_an_up_path_that_is_not_there_is_refused(balls, tmp_path):
    with pytest.raises(UserError, match="holds no decoder"):
        transfer_of(balls, "random", tmp_path, up_path=True).build(0)
