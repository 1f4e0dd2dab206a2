"""The forecast of a start: its parts, and what they grow with."""

import sys

import pytest
from processes import REPO

sys.path.append(str(REPO / "bench"))

from startup import IMPORT_FILES, IMPORT_S, StartupRates, forecast_startup

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
