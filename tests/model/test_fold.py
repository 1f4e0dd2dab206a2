"""Up-sampling and convolution as one against the two one after the other: float64, gradients, bf16, FLOPs."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from p2w.model.decoder import UpsampleBlock
from p2w.model.unet3d import Up, fold_cost_of, folded_by_count

BLOCKS = {
    "up": lambda: Up(6, 0, 4),
    "widen": lambda: UpsampleBlock(5, (2, 2, 2), 0, 3),
    "eight channels": lambda: Up(8, 0, 2),
}
SIZES = [(3, 5, 4), (1, 1, 1), (2, 1, 3)]


def both(block):
    """The same block in its two forms."""
    folded = copy.deepcopy(block)
    folded.form = "folded"
    return block, folded


def outcome(block, x, by):
    """Output, gradient of the input and of every parameter that has one, of sum(output * by)."""
    x = x.detach().requires_grad_()
    out = block.formed(x)
    used = [x, *block.up_conv.parameters(), *(p for p in block.ops[0].conv1.parameters() if p.requires_grad)]
    return out.detach(), *torch.autograd.grad(out, used, by.to(out.dtype))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_output_and_gradients_in_float64(name, training, size):
    torch.manual_seed(0)
    plain, folded = both(BLOCKS[name]().double().train(training))
    x = torch.randn(2, plain.up_conv.in_channels, *size, dtype=torch.float64)
    by = torch.randn_like(plain.formed(x))
    expected, found = outcome(plain, x, by), outcome(folded, x, by)
    torch.testing.assert_close(found[0], expected[0], atol=1e-13, rtol=0)
    for gradient, right in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(gradient, right, atol=1e-12, rtol=1e-12)


def test_the_convolutions_bias_counts_in_eval_mode_and_where_it_is_trained():
    torch.manual_seed(0)
    plain, folded = both(Up(3, 0, 2).double())
    x = torch.randn(1, 3, 2, 2, 2, dtype=torch.float64)
    without = folded.formed(x)
    for change in (lambda block: block.eval(), lambda block: block.train().ops[0].conv1.requires_grad_()):
        for block in (plain, folded):
            change(block)
        torch.testing.assert_close(folded.formed(x), plain.formed(x), atol=1e-13, rtol=0)
        moved = folded.formed(x) - without
        bias = plain.ops[0].conv1.bias.detach().view(1, -1, 1, 1, 1).expand_as(moved)
        torch.testing.assert_close(moved, bias, atol=1e-13, rtol=0)


@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_bf16_is_within_rounding_and_the_layout_stays(depth, layout):
    """Memory round about holds NaN: at D = 2, oneDNN's own convolutions in bf16 have read what they never wrote."""
    torch.manual_seed(0)
    plain, folded = both(Up(16, 0, 8).to(memory_format=layout))
    x = torch.randn(2, 16, depth, 4, 5).to(memory_format=layout)
    by = torch.randn_like(plain.formed(x))
    expected = outcome(plain, x, by)
    for _ in range(3):
        for count in (500, 5_000, 50_000, 500_000):
            torch.full((count,), float("nan"))
        with torch.autocast("cpu", torch.bfloat16):
            found = outcome(folded, x, by)
        assert found[0].is_contiguous(memory_format=layout)
        for value, right in zip(found, expected, strict=True):
            torch.testing.assert_close(value.float(), right, atol=0.02 * float(right.abs().max()), rtol=0)


@pytest.mark.parametrize(
    "block", [Up(4, 2, 3), UpsampleBlock(4, (1, 2, 2), 0, 3), UpsampleBlock(4, (1, 1, 1), 0, 3)]
)
def test_what_cannot_be_folded_says_so(block):
    assert block.possible_forms() == ("plain",) and fold_cost_of(block, (2, 2, 2)) is None
    assert not folded_by_count(block, 1_000, (8, 8, 8))


@pytest.mark.parametrize("name", BLOCKS)
def test_flops_are_those_that_torch_counts_also_of_the_fold(name):
    plain, folded = both(BLOCKS[name]())
    size, cost = (3, 5, 4), fold_cost_of(plain, (3, 5, 4))
    for block, samples, expected in (
        (plain, 2, 2 * cost.plain),
        (folded, 1, cost.folded + cost.fold),
        (folded, 3, 3 * cost.folded + cost.fold),
    ):
        with FlopCounterMode(display=False) as counter:
            out = block.formed(torch.rand(samples, block.up_conv.in_channels, *size, requires_grad=True))
            forward = counter.get_total_flops()
            out.sum().backward()
        assert forward == expected and counter.get_total_flops() == 3 * expected


def test_the_papers_coarsest_level_is_folded_for_a_whole_batch_and_not_for_two_samples():
    with torch.device("meta"):
        levels = {(4, 8, 8): Up(512, 0, 256), (8, 16, 16): Up(256, 0, 128), (16, 32, 32): Up(128, 0, 64)}
    assert [folded_by_count(level, 16, size) for size, level in levels.items()] == [True] * 3
    assert [folded_by_count(level, 2, size) for size, level in levels.items()] == [False, True, True]
