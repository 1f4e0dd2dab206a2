"""The probes of bench/evidence/probe.py on features with a known answer: all separated, or none."""

import sys
from pathlib import Path

import numpy as np
import pytest

EVIDENCE = Path(__file__).resolve().parents[2] / "bench" / "evidence"


@pytest.fixture
def probe(monkeypatch):
    monkeypatch.syspath_prepend(str(EVIDENCE))
    import probe

    yield probe
    del sys.modules["probe"]


def test_wholes_that_differ_are_found_and_noise_is_chance(probe):
    random = np.random.default_rng(0)
    noise = random.normal(size=(12, 8, 12))
    told = probe.probes(np.eye(12)[:, None] * 10 + 0.1 * noise)
    assert told["nearest"] == told["linear"] == told["auc"] == 1.0 and told["nearest_error"] == 0
    none = probe.probes(noise)
    assert none["nearest"] < 0.25 and none["linear"] < 0.3 and abs(none["auc"] - 0.5) < 0.1
