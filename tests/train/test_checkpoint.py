"""Checkpoints come back bit for bit, or are passed over with a line; nothing that can run code is ever loaded."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import crc32c
import pytest
import torch

from p2w.errors import UserError
from p2w.train import checkpoint
from p2w.train.checkpoint import Checkpoints, Snapshot, seal
from p2w.world import World


def snapshot(step, validation=None, fill=None):
    torch.manual_seed(step if fill is None else fill)
    model = torch.nn.Sequential(torch.nn.Conv3d(1, 2, 3), torch.nn.BatchNorm3d(2))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    model(torch.randn(2, 1, 4, 4, 4)).sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "schedule": {"best": float("inf")}, "skipped": 0}
    return Snapshot(step, model.state_dict(), state, validation)


def same(one, two):
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.fixture
def saved(tmp_path):
    """Checkpoints at steps 1, 2, 3, and the lines they say."""
    said = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3, said.append)
    for step in (1, 2, 3):
        checkpoints.save(snapshot(step))
    checkpoints.said = said
    return checkpoints


def test_round_trip_is_bit_identical(saved):
    found, kept = saved.load_latest(), snapshot(3)
    assert found.step == 3 and same(dict(found.model), dict(kept.model)) and same(found.state, kept.state)
    assert saved.said == [] and not list(saved.folder.glob(".*"))


def test_channels_last_weights_come_back_the_same(tmp_path):
    model = torch.nn.Conv3d(2, 3, 3).to(memory_format=torch.channels_last_3d)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(Snapshot(1, model.state_dict(), {}, None))
    assert torch.equal(checkpoints.load(1).model["weight"], model.weight)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, os.remove, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "meta.json"])
def test_a_damaged_one_is_named_and_passed_over(saved, name, damage):
    damage(saved.path(3) / name)
    if damage is flip and name == "meta.json":
        (saved.path(3) / name).write_text("[3]")
    found = saved.load_latest()
    assert found.step == 2 and same(dict(found.model), dict(snapshot(2).model))
    assert (
        len(saved.said) == 1 and "step-00000003" in saved.said[0] and "taking the one before" in saved.said[0]
    )
    assert "\n" not in saved.said[0]


def test_all_damaged_is_none_with_a_line_each(saved):
    for step in (1, 2, 3):
        truncate(saved.path(step) / "state.pt")
    assert saved.load_latest() is None and len(saved.said) == 3


def test_junk_in_the_folder_is_left_alone(saved):
    for name in ("step-abc", "step-", "step-00000009.bak", "notes"):
        (saved.folder / name).mkdir()
        (saved.folder / name / "meta.json").write_text("{}")
    (saved.folder / "step-00000010").write_text("a file")
    (saved.folder / "best.json").write_text('{"step": ')
    assert saved.load_latest().step == 3
    saved.save(snapshot(4, validation=0.5))
    assert saved.steps() == [2, 3, 4] and saved.best() == 4
    assert (saved.folder / "step-abc" / "meta.json").exists()


def test_a_save_replaces_what_an_earlier_crash_left_half_written(saved):
    beside = saved.folder / ".step-00000004.tmp"
    beside.mkdir()
    (beside / "model.safetensors").write_bytes(b"half")
    assert saved.load_latest().step == 3 and not saved.said
    saved.save(snapshot(4))
    assert saved.load_latest().step == 4 and not beside.exists()


def test_the_last_k_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, validation in enumerate([0.9, 0.5, 0.7, None, float("nan"), 0.6], 1):
        checkpoints.save(snapshot(step, validation))
    assert checkpoints.steps() == [2, 5, 6] and checkpoints.best() == 2
    checkpoints.save(snapshot(7, 0.4))
    assert checkpoints.steps() == [6, 7] and checkpoints.best() == 7
    assert Checkpoints(tmp_path / "none").best() is None


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_is_refused(saved, tmp_path):
    """With a right checksum, so that only weights_only stands between it and the user."""
    folder, sprung = saved.path(3), tmp_path / "sprung"
    torch.save({"optimizer": Trap(str(sprung))}, folder / "state.pt")
    meta = json.loads((folder / "meta.json").read_text())
    meta["crc32c"]["state.pt"] = crc32c.crc32c((folder / "state.pt").read_bytes())
    (folder / "meta.json").write_bytes(seal(meta))
    with pytest.raises(
        UserError, match=r"step-00000003: not a complete checkpoint \(Weights only load failed"
    ):
        saved.load(3)
    assert saved.load_latest().step == 2
    assert not sprung.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs root to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("elements", [20_000, 40_000, 70_000])
def test_a_full_disk_is_one_line_and_the_old_ones_stay(small_disk, elements):
    """80, 160 and 280 kB a file: the weights, the optimizer or the second checkpoint do not fit."""
    checkpoints = Checkpoints(small_disk / "checkpoints")
    checkpoints.save(snapshot(1))
    state = {"optimizer": torch.zeros(elements)}
    began = time.monotonic()
    with pytest.raises(UserError, match=r"not saved \(.*\); make room") as error:
        for step in (2, 3):
            checkpoints.save(Snapshot(step, {"w": torch.zeros(elements)}, state, None))
    assert "\n" not in str(error.value) and time.monotonic() - began < 10
    assert not list(checkpoints.folder.glob(".*"))
    latest = checkpoints.load_latest()
    assert latest.step == checkpoints.steps()[-1]
    checkpoints.save(snapshot(4))
    assert checkpoints.load_latest().step == 4


def test_a_disk_that_is_gone_is_one_line_too(tmp_path):
    """Not even its free space can be asked for; the run is to go on until the next try."""
    (tmp_path / "gone").write_text("")
    with pytest.raises(
        UserError, match=r"not saved \(.*; free space unknown: Not a directory\); mend what the message names"
    ) as error:
        Checkpoints(tmp_path / "gone" / "run" / "checkpoints").save(snapshot(1))
    assert "\n" not in str(error.value)


def test_latest_is_a_relative_link_to_the_newest(saved, tmp_path):
    link = saved.folder / "latest"
    assert os.readlink(link) == "step-00000003"
    saved.folder.rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "latest" / "meta.json").is_file()


def test_what_a_run_goes_on_from_is_latest_and_best_again(saved):
    saved.save(snapshot(4, validation=0.1))
    truncate(saved.path(4) / "state.pt")
    saved.continue_from(saved.load_latest())
    assert os.readlink(saved.folder / "latest") == "step-00000003" and saved.best() is None
    saved.continue_from(None)
    assert not (saved.folder / "latest").is_symlink()


def test_a_file_system_without_links_has_no_latest(saved, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    saved.save(snapshot(4))
    assert saved.load_latest().step == 4 and not (saved.folder / "latest").is_symlink() and not saved.said


def test_one_passed_over_does_not_push_out_what_is_saved_after_it(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1, warn=lambda line: None)
    for step in (1, 2, 9):
        checkpoints.keep = 3
        checkpoints.save(snapshot(step))
    truncate(checkpoints.path(9) / "state.pt")
    checkpoints.keep = 1
    checkpoints.save(snapshot(3))
    assert checkpoints.steps() == [3, 9] and checkpoints.load_latest().step == 3


def test_multiples_of_keep_every_are_kept_for_good(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4)
    for step in range(1, 12):
        checkpoints.save(snapshot(step))
    assert checkpoints.steps() == [4, 8, 10, 11]


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "meta.json"])
@pytest.mark.parametrize("seed", range(25))
def test_any_flip_or_cut_is_found(saved, name, seed):
    """One bit of one byte, another byte in its place, or the end missing: at random places of each file."""
    rng = random.Random(f"{name} {seed}")
    path = saved.path(3) / name
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    if seed % 3 == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif seed % 3 == 1:
        data[at] = (data[at] + rng.randrange(1, 256)) % 256
    else:
        del data[at:]
    path.write_bytes(data)
    found = saved.load_latest()
    assert found.step == 2 and same(dict(found.model), dict(snapshot(2).model))
    assert len(saved.said) == 1 and "step-00000003" in saved.said[0] and "\n" not in saved.said[0]


def test_every_byte_of_meta_json_is_sealed(saved):
    path = saved.path(3) / "meta.json"
    sound = path.read_bytes()
    for place in range(len(sound)):
        data = bytearray(sound)
        data[place] ^= 1 << random.randrange(8)
        path.write_bytes(data)
        with pytest.raises(UserError):
            saved.load(3)
    path.write_bytes(sound.replace(b"\n", b"\r\n"))
    with pytest.raises(UserError):
        saved.load(3)


def test_a_checkpoint_under_another_name_is_not_taken_for_that_step(saved):
    saved.path(3).rename(saved.path(7))
    assert saved.load_latest().step == 2 and "is of step 3" in saved.said[0]


WRITES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree")


def killed_in_a_save(checkpoints, snapshot, at):
    """Save in a forked process that kills itself at its `at`-th touch of the file system; False when it got through."""
    pid = os.fork()
    if pid == 0:
        count = [0]

        def touch(event, _):
            if event in WRITES:
                count[0] += 1
            if event in WRITES and count[0] > at:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(touch)
        try:
            checkpoints.save(snapshot)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 3], ids=["a new step", "one saved again"])
def test_killed_at_every_touch_of_the_disk(saved, tmp_path, step):
    """Whatever the moment: sound ones are there, `latest` and `best` name one of them, and the next save sweeps up."""
    new, sound, at = snapshot(step, validation=0.5, fill=9), tmp_path / "sound", 0
    saved.save(snapshot(3, validation=0.9))
    shutil.copytree(saved.folder, sound, symlinks=True)
    while killed_in_a_save(saved, new, at):
        found = saved.load_latest()
        assert not saved.said and found.step in (2, 3, 4)
        assert found.step != 2 or step == 3
        is_new = found.step == step and found.validation == 0.5
        assert same(dict(found.model), dict((new if is_new else snapshot(found.step)).model))
        if (saved.folder / "latest").is_symlink():
            saved.load(int(os.readlink(saved.folder / "latest").removeprefix("step-")))
        saved.continue_from(found)
        assert os.readlink(saved.folder / "latest") == saved.path(found.step).name
        assert saved.best() == (None if found.step == 2 else found.step if is_new else 3)
        saved.save(snapshot(5))
        assert not list(saved.folder.glob(".*")) and saved.load_latest().step == 5
        shutil.rmtree(saved.folder)
        shutil.copytree(sound, saved.folder, symlinks=True)
        at += 1
    assert at > 15
    assert saved.load_latest().validation == 0.5 and saved.best() == step


@pytest.mark.parametrize("validation", ["gone", "text", [1]])
def test_a_validation_that_is_no_number_is_one_line(saved, validation):
    path = saved.path(3) / "meta.json"
    meta = json.loads(path.read_text())
    meta["validation"] = validation
    if validation == "gone":
        del meta["validation"]
    path.write_bytes(seal(meta))
    with pytest.raises(UserError, match="not a complete checkpoint"):
        saved.load(3)


def test_a_state_that_ends_early_under_a_right_checksum_is_one_line(saved):
    """As someone writes it who knows how: bench/fuzz.py, checkpoint-resealed 38363."""
    folder = saved.path(3)
    (folder / "state.pt").write_bytes(
        b"\x80\x02"
    )  # a pickle that stops after its header: EOFError without a word
    meta = json.loads((folder / "meta.json").read_text())
    meta["crc32c"]["state.pt"] = crc32c.crc32c((folder / "state.pt").read_bytes())
    (folder / "meta.json").write_bytes(seal(meta))
    with pytest.raises(UserError, match=r"not a complete checkpoint \(.+\)$"):
        saved.load(3)


class ThreadWorld(World):
    """A rank that is a thread: what it gathers goes over a list."""

    shared: list = []  # noqa: RUF012 (of one test at a time)
    ready = threading.Barrier(4)

    def gather(self, values):
        self.shared.append((self.rank, values))
        self.ready.wait(20)
        found = torch.cat([one for _, one in sorted(self.shared, key=lambda one: one[0])])
        if self.ready.wait(20) == 0:
            self.shared.clear()
        self.ready.wait(20)
        return found


def load_on_four(folders, monkeypatch):
    """What ranks 0, 1 of one node and 2, 3 of another load, and which ranks computed checksums."""
    verified, said, own = [], [], threading.local()
    computed = checkpoint._checksum
    monkeypatch.setattr(checkpoint, "_checksum", lambda path: verified.append(own.rank) or computed(path))

    def load(rank):
        own.rank = rank
        world = ThreadWorld(rank, 4, rank % 2, 2, f"node{rank // 2}", torch.device("cpu"), "")
        return Checkpoints(folders[rank // 2], 3, said.append).load_on_all_ranks(world)

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(load, range(4))), verified, said


def test_one_rank_of_a_node_compares_the_checksums(saved, monkeypatch):
    found, verified, said = load_on_four([saved.folder] * 2, monkeypatch)
    assert [agreed for _, agreed in found] == [True] * 4 and said == []
    assert all(one.step == 3 and same(one.state, snapshot(3).state) for one, _ in found)
    assert sorted(verified) == [0, 0, 2, 2]  # two files each


def test_a_damaged_checkpoint_is_passed_over_by_all_ranks(saved, monkeypatch):
    with open(saved.path(3) / "state.pt", "r+b") as file:
        file.seek(200)
        file.write(b"\0damage\0")
    found, _, said = load_on_four([saved.folder] * 2, monkeypatch)
    assert [(one.step, agreed) for one, agreed in found] == [(2, True)] * 4
    assert len(said) == 2 and all("taking the one before" in line for line in said)


def test_nodes_with_other_checkpoints_do_not_agree(saved, monkeypatch, tmp_path):
    shutil.copytree(saved.folder, tmp_path / "other", symlinks=True)
    shutil.rmtree(tmp_path / "other" / "step-00000003")
    found, _, _ = load_on_four([saved.folder, tmp_path / "other"], monkeypatch)
    assert [agreed for _, agreed in found] == [False] * 4
    none = [tmp_path / "none"] * 2
    assert load_on_four(none, monkeypatch)[0] == [(None, True)] * 4
