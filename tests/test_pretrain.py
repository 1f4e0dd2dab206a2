"""A run put together in this process: what it leaves where there is little to validate."""

import pytest
from ct_sets import write_structured_set

from p2w.commands import train
from p2w.world import World


@pytest.mark.slow
def test_a_run_with_one_volume_to_validate_draws_its_figures(tmp_path, monkeypatch, capfd):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("P2W_DEVICE", "cpu")
    shards = write_structured_set(tmp_path / "set", train=4, val=1, per=1)
    argv = ["demo", "--shards", str(shards), "--run-dir", str(tmp_path / "run"), "--train.steps", "1"]
    small = ["--data.batch", "2", "--pretext.size", "8", "16", "16", "--model.width", "2"]
    small += ["--train.precision", "fp32"]
    world = World.start()
    assert train.work(train.build([*argv, *small, "--log.to", "none"], world), world) == 0
    assert "not written" not in capfd.readouterr().err
    assert {"reconstruction.npz", "reconstruction.png", "loss.png"} <= {
        path.name for path in (tmp_path / "run" / "figures").iterdir()
    }
