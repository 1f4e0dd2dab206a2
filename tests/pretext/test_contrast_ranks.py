"""At 1, 2 and 4 ranks: loss, gradients, queue, bank and validation of one rank with the whole batch. Real processes."""

import sys

import processes
import pytest
import torch
from processes import REPO

from tests.pretext.contrast_ranks import NAMES, STEPS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "tests/pretext/contrast_ranks.py", str(folder)]
    run = processes.run(
        command, cwd=REPO, env={"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return {size: [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)] for size in (1, 2, 4)}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_ranks_is_one(found, name, size):
    (alone,), ranks = found[1], found[size]
    for step in range(STEPS):
        mean = sum(rank[name]["losses"][step] for rank in ranks) / size
        assert mean == pytest.approx(alone[name]["losses"][step], rel=2e-6)
        for key, value in alone[name]["states"][step].items():
            for rank in ranks:
                other = rank[name]["states"][step][key]
                assert torch.equal(other, ranks[0][name]["states"][step][key]), f"{key}: ranks differ"
                assert torch.allclose(other.double(), value.double(), rtol=1e-4, atol=2e-6), key
    for place, value in enumerate(alone[name]["judged"]):
        together = torch.cat([rank[name]["judged"][place] for rank in ranks])
        assert torch.allclose(together, value, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_training_moved_all_that_is_trained_and_all_that_follows(found, name):
    first, *_, last = found[1][0][name]["states"]
    still = [key for key, value in last.items() if torch.equal(value, first[key])]
    assert still in ([], ["decoder.conv.bias"])


def test_the_queue_holds_the_newest_parts_in_the_order_of_the_batch(found):
    state = found[4][2]["moco"]["states"][-1]
    assert state["negatives.next"] == 4  # 24 parts in 20 places
    assert state["negatives.ids"].tolist() == [
        17,
        18,
        6,
        19,
        4,
        5,
        6,
        7,
        8,
        9,
        10,
        8,
        11,
        12,
        13,
        14,
        3,
        1,
        15,
        16,
    ]
    assert torch.allclose(state["negatives.queue"].norm(dim=1), torch.ones(20))
