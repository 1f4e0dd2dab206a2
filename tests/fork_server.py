"""Runs Python commands as forks of one process that has done the slow imports: 0.1 s of a core instead of 3 to 9.

`processes.Forked` and `processes.run` start it and ask it; nothing else needs to. All workers of a pytest share one. A
request is a line of JSON over a Unix socket, {words, env, cwd, session, spies, ignored}, with four file descriptors: the
command's stdin, stdout and stderr, and a socket on which the server says the process id and, at the end, the exit status
as `os.waitpid` gives it.

The same as for a process that a shell starts: process id, session and group, environment, folder, arguments, `sys.path`,
`__main__` (which workers that are spawned import again), files, signals, exit code, threads that are waited for, `atexit`.
Not the same, and to be tested by a real start where it matters:
- modules are imported before the environment is set: a variable that is read while torch, Triton or NumPy are imported, or
  by the interpreter itself, has no effect. `processes.FIXED` names them, and a request that sets one otherwise is refused;
- `sys.modules` holds more than the command imports, and its seed of `hash` is the same in every fork;
- the interpreter is not taken down, which would take half a second: what only lives in modules is not finalized, and C++
  objects are not destroyed;
- the parent is this server, and /proc/PID/cmdline is the server's own;
- what a command starts with its own interpreter (torchrun its ranks, `multiprocessing` its workers, a sweep its jobs), also
  by `nice`, is forked from it in its turn, unless it runs threads of a library or sets such a variable, and finds its
  modules imported.
"""

import _posixsubprocess
import array
import atexit
import contextlib
import gc
import importlib
import io
import json
import multiprocessing.process
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import NoReturn

from processes import same_modules

PRELOAD = (
    # What training, pictures, curves and checks import only when they need it, or torch does behind its back.
    "torch._dynamo", "torch.distributed.run", "torch.fx.experimental.symbolic_shapes", "torch.utils.tensorboard",
    "matplotlib.backends.backend_agg", "matplotlib.backends.backend_pdf", "matplotlib.backends.backend_svg",
    "matplotlib.figure", "PIL.PngImagePlugin", "rich.progress", "rich.table", "scipy.ndimage", "scipy.stats",
    "sklearn.metrics",
    # The commands.
    "p2w.commands.analyze", "p2w.commands.finetune", "p2w.commands.prepare_target",
    "p2w.commands.shard_luna", "p2w.commands.shard_scans", "p2w.commands.sweep", "p2w.commands.train",
    "p2w.doctor.command", "p2w.inference.predict", "p2w.phantom.target_tasks", "p2w.shards.verify",
    "p2w.train.form_choice", "p2w.weights.export",
    "tests.launch.spies",
    # What reading arguments and checksums import at their first use.
    "typeguard", "rich._emoji_codes", "torch.utils.serialization",
)  # fmt: skip
OPTIONAL = ("awscrt.checksums",)  # of the extra `fast`
TORCHRUN = ["-m", "torch.distributed.run"]
INHERITED = (
    "draw_nothing",
    "recalibrate_on_few",
)  # spies that hold for all that a command starts, not only for the ranks of torchrun
FLAGS = ("-u", "-B")  # of the interpreter, which a fork may go without


class Spies:
    """Those of the command that this process runs, which torchrun hands on to its ranks."""

    given: tuple = ()
    torchrun = False


def run_python(words: list[str]) -> None:
    """Do what `python WORDS` does, with the spies of a test in place."""
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    while words[0] in FLAGS:
        unbuffered |= words[0] == "-u"
        words = words[1:]
    binary = io.FileIO(1, "w", closefd=False)
    binary.name = "<stdout>"
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(
        binary if unbuffered else io.BufferedWriter(binary), sys.stdout.encoding, sys.stdout.errors,
        line_buffering=binary.isatty(), write_through=unbuffered,
    )  # fmt: skip
    sys.stdout.mode = "w"
    sys.stderr = sys.__stderr__
    multiprocessing.process.ORIGINAL_DIR = os.getcwd()  # to which the path of `__main__` is relative
    Spies.torchrun = words[:2] == TORCHRUN
    if not Spies.torchrun:
        for name, *args in Spies.given:
            getattr(sys.modules["tests.launch.spies"], name)(int(os.environ.get("RANK", "0")), *args)
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*paths, *BARE_PATH]
    if words[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *words[2:]]
        sys.modules["__main__"] = main_module = ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(main_module))
    elif words[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = words[1:]
        if not hasattr(sys.modules.get(words[1]), "__path__"):
            sys.modules.pop(words[1], None)  # it is run, and was not imported
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def can_fork(words: list[str], env: dict[str, str]) -> bool:
    """Whether a fork of this process can stand for `WORDS` with these variables: only its own interpreter, and alone."""
    if (
        words[0] != sys.executable
        or not words[1:]
        or (words[1][0] == "-" and words[1] not in ("-c", "-m", *FLAGS))
    ):
        return False
    if "resource_tracker" in words[-1] or same_modules(env, OWN):
        return False
    # A library's threads hold its locks; of torchrun it is known that they do not.
    return Spies.torchrun or threading.active_count() >= len(os.listdir("/proc/self/task"))


def fork_exec(
    args, executables, close_fds, pass_fds, cwd, env, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *more
):  # fmt: skip
    """`_posixsubprocess.fork_exec`, which `subprocess` and `multiprocessing` call, without the exec where that can be."""
    words = [os.fsdecode(word) for word in args]
    nicer = 0
    if words[:2] == ["nice", "-n"]:
        nicer, words = int(words[2]), words[3:]
    pairs = [os.fsdecode(pair).partition("=") for pair in env] if env is not None else []
    given = {name: value for name, _, value in pairs} if env is not None else dict(os.environ)
    session, preexec_fn = more[3], more[9]
    if preexec_fn or not close_fds or not can_fork(words, given):
        return REAL_FORK_EXEC(
            args, executables, close_fds, pass_fds, cwd, env, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *more
        )  # fmt: skip
    pid = os.fork()
    if pid == 0:
        atexit._clear()
        threading._threading_atexits.clear()
        if not Spies.torchrun:
            Spies.given = tuple(spy for spy in Spies.given if spy[0] in INHERITED)
        os.nice(nicer)
        keep = set(pass_fds) - {
            more[1]
        }  # the pipe for an exec that fails, which the parent waits to see closed
        become(words[1:], given, cwd, session, [p2cread, c2pwrite, errwrite], keep)
    return pid


def reset_signals() -> None:
    """As in a new interpreter: what is ignored stays ignored, Python's own functions are gone."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The traceback of the command, without the frames of this file and of `runpy`."""
    while trace and trace.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>", runpy.__file__):
        trace = trace.tb_next
    sys.__excepthook__(kind, error.with_traceback(trace), trace)


def become(
    words: list[str],
    env: dict[str, str],
    cwd: str | None,
    session: bool,
    files: list[int],
    keep: Iterable[int] = (),
) -> NoReturn:
    """Turn this process, which was just forked, into `python WORDS`, and end it as the interpreter would.

    `files` are the descriptors of stdin, stdout and stderr, -1 for those that it has; `keep` are more that it needs.
    """
    code, interrupted = 1, False
    try:
        if session:
            os.setsid()
        for number, file in enumerate(files):
            if file != -1:
                os.dup2(file, number)
        last = 2
        for file in sorted(file for file in keep if file > last):
            os.closerange(last + 1, file)
            last = file
        os.closerange(last + 1, 1 << 16)
        reset_signals()
        os.environ.clear()
        os.environ.update(env)
        if cwd is not None:
            os.chdir(cwd)
        sys.excepthook = excepthook
        run_python(words)
        code = 0
    except SystemExit as end:
        code = exit_code(end)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        interrupted = isinstance(error, KeyboardInterrupt)
    finally:
        end_process(code, interrupted)


def exit_code(end: SystemExit) -> int:
    """The exit code of a process that ends by this; a text is printed, and is code 1."""
    if end.code is None or isinstance(end.code, int):
        return (end.code or 0) & 0xFF
    print(end.code, file=sys.stderr)
    return 1


def end_process(code: int, interrupted: bool) -> NoReturn:
    """Wait for threads, run `atexit`, write out what is buffered, and leave; 120 where stdout cannot be written to."""
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            code = 120
            print(
                f"Exception ignored in: {stream!r}\n{type(error).__name__}: {error}",
                file=sys.stderr,
                flush=True,
            )
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def receive(control: socket.socket) -> tuple[dict, list[int]] | None:
    """The next request and its file descriptors; None where the tests have ended."""
    size = array.array("i")
    data, [*parts], _, _ = control.recvmsg(4, socket.CMSG_SPACE(4 * size.itemsize))
    if not data:
        return None
    for _, _, packed in parts:
        size.frombytes(packed)
    count, text = int.from_bytes(data, "big"), b""
    while len(text) < count:
        text += control.recv(count - len(text))
    return json.loads(text), list(size)


def serve(listener: socket.socket) -> tuple[dict, list[int]] | None:
    """Fork for each request; returns the request in the forked process, and None in the server once no tests are left.

    Each process of tests has a connection of its own: when it ends, what it has started is killed.
    """
    clients: dict[int, socket.socket] = {}
    # pidfd -> process, socket that is told of it, the connection that asked
    living: dict[int, tuple[int, socket.socket, int]] = {}
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        for file, _ in poll.poll():
            if file in living:
                pid, told, _ = living.pop(file)
                poll.unregister(file)
                os.close(file)
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(OSError), told:
                    told.sendall(f"{status}\n".encode())
                continue
            if file == listener.fileno():
                client, _ = listener.accept()
                _, user, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
                if user != os.getuid():  # its address is open to all
                    client.close()
                    continue
                clients[client.fileno()] = client
                poll.register(client, select.POLLIN)
                continue
            asked = receive(clients[file])
            if asked is None:
                for pid, _, client in living.values():
                    if client == file:
                        os.kill(pid, signal.SIGKILL)
                poll.unregister(file)
                clients.pop(file).close()
                if not clients:
                    return None
                continue
            pid = os.fork()
            if pid == 0:
                return asked
            *files, told = asked[1]
            for one in files:
                os.close(one)
            told = socket.socket(fileno=told)
            told.sendall(f"{pid}\n".encode())
            living[ended := os.pidfd_open(pid)] = pid, told, file
            poll.register(ended, select.POLLIN)


def main() -> None:
    """Serve over the listening socket whose descriptor is the only argument."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    gc.disable()
    for name in PRELOAD:
        importlib.import_module(name)
    for name in OPTIONAL:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    sys.modules["p2w.commands.train"].parse(
        ["demo"], speaks=False
    )  # tyro keeps what it has learned of the classes
    gc.enable()
    gc.collect()
    gc.freeze()  # else each fork's collections walk through, and copy, all that was imported here
    if asked := serve(listener):
        request, files = asked
        _posixsubprocess.fork_exec = subprocess._fork_exec = fork_exec
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in request["ignored"]:
            signal.signal(number, signal.SIG_IGN)
        Spies.given = request["spies"]
        become(request["words"], request["env"], request["cwd"], request["session"], files[:3])


OWN = dict(os.environ)
BARE_PATH = sys.path[1 + len([one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]) :]
REAL_FORK_EXEC = _posixsubprocess.fork_exec
if __name__ == "__main__":
    main()
