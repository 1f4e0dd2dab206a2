"""The networks that others published: sizes and names against the facts, padding against plain loops, both uses."""

import itertools

import numpy as np
import pytest
import torch

from p2w.errors import UserError
from p2w.model import ENCODERS, build_encoder
from p2w.model.conv import SameConv3d, average_same, cancelled_biases, pad_same
from p2w.model.decoder import EncoderDecoder, GeneralDecoder, build_decoder
from p2w.model.resnet3d import ResNet3d, ShortcutA
from p2w.pretext.protocol import check_size
from p2w.train.optim import Precision
from p2w.train.preflight import convolution_error

pytestmark = pytest.mark.slow  # seconds of computing

SMALL = ["unet3d", "resnet10", "resnet18", "resnet50", "i3d", "dense_vnet"]


def meta(name, width=32, in_channels=1):
    """Shapes without values. Batch norms that train are a hundred operations of Python each there, and others are few."""
    with torch.device("meta"):
        return build_encoder(name, width, in_channels).eval()


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_medicalnet_101_is_the_published_network():
    """Published: 2048 channels at stride 8, keys as published. Names and shapes of all depths equal MONAI 1.6.1's (once)."""
    encoder = meta("resnet101")
    state = encoder.state_dict()
    assert (
        state["layer3.22.conv3.weight"].shape == (1024, 256, 1, 1, 1)
        and "layer3.23.conv1.weight" not in state
    )
    assert state["conv1.weight"].shape == (64, 1, 7, 7, 7) and "layer1.0.downsample.1.running_var" in state
    assert (len(state), count(encoder)) == (624, 85_201_216)
    features = encoder(torch.zeros(1, 1, 32, 64, 64, device="meta"))
    assert [tuple(f.shape[1:]) for f in features] == [(64, 16, 32, 32), (256, 8, 16, 16), (2048, 4, 8, 8)]
    assert encoder.layer3[5].conv2.dilation == (2, 2, 2) and encoder.layer4[0].conv2.dilation == (4, 4, 4)
    assert encoder.layer2[0].conv2.stride == (2, 2, 2) and encoder.layer3[0].conv2.stride == (1, 1, 1)


@pytest.mark.parametrize(
    ("depth", "parameters", "tensors"),
    [(10, 14_355_520, 72), (18, 32_986_176, 102), (34, 63_295_808, 198), (50, 46_155_072, 318),
     (152, 117_359_936, 930), (200, 126_559_552, 1218)],
)  # fmt: skip
def test_every_depth_of_medicalnet(depth, parameters, tensors):
    encoder = meta(f"resnet{depth}")
    assert (count(encoder), len(encoder.state_dict())) == (parameters, tensors)
    learned = any("downsample" in name for name in encoder.state_dict())
    assert learned is (depth not in (18, 34))  # shortcut A has nothing to learn


def test_i3d_is_the_published_network():
    """12.7 M with three input channels and the classifier of 400 classes."""
    encoder = meta("i3d", in_channels=3)
    classifier = 1024 * 400 + 400
    assert round((count(encoder) + classifier) / 1e6, 1) == 12.7
    state = encoder.state_dict()
    assert state["Mixed_3b.b0.conv3d.weight"].shape == (64, 192, 1, 1, 1)
    assert state["Conv3d_1a_7x7.conv3d.weight"].shape == (64, 3, 7, 7, 7)
    assert {"Mixed_5c.b1b.bn.running_var", "Mixed_4f.b3b.conv3d.weight"} <= set(state)
    assert not any(name.endswith("conv3d.bias") for name in state)
    assert encoder.Mixed_4c.b2b.bn.eps == 1e-3
    features = encoder(torch.zeros(1, 3, 32, 64, 64, device="meta"))
    assert [tuple(f.shape[1:]) for f in features] == [
        (64, 16, 32, 32), (192, 16, 16, 16), (480, 16, 8, 8), (832, 8, 4, 4), (1024, 4, 2, 2),
    ]  # fmt: skip


def test_dense_vnet_has_the_published_channels():
    """Its features are checked against NiftyNet's own in tests/weights/test_tf_bundle.py."""
    encoder = meta("dense_vnet")
    state = encoder.state_dict()
    assert state["initial.conv.weight"].shape == (24, 1, 5, 5, 5)
    assert state["blocks.0.stack.4.conv.weight"].shape == (4, 25 + 16, 3, 3, 3)
    assert state["blocks.1.stack.9.conv.weight"].shape == (8, 24 + 72, 3, 3, 3)
    assert state["blocks.2.skip.conv.weight"].shape == (24, 24 + 160, 3, 3, 3)
    assert "blocks.2.down.conv.weight" not in state and count(encoder) == 863_682
    assert build_decoder(encoder, skips=True).conv.weight.shape == (1, 1 + 12 + 24 + 24, 3, 3, 3)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_channels_and_strides_describe_the_features(name):
    encoder = meta(name, width=8, in_channels=2)
    features = encoder(torch.zeros(1, 2, 32, 64, 96, device="meta"))
    along_z = encoder.slice_strides or encoder.strides
    assert [tuple(f.shape[1:]) for f in features] == [
        (c, 32 // z, 64 // s, 96 // s)
        for c, z, s in zip(encoder.channels, along_z, encoder.strides, strict=True)
    ]
    names = dict(encoder.named_parameters()) | dict(encoder.named_buffers())
    assert encoder.input_convs and set(encoder.input_convs) | set(encoder.norms_input) <= set(names)


@pytest.mark.parametrize("name", SMALL)
def test_both_uses_reach_every_parameter(name):
    torch.manual_seed(0)
    encoder = build_encoder(name, 2, 2)
    decoder = build_decoder(encoder, skips=True, out_channels=3)
    x = torch.rand(2, 2, 16, 32, 32)
    logits = decoder(encoder(x))
    assert logits.shape == (2, 3, 16, 32, 32)
    logits.square().mean().backward()
    unread = ("blocks.2.down",)  # there is none
    both = list(itertools.chain(encoder.named_parameters(), decoder.named_parameters()))
    cancelled = {id(bias) for part in (encoder, decoder) for bias in cancelled_biases(part)}
    assert all((p.grad is not None) is (id(p) not in cancelled) for n, p in both if not n.startswith(unread))
    encoder.zero_grad()
    pooled = encoder.pooled(x)
    assert pooled.shape == (2, encoder.channels[-1]) and pooled.dtype == torch.float32
    pooled.square().mean().backward()
    unused = [n for n, p in encoder.named_parameters() if p.grad is None and id(p) not in cancelled]
    assert [
        n for n, _ in encoder.named_parameters() if n.startswith(encoder.beside_pooled or ("?",))
    ] == unused


@pytest.mark.parametrize("name", ["resnet10", "resnet50", "i3d", "dense_vnet"])
def test_bf16_and_channels_last_on_a_cpu(name):
    """Every convolution beside float32, two slices at the coarsest level too, where oneDNN's gradients were garbage."""
    torch.manual_seed(0)
    encoder = build_encoder(name, 2)
    network = EncoderDecoder(encoder, build_decoder(encoder, skips=True)).to(
        memory_format=torch.channels_last_3d
    )
    bf16 = Precision("bf16", torch.bfloat16, "asked for")
    assert convolution_error(network, bf16, (1, 1, 16, 32, 32), torch.device("cpu")) == ""
    x = torch.rand(2, 1, 16, 32, 32).contiguous(memory_format=torch.channels_last_3d)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x)
    out.square().mean().backward()
    assert out.dtype == torch.float32 and out.shape == x.shape
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.requires_grad)


def test_shortcut_a_drops_voxels_and_appends_zeros():
    x = torch.rand(1, 3, 4, 6, 8, requires_grad=True)
    y = ShortcutA(5, 2)(x)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2, ::2]) and not y[:, 3:].any()
    y.sum().backward()
    assert x.grad is not None and x.grad.sum() == 3 * 2 * 3 * 4


def same_numpy(x, kernel, stride, reduce):
    """SAME by its definition: ceil(size / stride) windows, the padding's odd voxel behind. `reduce` takes {place: value}."""
    out = [-(-n // stride) for n in x.shape]
    before = [max((o - 1) * stride + kernel - n, 0) // 2 for o, n in zip(out, x.shape, strict=True)]
    y = np.empty(out)
    for index in np.ndindex(*out):
        starts = [i * stride - b for i, b in zip(index, before, strict=True)]
        y[index] = reduce({
            tuple(o): x[tuple(s + d for s, d in zip(starts, o, strict=True))]
            for o in np.ndindex(kernel, kernel, kernel)
            if all(0 <= s + d < n for s, d, n in zip(starts, o, x.shape, strict=True))
        })  # fmt: skip
    return y


@pytest.mark.parametrize("shape", [(4, 6, 5), (7, 8, 3)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (7, 2), (3, 1)])
def test_same_padding_against_plain_loops(shape, kernel, stride):
    torch.manual_seed(0)
    x = torch.randn(1, 1, *shape)
    conv = SameConv3d(1, 1, kernel, stride)
    weight = conv.weight.detach()[0, 0].double().numpy()
    expected = same_numpy(
        x[0, 0].double().numpy(), kernel, stride, lambda w: sum(weight[o] * v for o, v in w.items())
    )
    np.testing.assert_allclose(conv(x).detach()[0, 0], expected, atol=1e-5)
    if (kernel, stride) == (3, 2):
        mean = same_numpy(x[0, 0].double().numpy(), 3, 2, lambda w: np.mean(list(w.values())))
        np.testing.assert_allclose(average_same(x)[0, 0], mean, atol=1e-6)


def test_nothing_is_padded_where_nothing_is_needed():
    x = torch.rand(1, 1, 4, 4, 4)
    assert pad_same(x, (1, 2, 2), (1, 2, 2)) is x


def test_wide_levels_do_not_make_a_wide_decoder():
    with torch.device("meta"):
        decoder = GeneralDecoder((64, 832, 1024), (2, 4, 8), True, 1, (2, 2, 4))
    assert decoder.ups[0].up_conv.weight.shape == (1024, 256, 2, 2, 2)
    assert decoder.ups[0].ops[0].conv1.weight.shape[:2] == (256, 256 + 832)
    assert decoder.ups[1].up_conv.weight.shape == (256, 64, 1, 2, 2)


def test_sizes_that_there_are_not():
    with pytest.raises(UserError, match=r"its head is made of skips; pass --pretext\.skips"):
        build_decoder(meta("dense_vnet"), skips=False)
    with pytest.raises(UserError, match="depth 20: one of 10, 18"):
        ResNet3d(20)
    with pytest.raises(UserError, match=r"model\.width=0"):
        build_encoder("i3d", 0)
    with pytest.raises(UserError, match="unknown; one of dense_vnet, i3d, primus, res"):
        build_encoder("resnet", 32)


def test_a_size_is_judged_axis_by_axis():
    """I3D divides slices by 8, rows and columns by 32; the others all edges alike."""
    check_size((16, 32, 64), meta("i3d", 8))
    with pytest.raises(
        UserError, match=r"own of \(8, 32, 32\), the encoder's strides; pass e\.g\. --pretext\.size 8 32 32"
    ):
        check_size((12, 32, 48), meta("i3d", 8))
    with pytest.raises(UserError, match="multiple of 8, the encoder's stride"):
        check_size((12, 32, 48), meta("dense_vnet", 8))
