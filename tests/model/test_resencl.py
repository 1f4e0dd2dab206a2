"""nnU-Net's residual encoder: its names, its shapes, its numbers; golden values were made by nnU-Net's own code.

`resencl_keys.txt`: names and shapes of the encoder of dynamic_network_architectures 0.4.4's ResidualEncoderUNet at width 32.
"""

from pathlib import Path

import pytest
import torch

from p2w.errors import UserError
from p2w.model import build_encoder
from p2w.model.resencl import BLOCKS, ResEncL
from p2w.pretext.protocol import check_size
from p2w.weights.nnunet import from_nnunet, to_nnunet

KEYS = Path(__file__).with_name("resencl_keys.txt")


def golden() -> dict[str, tuple[int, ...]]:
    lines = (line.split() for line in KEYS.read_text().splitlines())
    return {name: tuple(map(int, shape)) for name, *shape in lines}


def test_names_and_shapes_are_nnunets_and_each_tensor_is_stored_once():
    with torch.device("meta"):
        ours = ResEncL().state_dict()
    theirs = to_nnunet(ours)
    assert {name: tuple(value.shape) for name, value in theirs.items()} == golden()
    assert len(ours) * 2 == len(theirs)
    back = from_nnunet(theirs)
    assert list(back) == list(ours) and all(back[name] is ours[name] for name in ours)


def test_the_published_sizes():
    with torch.device("meta"):
        encoder = build_encoder("resencl", 32)
        features = encoder(torch.zeros(1, 1, 32, 64, 64))
    assert encoder.channels == (32, 64, 128, 256, 320, 320) and encoder.strides == (1, 2, 4, 8, 16, 32)
    assert [f.shape[1] for f in features] == list(encoder.channels)
    assert [tuple(f.shape[2:]) for f in features] == [(32 // s, 64 // s, 64 // s) for s in encoder.strides]
    assert [len(stage.blocks) for stage in encoder.stages] == [1, 3, 4, 6, 6, 6] == list(BLOCKS)
    assert round(sum(p.numel() for p in encoder.parameters()) / 1e6, 2) == 90.30


def test_numbers_are_nnunets():
    """Mean, deviation and one value of each level that nnU-Net's code gives in float64, of weights made by a formula."""
    expected = [
        (1.081853295, 0.448458627, 0.920418114),
        (0.655988343, 1.397771591, 2.204303582),
        (1.118278931, 1.551264970, 0.300025329),
        (1.455762576, 1.722734875, 0.741327741),
        (1.616840300, 1.759882562, 0.080631986),
        (2.236306724, 2.263785721, 5.411154427),
    ]
    encoder = ResEncL(2).double()
    with torch.no_grad():
        for place, (_, value) in enumerate(sorted(encoder.state_dict().items())):
            count = torch.arange(value.numel(), dtype=torch.float64)
            value.copy_(torch.cos(0.7 * count + place).view(value.shape))
        x = torch.sin(torch.arange(32 * 32 * 64, dtype=torch.float64) * 0.01).view(1, 1, 32, 32, 64)
        found = [(float(f.mean()), float(f.std()), float(f[0, 1, 0, 0, 1])) for f in encoder(x)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-7, rtol=0)


def test_nnunets_own_network_takes_the_state_strictly_and_gives_the_same_features():
    """Runs where dynamic_network_architectures is installed; golden values stand in elsewhere."""
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    theirs = unet.ResidualEncoderUNet(
        2, 6, [2, 4, 8, 16, 20, 20], torch.nn.Conv3d, [[3] * 3] * 6, [[1] * 3, *[[2] * 3] * 5], list(BLOCKS), 2, [1] * 5,
        conv_bias=True, norm_op=torch.nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip
    ours = ResEncL(2, in_channels=2)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.encoder.load_state_dict(to_nnunet(ours.state_dict()), strict=True)
    x = torch.rand(1, 2, 32, 64, 32)
    assert all(torch.equal(a, b) for a, b in zip(ours(x), theirs.encoder(x), strict=True))


def test_what_instance_norm_cannot_take_is_refused_with_the_remedy():
    encoder = ResEncL(1)
    with pytest.raises(
        UserError, match=r"pretext\.size=\(32, 32, 32\).*must be 2 voxels.*--pretext\.size 32 64 64"
    ):
        check_size((32, 32, 32), encoder)
    with pytest.raises(
        UserError, match=r"pretext\.size=\(16, 32, 32\).*multiple of 32.*--pretext\.size 32 64 64"
    ):
        check_size((16, 32, 32), encoder)
    check_size((32, 64, 64), encoder)
    with pytest.raises(UserError, match="double an edge"):
        encoder(torch.zeros(1, 1, 32, 32, 32))
    with pytest.raises(UserError, match="multiple of 32"):
        encoder(torch.zeros(1, 1, 16, 32, 32))


@pytest.mark.parametrize("convert", [to_nnunet, from_nnunet])
def test_a_foreign_name_is_refused(convert):
    with pytest.raises(UserError, match=r"down_tr64\.ops\.0\.bn1\.weight: not a parameter of nnU-Net's"):
        convert({"down_tr64.ops.0.bn1.weight": torch.zeros(1)})
