"""Batch norm over two and three ranks under DDP is that of one rank with the whole batch. Real processes, float64."""

import sys

import processes
import pytest
import torch
from processes import REPO

from tests.model.norm_ranks import SHARES, STEPS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run = processes.run(
        [sys.executable, "tests/model/norm_ranks.py", str(folder)],
        cwd=REPO, env={"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return {size: [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)] for size in SHARES}


@pytest.mark.parametrize(("name", "size"), [("paper", 2), ("foreign", 2), ("foreign", 3)])
def test_statistics_gradients_and_weights_are_the_whole_batchs(found, name, size):
    """Ranks have shares of different sizes, one of them none."""
    (alone,), ranks = ([rank[name] for rank in found[count]] for count in (1, size))
    for step in range(STEPS):
        expected, got = alone["steps"][step], [rank["steps"][step] for rank in ranks]
        torch.testing.assert_close(sum(one["loss"] for one in got), expected["loss"], atol=0, rtol=1e-9)
        for part in ("gradients", "state"):
            assert all(list(one[part]) == list(expected[part]) for one in got)
            for key, value in expected[part].items():
                for one in got:
                    assert torch.equal(one[part][key], got[0][part][key]), f"{key}: ranks differ"
                    torch.testing.assert_close(
                        one[part][key],
                        value,
                        atol=1e-9,
                        rtol=1e-7,
                        msg=lambda text, key=key: f"{key}: {text}",
                    )
    for rank in ranks:
        torch.testing.assert_close(rank["judged"], alone["judged"], atol=1e-7, rtol=1e-7)
