"""What pretraining starts from: a run, weights of others; whole or refused, in every part of the network that it trains."""

import importlib.util
import json
import os
import shutil
import sys
from dataclasses import replace

import processes
import pytest
import torch

from p2w.commands.train import parse
from p2w.config import read_config
from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.model.decoder import build_decoder
from p2w.model.resencl import ResEncL
from p2w.pretext import build_pretext_and_network
from p2w.weights.nnunet import to_nnunet
from p2w.weights.start import initialise, load_start, read_init


def config_of(run, init, pretext="parts2whole", **model):
    """The run's settings, with a start."""
    config = read_config(run / "config.json")
    return replace(
        config,
        model=replace(config.model, init=str(init), **model),
        pretext=replace(config.pretext, name=pretext),
        contrast=replace(config.contrast, queue=64),
    )


def started(config, run, said):
    torch.manual_seed(config.train.seed)
    pretext, network = build_pretext_and_network(config)
    return network, initialise(pretext, network, config, run, said.append)


def equal(module, state):
    mine = module.state_dict()
    return all(torch.equal(mine[name], value) for name, value in state.items())


def test_ones_own_run_gives_encoder_and_decoder(trained_run, tmp_path):
    said: list[str] = []
    _, network = started(config_of(trained_run, trained_run), tmp_path / "new", said)
    best = load_start(str(trained_run))
    assert equal(network.encoder, best.encoder.state_dict()) and equal(network.decoder, best.decoder_state)
    assert said[0] == "p2w: unet3d, width 2" and any("matched" in line for line in said)
    assert said[-1].split()[0] == "decoder" and said[-1].endswith("loaded")
    newest = f"{trained_run}/checkpoints/step-00000020"
    _, network = started(config_of(trained_run, newest), tmp_path / "new", said)
    assert equal(network.encoder, load_start(newest).encoder.state_dict())
    assert not equal(network.encoder, best.encoder.state_dict())


def test_copies_of_the_encoder_are_copies_of_the_loaded_one(trained_run, tmp_path):
    """MoCo's slowly following encoder starts as the encoder, and its head, which the file lacks, is new."""
    said: list[str] = []
    before, network = started(config_of(trained_run, trained_run, "moco"), tmp_path / "new", said)
    loaded = load_start(str(trained_run)).encoder.state_dict()
    assert equal(network.encoder, loaded) and not equal(before.encoder, loaded)
    first = loaded["down_tr64.ops.0.conv1.weight"]
    copies = [n for n, v in network.state_dict().items() if v.shape == first.shape and torch.equal(v, first)]
    kernels = [
        n
        for n, v in network.state_dict().items()
        if v.shape == first.shape and n.endswith("down_tr64.ops.0.conv1.weight")
    ]
    assert copies == kernels and len(kernels) >= 2
    assert any(line.endswith("new") for line in said)


def test_a_run_with_a_checkpoint_continues_from_that(trained_run):
    config = config_of(trained_run, "no/such/file")
    assert read_init(config, trained_run) is None
    before, network = started(config, trained_run, [])
    assert network is before
    with pytest.raises(UserError, match="no/such/file"):
        read_init(config, trained_run / "elsewhere")


def test_another_network_or_width_is_one_line_with_the_remedy(trained_run, resencl_run, tmp_path):
    with pytest.raises(UserError, match=r"pass --model.name unet3d --model.width 2"):
        read_init(config_of(resencl_run, trained_run), tmp_path)
    with pytest.raises(UserError, match="width 2, and the run is of unet3d, width 4"):
        read_init(config_of(trained_run, trained_run, width=4), tmp_path)


def test_models_genesis_starts_its_own_recipe_with_its_decoder(trained_run, tmp_path):
    torch.manual_seed(1)
    encoder = build_encoder("unet3d", 2)
    decoder = build_decoder(encoder, skips=True)
    state = {**encoder.state_dict(), **decoder.state_dict()}
    turned = {k: v.permute(0, 1, 4, 3, 2) if v.ndim == 5 else v for k, v in state.items()}
    torch.save({"state_dict": turned}, tmp_path / "g.pt")
    config = config_of(trained_run, tmp_path / "g.pt", "models_genesis")
    for skips in (True, False):
        said: list[str] = []
        changed = replace(config, pretext=replace(config.pretext, skips=skips))
        _, network = started(changed, tmp_path / "new", said)
        assert equal(network.encoder, encoder.state_dict())
        assert said[-1].endswith("loaded" if skips else "new")
        assert equal(network.decoder, decoder.state_dict() if skips else {})


def nnssl(path, axes=(0, 1, 2), width=1, decoder=True):
    """A checkpoint in the public layout: two names a tensor, a decoder that holds the encoder again, a plan."""
    torch.manual_seed(2)
    encoder = ResEncL(width)
    weights = to_nnunet({f"encoder.{n}": v for n, v in encoder.state_dict().items()})
    weights = {n: v.permute(0, 1, *(2 + a for a in axes)) if v.ndim == 5 else v for n, v in weights.items()}
    if decoder:
        weights |= {f"decoder.{n}": v for n, v in weights.items()}
        weights["decoder.stages.0.convs.0.conv.weight"] = torch.zeros(1, 2, 3, 3, 3)
    plan = {
        "plans_name": "nnsslPlans",
        "transpose_forward": list(axes),
        "configurations": {"onemmiso": {"spacing": [1, 1, 1]}},
    }
    adaptation = {"pretrain_plan": plan, "key_to_encoder": "encoder.stages", "key_to_stem": "encoder.stem"}
    torch.save({"network_weights": weights, "nnssl_adaptation_plan": adaptation, "trainer_name": "MAE"}, path)
    return encoder


@pytest.mark.parametrize("axes", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_nnssls_resencl_starts_pretraining_and_fine_tuning(resencl_run, tmp_path, axes):
    encoder = nnssl(tmp_path / "checkpoint_final.pth", axes)
    start = load_start(str(tmp_path / "checkpoint_final.pth"))
    assert equal(start.encoder, encoder.state_dict()) and start.encoder.input_norm == "z"
    assert start.report.what == "nnssl: resencl, width 1" and len(start.report.head) > 400
    assert len(start.report.matched) == len(encoder.state_dict()) and start.report.whole
    said: list[str] = []
    _, network = started(config_of(resencl_run, tmp_path / "checkpoint_final.pth"), tmp_path / "new", said)
    assert equal(network.encoder, encoder.state_dict())
    assert "note: pretraining feeds [0, 1]" in said[-1]


def test_a_part_of_nnssls_encoder_and_a_plan_that_lies_are_refused(tmp_path):
    nnssl(tmp_path / "a.pth")
    held = torch.load(tmp_path / "a.pth", weights_only=True)
    for change, told in (
        (lambda h: h["network_weights"].pop("encoder.stages.2.blocks.1.conv1.conv.weight"), "1 are missing"),
        (
            lambda h: h["network_weights"].update({"prompt.weight": torch.zeros(2)}),
            "unknown ones, first prompt.weight",
        ),
        (
            lambda h: h["nnssl_adaptation_plan"]["pretrain_plan"].update(transpose_forward=[0, 0, 2]),
            "transpose_forward is",
        ),
        (lambda h: h.update(nnssl_adaptation_plan=[1]), "nnssl_adaptation_plan is not nnssl's"),
    ):
        changed = {**held, "network_weights": dict(held["network_weights"])}
        changed["nnssl_adaptation_plan"] = json.loads(json.dumps(held["nnssl_adaptation_plan"]))
        change(changed)
        torch.save(changed, tmp_path / "b.pth")
        with pytest.raises(UserError, match=told) as refused:
            load_start(str(tmp_path / "b.pth"))
        assert "\n" not in str(refused.value)


@pytest.mark.skipif(
    importlib.util.find_spec("dynamic_network_architectures") is None, reason="needs nnU-Net's networks"
)
def test_the_real_class_of_nnssls_resencl_is_read_whole(tmp_path):
    """nnssl's network is dynamic_network_architectures' ResidualEncoderUNet; its state dict, saved as nnssl saves it."""
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    from p2w.weights.nnunet import architecture

    how = architecture(list(ResEncL(1).channels))
    how |= {"conv_op": torch.nn.Conv3d, "norm_op": torch.nn.InstanceNorm3d, "nonlin": torch.nn.LeakyReLU}
    network = ResidualEncoderUNet(input_channels=1, num_classes=1, **how)
    torch.save({"network_weights": network.state_dict()}, tmp_path / "checkpoint_final.pth")
    start = load_start(str(tmp_path / "checkpoint_final.pth"))
    assert start.report.whole
    x = torch.rand(1, 1, 32, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(start.encoder(x), network.encoder(x), strict=True))


def test_the_command_line_takes_init(trained_run):
    args, _ = parse(["demo", "--init", str(trained_run)])
    assert args.config.model.init == str(trained_run)
    assert parse(["demo", "--model.init", "random"])[0].config.model.init == "random"


@pytest.mark.slow
def test_a_run_from_init_begins_with_its_weights_and_continues_without_the_file(
    tiny_set, trained_run, tmp_path
):
    """At a learning rate of 0 the first checkpoint holds the file's weights; the same command goes on without the file."""
    init, run = tmp_path / "start", tmp_path / "run"
    shutil.copytree(trained_run, init)
    command = [
        sys.executable,
        "-m",
        "p2w",
        "train",
        "demo",
        "--shards",
        tiny_set,
        "--run-dir",
        run,
        "--init",
        init,
    ]
    command += [
        "--data.batch",
        "4",
        "--model.width",
        "2",
        "--pretext.size",
        "16",
        "32",
        "32",
        "--optim.lr",
        "0",
        "--train.steps",
        "2",
    ]
    command += ["--train.precision", "fp32", "--train.validate-every", "100"]
    environment = {**os.environ, "P2W_DEVICE": "cpu"}
    done = processes.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "p2w: unet3d, width 2" in done.stderr and "decoder" in done.stderr
    trained = load_start(str(run))
    best = load_start(str(trained_run))
    weights = {
        n: v for n, v in best.encoder.state_dict().items() if "running" not in n and "tracked" not in n
    }
    assert equal(trained.encoder, weights)
    shutil.rmtree(init)
    again = processes.run(command, capture_output=True, text=True, env=environment)
    assert again.returncode == 0 and "has its 2 steps already" in again.stderr, again.stderr


@pytest.mark.parametrize("axes", [(1, 0, 2), (2, 0, 1)])
def test_kernels_of_nnunets_own_checkpoint_are_turned_as_its_plan_says(tmp_path, axes):
    """nnU-Net has no plan of a pretraining; the plan of its training is among the arguments of the trainer."""
    encoder = nnssl(tmp_path / "a.pth", axes)
    held = torch.load(tmp_path / "a.pth", weights_only=True)
    plan = held.pop("nnssl_adaptation_plan")["pretrain_plan"]
    torch.save({**held, "init_args": {"plans": plan, "fold": 0}}, tmp_path / "b.pth")
    assert equal(load_start(str(tmp_path / "b.pth")).encoder, encoder.state_dict())
    torch.save({**held, "init_args": {"plans": {"transpose_forward": [0, 0, 1]}}}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"its plan is not nnU-Net's .transpose_forward is"):
        load_start(str(tmp_path / "c.pth"))
