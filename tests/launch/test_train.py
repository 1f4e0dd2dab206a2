"""launch/train.py as users meet it: what it refuses, what it prints, what it leaves behind. Real processes throughout."""

import json
import os
import shutil
import subprocess

import pytest
from ct_sets import write_structured_set
from launch_runs import TINY, metrics, status, weights

SHORT = [*TINY, "--train.steps", "6", "--train.validate-every", "3", "--train.checkpoint-every", "3"]


def finished(result, ranks=1):
    codes, _, err = result
    assert codes == [0] * ranks, err
    assert "Traceback" not in err and "Warning" not in err
    return err


@pytest.fixture(scope="module")
def short(forge, tiny_set, tmp_path_factory):
    """The finished short run on the tar shards; copy it, do not change it."""
    folder = tmp_path_factory.mktemp("short")
    finished(forge.run(folder, "demo", *SHORT, "--shards", tiny_set, "--run-dir", folder / "run"))
    return folder / "run"


def test_one_process_without_torchrun_learns_and_leaves_everything(forge, tiny_set, tmp_path):
    run = tmp_path / "run"
    err = finished(forge.run(tmp_path, "demo", *TINY, "--shards", tiny_set, "--run", run, draws=True))
    assert status(run) == {"state": "finished", "step": 30, "why": ""}
    first, last = [record["val/loss"] for record in metrics(run) if "val/loss" in record][::2]
    assert last < 0.8 * first
    assert {
        "config.json",
        "run.json",
        "status.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "figures",
    } <= {path.name for path in run.iterdir()}
    assert {"loss.png", "reconstruction.png", "similarity.png"} <= {
        path.name for path in (run / "figures").iterdir()
    }
    assert f"{tiny_set}: 24 sub-scans to train, 8 to validate" in err and "always the mean image" in err
    assert str(tiny_set) in (run / "run.json").read_text()


def test_tar_arrow_and_packed_arrow_give_the_same_bits(forge, short, tiny_arrow_set, tmp_path):
    packed = write_structured_set(tmp_path / "zstd", "arrow", compress="zstd")
    plain, small = (
        sum(path.stat().st_size for path in one.glob("*.arrow")) for one in (tiny_arrow_set, packed)
    )
    assert small < plain / 2
    for name, shards in (("arrow", tiny_arrow_set), ("packed", packed)):
        finished(forge.run(tmp_path, "demo", *SHORT, "--shards", shards, "--run-dir", tmp_path / name))
    assert weights(short, 6) == weights(tmp_path / "arrow", 6) == weights(tmp_path / "packed", 6)


BAD = {
    "unknown recipe": (["papr"], "error: recipe papr: unknown; one of demo, paper, large"),
    "no shards": (["demo", "--shards", "{tmp}/none"], "error: {tmp}/none: no"),
    "no such config": (["{tmp}/config.json"], "error: {tmp}/config.json: No such file"),
    "unknown flag": (["demo", "--optim.lrr", "1"], "--optim.lrr"),
    "not a number": (["demo", "--optim.lr", "fast"], "--optim.lr"),
    "bad value": (["demo", "--optim.lr", "-1"], "error: optim.lr=-1.0: must be at least 0"),
    "not a multiple of 8": (
        ["demo", "--pretext.size", "8", "8", "9"],
        "error: pretext.size=(8, 8, 9): each edge",
    ),
    "unknown pretext": (
        ["demo", "--pretext.name", "puzzle"],
        "error: pretext.name=puzzle: unknown; one of amdim, ",
    ),
    "unknown model": (["demo", "--model.name", "resnet"], "error: model.name=resnet: unknown; one of "),
    "too few": (["demo", "--data.batch", "32"], "24 sub-scans do not fill one global batch of 32"),
    "accumulate": (
        ["demo", "--optim.accumulate", "3"],
        "error: optim.accumulate=3: does not divide a rank's 4",
    ),
    "fp16": (["demo", "--train.precision", "fp16"], "error: train.precision=fp16: float16 needs a GPU"),
    "apex": (["demo", "--optim.fused", "apex"], "error: optim.fused=apex: apex is not installed"),
    "run is a file": (["demo", "--run-dir", "{tmp}/file"], "error: {tmp}/file: {tmp}/file is a file"),
    "run below a file": (
        ["demo", "--run-dir", "{tmp}/file/run"],
        "error: {tmp}/file/run: {tmp}/file is a file",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_no_run_folder(forge, tiny_set, tmp_path, name):
    argv, said = BAD[name]
    (tmp_path / "file").write_text("")
    defaults = ["--shards", tiny_set, "--data.batch", 4, "--run-dir", tmp_path / "run"]
    recipe, *flags = [arg.format(tmp=tmp_path) for arg in argv]
    argv = [recipe, *defaults, *flags]
    codes, out, err = forge.run(tmp_path, *argv)
    assert codes == [2], err
    assert said.format(tmp=tmp_path) in err and "Traceback" not in err + out
    if said.startswith("error"):
        assert err.count("\n") == 1, err
    assert not (tmp_path / "run").exists() and (tmp_path / "file").read_text() == ""


def test_a_shard_that_is_missing_or_cut_short_is_named(forge, tiny_set, tmp_path):
    shards = shutil.copytree(tiny_set, tmp_path / "set")
    victim = sorted(shards.glob("*.tar"))[2]
    os.truncate(victim, 4096)
    codes, _, err = forge.run(tmp_path, "demo", "--shards", shards, "--run-dir", tmp_path / "run")
    assert codes == [2] and err.startswith(f"error: {victim} has 4,096 bytes") and err.count("\n") == 1
    victim.unlink()
    codes, _, err = forge.run(tmp_path, "demo", "--shards", shards, "--run-dir", tmp_path / "run")
    assert codes == [2] and err.startswith(f"error: {victim} is missing") and err.count("\n") == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_damaged_sub_scan_stops_all_ranks_and_is_named(forge, tiny_set, tmp_path, ranks):
    shards = shutil.copytree(tiny_set, tmp_path / "set")
    victim = sorted(shards.glob("*.tar"))[3]
    data = bytearray(victim.read_bytes())
    data[60_000] ^= 1
    victim.write_bytes(data)
    argv = ("demo", *SHORT, "--shards", shards, "--run-dir", tmp_path / "run")
    codes, _, err = forge.run(tmp_path, *argv, ranks=ranks)
    assert 2 in codes and set(codes) <= {1, 2}, (codes, err)
    assert err.count("error: ") == 1 and f"shard {victim.name}" in err and "checksum differs" in err
    assert "Traceback" not in err
    assert status(tmp_path / "run")["state"] == "failed"


def test_under_torchrun_each_complaint_comes_once_a_node(forge, tiny_set, tmp_path):
    for argv, said in (
        (["--data.batch", 5], "a global batch of 5 cannot be shared evenly by 2 ranks"),
        (["--x"], "--x"),
    ):
        run = tmp_path / said[:3]
        forge.torchrun(run, "demo", "--shards", tiny_set, "--run-dir", run / "run", *argv, ranks=2)
        assert forge.wait() != [0]
        err = (run / "err.txt").read_text()
        ours = [
            line for line in err.splitlines() if said in line and "traceback : " not in line
        ]  # torchrun's report
        assert len(ours) == 1, err
        assert not (run / "run").exists()


def test_dry_run_prints_the_facts_and_leaves_nothing(forge, tiny_set, tmp_path):
    argv = ("paper", "--shards", tiny_set, "--run-dir", tmp_path / "run", "--data.batch", 8, "--dry-run")
    codes, out, err = forge.run(tmp_path, *argv, ranks=2)
    assert codes == [0, 0] and err == ""
    facts = [
        "recipe          paper", '"volume_fraction": [', f"data            {tiny_set}: 24 sub-scans to train, 8 to validate",
        f"run             {tmp_path / 'run'}", "processes       2 process(es)", "parameters      16.75 M, encoder 7.03 M",
        "580 GFLOP a sample", "memory a rank   0.25 GiB", "steps           351,800 of 8 wholes = 117266.7 epochs of 3 steps",
    ]  # fmt: skip
    for fact in facts:
        assert out.count(fact) == 1, fact
    assert not (tmp_path / "run").exists()


def test_help_names_recipes_and_settings(forge, tmp_path):
    codes, out, _ = forge.run(tmp_path, "demo", "--help", ranks=2)
    assert codes == [0, 0] and out.count("usage: ") == 1
    for text in (
        "demo",
        "paper",
        "large",
        "--shards",
        "--run",
        "--optim.lr",
        "--pretext.volume-fraction",
        "--dry-run",
    ):
        assert text in out


def test_the_defaults_name_the_folder_that_is_missing(forge, tmp_path):
    codes, _, err = forge.run(tmp_path)
    assert codes == [2] and err.startswith("error: shards: no such folder") and "p2w shard-luna" in err


def test_bf16_accumulation_clipping_and_many_epochs(forge, tiny_set, tmp_path):
    options = [
        "--train.precision",
        "bf16",
        "--optim.accumulate",
        "2",
        "--optim.clip-norm",
        "0.01",
        "--data.batch",
        "12",
    ]
    finished(forge.run(tmp_path, "demo", *SHORT, *options, "--shards", tiny_set, "--run-dir", tmp_path / "r"))
    rates = [record["train/grad_norm"] for record in metrics(tmp_path / "r") if "train/loss" in record]
    assert len(rates) == 6 and max(rates) > 0.01  # the norm logged is the one before clipping


def test_early_stop_and_plateau_and_repeating_it(forge, tiny_set, tmp_path):
    """A rate of 0 never improves: the second validation is the first that brings nothing, then the rate is halved."""
    run = tmp_path / "run"
    argv = [
        "demo",
        *SHORT,
        "--optim.warmup-steps",
        0,
        "--optim.lr",
        1e-9,
        "--train.early-stop",
        2,
        "--train.steps",
        60,
        "--train.validate-every",
        2,
    ]
    argv += ["--shards", tiny_set, "--run-dir", run]
    finished(forge.run(tmp_path, *argv))
    said = status(run)
    assert said["state"] == "stopped early" and said["step"] < 60
    rates = {record["train/lr"] for record in metrics(run) if "train/lr" in record}
    assert rates <= {1e-9, 5e-10} and len(rates) == 2
    lines = metrics(run)
    finished(forge.run(tmp_path, *argv))
    assert status(run) == said and metrics(run) == lines


def test_without_validation_scans_it_trains_with_a_warning(forge, tmp_path):
    shards = write_structured_set(tmp_path / "set", train=2, val=0)
    err = finished(
        forge.run(tmp_path, "demo", *SHORT, "--shards", shards, "--run-dir", tmp_path / "run", draws=True)
    )
    assert err.count("warning: ") == 1 and "no scan is set aside" in err
    assert status(tmp_path / "run")["state"] == "finished"
    assert not any("val/loss" in record for record in metrics(tmp_path / "run"))


def test_another_command_on_the_folder_is_refused(forge, tiny_set, short, tiny_arrow_set, tmp_path):
    argv = ["demo", *SHORT, "--shards", tiny_set, "--run-dir", shutil.copytree(short, tmp_path / "run")]
    codes, _, err = forge.run(tmp_path, *argv, "--optim.lr", 5)
    assert codes == [2] and "optim.lr was 0.01, now 5.0" in err and err.count("\n") == 1
    codes, _, err = forge.run(tmp_path, *argv, "--shards", tiny_arrow_set)
    assert codes == [2] and "was trained on data set" in err and err.count("\n") == 1
    (tmp_path / "run" / "config.json").write_text('{"data": ')
    codes, _, err = forge.run(tmp_path, *argv)
    assert codes == [2] and "not JSON" in err and err.count("\n") == 1


def test_a_longer_run_continues_the_shorter_one(forge, tiny_set, short, tmp_path):
    argv = ["demo", *SHORT, "--shards", tiny_set]
    shutil.copytree(short, tmp_path / "two")
    finished(forge.run(tmp_path, *argv, "--run-dir", tmp_path / "two", "--train.steps", 9))
    finished(forge.run(tmp_path, *argv, "--run-dir", tmp_path / "one", "--train.steps", 9))
    assert weights(tmp_path / "one", 9) == weights(tmp_path / "two", 9)


def test_a_full_disk_does_not_end_the_run(forge, tiny_set, tmp_path):
    """Neither weights nor metrics nor figures can be written any more: training goes on, but its end is no success."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs root to mount a small file system")
    try:
        argv = ["demo", *SHORT, "--shards", tiny_set, "--run-dir", disk / "run"]
        finished(forge.run(tmp_path, *argv))
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 65536))
        codes, _, err = forge.run(tmp_path, *argv, "--train.steps", 12, draws=True)
        assert codes == [2] and "step 12: could not be saved" in err and "Traceback" not in err
        (disk / "ballast").unlink()
        finished(forge.run(tmp_path, *argv, "--train.steps", 12))
        assert status(disk / "run") == {"state": "finished", "step": 12, "why": ""}
        lines = (disk / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines if "train/loss" in line] == list(range(1, 13))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
