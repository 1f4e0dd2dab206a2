"""A run put together in this process: what it leaves where there is little to validate."""

import pytest
from ct_sets import write_structured_set

from p2w.commands import train
from p2w.config import Config, DataConfig, OptimConfig, TrainConfig, check_config
from p2w.pretext.settings import PretextConfig
from p2w.pretrain import elastic_settings, ranks_that_train, shares_batch_norm
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


def elastic(batch, began, ranks, **settings):
    """Passes, and whether batch norm is shared, of a run that goes on with other ranks."""
    optim = OptimConfig(accumulate=settings.get("accumulate", 1))
    config = check_config(
        Config(
            data=DataConfig(batch=batch), optim=optim, train=TrainConfig(elastic=settings.get("elastic", True)),
            pretext=PretextConfig(name=settings.get("pretext", "parts2whole")),
        )
    )  # fmt: skip
    found = elastic_settings(config, began, ranks)
    return found.optim.accumulate, shares_batch_norm(found, ranks)


@pytest.mark.parametrize(
    ("case", "passes", "shared"),
    [
        ((64, 4, 2), 2, False),  # 16 a rank and pass as before: batch norm of the same wholes
        ((96, 4, 3), 2, False),  # 32 a rank, of which 24 do not make equal passes: 16
        ((64, 2, 4), 1, False),
        ((32, 4, 2), 1, True),  # batch norm was shared by the ranks: all wholes of a pass belong together
        ((32, 4, 1), 1, False),  # one rank has them all
        ((128, 8, 2), 4, False),
    ],
)
def test_what_belongs_together_in_a_step_keeps_its_size(case, passes, shared):
    assert elastic(*case) == (passes, shared)


def test_a_loss_that_compares_wholes_keeps_its_passes():
    assert elastic(64, 4, 2, pretext="moco") == (1, False)
    assert elastic(128, 4, 2, pretext="moco", accumulate=2) == (2, False)
    assert elastic(128, 4, 2, accumulate=2) == (4, False)


def test_without_elastic_nothing_changes():
    assert elastic(32, 4, 2, elastic=False) == (1, False)


def test_as_many_ranks_train_as_divide_the_batch():
    config = Config(data=DataConfig(batch=16), train=TrainConfig(elastic=True))
    assert [ranks_that_train(config, ranks) for ranks in (1, 3, 4, 24)] == [1, 2, 4, 16]
    assert ranks_that_train(Config(), 3) == 3  # which the sampler refuses
