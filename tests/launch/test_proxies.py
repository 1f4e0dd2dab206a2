"""Every kind of generative proxy trains on two ranks, and stopped and continued it gives the same weights, bit for bit."""

import shutil

import pytest
from launch_runs import TINY, metrics, weights

NAMES = {
    "parts2whole": "--intensity.strength 1 --position.weight 0.1",
    "models_genesis": "--genesis.blocks 200",
    "rubiks_cube": "--rubik.orders 5",
    "rubiks_cube_pp": "--rubik.critic-width 2",
    "simmim": "",
    "mae": "--model.name vit3d:depth=1 --mae.decoder-width 12 --mae.decoder-depth 1",
}
FEW = "--train.validate-every 100 --train.probe-every 0 --train.checkpoint-every 2 --pretext.size 16 16 16"


@pytest.mark.parametrize("name", NAMES)
def test_a_proxy_trains_on_two_ranks_and_continues_where_it_stopped(forge, tiny_set, tmp_path, name):
    run = tmp_path / "run"
    argv = ["demo", *TINY, *FEW.split(), "--pretext.name", name, *NAMES[name].split(), "--train.steps", 4]
    argv += ["--shards", tiny_set, "--run-dir", run]

    def train():
        codes, _, err = forge.run(tmp_path / "out", *argv, ranks=2)
        assert codes == [0, 0], err
        return weights(run, 4)

    whole = train()
    losses = [one["train/loss"] for one in metrics(run) if "train/loss" in one]
    assert len(losses) == 4 and all(0 < loss < 10 for loss in losses)
    shutil.rmtree(run / "checkpoints" / "step-00000004")  # as if killed after the checkpoint of step 2
    assert train() == whole
