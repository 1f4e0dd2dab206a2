"""Out of a run and back: the same bits, with a card that says what they are; what is not ours is one line."""

import json
import shutil
import sys

import processes
import pytest
import torch
from safetensors.torch import load_file, save_file

import p2w
from p2w.__main__ import COMMANDS
from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.model.conv import cancelled_biases
from p2w.weights import export, load
from p2w.weights.foreign import from_genesis


def weights(run, step=10):
    state = load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    return {k: v for k, v in state.items() if k.startswith("encoder.")}


def same(encoder, state):
    mine = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    return mine.keys() == state.keys() and all(torch.equal(mine[k], state[k]) for k in state)


def test_a_run_loads_as_its_best_checkpoint_and_a_checkpoint_as_itself(trained_run):
    encoder = p2w.load(trained_run)
    assert same(encoder, weights(trained_run, 10))
    assert same(p2w.load(trained_run / "checkpoints" / "step-00000020"), weights(trained_run, 20))
    assert same(p2w.load(trained_run / "checkpoints" / "latest"), weights(trained_run, 20))
    assert (encoder.channels, encoder.strides) == ((4, 8, 16, 32), (1, 2, 4, 8))
    features = encoder(torch.rand(1, 1, 16, 32, 32))
    features[-1].mean().backward()
    cancelled = {
        id(bias) for bias in cancelled_biases(encoder)
    }  # by a batch norm: frozen, as in a new network
    assert len(cancelled) == 8
    assert all((weight.grad is not None) is (id(weight) not in cancelled) for weight in encoder.parameters())


@pytest.mark.parametrize("to", ["safetensors", "hub-folder"])
@pytest.mark.parametrize("what", ["encoder", "all"])
def test_round_trip_is_exact_and_the_card_says_what_it_is(trained_run, tmp_path, to, what):
    out = tmp_path / "out"
    assert export.main([str(trained_run), "--to", to, "--what", what, "--out", str(out)]) == 0
    assert same(p2w.load(out), weights(trained_run))
    file = out / "model.safetensors" if to == "hub-folder" else out
    held = load_file(file)
    assert any(k.startswith("decoder.") for k in held) == (what == "all")
    if to == "hub-folder":
        card = json.loads((out / "card.json").read_text())
        assert card["training"]["figures"] == {"val/loss": 0.02, "similarity/auc": 0.8}
        assert card["training"]["data"]["fingerprint"] == "0123456789abcdef"
        assert card["input"]["axis_order"] == "zyx" and card["training"]["samples"] == 160
        assert "encoder = p2w.load(" in (out / "README.md").read_text()
        assert export.main([str(trained_run), "--to", to, "--out", str(out), "--step", "20"]) == 0
        assert same(p2w.load(out), weights(trained_run, 20))


@pytest.mark.parametrize("to", ["safetensors", "hub-folder"])
def test_every_encoder_comes_back_as_it_went(any_run, tmp_path, to):
    out = tmp_path / "out"
    assert export.main([str(any_run), "--to", to, "--out", str(out)]) == 0
    encoder = p2w.load(out)
    assert same(encoder, weights(any_run)) and same(p2w.load(any_run), weights(any_run))
    cancelled = {id(bias) for bias in cancelled_biases(encoder)}
    assert all(value.requires_grad is (id(value) not in cancelled) for value in encoder.parameters())


def test_what_a_format_is_not_for_is_refused_before_anything_is_written(any_run, tmp_path):
    name, out = any_run.name, tmp_path / "out"
    for to, takes in (("models-genesis", "unet3d"), ("nnunet", "resencl")):
        if name != takes:
            with pytest.raises(UserError, match=rf"trained {name}, and .* {takes}.*; pass --to safetensors"):
                export.main([str(any_run), "--to", to, "--out", str(out)])
    assert not out.exists()


def test_the_card_tells_spacing_channels_data_and_command(trained_run, tmp_path):
    export.main([str(trained_run), "--to", "hub-folder", "--out", str(tmp_path / "out")])
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    spacing = card["input"]["spacing_mm_zyx"]
    assert spacing["scans_median"] == [1.25, 0.7, 0.7]
    whole = [1.25 * 64 / 16, 0.7 * 128 / 32, 0.7 * 128 / 32]  # parts of 1/16 to 1/4 of its volume
    for name, volume in (("network_smallest", 1 / 16), ("network", 1 / 8), ("network_largest", 1 / 4)):
        assert spacing[name] == pytest.approx([mm * volume ** (1 / 3) for mm in whole], abs=1e-4)
    assert card["encoder"]["in_channels"] == 1 and card["training"]["command"] == "train.py demo"
    assert card["training"]["data_set"]["shape"] == [64, 128, 128]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "[1.25, 0.7, 0.7] mm (z, y, x; median)" in text


def test_a_card_says_that_scans_were_mr_and_resampled(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "mr")
    told = json.loads((run / "run.json").read_text())
    told["starts"][-1]["data_set"] |= {
        "modality": "mr",
        "intensity": {"percentiles": [0.5, 99.5], "become": [-1000, 1000]},
        "tiling": {"tile": [64, 128, 128], "spacing_mm": [2.0, 1.0, 1.0]},
    }
    (run / "run.json").write_text(json.dumps(told))
    export.main([str(run), "--to", "hub-folder", "--out", str(tmp_path / "out")])
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    text = (tmp_path / "out" / "README.md").read_text()
    assert card["input"]["modality"] == "mr" and card["input"]["resampled_to_mm"] == [2.0, 1.0, 1.0]
    assert "The scans are MR: of each, the percentiles 0.5 and 99.5 became the ends" in text
    assert "Scans were resampled to [2.0, 1.0, 1.0] mm" in text and "not resampled" not in text


def test_the_spacing_of_filled_up_sub_scans_is_that_of_their_real_part(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "short")
    told = json.loads((run / "run.json").read_text())
    told["starts"][-1]["data_set"] |= {"real_shape": [30.0, 128.0, 128.0]}
    (run / "run.json").write_text(json.dumps(told))
    export.main([str(run), "--to", "hub-folder", "--out", str(tmp_path / "out")])
    spacing = json.loads((tmp_path / "out" / "card.json").read_text())["input"]["spacing_mm_zyx"]
    whole = [1.25 * 30 / 16, 0.7 * 128 / 32, 0.7 * 128 / 32]
    assert spacing["network"] == pytest.approx([mm / 2 for mm in whole], abs=1e-4)


def test_a_run_that_noted_no_data_set_has_a_card_without_spacing(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "old")
    starts = json.loads((run / "run.json").read_text())
    del starts["starts"][-1]["data_set"]
    (run / "run.json").write_text(json.dumps(starts))
    export.main([str(run), "--to", "hub-folder", "--out", str(tmp_path / "out")])
    assert "did not record the spacing of its scans" in (tmp_path / "out" / "README.md").read_text()


def test_more_input_channels_come_back(tmp_path):
    state = {f"encoder.{k}": v for k, v in build_encoder("vit3d", 1, 3).state_dict().items()}
    described = {"encoder": {"name": "vit3d", "width": 1, "in_channels": 3}}
    save_file(state, tmp_path / "three.safetensors", {"p2w": json.dumps(described)})
    encoder = p2w.load(tmp_path / "three.safetensors")
    assert encoder.in_channels == 3 and same(encoder, state)


def test_models_genesis_file_loads_without_code_and_comes_back(trained_run, tmp_path):
    out = tmp_path / "genesis.pt"
    export.main([str(trained_run), "--to", "models-genesis", "--out", str(out)])
    state = torch.load(out, weights_only=True)["state_dict"]
    assert "module.down_tr64.ops.0.conv1.weight" in state
    back, expected = from_genesis(state), weights(trained_run)
    assert back.keys() == expected.keys() and all(torch.equal(back[k], expected[k]) for k in back)


def test_what_is_not_ours_is_refused(trained_run, tmp_path):
    stranger = tmp_path / "stranger.safetensors"
    save_file({"a": torch.zeros(1)}, stranger)
    (tmp_path / "text").write_text("hello")
    (tmp_path / "long").write_bytes(b"\xff" * 64)
    (tmp_path / "copied").mkdir()
    (tmp_path / "copied" / "meta.json").write_text("{}")
    for path in (
        stranger,
        tmp_path / "copied",
        tmp_path / "text",
        tmp_path / "long",
        tmp_path / "nothing",
        tmp_path,
    ):
        with pytest.raises(UserError, match=str(path)):
            p2w.load(path)
    with pytest.raises(UserError, match="no checkpoint of step 5; it has 10, 20"):
        export.main([str(trained_run), "--to", "safetensors", "--step", "5"])
    with pytest.raises(UserError, match=r"no folder that p2w export wrote"):
        export.main([str(trained_run), "--to", "hub-folder", "--out", str(tmp_path)])


def test_weights_of_another_network_are_refused_and_told(trained_run, tmp_path):
    out = tmp_path / "w.safetensors"
    export.main([str(trained_run), "--to", "safetensors", "--out", str(out)])
    state, card = load_file(out), load.find_checkpoint(trained_run)
    assert card.step == 10
    state.pop("encoder.down_tr64.ops.0.conv1.weight")
    broken = tmp_path / "broken.safetensors"
    described = {"encoder": {"name": "unet3d", "width": 2}}
    save_file(state, broken, {"p2w": json.dumps(described)})
    with pytest.raises(UserError, match=r"1 of 56 tensors of unet3d \(width 2\) are missing"):
        p2w.load(broken)


@pytest.mark.slow
def test_the_command_from_the_shell(trained_run, tmp_path):
    command = [sys.executable, "-m", "p2w", "export", str(trained_run), "--to", "safetensors"]
    done = processes.run([*command, "--out", str(tmp_path / "e.safetensors")], capture_output=True, text=True)
    assert done.returncode == 0 and "encoder of step 10" in done.stdout
    failed = processes.run([*command, "--step", "7"], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "Traceback" not in failed.stderr
    listed = processes.run([sys.executable, "-m", "p2w"], capture_output=True, text=True)
    assert all(f"p2w {name}" in listed.stdout for name in COMMANDS)


def test_an_export_that_cannot_be_written_leaves_nothing(trained_run, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_atomic", full)
    with pytest.raises(UserError, match="No space left on device"):
        export.main([str(trained_run), "--to", "hub-folder", "--out", str(tmp_path / "hub")])
    assert list(tmp_path.iterdir()) == []
