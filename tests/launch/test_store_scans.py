"""A run on whole scans: it continues bit for bit, says what it was trained on, and refuses what does not go with it."""

import json
import os
import signal

from ct_files import ct, write
from cut_here import cut_here
from launch_runs import TINY, metrics, status, wait_for, weights

from p2w.config import read_config
from p2w.model import build_encoder
from p2w.report import write_report
from p2w.shards.scan_shards import ShardingSettings
from p2w.shards.tiling import Tiling
from p2w.weights.card import Trained, markdown, model_card

STEPS = 12
FEW = (*TINY, "--train.steps", STEPS, "--train.validate-every", 6)


def test_a_run_on_whole_scans_that_is_killed_ends_with_the_same_bits(forge, tmp_path):
    for number in range(3):
        write(tmp_path / "scans" / f"s{number}.mhd", ct((40, 70, 75), number))
    settings = ShardingSettings(Tiling((16, 32, 32)), store="scans")
    shards = cut_here(tmp_path / "scans", tmp_path / "set", settings).root
    argv = ("demo", *FEW, "--shards", shards, "--run-dir")
    codes, _, err = forge.run(tmp_path / "1", *argv, tmp_path / "whole", ranks=2)
    assert codes == [0, 0], err
    run = tmp_path / "run"
    pids = forge.start(tmp_path / "2", *argv, run, ranks=2, spies=(("lag", 0, 0.1),))
    wait_for((run / "checkpoints" / "step-00000004" / "meta.json").exists, "the first checkpoint")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert forge.wait() == [-9, -9]
    codes, said, err = forge.run(tmp_path / "2", *argv, run, ranks=2)
    assert codes == [0, 0], err
    assert "16 sub-scans to train, 8 to validate, cut from whole scans, in training at random places" in err
    assert status(run)["state"] == "finished"
    assert weights(run, STEPS) == weights(tmp_path / "whole", STEPS) and metrics(run) == metrics(
        tmp_path / "whole"
    )

    told = json.loads((run / "run.json").read_text())["starts"][-1]["data_set"]
    assert told["store"] == "scans" and told["chunk"] == [16, 32, 32] and told["shape"] == [16, 32, 32]
    assert "from whole scans, in training at random places" in write_report(run).read_text()
    config = read_config(run / "config.json")
    card = model_card(
        Trained(run, STEPS, config), build_encoder(config.model.name, config.model.width), "encoder"
    )
    assert card["input"]["store"] == "scans" and "cut at random places of the scans" in markdown(card)

    new = tmp_path / "new"
    for more, why in (
        (("--data.cache-on-device",), "none can be kept: pass --data.no-cache-on-device"),
        (("--pretext.name", "instdisc"), "remembers every whole from epoch to epoch"),
    ):
        codes, _, err = forge.run(tmp_path / "3", *argv, new, *more)
        assert codes == [2] and why in err and len(err.splitlines()) == 1 and not new.exists()
    codes, said, err = forge.run(tmp_path / "4", *argv, new, "--dry-run")
    assert codes == [0] and "to validate, cut from whole scans" in said, err
