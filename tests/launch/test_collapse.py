"""A network that has collapsed is named in the log, in status.json and in the report; a healthy one is not."""

import pytest
from launch_runs import TINY, metrics, status

from p2w import report

pytestmark = pytest.mark.slow


def test_a_learning_rate_that_kills_the_network_is_named(forge, tiny_set, tmp_path):
    run = tmp_path / "run"
    argv = [
        "demo",
        *TINY,
        "--optim.lr",
        "1e4",
        "--optim.schedule",
        "constant",
        "--shards",
        tiny_set,
        "--run-dir",
        run,
    ]
    codes, _, err = forge.run(tmp_path, *argv)
    norms = [one["train/grad_norm"] for one in metrics(run) if "train/grad_norm" in one]
    assert codes == [0] and norms[-1] == 0 and "the network has collapsed: from step" in err, (norms, err)
    assert status(run)["state"] == "finished" and "collapsed" in status(run)["why"]
    assert "the network has collapsed" in report.write_report(run).read_text()
