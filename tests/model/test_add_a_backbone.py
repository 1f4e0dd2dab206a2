"""The recipe of docs/add_a_backbone.md: a toy with a decoder, a setting and published weights of its own."""

import functools

import pytest
import torch
from ct_sets import structured_hu
from torch import nn

from p2w.config import Config, ModelConfig, PretextConfig
from p2w.errors import UserError
from p2w.finetune.init import network_of
from p2w.finetune.task_types import task_type
from p2w.model import ENCODERS, build_encoder
from p2w.model.conv import Conv3d, scale_channels
from p2w.model.decoder import GeneralDecoder, build_decoder
from p2w.model.encoder import Encoder, PublishedFormat
from p2w.model.norm import BatchNorm3d
from p2w.pretext import build_pretext_and_network
from p2w.rng import SampleKeys
from p2w.weights.start import load_start


class ToyDecoder(nn.Module):
    """Up-samples each level's features, adds them up, one convolution."""

    def __init__(self, channels, strides, skips, out_channels):
        super().__init__()
        self.skips, used = skips, range(len(channels)) if skips else [len(channels) - 1]
        self.used = list(used)
        self.convs = nn.ModuleList(Conv3d(channels[i], out_channels, 1) for i in self.used)
        self.ups = nn.ModuleList(nn.Upsample(scale_factor=strides[i]) for i in self.used)

    def forward(self, features):
        return sum(up(conv(features[i])) for i, conv, up in zip(self.used, self.convs, self.ups, strict=True))


class Toy(Encoder):
    """Strided convolutions, `depth` of them a level."""

    input_convs = ("first.weight",)
    published = (
        PublishedFormat("ToyNet", known_by="stem.weight", head=("fc.",), rename=((r"^stem\.", "first."),)),
    )

    def __init__(self, width=32, in_channels=1, *, depth: int = 1, slope: float = 0.1, bias: bool = True):
        super().__init__()
        fine = scale_channels(32, width)
        self.channels, self.strides, self.in_channels = (fine, 2 * fine), (1, 4), in_channels
        self.first = Conv3d(in_channels, fine, 3, padding=1)
        self.norm = BatchNorm3d(fine)
        self.act = nn.LeakyReLU(slope)
        self.deep = nn.Sequential(*(Conv3d(fine, fine, 3, padding=1) for _ in range(depth)))
        self.down = Conv3d(fine, 2 * fine, 4, stride=4, bias=bias)

    def build_decoder(self, skips, out_channels=1):
        return ToyDecoder(self.channels, self.strides, skips, out_channels)

    def forward(self, x):
        fine = self.deep(self.act(self.norm(self.first(x))))
        return [fine, self.down(fine)]


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """The one line."""
    monkeypatch.setitem(ENCODERS, "toy", Toy)
    monkeypatch.setitem(ENCODERS, "toy_deep", functools.partial(Toy, depth=3))


@pytest.mark.parametrize("skips", [False, True])
def test_it_is_pretrained_with_its_own_decoder(skips):
    pretext = PretextConfig(name="parts2whole", size=(8, 16, 16), skips=skips)
    config = Config(pretext=pretext, model=ModelConfig(name="toy:depth=2,slope=0.2", width=4))
    task, network = build_pretext_and_network(config)
    assert isinstance(network.decoder, ToyDecoder) and len(network.encoder.deep) == 2
    assert network.encoder.act.negative_slope == 0.2
    batch = torch.stack([torch.from_numpy(structured_hu(n, 0, (16, 32, 32))) for n in range(2)])
    views = task.sample(batch, SampleKeys(0, 0, torch.arange(2)))
    before = network.encoder.first.weight.detach().clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    task.loss(network(views.input, *views.extra_inputs), views)[0].backward()
    optimizer.step()
    assert not torch.equal(before, network.encoder.first.weight)


def test_a_network_without_a_decoder_of_its_own_gets_a_general_one(monkeypatch):
    monkeypatch.delattr(Toy, "build_decoder")
    assert isinstance(build_decoder(build_encoder("toy", 4), True), GeneralDecoder)


def test_its_published_weights_are_a_starting_point(tmp_path):
    torch.manual_seed(0)
    encoder = build_encoder("toy", 4)
    state = {
        f"module.{name.replace('first.', 'stem.')}": value for name, value in encoder.state_dict().items()
    }
    torch.save({"state_dict": state | {"module.fc.weight": torch.ones(2)}}, tmp_path / "toynet.pth")
    start = load_start(str(tmp_path / "toynet.pth"), in_channels=2)
    assert (start.network, start.width, start.report.head) == ("toy", 4, ("fc.weight",))
    assert start.report.whole and start.report.adapted == ("first.weight",) and "ToyNet" in start.report.what
    assert torch.equal(start.encoder.down.weight, encoder.down.weight)
    network = network_of(task_type("segmentation"), start, ("background", "toy"), pretrained_decoder=False)
    assert network(torch.rand(1, 2, 8, 16, 16)).shape == (1, 1, 8, 16, 16)
    torch.save({"another.weight": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"known are Models Genesis, MedicalNet, .*I3D, ToyNet, "):
        load_start(str(tmp_path / "other.pth"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("toy:deep=2", "no setting 'deep'; its settings are depth, slope, bias"),
        ("toy:depth=two", "depth is 'two', must be of type int"),
        ("toy:bias=0", "bias is '0', must be of type bool"),
        ("unet3d:depth=2", "no setting 'depth'; it has no settings of its own"),
        ("vit3d:depth=0", "at least 1"),
        ("toi", "unknown; one of "),
    ],
)
def test_a_setting_that_it_does_not_have_is_refused(name, said):
    with pytest.raises(UserError, match=said):
        build_encoder(name, 4)


def test_settings_of_our_own():
    blocks = build_encoder("vit3d:depth=2", 1).blocks
    assert build_encoder("toy:bias=False", 4).down.bias is None
    assert len(blocks) == 2 and len(build_encoder("toy_deep", 4).deep) == 3
