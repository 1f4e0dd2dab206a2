"""Counts of skipped steps, when each norm is read at once, and when the newest is not read yet (on a GPU)."""

import json

import pytest
import torch

from p2w.errors import UserError
from p2w.log import Log
from p2w.train.budgets import NonfiniteSteps
from p2w.train.step import HostScalar, StepResult
from p2w.world import World


def result(norm: float) -> StepResult:
    return StepResult(torch.tensor(norm), {}, HostScalar(torch.tensor(norm)))


@pytest.fixture
def skips(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("P2W_DEVICE", "cpu")
    return lambda most, lag: NonfiniteSteps(
        most, World.from_env(), lambda id: f"scan/{id}", Log(tmp_path, True, 9), lag
    )


@pytest.mark.parametrize("lag", [0, 1])
def test_a_bad_step_is_named_with_its_own_step_and_sub_scans(skips, tmp_path, lag):
    one = skips(9, lag)
    for step, norm in enumerate((1.0, float("nan"), 2.0, 3.0), start=1):
        one.add(result(norm), torch.tensor([10 * step, 10 * step + 1]), step)
    one.read_all()
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(event["step"], event["keys"]) for event in events] == [(2, ["scan/20", "scan/21"])]
    assert one.in_a_row == 0


def test_what_is_not_read_yet_counts_for_a_checkpoint_and_ends_the_run_a_step_later(skips):
    one = skips(2, lag=1)
    bad = float("inf")
    one.add(result(bad), torch.tensor([1]), 1)
    assert (one.in_a_row, one.in_a_row_now()) == (0, 1)
    one.add(result(bad), torch.tensor([2]), 2)
    assert (one.in_a_row, one.in_a_row_now()) == (1, 2)
    with pytest.raises(UserError, match="step 2, rank 0: 2 steps in a row without a finite gradient"):
        one.add(result(1.0), torch.tensor([3]), 3)


def test_a_good_step_that_is_not_read_yet_ends_the_row(skips):
    one = skips(9, lag=1)
    one.add(result(float("nan")), torch.tensor([1]), 1)
    one.add(result(1.0), torch.tensor([2]), 2)
    assert (one.in_a_row, one.in_a_row_now()) == (1, 0)
    one.read_all()
    assert one.in_a_row == 0
