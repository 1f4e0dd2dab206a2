"""Contrastive runs, killed and continued: what they remember is in the checkpoint, and `p2w.load` finds their encoder."""

import pytest
import torch
from launch_runs import TINY, metrics, status, weights
from safetensors.torch import load_file

import p2w

SIZES = """--train.steps 8 --train.checkpoint-every 3 --train.validate-every 8 --contrast.queue 20 --contrast.bank 32
--contrast.momentum 0.9""".split()  # noqa: SIM905


def run(forge, shards, folder, name, *spies):
    argv = ("demo", *TINY, *SIZES, "--pretext.name", name, "--shards", shards, "--run-dir", folder / "run")
    return forge.run(folder, *argv, ranks=2, spies=spies)


@pytest.mark.parametrize("name", ["moco", "pirl"])
def test_killed_and_continued_it_is_the_run_that_was_not(forge, tiny_set, tmp_path, name):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    codes, _, err = run(forge, tiny_set, whole, name)
    assert codes == [0, 0], err
    codes, _, err = run(forge, tiny_set, killed, name, ("die", 5, 1))
    assert codes[1] == -9, err
    codes, _, err = run(forge, tiny_set, killed, name)
    assert codes == [0, 0] and "continues after step 3 of 8" in err, err
    assert weights(killed / "run", 8) == weights(whole / "run", 8)
    assert metrics(killed / "run") == metrics(whole / "run")
    last = metrics(whole / "run")[-1]
    assert last["similarity/auc"] > 0 and {"val/loss", "val/cosine", "val/accuracy"} <= last.keys()
    encoder = p2w.load(whole / "run").state_dict()
    state = load_file(whole / "run" / "checkpoints" / "step-00000008" / "model.safetensors")
    assert status(whole / "run")["state"] == "finished"
    assert all(torch.equal(value, state[f"encoder.{key}"]) for key, value in encoder.items())
    if name == "moco":
        slow = {key: state[f"negatives.slow_encoder.{key}"] for key in encoder}
        assert any(not torch.equal(slow[key], encoder[key]) for key in encoder)
        assert state["negatives.next"] == 12 and (state["negatives.ids"] >= 0).all()
