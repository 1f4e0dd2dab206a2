"""The forecast of a start: its parts, and what they grow with."""

import pytest

from p2w.train.estimate import MachineRates, forecast_throughput, poll_s
from p2w.train.startup import IMPORT_FILES, IMPORT_S, StartupRates, forecast_startup

RUN = {"per_node": 8, "cores_per_node": 64, "rows": 28_000, "shards": 888, "checkpoint_bytes": 2e8}


def test_one_process_meets_nobody():
    found = forecast_startup(StartupRates(file_op_s=0.0), ranks=1, **RUN)
    assert found.meeting_s == 0 and found.imports_s == pytest.approx(IMPORT_S)
    assert found.total_s == pytest.approx(found.imports_s + found.shards_s + found.checkpoint_s)


def test_a_busy_server_is_asked_once_a_node():
    rates = StartupRates(file_op_s=2e-4, file_ops_per_s=20_000)
    one, many = (forecast_startup(rates, ranks=n, **RUN) for n in (8, 1024))
    assert one.imports_s == pytest.approx(IMPORT_S + IMPORT_FILES * 2e-4)
    assert many.imports_s == pytest.approx(IMPORT_S + 128 * IMPORT_FILES / 20_000)
    assert many.meeting_s > one.meeting_s and "imports" in many.line()


def test_ten_million_rows_and_more_ranks_than_cores():
    large = RUN | {"rows": 10_000_000, "shards": 300_000}
    wide = forecast_startup(StartupRates(), ranks=8, **large)
    tight = forecast_startup(StartupRates(), ranks=8, **(large | {"cores_per_node": 2}))
    assert 5 < wide.shards_s < 15 < tight.shards_s
    assert tight.imports_s == pytest.approx(wide.imports_s + 3 * IMPORT_S)
    slow = forecast_startup(StartupRates(bytes_per_s_in_all=1e9), ranks=512, **RUN)
    assert slow.checkpoint_s > 64 * 2e8 / 1e9  # 64 nodes read it, and not 512 ranks


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
