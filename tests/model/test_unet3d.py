"""The paper's network: sizes, names, arithmetic, and one level against NumPy in float64."""

import numpy as np
import pytest
import torch

from p2w.config import Config, OptimConfig, PretextConfig
from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.model.decoder import EncoderDecoder
from p2w.model.unet3d import Level, UNet3dDecoder, UNet3dEncoder
from p2w.pretext import build_pretext_and_network
from p2w.train.estimate import run_cost
from p2w.weights.foreign import from_genesis, to_genesis


def network(width=32, skips=False, device="meta"):
    with torch.device(device):
        encoder = UNet3dEncoder(width)
        return EncoderDecoder(encoder, UNet3dDecoder(encoder.channels, encoder.strides, skips))


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_and_shapes_are_the_papers():
    """Published: 19.07 M with skips as in the torch port of Models Genesis, encoder 7.03 M; ours without skips 16.75 M."""
    assert round(count(network(skips=True)) / 1e6, 2) == 19.07
    assert round(count(network()) / 1e6, 2) == 16.75
    assert round(count(network().encoder) / 1e6, 2) == 7.03
    features = network().encoder(torch.zeros(1, 1, 32, 64, 64, device="meta"))
    assert [tuple(f.shape) for f in features] == [
        (1, 64, 32, 64, 64), (1, 128, 16, 32, 32), (1, 256, 8, 16, 16), (1, 512, 4, 8, 8),
    ]  # fmt: skip
    encoder = network().encoder
    assert encoder.channels == (64, 128, 256, 512) and encoder.strides == (1, 2, 4, 8)


def test_names_are_models_genesis_both_ways():
    ours = network(width=2, skips=True, device="cpu").state_dict()
    theirs = to_genesis(ours)
    levels = [f"down_tr{n}.ops.{i}" for n in (64, 128, 256, 512) for i in (0, 1)]
    levels += [f"up_tr{n}.ops.{i}" for n in (256, 128, 64) for i in (0, 1)]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"{level}.conv1.{name}" for level in levels for name in ("weight", "bias")}
    expected |= {f"{level}.bn1.{name}" for level in levels for name in norm}
    expected |= {f"up_tr{n}.up_conv.{name}" for n in (256, 128, 64) for name in ("weight", "bias")}
    expected |= {"out_tr.final_conv.weight", "out_tr.final_conv.bias"}
    assert set(theirs) == expected
    back = from_genesis({f"module.{name}": value for name, value in theirs.items()})
    assert list(back) == list(ours)
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    network(width=2, skips=True, device="cpu").load_state_dict(back)


@pytest.mark.parametrize(("convert", "name"), [(from_genesis, "layer1.weight"), (to_genesis, "head.weight")])  # fmt: skip
def test_a_foreign_name_is_refused(convert, name):
    with pytest.raises(UserError, match=f"{name}: not a"):
        convert({name: torch.zeros(1)})


def conv3d_float64(x, weight, bias):
    """(C, D, H, W), (O, C, 3, 3, 3) -> (O, D, H, W), zero padded: seven plain loops, the inner four as one sum."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (1, 1)))
    out = np.empty((len(weight), *x.shape[1:]))
    for o in range(len(weight)):
        for z, y, w in np.ndindex(*x.shape[1:]):
            out[o, z, y, w] = (padded[:, z : z + 3, y : y + 3, w : w + 3] * weight[o]).sum() + bias[o]
    return out


def level_float64(x, state, training):
    """Naive Level on a batch (B, C, D, H, W): convolution, batch norm with biased variance, ReLU; twice."""
    for op in (0, 1):
        w = {
            name: value.double().numpy()
            for name, value in state.items()
            if name.startswith(f"ops.{op}.") and value.ndim
        }
        x = np.stack(
            [conv3d_float64(one, w[f"ops.{op}.conv1.weight"], w[f"ops.{op}.conv1.bias"]) for one in x]
        )
        mean, var = w[f"ops.{op}.bn1.running_mean"], w[f"ops.{op}.bn1.running_var"]
        if training:
            mean, var = x.mean((0, 2, 3, 4)), x.var((0, 2, 3, 4))
        broadcast = (slice(None), None, None, None)
        x = (x - mean[broadcast]) / np.sqrt(var[broadcast] + 1e-5)
        x = np.maximum(x * w[f"ops.{op}.bn1.weight"][broadcast] + w[f"ops.{op}.bn1.bias"][broadcast], 0)
    return x


@pytest.mark.parametrize("training", [True, False])
def test_one_level_against_numpy(training):
    torch.manual_seed(0)
    level = Level(2, 3, 4).train(training)
    for name, value in level.state_dict().items():
        if value.ndim and "conv1" not in name:
            value.uniform_(
                0.5, 1.5
            )  # neither 0 nor 1, so that a mix-up of scale, shift, mean, variance shows
    state = {name: value.clone() for name, value in level.state_dict().items()}
    x = torch.randn(2, 2, 3, 4, 5)
    np.testing.assert_allclose(
        level(x).detach().numpy(), level_float64(x.double().numpy(), state, training), atol=2e-5
    )


def test_no_skips_means_only_the_bottleneck_is_read():
    torch.manual_seed(0)
    for skips in (False, True):
        net = network(width=2, skips=skips, device="cpu").eval()
        features = net.encoder(torch.randn(1, 1, 8, 8, 8))
        before = net.decoder(features)
        after = net.decoder([torch.zeros_like(f) for f in features[:3]] + [features[3]])
        assert torch.equal(before, after) is not skips


def test_output_is_float32_in_0_1_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        out = network(width=2, device="cpu")(torch.randn(1, 1, 8, 8, 16))
    assert out.dtype == torch.float32 and out.min() >= 0 and out.max() <= 1


def test_plan_counts_580_gflop_forward_and_backward():
    config = Config()
    facts = run_cost(config, lambda: build_pretext_and_network(config), samples=1, bytes_per_value=2)
    assert facts.flops_per_sample == pytest.approx(580e9, rel=0.01)
    assert facts.parameters == count(network())
    assert facts.state_bytes == 16 * facts.parameters  # weights, gradients, Adam's two averages, 4 bytes each
    sgd = Config(optim=OptimConfig(name="sgd"), pretext=PretextConfig(size=(64, 128, 128)))
    large = run_cost(sgd, lambda: build_pretext_and_network(sgd), samples=2, bytes_per_value=2)
    assert large.state_bytes == 12 * facts.parameters
    assert large.flops_per_sample == pytest.approx(8 * facts.flops_per_sample, rel=1e-3)
    assert large.activation_bytes == pytest.approx(16 * facts.activation_bytes, rel=0.05)


def test_pooled_is_the_mean_of_the_bottleneck():
    encoder = UNet3dEncoder(2).eval()
    x = torch.randn(2, 1, 8, 16, 16)
    expected = encoder(x)[-1].detach().double().numpy().mean((2, 3, 4))
    np.testing.assert_allclose(encoder.pooled(x).detach().numpy(), expected, atol=1e-6)


def test_unknown_names_and_widths_and_other_strides_are_refused():
    with pytest.raises(UserError, match=r"model\.name=resnet: unknown; one of .*, unet3d"):
        build_encoder("resnet", 32)
    with pytest.raises(UserError, match=r"model\.width=0"):
        UNet3dEncoder(0)
    with pytest.raises(UserError, match="strides"):
        UNet3dDecoder((1, 2, 3, 4), (2, 4, 8, 16))
