"""FLOPs of both forms of the up-samplings: counted by hand, by torch, and as --dry-run prints them."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from p2w.config import Config, OptimConfig, PretextConfig
from p2w.model.forms import set_forms
from p2w.model.unet3d import folded_by_count
from p2w.pretext import build_pretext_and_network
from p2w.train.estimate import PEAK, describe_scaling, run_cost

LEVELS = {"decoder.up_tr256": (4, 8, 8), "decoder.up_tr128": (8, 16, 16), "decoder.up_tr64": (16, 32, 32)}


@pytest.fixture(scope="module")
def paper():
    return run_cost(Config(), lambda: build_pretext_and_network(Config()), samples=16, bytes_per_value=2)


def counted(samples, forms):
    """FLOPs of a forward and a backward pass of the paper's network, as torch counts them."""
    with torch.device("meta"):
        network = build_pretext_and_network(Config())[1]
        set_forms(network, forms)
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(samples, 1, 32, 64, 64)).sum().backward()
    return counter.get_total_flops()


def test_the_papers_network_folded(paper):
    """580 GFLOP a sample, 343 folded but for the channels that fill up to a multiple of 8, and 98 a pass for folding."""
    assert paper.flops_per_sample == pytest.approx(580e9, rel=0.01)
    ones = sum(
        3 * 2 * 64 * 7 * cout * d * h * w
        for cout, (d, h, w) in zip((256, 128, 64), LEVELS.values(), strict=True)
    )
    assert paper.folded_flops_per_sample - ones == pytest.approx(343e9, rel=0.01)
    assert paper.fold_flops == 3 * 2 * 216 * (513 * 512 * 256 + 257 * 256 * 128 + 129 * 128 * 64)


@pytest.mark.parametrize("samples", [1, 2, 16])
def test_a_pass_is_what_torch_counts_in_the_forms_that_have_less_arithmetic(paper, samples):
    blocks = dict(build_on_meta().named_modules())
    forms = {
        name: "folded" if folded_by_count(blocks[name], samples, size) else "plain"
        for name, size in LEVELS.items()
    }
    assert paper.flops(samples) == counted(samples, forms)
    assert paper.flops(samples) < counted(samples, {}) == samples * paper.flops_per_sample


def build_on_meta():
    with torch.device("meta"):
        return build_pretext_and_network(Config())[1]


def test_the_page_tells_both_and_the_forecast_takes_the_one_that_would_run(paper):
    page = "\n".join(paper.lines())
    assert (
        "580 GFLOP a sample" in page
        and f"{paper.folded_flops_per_sample / 1e9:,.0f} with every up-sampling folded" in page
    )
    assert f"{paper.fold_flops / 1e9:,.0f} a pass for folding" in page
    peak = PEAK["H200"][0]
    for ranks, passes in ((1, 1), (1, 8), (8, 1)):
        one = replace(paper, passes=passes)
        fastest = 0.5 * peak / (one.flops(16 / ranks / passes) / (16 / ranks / passes)) * ranks
        said = describe_scaling(one, "NVIDIA H200", ranks=ranks, per_node=ranks, batch=16, steps=10)
        assert float(said[0].split("-")[1].split(" samples/s")[0].replace(",", "")) <= 1.001 * fastest
    alone = describe_scaling(paper, "NVIDIA H200", ranks=1, per_node=1, batch=16, steps=10)[0]
    assert alone.startswith(
        f"1 x H200: {0.28 * peak * 16 / paper.flops(16):,.0f}-{0.5 * peak * 16 / paper.flops(16):,.0f} "
    )


@pytest.mark.parametrize(("ranks", "passes"), [(1, 1), (8, 1), (2, 4)])
def test_in_all_is_the_arithmetic_of_the_forms_that_run_and_the_plain_one_beside_it(paper, ranks, passes):
    cost = replace(paper, passes=passes)
    forms = cost.flops(16 / ranks / passes) * ranks * passes * 1000
    plain = 16 * 1000 * cost.flops_per_sample
    assert forms < plain
    assert cost.total(16, ranks, 1000) == (
        f"{forms / 1e15:.2g} PFLOP forward and backward, up-samplings folded where that is less arithmetic; "
        f"{plain / 1e15:.2g} in plain forms"
    )
    unfolded = replace(cost, folds=())
    assert unfolded.total(16, ranks, 1000) == f"{plain / 1e15:.2g} PFLOP forward and backward"
    assert unfolded.total(16, ranks, 10**6) == f"{1000 * plain / 1e15:,.0f} PFLOP forward and backward"
    said = describe_scaling(unfolded, "NVIDIA H200", ranks=ranks, per_node=8, batch=16, steps=10)[-1]
    assert "folded" not in said


def test_with_skips_nothing_is_folded():
    config = Config(pretext=PretextConfig(skips=True), optim=OptimConfig(accumulate=2))
    facts = run_cost(config, lambda: build_pretext_and_network(config), samples=1, bytes_per_value=2)
    assert facts.folds == () and facts.folded_flops_per_sample == facts.flops_per_sample and facts.passes == 2
    assert facts.flops(3) == 3 * facts.flops_per_sample and "folded" not in "\n".join(facts.lines())
