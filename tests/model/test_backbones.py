"""Every proxy task on every encoder: it trains, or says in one line why not. Whatever joins the tables is tried."""

from dataclasses import replace

import pytest
import torch
from ct_sets import structured_hu

from p2w.config import Config, ModelConfig, PretextConfig
from p2w.errors import UserError
from p2w.model import ENCODERS, build_encoder
from p2w.pretext import PRETEXTS, build_pretext_and_network
from p2w.rng import SampleKeys
from p2w.train.estimate import run_cost
from p2w.train.optim import Precision
from p2w.train.preflight import convolution_error

# Width, and size of the input: as small as the strides allow. One depth stands for those of the same code.
TINY = {
    "unet3d": (2, (8, 16, 16)),
    "resencl": (1, (32, 32, 64)),
    "vit3d": (1, (16, 16, 16)),
    "primus": (1, (16, 16, 16)),
}
OTHERS = (2, (16, 32, 32))
SAME_CODE = {"resnet18", "resnet34", "resnet101", "resnet152", "resnet200"}
ONLY_WITH_SKIPS = {"dense_vnet"}
NAMES = [
    name
    if name == "unet3d"
    else pytest.param(name, marks=pytest.mark.slow)  # the paper's alone is tried by `make quick`
    for name in sorted(set(ENCODERS) - SAME_CODE)
]


def tiny(encoder: str, pretext: str = "parts2whole", **settings) -> Config:
    width, size = TINY.get(encoder, OTHERS)
    config = Config(pretext=PretextConfig(name=pretext, size=size, **settings))
    return replace(config, model=ModelConfig(name=encoder, width=width))


def wholes(count: int = 4) -> torch.Tensor:
    return torch.stack([torch.from_numpy(structured_hu(n, 0, (32, 64, 64))) for n in range(count)])


@pytest.mark.parametrize("pretext", PRETEXTS)
@pytest.mark.parametrize("encoder", NAMES)
def test_a_step_reaches_every_parameter(encoder, pretext):
    """Gradients that are finite and there for each: DDP waits for ever for one that is not."""
    torch.manual_seed(0)
    try:
        task, network = build_pretext_and_network(tiny(encoder, pretext))
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return
    batch = wholes(4 if encoder == "unet3d" else 2)  # two are enough for batch norms and for negatives
    views = task.sample(batch, SampleKeys(0, 0, torch.arange(len(batch))))
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
    for _ in range(2):  # a memory bank is empty at the first step, and tells the encoder nothing
        optimizer.zero_grad()
        loss, _ = task.loss(network(views.input, *views.extra_inputs), views)
        assert torch.isfinite(loss)
        loss.backward()
        wrong = [
            name
            for name, value in network.named_parameters()
            if value.requires_grad and (value.grad is None or not bool(torch.isfinite(value.grad).all()))
        ]
        assert not wrong
        if any(value.grad is not None and bool(value.grad.any()) for value in network.encoder.parameters()):
            return
        optimizer.step()
    pytest.fail("the loss does not reach the encoder")


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("encoder", NAMES)
def test_bf16_and_channels_innermost(encoder, skips):
    if encoder in ONLY_WITH_SKIPS and not skips:
        with pytest.raises(UserError, match=r"pass --pretext\.skips"):
            build_pretext_and_network(tiny(encoder, skips=skips))
        return
    task, network = build_pretext_and_network(tiny(encoder, skips=skips))
    network.to(memory_format=torch.channels_last_3d)
    views = task.sample(wholes(2), SampleKeys(0, 0, torch.arange(2)))
    with torch.autocast("cpu", torch.bfloat16):
        output = network(views.input)
    assert output.shape == views.target.shape and output.dtype == torch.float32
    task.loss(output, views)[0].backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in network.parameters() if p.requires_grad)


@pytest.mark.parametrize("encoder", NAMES)
def test_what_a_run_asks_of_its_network(encoder):
    """The features analysed, the plan of a dry run, and the check before the first step."""
    config = tiny(encoder, skips=encoder in ONLY_WITH_SKIPS)
    _, network = build_pretext_and_network(config)
    shape = (1, 1, *config.pretext.size)
    assert network.encoder.pooled(torch.rand(2, *shape[1:])).shape == (2, network.encoder.channels[-1])
    facts = run_cost(config, lambda: build_pretext_and_network(config), samples=1, bytes_per_value=4)
    assert facts.parameters == sum(value.numel() for value in network.parameters())
    assert facts.flops_per_sample > 0 and facts.activation_bytes > 0
    bf16 = Precision("bf16", torch.bfloat16, "asked for")
    assert convolution_error(network, bf16, shape, torch.device("cpu")) == ""


@pytest.mark.parametrize("encoder", NAMES)
def test_input_channels(encoder):
    width, size = TINY.get(encoder, OTHERS)
    made = build_encoder(encoder, width, in_channels=3)
    assert made.in_channels == 3
    features = made(torch.rand(1, 3, *size))
    assert [f.shape[1] for f in features] == list(made.channels)
