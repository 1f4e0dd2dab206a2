"""bf16 on the CPU gives gradients one can trust, at every depth a network's coarsest map may have."""

import pytest
import torch

from p2w.model import build_encoder
from p2w.model.conv import Conv3d


def litter() -> None:
    """Leave memory behind that holds no zeros: what reads before it writes is found out."""
    for count in (500, 5_000, 50_000, 500_000, 2_000_000):
        torch.full((count,), float("nan"))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format])
def test_gradients_in_bf16_are_those_of_fp32(depth, layout):
    torch.manual_seed(0)
    conv = Conv3d(16, 32, kernel_size=3, padding=1).to(memory_format=layout)
    x = torch.randn(2, 16, depth, 4, 4).to(memory_format=layout)
    out = conv(x)
    by = torch.randn_like(out)
    out.backward(by)
    expected = conv.weight.grad.clone()
    for _ in range(6):
        litter()
        conv.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            conv(x).float().backward(by)
        torch.testing.assert_close(
            conv.weight.grad, expected, atol=0.02 * float(expected.abs().max()), rtol=0
        )


@pytest.mark.parametrize("size", [(8, 16, 16), (16, 32, 32), (24, 16, 16)])
def test_a_bf16_step_of_the_encoder_has_the_same_bits_each_time(size):
    """The demo recipe's coarsest map has two slices; its runs differed from the second step on."""
    torch.manual_seed(0)
    encoder = build_encoder("unet3d", 4).to(memory_format=torch.channels_last_3d)
    x, found = torch.rand(2, 1, *size), []
    for _ in range(4):
        litter()
        encoder.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            encoder(x)[-1].float().square().mean().backward()
        found.append(
            [parameter.grad.clone() for parameter in encoder.parameters() if parameter.requires_grad]
        )
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
