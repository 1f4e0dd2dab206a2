"""A fork of the server is to its test what a new interpreter is, but for what fork_server.py names."""

import json
import os
import signal
import subprocess
import sys

import processes
import pytest
from processes import REPO, Forked

SEEN = """
import json, os, signal, sys, threading
print(json.dumps({
    "argv": sys.argv, "path": sys.path, "cwd": os.getcwd(), "environment": dict(os.environ), "name": __name__,
    "main": sorted(one for one in vars(sys.modules["__main__"]) if not one.startswith("__")),
    "session": os.getsid(0) == os.getpid(), "group": os.getpgid(0) == os.getpid(), "input": sys.stdin.read(),
    "handlers": [str(signal.getsignal(one)) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE, signal.SIGCHLD)],
    "files": sorted(one for one in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{one}")),
    "threads": threading.active_count(),
}))
"""
POOL = """
import os, sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
def work(number):
    return number * 2, __name__, os.getppid()
if __name__ == "__main__":
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        done = list(pool.map(work, range(4)))
    assert {parent for *_, parent in done} == {os.getpid()}
    print([row[:2] for row in done])
"""
CHILD = """
import subprocess, sys
code = "import os, sys; print(os.environ['MARK'], sys.argv, 'torch' in sys.modules); sys.exit(4)"
env = {"MARK": "child", "PATH": ""}
done = subprocess.run([sys.executable, "-c", code, "x"], env=env, capture_output=True, text=True)
print(done.stdout.strip(), done.returncode)
one = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
one.stdin.close()  # which `Popen` would not come to if it waited for the end of the child
print(one.wait())
"""

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("form", ["-c", "script", "-m"])
def test_it_sees_what_a_new_interpreter_sees(form, tmp_path):
    (tmp_path / "seen.py").write_text(SEEN)
    words = {"-c": ["-c", SEEN], "script": ["seen.py"], "-m": ["-m", "seen"]}[form]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO), "OWN": "ü 1", "PYTHONDONTWRITEBYTECODE": "1"}
    (tmp_path / "input").write_text("given")
    seen = []
    for run in (subprocess.run, processes.run):
        with open(tmp_path / "input") as given:
            done = run(
                [sys.executable, *words, "a b", "--c"], stdin=given, capture_output=True, text=True, cwd=tmp_path, env=env,
                start_new_session=True,
            )  # fmt: skip
        assert done.returncode == 0 and not done.stderr, done.stderr
        seen.append(json.loads(done.stdout))
    seen[0]["environment"].pop("LC_CTYPE", None)  # which an interpreter may set
    seen[1]["environment"].pop("LC_CTYPE", None)
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    "code",
    [
        "", "import sys; sys.exit(3)", "import sys; sys.exit('no such thing')", "raise KeyError(4)", "1 +",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "import sys; sys.exit(-1)", "import os; os._exit(7)",
        "import os, signal; os.kill(os.getpid(), signal.SIGINT)", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import atexit; atexit.register(print, 'end'); print('begin')",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.05), print('late'))).start()",
    ],
)  # fmt: skip
def test_it_ends_and_says_what_a_new_interpreter_does(code):
    real, forked = (
        run([sys.executable, "-c", code], capture_output=True, text=True)
        for run in (subprocess.run, processes.run)
    )
    assert (forked.returncode, forked.stdout, forked.stderr) == (real.returncode, real.stdout, real.stderr)


def test_output_into_a_pipe_without_a_reader_is_code_120():
    read, write = os.pipe()
    os.close(read)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", "print('x')"]
    ends = [
        run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=env)
        for run in (subprocess.run, processes.run)
    ]
    os.close(write)
    assert [end.returncode for end in ends] == [120, 120] and ends[0].stderr == ends[1].stderr


def test_workers_and_children_are_its_own(tmp_path):
    (tmp_path / "pool.py").write_text(POOL)
    said = processes.run([sys.executable, "pool.py"], cwd=tmp_path, capture_output=True, text=True)
    assert said.stdout == f"{[(2 * number, '__mp_main__') for number in range(4)]}\n", said.stderr
    said = processes.run(
        [sys.executable, "-c", CHILD], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert said.stdout == "child ['-c', 'x'] True 4\n0\n", said.stderr


def test_what_it_starts_nicer_is_a_fork_too():
    code = "import subprocess, sys; subprocess.run(['nice', '-n', '3', sys.executable, '-c', sys.argv[1]], check=True)"
    inner = "import os, sys; print(os.nice(0), 'p2w.commands.train' in sys.modules)"
    said = processes.run([sys.executable, "-c", code, inner], capture_output=True, text=True, timeout=60)
    assert said.stdout == f"{min(19, os.nice(0) + 3)} True\n", said.stderr


def test_it_is_waited_for_killed_and_timed_out():
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2)
    code = "import time; print('up', flush=True); time.sleep(60)"
    process = Forked([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n" and process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == process.poll() == -signal.SIGTERM
    process.stdout.close()


def test_what_a_fork_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1: a fork has None"):
        processes.run([sys.executable, "-c", ""], env={**os.environ, "TRITON_INTERPRET": "1"})
    with pytest.raises(ValueError, match=r"PYTHONPATH=.*: a fork has p2w from"):
        (tmp_path / "p2w").mkdir()
        processes.run([sys.executable, "-c", ""], env={"PYTHONPATH": f"{tmp_path}:{REPO}"})
    with pytest.raises(ValueError, match=r"only .*python.* can be forked"):
        processes.run(["bash", "-c", "true"])
