"""The throughput forecast against values computed by hand."""

import pytest

from p2w.train.estimate import (
    MachineRates,
    RunCost,
    all_reduce_s,
    describe_scaling,
    forecast_throughput,
    known_device,
    poll_s,
    sustained_rates,
)

PAPER = {"flops_per_sample": 580e9, "gradient_bytes": 67e6, "sample_bytes": 2 << 20}


def test_one_rank_is_its_arithmetic():
    found = forecast_throughput(MachineRates(1e14, 1e11, 1e10), ranks=1, per_node=8, batch=16, **PAPER)
    assert found.step_s == pytest.approx(16 * 580e9 / 1e14) and found.all_reduce_s == 0
    assert found.samples_per_s == pytest.approx(1e14 / 580e9) and found.limit == "arithmetic"


def test_a_ring_moves_every_byte_twice_but_for_its_own_share():
    rates = MachineRates(1e14, 1e9, 1e8, hop_s=0.0)
    assert all_reduce_s(rates, 1e9, 2, 8) == pytest.approx(1.0)
    assert all_reduce_s(rates, 1e9, 4, 8) == pytest.approx(1.5)
    assert all_reduce_s(rates, 1e9, 4, 2) == pytest.approx(15.0)  # over the slower wire between nodes


def test_a_tree_is_taken_where_hops_cost_more_than_bytes():
    assert all_reduce_s(MachineRates(1, 1e12, 1e12, hop_s=1.0), 1.0, 1024, 8) == pytest.approx(20.0)


def test_sums_hide_behind_the_backward_pass_but_for_the_last_bucket():
    wide, narrow = (
        forecast_throughput(
            MachineRates(580e9, speed, speed, hop_s=0.0), ranks=2, per_node=2, batch=2, **PAPER
        )
        for speed in (1e12, 67e6)
    )
    assert wide.exposed_s == pytest.approx(wide.all_reduce_s * (25 << 20) / 67e6)
    assert narrow.all_reduce_s == pytest.approx(1.0) and narrow.exposed_s == pytest.approx((25 << 20) / 67e6)
    bare = forecast_throughput(
        MachineRates(580e9, 67e6, 67e6, 0.0, hidden=0.0), ranks=2, per_node=2, batch=2, **PAPER
    )
    assert bare.step_s == pytest.approx(2.0)


def test_slow_reading_is_the_limit():
    rates = MachineRates(580e15, 1e15, 1e15, hop_s=0.0, read_bytes_per_s=2 << 20)
    found = forecast_throughput(rates, ranks=16, per_node=8, batch=16, **PAPER)
    assert found.step_s == pytest.approx(1.0) and found.limit == "reading"


def test_known_cards():
    name, rates = known_device("NVIDIA H200")
    low, high = sustained_rates(rates)
    assert name == "H200" and known_device("AMD EPYC") is None
    rates = [
        forecast_throughput(one, ranks=1, per_node=8, batch=16, **PAPER).samples_per_s for one in (low, high)
    ]
    assert rates[0] == pytest.approx(0.28 * 989e12 / 580e9) and rates[1] > 680


def test_lines_for_a_person():
    cost = RunCost(16_750_000, 7_030_000, 580_000_000_000, 0, 0, 0)
    here = describe_scaling(cost, "NVIDIA H200", ranks=4, per_node=4, batch=16, steps=351_800)
    assert here[0].startswith("4 x H200: 1,8") and "limit: arithmetic" in here[0] and len(here) == 2
    other = describe_scaling(cost, "", ranks=1, per_node=1, batch=12, steps=10)
    assert [line.split(":")[0] for line in other] == ["1 x H100", "assumed"]  # 8 do not share a batch of 12


def test_the_question_for_stop_requests_is_in_the_forecast_of_a_step():
    paper = {"flops_per_sample": 580e9, "gradient_bytes": 67e6, "sample_bytes": 2 << 20}
    rates = MachineRates(1e14, 1e11, 1e10)
    alone, pair, many = (
        forecast_throughput(rates, ranks=n, per_node=8, batch=16 * n, **paper) for n in (1, 2, 1024)
    )
    assert alone.stop_s == 0 and poll_s(2) == pytest.approx(6e-4)  # measured between two ranks
    assert pair.stop_s == pytest.approx(6e-4 * pair.step_s / 0.25)
    assert many.samples_per_s == pytest.approx(16 * 1024 / (many.step_s + many.stop_s))
    assert 0 < many.stop_s < 0.03 * many.step_s
    slow = forecast_throughput(MachineRates(1e12, 1e11, 1e10), ranks=2, per_node=8, batch=32, **paper)
    assert slow.step_s > 1 and slow.stop_s == poll_s(2)  # at every step, and no more often
