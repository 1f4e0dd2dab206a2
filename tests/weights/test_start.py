"""Every starting point in the form its authors publish it: read back exactly, adapted, reported, or refused in one line."""

import json
import os
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from formula_weights import formula_volume, formula_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import p2w
from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.model.decoder import build_decoder
from p2w.model.encoder import normalise_input
from p2w.weights import export, start
from p2w.weights.start import examine_weights, load_decoder, load_start


def randomised(module):
    """Norms too get values that are not 0 or 1, so that a mix-up shows."""
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5) if value.ndim == 1 else value.normal_(0, 0.1)
    return module


def trained(name, width=2, in_channels=1):
    torch.manual_seed(7)
    return randomised(build_encoder(name, width, in_channels))


def old(state):
    """As torch 0.3 saved: no counters of batches."""
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def medicalnet(path, name="resnet10", **more):
    encoder = trained(name)
    state = OrderedDict((f"module.{k}", v) for k, v in encoder.state_dict().items())
    state["module.conv_seg.0.weight"] = torch.zeros(4)
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"state": {}}, **more}, path)
    return encoder


def genesis(path):
    """Models Genesis' kernels are x, y, z: the file holds ours turned."""
    encoder = trained("unet3d")
    decoder = randomised(build_decoder(encoder, skips=True))
    state = {**encoder.state_dict(), **decoder.state_dict()}
    turned = {f"module.{k}": v.permute(0, 1, 4, 3, 2) if v.ndim == 5 else v for k, v in state.items()}
    torch.save({"epoch": 9, "state_dict": turned}, path)
    return encoder, decoder


def same(encoder, other):
    mine, theirs = encoder.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[k], theirs[k]) for k in mine if not k.endswith("num_batches_tracked")
    )


def test_random_is_drawn_from_torchs_generator():
    torch.manual_seed(3)
    start = load_start("random", "resnet10", 2, in_channels=4)
    torch.manual_seed(3)
    assert same(start.encoder, build_encoder("resnet10", 2, 4)) and start.decoder_state is None
    assert start.source == "random" and start.pretrained_on == {}
    assert load_start("random", width=2).network == "unet3d"


@pytest.mark.parametrize("name", ["resnet10", "resnet18", "resnet34", "resnet50"])
def test_medicalnet_tells_its_depth(tmp_path, name):
    encoder = medicalnet(tmp_path / "r.pth", name)
    start = load_start(str(tmp_path / "r.pth"))
    assert same(start.encoder, encoder) and (start.network, start.width) == (name, 2)
    assert start.report.head == ("conv_seg.0.weight",) and "MedicalNet" in start.report.table()
    assert start.encoder.training and not start.report.missing


@pytest.mark.parametrize("zipped", [True, False])
def test_i3d_of_three_channels_sees_one_as_it_saw_grey(tmp_path, zipped):
    """An old file, without counters, with a classifier; three input channels summed do what grey repeated did."""
    encoder = trained("i3d", in_channels=3).eval()
    state = {
        **old(encoder.state_dict()),
        "logits.conv3d.weight": torch.zeros(9),
        "logits.conv3d.bias": torch.zeros(9),
    }
    torch.save(OrderedDict(state), tmp_path / "i.pt", _use_new_zipfile_serialization=zipped)
    start = load_start(str(tmp_path / "i.pt"), "i3d")
    assert start.report.adapted == ("Conv3d_1a_7x7.conv3d.weight",) and len(start.report.head) == 2
    x = torch.rand(1, 1, 8, 32, 32)
    grey = start.encoder.eval()(normalise_input(x, "symmetric", 1))
    repeated = encoder(normalise_input(x, "symmetric", 3))
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(grey, repeated, strict=True))
    assert same(load_start(str(tmp_path / "i.pt"), in_channels=3).encoder, encoder)


@pytest.mark.parametrize("name", ["unet3d", "resnet10", "i3d"])
def test_one_channel_becomes_four_that_agree(tmp_path, name):
    encoder = trained(name).eval()
    state = encoder.state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    start = examine_weights(str(tmp_path / "w.safetensors"), in_channels=4)
    assert start.report.whole and set(start.report.adapted) == set(encoder.input_convs)
    if name == "unet3d":  # a file under Models Genesis' names counts as theirs, whose kernels are turned
        return
    x = torch.rand(1, 1, 16, 32, 32)
    four = start.encoder.eval()(x.expand(-1, 4, -1, -1, -1))
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(four, encoder(x), strict=True))


def test_models_genesis_is_turned_to_zyx_with_its_decoder(tmp_path):
    encoder, decoder = genesis(tmp_path / "g.pt")
    start = load_start(str(tmp_path / "g.pt"), in_channels=1)
    assert same(start.encoder, encoder) and "LUNA16" in start.pretrained_on["what"]
    mine = build_decoder(start.encoder, skips=True)
    load_decoder(mine, start)
    assert same(mine, decoder)
    other_classes = build_decoder(start.encoder, skips=True, out_channels=3)
    load_decoder(other_classes, start)
    assert torch.equal(other_classes.up_tr64.ops[1].bn1.weight, decoder.up_tr64.ops[1].bn1.weight)
    with pytest.raises(UserError, match="without the skips"):
        load_decoder(build_decoder(start.encoder, skips=False), start)


RECORDED = Path(__file__).parent / "recorded" / "models_genesis.npz"


@pytest.fixture(scope="module")
def whole_unet():
    """Encoder and decoder of the class's size, with the weights of tests/formula_weights.py turned to z, y, x."""
    with np.load(RECORDED) as recorded:
        names = json.loads(str(recorded["names"]))
    theirs = {name: torch.from_numpy(v) for name, v in formula_weights(names).items() if v.ndim}
    counters = {name: torch.tensor(0) for name, shape in names.items() if not shape}
    encoder = build_encoder("unet3d", 32)
    decoder = build_decoder(encoder, skips=True)
    for module in (encoder, decoder):
        turned = {k: v.permute(0, 1, 4, 3, 2) if v.ndim == 5 else v for k, v in (theirs | counters).items()}
        module.load_state_dict({k: turned[k] for k in module.state_dict()})
    return encoder, decoder, names, theirs


@pytest.mark.slow
def test_models_genesis_own_class_takes_the_export_and_computes_the_same(whole_unet, tmp_path, capsys):
    """Names, shapes and an output recorded from its class by reference/models_genesis.py; a round trip has the same bits."""
    encoder, decoder, names, theirs = whole_unet
    state = {
        f"{part}.{name}": value
        for part, module in (("encoder", encoder), ("decoder", decoder))
        for name, value in module.state_dict().items()
    }
    export._models_genesis(tmp_path / "g.pt", state, {"encoder": {"name": "unet3d"}})
    assert capsys.readouterr().out == ""
    held = torch.load(tmp_path / "g.pt", weights_only=True)["state_dict"]
    held = {name.removeprefix("module."): value for name, value in held.items()}
    assert {name: list(value.shape) for name, value in held.items()} == names  # what its strict load compares
    assert all(torch.equal(held[name], value) for name, value in theirs.items())
    back = load_start(str(tmp_path / "g.pt"))
    assert same(back.encoder, encoder)
    mine = build_decoder(back.encoder, skips=True)
    load_decoder(mine, back)
    assert same(mine, decoder)
    with np.load(RECORDED) as recorded, torch.no_grad():
        expected = torch.from_numpy(recorded["output"])
        volume = torch.from_numpy(formula_volume(tuple(expected.shape))).permute(0, 1, 4, 3, 2)
        output = torch.sigmoid(mine(back.encoder(volume))).permute(0, 1, 4, 3, 2)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)
    assert start.main_inspect([str(tmp_path / "g.pt")]) == 0
    assert "\nwhole: --init takes it" in capsys.readouterr().out


def test_what_models_genesis_own_class_cannot_load_is_told(whole_unet, trained_run, tmp_path, capsys):
    encoder = whole_unet[0]
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    without = {f"decoder.{n}": v for n, v in build_decoder(encoder, skips=False).state_dict().items()}
    card = {"encoder": {"name": "unet3d"}}
    for given, told in (
        (state, "encoder alone; pass --what all"),
        (state | without, "has skips, and this one has none"),
    ):
        export._models_genesis(tmp_path / "g.pt", given, card)
        assert f"UNet3D, cannot load this file: {told}" in capsys.readouterr().out.replace(
            "this is the ", ""
        ).replace("its decoder ", "")
    out = str(tmp_path / "narrow.pt")
    export.main([str(trained_run), "--to", "models-genesis", "--what", "all", "--out", out])
    assert "cannot load this file: its first convolution has 32 kernels" in capsys.readouterr().out


@pytest.mark.slow
def test_inspect_says_whole_of_wholes_alone(whole_unet, tmp_path, capsys):
    encoder, decoder, _, _ = whole_unet
    for parts, dropped, told in (
        ((encoder, decoder), "", "\nwhole: "),
        ((encoder,), "", "\nencoder whole: "),
        ((encoder, decoder), "up_tr128.ops.0.conv1.weight", "\nencoder whole: "),
        ((encoder, decoder), "down_tr128.ops.0.conv1.weight", "\nnot whole: "),
    ):
        state = {
            name: value for part in parts for name, value in part.state_dict().items() if name != dropped
        }
        torch.save({"state_dict": state}, tmp_path / "g.pt")
        start.main_inspect([str(tmp_path / "g.pt")])
        assert told in capsys.readouterr().out, dropped


def test_a_models_genesis_file_of_an_early_version_is_not_turned(tmp_path):
    """Early exports hold our kernels as they are, and say nothing of axes."""
    encoder = trained("unet3d")
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in encoder.state_dict().items()}, "p2w": "{}"},
        tmp_path / "g.pt",
    )
    assert same(load_start(str(tmp_path / "g.pt")).encoder, encoder)


def test_ours_in_every_form(trained_run, tmp_path):
    """A run, a checkpoint and all exports give the same encoder."""
    exported = {}
    for to in ("safetensors", "models-genesis", "hub-folder"):
        exported[to] = tmp_path / to
        export.main([str(trained_run), "--to", to, "--what", "all", "--out", str(exported[to])])
    state = load_file(trained_run / "checkpoints" / "step-00000010" / "model.safetensors")
    for path in (trained_run, trained_run / "checkpoints" / "step-00000010", *exported.values()):
        start = load_start(str(path), width=2)
        mine = start.encoder.state_dict()
        assert all(torch.equal(mine[k], state[f"encoder.{k}"]) for k in mine), path
        decoder = build_decoder(start.encoder, skips=False)
        load_decoder(decoder, start)
        assert torch.equal(decoder.out_tr.final_conv.weight, state["decoder.out_tr.final_conv.weight"])
        assert start.pretrained_on == {"fingerprint": "0123456789abcdef", "shards": "shards"}
    assert load_start(str(trained_run), in_channels=3).report.adapted == ("down_tr64.ops.0.conv1.weight",)
    export.main([str(trained_run), "--to", "safetensors", "--out", str(tmp_path / "e.safetensors")])
    alone = load_start(str(tmp_path / "e.safetensors"))
    with pytest.raises(UserError, match="holds no decoder"):
        load_decoder(build_decoder(alone.encoder, skips=False), alone)


def damaged(path, change):
    """A MedicalNet file whose state dict `change` has altered."""
    encoder = trained("resnet10")
    state = {f"module.{k}": v for k, v in encoder.state_dict().items()}
    change(state)
    torch.save({"state_dict": state}, path)


def test_a_part_of_a_network_is_refused_and_reported(tmp_path, capsys):
    path = tmp_path / "r.pth"
    for change, told in (
        (lambda s: s.pop("module.layer3.0.conv1.weight"), "1 are missing"),
        (lambda s: s.update({"module.layer3.0.bn1.weight": torch.zeros(3)}), "1 have another shape"),
        (
            lambda s: s.update({"module.attention.weight": torch.zeros(3)}),
            "1 unknown ones, first attention.weight",
        ),
        (lambda s: s.update({"module.conv1.weight": torch.zeros(4, 1, 5, 5, 5)}), "1 have another shape"),
    ):
        damaged(path, change)
        with pytest.raises(UserError, match=told) as refused:
            load_start(str(path))
        assert "\n" not in str(refused.value) and str(path) in str(refused.value)
        assert start.main_inspect([str(path)]) == 1
    printed = capsys.readouterr().out
    assert "missing        1  layer3.0.conv1.weight" in printed and "not whole" in printed


def test_wrong_files_and_wrong_wishes(tmp_path, trained_run):
    medicalnet(tmp_path / "r.pth")
    (tmp_path / "text.pt").write_text("hello")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    torch.save({"state_dict": {"encoder.block.0.weight": torch.zeros(3)}}, tmp_path / "other.pt")
    torch.save({"state_dict": [1]}, tmp_path / "list.pt")
    cut = tmp_path / "cut.pth"
    cut.write_bytes((tmp_path / "r.pth").read_bytes()[:5000])
    blocks = trained("resnet10").state_dict()
    torch.save({k: v for k, v in blocks.items() if not k.startswith("layer2")}, tmp_path / "blocks.pth")
    for name, told in (
        ("none.pt", "No such file"), ("text.pt", "no file of tensors|cannot be read"), ("tensor.pt", "holds a Tensor"),
        ("other.pt", "unknown network .encoder.block"), ("list.pt", "state_dict is a list"),
        ("cut.pth", "cannot be read|no file of tensors"), ("blocks.pth", "none of MedicalNet's depths"),
        (".", "config.json|No such file|cannot be read"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=told) as refused:
            load_start(str(tmp_path / name))
        assert "\n" not in str(refused.value), name
    with pytest.raises(UserError, match="weights of resnet10, and i3d was asked for"):
        load_start(str(tmp_path / "r.pth"), "i3d")
    with pytest.raises(UserError, match="of width 2; leave"):
        load_start(str(tmp_path / "r.pth"), width=32)
    with pytest.raises(UserError, match="of width 2, not 32"):
        load_start(str(trained_run), width=32)
    with pytest.raises(UserError, match="weights of unet3d, and resnet10 was asked for"):
        load_start(str(trained_run), "resnet10")


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.slow
def test_a_pickle_that_would_run_code_is_one_line_and_exit_code_2(tmp_path):
    path, mark = tmp_path / "evil.pth", tmp_path / "ran"
    medicalnet(path, extra=Evil(mark))
    command = [sys.executable, "-m", "p2w", "inspect", str(path)]
    done = processes.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not mark.exists()
    assert "reading it would run posix.system" in done.stderr and str(path) in done.stderr


def test_inspect_says_what_init_would_do(tmp_path, capsys):
    medicalnet(tmp_path / "r.pth")
    assert start.main_inspect([str(tmp_path / "r.pth"), "--in-channels", "4"]) == 0
    out = capsys.readouterr().out
    assert "MedicalNet: resnet10, width 2" in out and "adapted        1  conv1.weight" in out
    assert "positive-z, 4 channels" in out and "whole: --init takes it" in out


def test_a_pretrained_network_of_others_is_fed_what_our_pretraining_fed_it(tmp_path):
    """[0, 1], whatever its authors fed it; and only the U-Net goes out under Models Genesis' names."""
    encoder = trained("resnet10")
    card = {"encoder": {"name": "resnet10", "width": 2}, "training": {"data": {"fingerprint": "f"}}}
    state = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    save_file(state, tmp_path / "r.safetensors", {"p2w": json.dumps(card)})
    start = load_start(str(tmp_path / "r.safetensors"))
    assert (
        same(start.encoder, encoder)
        and start.encoder.input_norm == "unit"
        and encoder.input_norm == "positive-z"
    )
    assert p2w.load(tmp_path / "r.safetensors").input_norm == "unit" and start.pretrained_on == {
        "fingerprint": "f"
    }
    with pytest.raises(UserError, match="Models Genesis' names are for unet3d, not resnet10"):
        export._models_genesis(tmp_path / "g.pt", state, card)


def test_medicalnets_intensities_are_those_of_its_own_code():
    """Voxels > 0 of the volume that it is given; recorded by reference/medicalnet.py. Voxels at 0 are noise there."""
    with np.load(RECORDED.with_name("medicalnet.npz")) as recorded:
        volume, theirs = torch.from_numpy(recorded["volume"]), torch.from_numpy(recorded["normalised"])
    ours = normalise_input(volume[None, None], "positive-z", 1)[0, 0]
    inside = volume > 0
    assert 0.2 < inside.float().mean() < 0.8 and torch.equal(theirs.isnan(), ~inside)
    torch.testing.assert_close(ours[inside], theirs[inside], rtol=1e-5, atol=1e-5)
    assert ours[~inside].unique().numel() == 1


def test_i3d_forgets_the_statistics_of_video_within_a_short_fine_tuning():
    torch.manual_seed(0)
    unit = build_encoder("i3d", 1).Conv3d_1a_7x7.train()
    unit.bn.running_mean.fill_(100.0)
    unit.bn.running_var.fill_(100.0)
    x = torch.rand(2, 1, 8, 16, 16)
    with torch.no_grad():
        for _ in range(160):
            unit(x)
        made = unit.conv3d(x)
    mean, var = made.mean(dim=(0, 2, 3, 4)), made.var(dim=(0, 2, 3, 4))
    torch.testing.assert_close(unit.bn.running_mean, mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(unit.bn.running_var, var, rtol=1e-3, atol=1e-3)


def test_fine_tuned_weights_are_fed_as_they_were(tmp_path):
    encoder = trained("resnet10")
    card = {"encoder": {"name": "resnet10", "width": 2, "feeding": "positive-z"}}
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", {"p2w": json.dumps(card)})
    start = load_start(str(tmp_path / "model.safetensors"))
    assert start.encoder.input_norm == "positive-z" and same(start.encoder, encoder)
    assert p2w.load(tmp_path / "model.safetensors").input_norm == "positive-z"


def spoilt(name, change):
    """The state of a ResNet with one tensor changed."""
    state = dict(trained("resnet10").state_dict())
    state[name] = change(state[name].clone())
    return state


def with_nan(value):
    value.view(-1)[3] = float("nan")
    return value


UNSOUND = {
    "NaN": (lambda: spoilt("layer1.0.conv1.weight", with_nan), "layer1.0.conv1.weight holds NaN"),
    "too large": (
        lambda: spoilt("conv1.weight", lambda v: v.double() * 1e300),
        "conv1.weight holds NaN or inf",
    ),
    "quantized": (
        lambda: spoilt("conv1.weight", lambda v: (9 * v).to(torch.int8)),
        "conv1.weight holds int8",
    ),
    "complex": (lambda: spoilt("conv1.weight", lambda v: v.to(torch.complex64)), "holds complex"),
    "variance": (lambda: spoilt("bn1.running_var", lambda v: -v), "a variance below 0"),
    "no values": (lambda: spoilt("conv1.weight", lambda v: v.to("meta")), "a shape but no values"),
    "zeros": (lambda: {k: torch.zeros_like(v) for k, v in trained("resnet10").state_dict().items()}, "is 0"),
    "two names": (
        lambda: (
            {f"module.{k}": v + 1 for k, v in trained("resnet10").state_dict().items()}
            | trained("resnet10").state_dict()
        ),
        "conv1.weight twice",
    ),
    "two states": (
        lambda: dict.fromkeys(("state_dict", "network_weights"), trained("resnet10").state_dict()),
        "weights twice, as state_dict and network_weights",
    ),
}


@pytest.mark.parametrize("kind", UNSOUND)
def test_tensors_that_are_no_weights_are_refused(tmp_path, kind):
    make, why = UNSOUND[kind]
    torch.save(make(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=why) as refused:
        load_start(str(tmp_path / "w.pth"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
@pytest.mark.parametrize("container", ["state_dict", "model_state_dict", ""])
def test_what_compiling_and_ddp_put_before_names_is_left_out(tmp_path, prefix, container):
    encoder = trained("resnet10")
    inside = {name.replace("layer1.0.", "layer1.0._orig_mod."): v for name, v in encoder.state_dict().items()}
    named = {prefix + name: value for name, value in inside.items()}
    torch.save({container: named, "epoch": 3} if container else named, tmp_path / "w.pth")
    assert same(load_start(str(tmp_path / "w.pth")).encoder, encoder)


def test_a_torch_file_without_checksums_is_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        encoder = medicalnet(tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(load_start(str(tmp_path / "w.pth")).encoder, encoder)


def test_a_flipped_bit_in_a_torch_file_is_found(tmp_path, trained_run):
    """torch does not compare the checksums that its archives have."""
    medicalnet(tmp_path / "r.pth")
    export.main([str(trained_run), "--to", "models-genesis", "--out", str(tmp_path / "g.pt")])
    for name, read in (("r.pth", load_start), ("g.pt", load_start), ("g.pt", p2w.load)):
        data = bytearray((tmp_path / name).read_bytes())
        data[len(data) // 2] ^= 64
        (tmp_path / f"bad-{name}").write_bytes(data)
        with pytest.raises(UserError, match=r"the checksum of .* differs"):
            read(str(tmp_path / f"bad-{name}"))


def test_our_own_exports_come_back_as_float32_or_are_refused(tmp_path, trained_run):
    """Files that were changed after p2w wrote them: halved, or with a value that is no number."""
    export.main([str(trained_run), "--to", "safetensors", "--out", str(tmp_path / "e.safetensors")])
    with safe_open(tmp_path / "e.safetensors", "pt") as file:
        card = file.metadata()
    state = load_file(tmp_path / "e.safetensors")
    save_file({k: v.half() if v.ndim else v for k, v in state.items()}, tmp_path / "h.safetensors", card)
    halved = p2w.load(tmp_path / "h.safetensors")
    assert all(v.dtype == torch.float32 for v in halved.state_dict().values() if v.is_floating_point())
    assert all(torch.isfinite(one).all() for one in halved.eval()(torch.rand(1, 1, 8, 16, 16)))
    with_nan(state["encoder.down_tr64.ops.0.conv1.weight"])
    save_file(state, tmp_path / "n.safetensors", card)
    for read in (p2w.load, load_start):
        with pytest.raises(UserError, match=r"down_tr64\.ops\.0\.conv1\.weight holds NaN"):
            read(str(tmp_path / "n.safetensors"))
