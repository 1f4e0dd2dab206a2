"""The parts of bench/soak.py that judge: exit codes belong to a start, bounds count time in which processes could run."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import processes
import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
RANK = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1], os.environ["RANK"]).touch()
time.sleep(float(sys.argv[2]))
sys.exit(int(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def faults():
    """The modules, and none of them for other tests."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in (BENCH, BENCH.parent / "tests" / "slurm"):
            patch.syspath_prepend(str(folder))
        import faults.launched_run
        import faults.run_clock
        import faults.runs

        yield faults
    for name in [name for name in sys.modules if name.partition(".")[0] == "faults"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def forge(faults):
    forge = faults.launched_run.Forge(processes.Forked)
    yield forge
    forge.close()


@pytest.fixture
def start(faults, forge, tmp_path):
    """Two ranks that sleep for some seconds and exit with a code."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)

    def start(seconds: float, code: int = 0):
        argv = [str(tmp_path), str(seconds), str(code)]
        return faults.launched_run.Forked(forge, tmp_path, argv, 2, script=str(script))

    return start


def test_a_start_that_nobody_waits_for_is_ended_before_the_next(start):
    """Its exit codes were taken for the process ids of the next one, and these for exit codes."""
    forgotten = start(3600)
    later = start(0, code=3)
    assert 3 in later.codes() and {*later.codes()} <= {
        3,
        -signal.SIGTERM,
    }  # the first that fails ends the other
    assert forgotten.codes() == [-signal.SIGKILL] * 2 and not forgotten.running()
    assert not set(later.ranks()) & set(forgotten.ranks())
    for pid in forgotten.ranks():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_exit_codes_can_be_asked_for_again_and_a_kill_spares_later_starts(start):
    first = start(0)
    assert first.codes() == first.codes() == [0, 0]
    second = start(3600)
    first.kill()  # it has ended
    assert second.running()
    second.kill()
    assert second.codes() == [-signal.SIGKILL] * 2 and first.codes() == [0, 0]


def test_an_answer_of_another_start_is_refused(faults):
    """A forge that answers every line with the process ids of start 6."""
    says = """import sys
for line in sys.stdin:
    print('{"number": 6, "pids": [1, 2]}', flush=True)
"""

    def popen(command, **options):
        return processes.Forked([sys.executable, "-c", says], **options)

    forge = faults.launched_run.Forge(popen)
    with pytest.raises(RuntimeError, match=r"start 1: the forge answers .*6.* instead of pids"):
        forge.start({})
    forge.number = 0
    forge.close()


def test_a_process_that_has_got_the_id_of_a_rank_is_not_the_rank(faults):
    """A rank that has ended is not taken for another process, and a zombie does not run."""
    import psutil

    sleeper = subprocess.Popen(["sleep", "3600"])
    rank = psutil.Process(sleeper.pid)
    assert faults.launched_run.alive(rank)
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert not faults.launched_run.alive(rank)  # a zombie
    sleeper.wait()
    assert not faults.launched_run.alive(rank)


@pytest.fixture
def proc(tmp_path):
    """A /proc in which the test says for how long threads have waited for a core."""

    def waited(pid: int, thread: int, seconds: float) -> None:
        folder = tmp_path / str(pid) / "task" / str(thread)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "schedstat").write_text(f"12345 {seconds * 1e9:.0f} 678\n")

    waited.folder = tmp_path
    return waited


def test_time_without_a_core_does_not_count(faults, proc):
    proc(7, 7, 1000.0)  # before the clock began
    clock = faults.run_clock.RunClock(lambda: [7, 8], proc.folder, every=0.0)
    clock.began -= 100.0  # of these 100 s
    assert 100 <= clock.seconds() < 160
    clock.restart()
    clock.began -= 100.0
    proc(7, 7, 1030.0)  # this thread had no core for 30
    proc(7, 9, 20.0)  # and this one for 20 of the same
    assert clock.seconds() >= 70 and clock.waited == pytest.approx(30)
    proc(8, 8, 25.0)  # a process that has come since
    proc(7, 7, 1031.0)
    before = clock.seconds()
    assert clock.waited == pytest.approx(55) and before >= 70  # it does not go back
    (proc.folder / "7" / "task" / "7" / "schedstat").unlink()  # a thread that has ended
    assert clock.seconds() >= before and clock.waited == pytest.approx(55)


def test_a_bound_is_kept_by_the_time_in_which_processes_could_run(faults, proc, monkeypatch):
    """A machine that others fill does not break it; processes that could run and do not, do."""
    runs, asked = faults.runs, 0
    monkeypatch.setattr(
        runs, "RunClock", lambda: faults.run_clock.RunClock(lambda: [7], proc.folder, every=0.0)
    )

    def starved() -> bool:
        nonlocal asked
        asked += 1
        proc(7, 7, 10.0 * asked)  # more than passes
        return asked == 30

    runs.wait_for(starved, "a step", seconds=0.05)
    assert asked == 30
    with pytest.raises(runs.Wrong, match=r"a step did not come in 0 s, without \d+ s for a core"):
        runs.wait_for(lambda: False, "a step", seconds=0.05)
    with pytest.raises(runs.Wrong):
        runs.wait_for(lambda: False, "a step", seconds=0.05, progress=lambda: 3)


def test_progress_begins_a_bound_anew(faults, proc, monkeypatch):
    clocks = []

    def clock():
        clocks.append(faults.run_clock.RunClock(lambda: [], proc.folder))
        return clocks[-1]

    monkeypatch.setattr(faults.runs, "RunClock", clock)
    step = 0
    done = faults.runs.bounded(lambda: step == 5, "the end", 100.0, progress=lambda: step)
    for step in range(1, 5):  # noqa: B007  read by the lambdas
        clocks[0].began -= 90.0
        assert not done()
    clocks[0].began -= 110.0
    with pytest.raises(faults.runs.Wrong, match="the end did not come in 100 s"):
        done()


def test_all_that_a_soak_starts_has_its_mark(faults, monkeypatch):
    """Also what has lost its parent; and nothing else."""
    monkeypatch.setenv("SOAK_PID", "")  # undone at the end
    other = subprocess.Popen(["sleep", "3600"])
    faults.run_clock.mark_children()
    orphan = subprocess.run(
        ["sh", "-c", "sleep 3600 >&- & echo $!"], stdout=subprocess.PIPE, text=True, check=True
    )
    pid = int(orphan.stdout)
    try:
        found = faults.run_clock.marked()
        assert pid in found and os.getpid() in found and other.pid not in found
    finally:
        os.kill(pid, signal.SIGKILL)
        other.kill()
        other.wait()
