"""A loss that is not finite on one of two ranks: both skip, nothing changes, the rank and its sub-scans are named."""

import json
import re

from launch_runs import TINY, status


def test_a_bad_loss_on_one_rank_is_named_and_leaves_no_trace(forge, tiny_set, tmp_path):
    run = tmp_path / "run"
    argv = ("demo", *TINY, "--train.steps", 8, "--shards", tiny_set, "--run-dir", run)
    spies = (("poison", 5, 1, str(tmp_path / "state")),)
    codes, _, err = forge.run(tmp_path, *argv, ranks=2, spies=spies)
    assert codes == [0, 0] and status(run)["state"] == "finished", err
    for rank in range(2):
        before, after, applied = json.loads((tmp_path / f"state.{rank}").read_text())
        assert before == after and applied is False
    said = re.findall(r"step 6: gradient norm nan, step skipped on all ranks \(1 in a row\); (.*)", err)
    assert len(said) == 1 and said[0].startswith("the loss of rank 1 was not finite, on 1.2.826.")
    assert "rank 0" not in said[0] and said[0].count("/z") == 2  # rank 1's two of the batch of four
    events = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "skipped" in line
    ]
    assert [event["step"] for event in events] == [6] and len(events[0]["keys"]) == 4
    assert said[0] == events[0]["skipped"] and said[0].endswith(", ".join(events[0]["keys"][2:]))
