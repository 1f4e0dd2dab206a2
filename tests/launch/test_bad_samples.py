"""Damaged shards and real ranks: stop, or go on in step, counted, until there are too many."""

import shutil

import pytest
from launch_runs import TINY, metrics, status, weights

from p2w.shards.manifest import open_manifest

SKIP = (
    "--data.on-bad-sample",
    "skip",
    "--data.max-bad-share",
    "0.1",
    "--train.steps",
    "9",
    "--train.validate-every",
    "9",
)

BAD = {f"1.2.826.{place}_y0000_x0000" for place in ("0001/z0016", "0004/z0000", "0007/z0016")}


@pytest.fixture(scope="module")
def damaged_set(tiny_set, tmp_path_factory):
    """The small set with one bit flipped in two sub-scans for training and one for validation."""
    folder = tmp_path_factory.mktemp("damaged") / "set"
    shutil.copytree(tiny_set, folder)
    for row in open_manifest(folder).table.to_pylist():
        if row["key"] in BAD:
            with open(folder / row["shard"], "r+b") as file:
                file.seek(row["offset"])
                byte = file.read(1)[0]
                file.seek(row["offset"])
                file.write(bytes([byte ^ 1]))
    return folder


def test_skip_is_the_same_over_restarts_and_counts_the_same_at_any_world_size(forge, damaged_set, tmp_path):
    common = [*TINY, "--shards", damaged_set, *SKIP]
    counts = {}
    for ranks in (1, 2, 4):
        codes, _, err = forge.run(
            tmp_path / str(ranks), *common, "--run-dir", tmp_path / str(ranks) / "run", ranks=ranks
        )
        assert codes == [0] * ranks, err
        named = [line for line in err.splitlines() if line.startswith("warning: rank")]
        assert all("p2w verify" in line and "key 1.2.826" in line for line in named)
        assert {line.split("key ")[1].split(":")[0] for line in named} == BAD
        records = [
            record for record in metrics(tmp_path / str(ranks) / "run") if "data/bad_samples" in record
        ]
        counts[ranks] = [
            (record["step"], record["data/bad_samples"], record["data/bad_share"]) for record in records
        ]
    assert counts[1] == counts[2] == counts[4]
    assert counts[1][-1][1] >= 3 and counts[1][5][1:] == (2, 2 / 24)  # two an epoch of six steps
    codes, _, err = forge.run(
        tmp_path / "again", *common, "--run-dir", tmp_path / "again/run", "--train.steps", 5, ranks=2
    )
    assert codes == [0, 0], err
    codes, _, err = forge.run(tmp_path / "again", *common, "--run-dir", tmp_path / "again/run", ranks=2)
    assert codes == [0, 0], err
    assert weights(tmp_path / "again/run", 9) == weights(tmp_path / "2/run", 9)
    records = [record for record in metrics(tmp_path / "again/run") if "data/bad_samples" in record]
    assert counts[2] == [
        (record["step"], record["data/bad_samples"], record["data/bad_share"]) for record in records
    ]


def test_past_the_share_all_ranks_stop_with_one_line(forge, damaged_set, tmp_path):
    options = [
        *TINY,
        "--shards",
        damaged_set,
        *SKIP,
        "--data.max-bad-share",
        "0.05",
        "--run-dir",
        tmp_path / "run",
    ]
    codes, _, err = forge.run(tmp_path, *options, ranks=2)
    assert codes == [2, 2] and "Traceback" not in err
    lines = {line for line in err.splitlines() if line.startswith("error")}
    assert len(lines) == 1 and "2 of an epoch's 24 samples could not be used" in lines.pop()
    assert status(tmp_path / "run")["state"] == "failed"


def test_the_default_stops_and_names_shard_key_and_command(forge, damaged_set, tmp_path):
    codes, _, err = forge.run(tmp_path, *TINY, "--shards", damaged_set, "--run-dir", tmp_path / "run")
    assert codes == [2]
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    assert "1.2.826.000" in line and ".tar, key" in line and f"p2w verify {damaged_set} --repair" in line


def test_a_set_that_misses_a_shard_is_refused_before_the_process_group(forge, tiny_set, tmp_path):
    shutil.copytree(tiny_set, tmp_path / "set")
    (tmp_path / "set" / "1.2.826.0003.tar").unlink()
    options = [
        *TINY,
        "--shards",
        tmp_path / "set",
        "--run-dir",
        tmp_path / "run",
        "--data.on-bad-sample",
        "skip",
    ]
    forge.torchrun(tmp_path, *options, ranks=2)
    assert forge.wait() != [0]
    err = (tmp_path / "err.txt").read_text()
    assert err.count("1.2.826.0003.tar is missing") >= 1 and "p2w verify" in err and "--repair" in err
    assert "init_process_group" not in err and not (tmp_path / "run").exists()
