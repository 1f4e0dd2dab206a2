"""One line and exit code 2 for bad input, whatever is raised inside a command."""

import os
import subprocess
import sys

import processes
import pytest
from processes import REPO

from p2w.errors import UserError, exits


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "said"),
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (raising(UserError("x: wrong; pass y")), 2, "error: x: wrong; pass y\n"),
        (raising(KeyboardInterrupt()), 130, "stopped: Ctrl-C\n"),
    ],
)
def test_exit_codes(main, code, said, capsys):
    with pytest.raises(SystemExit) as end:
        exits(main)()
    assert (end.value.code, capsys.readouterr().err) == (code, said)


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        exits(raising(ZeroDivisionError()))()


COMMANDS = [
    ["-m", "p2w", "--help"], ["-m", "p2w", "report", "--help"], ["-m", "p2w.phantom", "--help"],
    ["preprocess/shard_luna.py", "--help"], ["preprocess/prepare_target.py", "ncs", "--help"], ["launch/train.py", "--help"],
    ["launch/finetune.py", "--help"], ["launch/sweep.py", "--help"], ["launch/analyze.py", "--help"],
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_into_a_pipe_that_is_not_read_to_its_end_is_quiet(command):
    """The reader has ended before the first byte is written, which is the hardest case of `| head`.

    Commands that import torch are forks, where that is done; the others are interpreters, which flush stdout as they end.
    """
    read, write = os.pipe()
    os.close(read)
    env = {**os.environ, "PYTHONPATH": str(REPO), "P2W_DEVICE": "cpu"}
    run = processes.run if command[0].startswith("launch/") else subprocess.run
    ended = run(
        [sys.executable, *command],
        cwd=REPO,
        env=env,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    ("work", "code", "said"),
    [
        ("print('x' * 100_000)", 141, ""),  # in the middle of the work
        ("print('x'); return 3", 141, ""),
        (
            "import socket; a, b = socket.socketpair(); b.close(); a.send(b'x')",
            1,
            "BrokenPipeError",
        ),  # another pipe
    ],
)
def test_a_closed_pipe_ends_a_command_without_a_message(work, code, said):
    read, write = os.pipe()
    os.close(read)
    source = f"from p2w.errors import exits\ndef main():\n    {work}\nexits(main)()"
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    if said:  # and its own stdout is read
        os.close(write)
        write = os.open(os.devnull, os.O_WRONLY)
    ended = subprocess.run(
        [sys.executable, "-c", source], env=env, stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert ended.returncode == code and said in ended.stderr and bool(ended.stderr) == bool(said), (
        ended.stderr
    )
