"""A run is its folder: continued by its own command, refused to any other, held by one process."""

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from processes import call
from stream_sets import write_set

from p2w.config import Config, config_to_json
from p2w.errors import UserError
from p2w.shards.manifest import data_fingerprint
from p2w.stream import sampler as samplers
from p2w.stream.sampler import Sampler
from p2w.stream.stream import open_set
from p2w.train.run_dir import RunDir
from p2w.weights.load import find_checkpoint

CONFIG = Config()
MACHINE = {"host": "here"}


@pytest.fixture
def run(tmp_path):
    folder = RunDir(tmp_path / "run")
    folder.open(CONFIG, "abc", "shards", MACHINE)
    folder.close()
    return folder


def test_the_same_command_continues_and_every_start_is_noted(run):
    run.check_may_continue(CONFIG, "abc")
    run.open(CONFIG, "abc", "elsewhere/shards", MACHINE)
    run.close()
    assert [start["shards"] for start in json.loads((run.path / "run.json").read_text())["starts"]] == [
        "shards", "elsewhere/shards",
    ]  # fmt: skip
    assert (run.path / "config.json").read_text() == config_to_json(CONFIG)


def test_another_setting_is_refused_by_name(run):
    other = replace(CONFIG, optim=replace(CONFIG.optim, lr=0.5))
    with pytest.raises(UserError, match=r"optim\.lr was 0\.001, now 0\.5\. A run keeps its settings"):
        run.check_may_continue(other, "abc")


def test_length_and_readers_may_change(run):
    longer = replace(
        CONFIG, train=replace(CONFIG.train, steps=9, log_every=1), data=replace(CONFIG.data, reader_threads=0)
    )
    run.check_may_continue(longer, "abc")


def test_another_data_set_is_refused(run):
    with pytest.raises(UserError, match=r"was trained on data set abc, now abd; pass the --shards"):
        run.check_may_continue(CONFIG, "abd")


def test_the_fingerprint_is_of_content_and_not_of_place():
    meta = {
        "shape": [1, 2, 3],
        "tiling": {"z_margin": 0},
        "shards": [{"name": "a", "crc32c": 1}],
        "sources": ["x"],
    }
    assert data_fingerprint(meta) == data_fingerprint({**meta, "sources": ["y"]})
    assert data_fingerprint(meta) != data_fingerprint({**meta, "shards": [{"name": "a", "crc32c": 2}]})


def hold(path):
    folder = RunDir(Path(path))
    folder.open(CONFIG, "abc", "shards", MACHINE)
    print("started", flush=True)
    time.sleep(30)


@pytest.mark.slow
def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    first = call(hold, str(tmp_path / "run"), stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "started\n"
        with pytest.raises(UserError, match=r"another process trains in it \(.*, pid \d+\)"):
            RunDir(tmp_path / "run").open(CONFIG, "abc", "shards", MACHINE)
        first.kill()
        first.wait(10)
        again = RunDir(tmp_path / "run")
        again.open(CONFIG, "abc", "shards", MACHINE)  # a killed process leaves no lock behind
        again.close()
    finally:
        first.kill()
        first.communicate(timeout=10)


@pytest.mark.parametrize("below", ["", "run/deeper"])
def test_a_file_in_the_way_is_one_line(tmp_path, below):
    (tmp_path / "file").write_text("")
    folder = RunDir(tmp_path / "file" / below if below else tmp_path / "file")
    with pytest.raises(UserError, match="name a folder"):
        folder.check_may_continue(CONFIG, "abc")
        folder.open(CONFIG, "abc", "shards", MACHINE)


@pytest.mark.parametrize("name", ["config.json", "run.json"])
@pytest.mark.parametrize("content", [b"", b'{"starts": [{', b"\xff", b"[]", b'{"starts": [{}]}', b"null"])
def test_a_torn_file_is_one_line(run, name, content):
    (run.path / name).write_bytes(content)
    with pytest.raises(UserError, match=str(run.path)) as error:
        run.check_may_continue(CONFIG, "abc")
    assert "\n" not in str(error.value)


def first_ids(shards, folder, steps=3):
    """The sub-scans of the first steps of a run in the folder, as `p2w train` opens the set for it."""
    run = RunDir(folder)
    found = open_set(str(shards), order=run.order(), order_version=run.order_version())
    sampler = Sampler(found, "train", 4, 0, 0, 1, training=True)
    return [sampler.step_ids(0, step).tolist() for step in range(steps)]


def test_an_old_run_keeps_its_order_and_a_new_one_records_its_own(tmp_path, monkeypatch):
    """The ids were recorded from the version that had no other order."""
    monkeypatch.setattr(samplers, "VERSION_2_FROM", 10)
    write_set(tmp_path / "shards")
    old = [[14, 1, 13, 8], [9, 12, 3, 6], [10, 5, 11, 0]]
    new = first_ids(tmp_path / "shards", tmp_path / "none")
    assert new != old
    for start, expected in (
        ({"shards": "shards", "data": "x"}, old),  # before the order was recorded at all
        ({"shards": "shards", "order": "shuffled"}, old),
        ({"shards": "shards", "order": "shuffled", "order_version": 1}, old),
        ({"shards": "shards", "order": "shuffled", "order_version": 2}, new),
    ):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "run.json").write_text(json.dumps({"starts": [start]}))
        assert first_ids(tmp_path / "shards", folder) == expected, start
    (folder / "run.json").write_text(json.dumps({"starts": [start | {"order_version": 3}]}))
    with pytest.raises(UserError, match=r"order of version 3, .*continue it with the version of p2w"):
        RunDir(folder).order_version()


def test_a_rank_that_waits_for_one_that_has_left_does_not_change_how_the_run_ended(run):
    """Of several nodes the first leaves with the store, and the others' watchdogs call that a hang."""

    def state() -> str:
        return json.loads((run.path / "status.json").read_text())["state"]

    def start() -> tuple[RunDir, RunDir]:
        first, other = RunDir(run.path), RunDir(run.path)
        first.open(CONFIG, "abc", "shards", MACHINE)
        return first, other

    first, other = start()
    first.write_status("running", 3)
    first.add_to_start(from_step=3)
    first.write_status("told to stop", 5, "torchrun is gone")
    other.write_status("failed", 5, "hangs: no answer from the rendezvous store")
    assert state() == "told to stop"
    first.close()

    first, other = start()  # the next start hangs before it trains: the state is still that of the one before
    other.write_status("failed", 5, "hangs: rank 0")
    assert state() == "failed"
    first.write_status("running", 5)
    first.add_to_start(from_step=5)
    RunDir(run.path).write_status("failed", 6, "hangs: rank 0")  # and here while it trains
    assert json.loads((run.path / "status.json").read_text())["step"] == 6
    first.close()


def test_a_config_that_was_edited_is_refused(run):
    """Continuing, or a card, would tell of settings that the weights were not trained with."""
    path = run.path / "config.json"
    written = path.read_text()
    edited = replace(CONFIG, pretext=replace(CONFIG.pretext, window_hu=(-500.0, 500.0)))
    path.write_text(config_to_json(edited))
    for check in (lambda: run.check_may_continue(edited, "abc"), lambda: find_checkpoint(run.path)):
        with pytest.raises(UserError, match=r"window_hu is \(-500.*began with \(-1000.*was edited") as error:
            check()
        assert "\n" not in str(error.value)
    longer = replace(CONFIG, train=replace(CONFIG.train, steps=CONFIG.train.steps + 1))
    path.write_text(config_to_json(longer))  # may change
    run.check_may_continue(longer, "abc")
    path.write_text(config_to_json(edited))
    starts = json.loads((run.path / "run.json").read_text())["starts"]
    for start in starts:
        del start["config"]
    (run.path / "run.json").write_text(json.dumps({"starts": starts}))  # as earlier versions wrote it
    run.check_may_continue(edited, "abc")
    path.write_text(written.replace('"batch":', '"batch": 4, "batch":', 1))
    with pytest.raises(UserError, match="'batch' is twice in one object"):
        run.check_may_continue(CONFIG, "abc")


@pytest.mark.parametrize("name", ["transfer.json", "manifest.parquet"])
def test_a_folder_of_a_fine_tuning_or_a_data_set_is_not_trained_in(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=rf"is a .*\({name}\); a pretraining gets its own folder"):
        RunDir(tmp_path).check_may_continue(CONFIG, "abc")
