"""Sweeps: which commands make a table, and running them with a stand-in for `p2w finetune` in real processes."""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from finetune_folders import write_transfer
from processes import REPO, Forked, kill_group
from target_sets import write_target_set

from p2w.errors import UserError
from p2w.reproduce import paper_numbers
from p2w.reproduce import sweep_jobs as reproduce_sweep

pytestmark = pytest.mark.slow

STAND_IN = """
import json, os, sys, time
from pathlib import Path
given = dict(zip(sys.argv[2::2], sys.argv[3::2]))
run, trials = Path(given["--run-dir"]), int(given["--trials"])
if given["--init"] == "broken":
    sys.exit("error: broken: no such file")
run.mkdir(parents=True, exist_ok=True)
settings = {"task": {"name": "ncc", "fingerprint": "f", "kind": "classification"}, "network": "unet3d", "fraction": 1.0,
            "init": {"label": given["--label"], "source": given["--init"]}, "decoder": "scratch", "trials": trials}
(run / "transfer.json").write_text(json.dumps(settings))
for index in range(trials):
    place = run / f"trial-{index:02d}"
    place.mkdir(exist_ok=True)
    if (place / "result.json").exists():
        continue
    with open(run / "begun.txt", "a") as file:
        file.write(f"{index} {os.environ.get('OMP_NUM_THREADS')} {os.environ.get('LOCAL_RANK')}\\n")
    time.sleep(0.25)
    result = {"trial": index, "seed": index, "state": "finished", "metrics": {"auc": 0.9}}
    (place / "half").write_text(json.dumps(result))
    os.replace(place / "half", place / "result.json")
"""
DRIVER = """
import sys
from pathlib import Path
from p2w.reproduce import sweep_jobs as plans
from p2w.reproduce.sweep_jobs import Sweep, SweepSlots as Machine
top, trials = Path(sys.argv[1]), int(sys.argv[2])
tasks = {"ncc": plans.SweepTask(top, "ncc", "classification", 0, "f")}
common = plans.FineTuningPlan(tasks, top / "out", trials, {}, program=(str(top / "stand_in.py"),))
jobs = plans.table1(common, plans.parse_inits(sys.argv[3:]))
print("failed", Sweep(jobs, top / "out", Machine(2, 3, 2)).run("trials"), [job.count() for job in jobs])
"""


@pytest.fixture
def sweep(tmp_path):
    """Start the driver on three rows, as a fork; its output is in `tmp_path/said/out.txt`."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "drive.py").write_text(DRIVER)
    (tmp_path / "said").mkdir()
    started = []

    def begin(trials, *rows):
        words = [str(tmp_path / "drive.py"), str(tmp_path), str(trials), *(rows or ("a=x", "b=y", "c=z"))]
        with open(tmp_path / "said" / "out.txt", "ab") as out:
            started.append(
                Forked(
                    [sys.executable, *words], stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
                    env={**os.environ, "PYTHONPATH": str(REPO)},
                )
            )  # fmt: skip
        return started[-1]

    yield begin
    for one in started:
        kill_group(one)
    for file in (tmp_path / "out" / "logs").glob("*.lock"):
        kill_holders(file)


def kill_holders(lock):
    """Stand-ins that outlived their driver: they have the lock's file open."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            files = [os.readlink(one) for one in Path(f"/proc/{process.pid}/fd").iterdir()]
            if str(lock) in files:
                process.kill()


def begun(top):
    return {
        path.parent.name: path.read_text().splitlines() for path in (top / "out" / "ncc").glob("*/begun.txt")
    }


def results(top):
    return len(list((top / "out").glob("ncc/*/trial-*/result.json")))


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_one_that_fails_is_named_the_others_go_on_and_what_is_done_is_not_done_again(tmp_path, sweep):
    assert sweep(2, "a=x", "bad=broken", "b=y").wait() == 0
    said = (tmp_path / "said" / "out.txt").read_text()
    assert "ncc-bad: ended with code 1: error: broken: no such file; see" in said
    assert "failed ['ncc-bad'] [2, 0, 2]" in said and "4/6 trials" in said
    before = begun(tmp_path)
    assert {line for lines in before.values() for line in lines} <= {
        f"{i} 3 {gpu}" for i in (0, 1) for gpu in (0, 1)
    }
    assert sweep(2).wait() == 0
    assert begun(tmp_path) == before | {"c": begun(tmp_path)["c"]} and results(tmp_path) == 6


def test_killed_outright_no_trial_is_done_twice(tmp_path, sweep):
    """The driver dies, the stand-ins live on and hold their locks: the second driver waits for them."""
    first = sweep(6)
    wait_for(lambda: results(tmp_path) >= 2)
    first.kill()
    first.wait()
    assert results(tmp_path) < 12
    assert sweep(6).wait() == 0
    assert {name: [line.split()[0] for line in lines] for name, lines in begun(tmp_path).items()} == {
        name: list("012345") for name in "abc"
    }


def test_told_to_stop_it_takes_its_jobs_along_and_goes_on_later(tmp_path, sweep):
    first = sweep(4)
    wait_for(lambda: results(tmp_path) >= 1)
    driver = psutil.Process(first.pid)
    jobs = driver.children()
    assert len(jobs) == 2
    driver.send_signal(signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM
    assert not any(job.is_running() and job.status() != psutil.STATUS_ZOMBIE for job in jobs)
    assert "stopped: SIGTERM; the same command goes on" in (tmp_path / "said" / "out.txt").read_text()
    assert sweep(4).wait() == 0 and results(tmp_path) == 12


def common(top, **more):
    names = more.pop("names", ("ncc", "ncs"))
    for name in names:
        if not (top / name).exists():
            kind = "segmentation" if name in ("ncs", "bms") else "classification"
            write_target_set(top / name, kind, (1, 1, 1), 2, 3 if name == "bms" else 0, name)
    sets = reproduce_sweep.parse_tasks([str(top / name) for name in names])
    return reproduce_sweep.FineTuningPlan(
        sets, top / "out", more.pop("trials", 10), more.pop("fraction", {}), **more
    )


def write_pretraining(run, steps, validated):
    for step in steps:
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text("{}")
    lines = [json.dumps({"step": step, "val/loss": 0.1}) for step in validated]
    (run / "metrics.jsonl").write_text("\n".join(lines))


def test_fig3_is_26_checkpoints_five_times_with_the_papers_shares(tmp_path):
    steps = [1759 * at for at in range(1, 101)]
    write_pretraining(tmp_path / "run", [*steps, 175_901], steps)
    jobs = reproduce_sweep.fig3(
        common(tmp_path, trials=paper_numbers.FINE_TUNINGS), tmp_path / "run", paper_numbers.CHECKPOINTS
    )
    assert len(jobs) == 52 and len({job.folder for job in jobs}) == 52 and {job.units for job in jobs} == {5}
    chosen = [int(job.command[job.command.index("--init") + 1].rpartition("@")[2]) for job in jobs[:26]]
    assert chosen[0] == steps[0] and chosen[-1] == steps[-1] and chosen == sorted(set(chosen))
    gaps = {b - a for a, b in pairwise(chosen)}
    assert gaps <= {3 * 1759, 4 * 1759, 5 * 1759}
    shares = [job.command[job.command.index("--fraction") + 1] for job in jobs]
    assert shares == ["0.45"] * 26 + ["0.1"] * 26
    (tmp_path / "short").mkdir()
    write_pretraining(tmp_path / "short", [5, 10], [5])
    with pytest.raises(UserError, match="2 checkpoints, 1 of them validated"):
        reproduce_sweep.fig3(common(tmp_path), tmp_path / "short", 26)
    with pytest.raises(UserError, match="holds no checkpoints"):
        reproduce_sweep.fig3(common(tmp_path), tmp_path / "nowhere", 26)


def test_spread_takes_all_where_there_are_few_and_no_step_twice():
    assert reproduce_sweep.spread_steps([1, 5, 9], 26) == [1, 5, 9]
    assert reproduce_sweep.spread_steps([0, 1, 2, 3, 100], 3) == [0, 3, 100]
    assert len(set(reproduce_sweep.spread_steps([0, 1, 2, 98, 99, 100], 5))) == 5


def test_table2_pretrains_six_networks_and_names_what_each_row_needs(tmp_path):
    jobs = reproduce_sweep.table2(common(tmp_path), "shards", "paper", 4, ["--train.steps", "9"])
    first, rest = jobs[:6], jobs[6:]
    assert all(job.pretrains for job in first) and len(rest) == 12
    assert first[0].line.startswith(
        "torchrun --standalone --nproc_per_node=4 -m p2w train paper --shards shards"
    )
    assert first[0].line.endswith("--pretext.volume-fraction 0.0625 1.0 --pretext.skips --train.steps 9")
    assert ["--pretext.skips" in job.command for job in jobs] == [True] + [False] * 17
    assert [job.needs for job in rest] == [job.name for job in first] * 2
    assert [job.command.count("pretrained") for job in rest] == [0] * 6 + [1] + [
        0
    ] * 5  # none for classification
    assert rest[3].command[rest[3].command.index("--init") + 1] == str(first[3].folder)
    assert rest[3].folder == tmp_path / "out" / "ncc" / "1of16-1of4"


def test_table1_rows_networks_and_refusals(tmp_path):
    rows = reproduce_sweep.parse_inits(
        ["random", "Parts2Whole=runs/p=q@100", "MedicalNet=m.pth,resnet101", "runs/mine"]
    )
    assert [(row.label, row.init, row.network) for row in rows] == [
        ("Scratch", "random", ""), ("Parts2Whole", "runs/p=q@100", ""), ("MedicalNet", "m.pth", "resnet101"),
        ("mine", "runs/mine", ""),
    ]  # fmt: skip
    jobs = reproduce_sweep.table1(
        common(tmp_path, names=("ncc",), width=8, fraction={"": 0.1}, more=("--recipe.lr", "1")), rows
    )
    assert jobs[2].line == (
        f"python -m p2w finetune --task {tmp_path}/ncc --init m.pth --label MedicalNet --trials 10 --network resnet101 "
        f"--width 8 --fraction 0.1 --run-dir {tmp_path}/out/ncc/medicalnet --recipe.lr 1"
    )
    for bad in (["=x"], ["a="], ["a=x", "A=y"]):
        with pytest.raises(UserError, match="--inits"):
            reproduce_sweep.parse_inits(bad)
    own = tmp_path / "ncc"
    for bad in ([], [str(tmp_path / "nowhere")], [f"a={own}", f"A={own}"]):
        with pytest.raises(UserError, match="--tasks"):
            reproduce_sweep.parse_tasks(bad)
    with pytest.raises(UserError, match="no manifest"):
        reproduce_sweep.parse_tasks([str(tmp_path)])


def test_a_set_with_folds_is_a_command_for_each_of_them(tmp_path):
    rows = reproduce_sweep.parse_inits(["random"])
    jobs = reproduce_sweep.table1(common(tmp_path, names=("bms",)), rows)
    assert [job.line.partition("--fold ")[2][0] for job in jobs] == ["0", "1", "2"]
    assert (
        jobs[2].folder == tmp_path / "out" / "bms" / "scratch" / "fold-2" and len({j.name for j in jobs}) == 3
    )
    assert len(reproduce_sweep.table1(common(tmp_path, names=("bms",), folds=(1,)), rows)) == 1
    with pytest.raises(UserError, match=r"--folds 3: .* has folds 0 to 2"):
        reproduce_sweep.table1(common(tmp_path, names=("bms",), folds=(3,)), rows)


def test_what_another_sweep_left_is_not_taken_for_done(tmp_path):
    rows = reproduce_sweep.parse_inits(["random"])
    (job,) = reproduce_sweep.table1(common(tmp_path, names=("ncs",), trials=1), rows)
    write_transfer(job.folder, "ncs", "Scratch", (0.5,), fingerprint=job.test_set)
    assert job.done
    (other,) = reproduce_sweep.table1(common(tmp_path, names=("ncs",), trials=1, fraction={"": 0.1}), rows)
    with pytest.raises(UserError, match=r"--fraction 1, the sweep's are .* and 0\.1; name another --out"):
        _ = other.done


def test_the_command_prints_and_writes_an_array(tmp_path, monkeypatch, capsys):
    common(tmp_path, names=("ncc",))
    monkeypatch.chdir(REPO)
    command = runpy.run_path(str(REPO / "launch" / "sweep.py"))["main"]
    base = ["launch/sweep.py", "table2", "--tasks", str(tmp_path / "ncc"), "--out", str(tmp_path / "out")]
    lists = tmp_path / "jobs.txt"
    monkeypatch.setattr(sys, "argv", [*base, "--array", str(lists)])
    assert command() == 0
    lines = lists.read_text().splitlines()
    assert len(lines) == 6 and all(line.startswith("python -m p2w finetune --task ") for line in lines)
    assert f"sbatch --array=1-6 slurm/finetune.sbatch {lists}" in capsys.readouterr().out
    assert len((tmp_path / "jobs-pretraining.txt").read_text().splitlines()) == 6
    monkeypatch.setattr(sys, "argv", [*base, "--dry-run", "--finetune-args=--recipe.lr 1"])
    assert command() == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 13 and said[-1] == "# 12 commands, 0 done" and said[6].endswith("--recipe.lr 1")
    assert not (tmp_path / "out").exists()
    for wrong in ("--jobs", "--trials", "--ranks"):
        monkeypatch.setattr(sys, "argv", [*base, wrong, "0"])
        with pytest.raises(UserError, match=f"{wrong} 0: must be at least 1"):
            command()
