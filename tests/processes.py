"""Starting and ending real processes: a new interpreter, or a fork of one that has its imports done."""

import array
import contextlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

REPO = Path(__file__).resolve().parent.parent
# What is read while modules are imported or by the interpreter: the server's own, for all that it forks.
FIXED = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TRITON_INTERPRET", "PYTHONHASHSEED",
    "PYTHONWARNINGS", "PYTHONOPTIMIZE", "PYTHONHOME", "PYTHONSAFEPATH", "LD_PRELOAD", "TORCH_CPP_LOG_LEVEL",
    *(["CUDA_VISIBLE_DEVICES"] if os.path.exists("/dev/nvidiactl") else []),  # without a driver nothing reads it
)  # fmt: skip


def same_modules(env: Mapping[str, str], own: Mapping[str, str]) -> str:
    """Why a process with these variables cannot be a fork of one that imported its modules with `own`; "" if it can."""
    for name in FIXED:
        if env.get(name, own.get(name)) != own.get(name):
            return f"{name}={env[name]}: a fork has {own.get(name)}"
    for path in filter(None, env.get("PYTHONPATH", "").split(os.pathsep)):
        if (Path(path) / "p2w").is_dir():  # the first that has it is imported from
            if not os.path.samefile(path, REPO):
                return f"PYTHONPATH={env['PYTHONPATH']}: a fork has p2w from {REPO}"
            break
    return ""


def torchrun(ranks: int, *args: object, restarts: int = 0) -> list[str]:
    """The command line that starts launch/train.py on `ranks` processes."""
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*agent, f"--max-restarts={restarts}", "launch/train.py", *map(str, args)]


class _Server:
    """tests/fork_server.py, started when it is first asked; forks of this process share it, and it ends with all."""

    def __init__(self) -> None:
        self.name = ""
        self.control: socket.socket | None = None
        self.owner = 0
        self.environment: dict[str, str] = {}
        self.one_request = threading.Lock()

    def start(self) -> None:
        """Begin the imports; returns at once."""
        self.environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("")  # a free name outside of the file system
            listener.listen(64)
            self.name = listener.getsockname()
            self._connect()
            subprocess.Popen(
                [sys.executable, str(REPO / "tests" / "fork_server.py"), str(listener.fileno())],
                stdin=subprocess.DEVNULL, pass_fds=[listener.fileno()], cwd=REPO, env=self.environment,
                start_new_session=True,
            )  # fmt: skip

    def _connect(self) -> None:
        self.owner, self.control = os.getpid(), socket.socket(socket.AF_UNIX)
        self.control.connect(self.name)

    def ask(self, request: dict[str, Any], files: list[int]) -> socket.socket:
        """Begin a command; returns the socket that says its process id, and its exit status when it ends."""
        with self.one_request:
            if not self.name:
                self.start()
            elif self.owner != os.getpid():
                self._connect()
            if reason := same_modules(request["env"], self.environment):
                raise ValueError(f"{reason}; start a new interpreter")
            mine, theirs = socket.socketpair()
            with theirs:
                text = json.dumps(request).encode()
                descriptors = array.array("i", [*files, theirs.fileno()])
                kind = (socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)
                self.control.sendmsg([len(text).to_bytes(4, "big")], [kind])
                self.control.sendall(text)
        return mine


SERVER = _Server()


class Forked(subprocess.Popen):
    """`subprocess.Popen` of a Python command, [sys.executable, …], as a fork: see fork_server.py for what differs.

    `spies` are (name, argument, …) of functions in tests/launch/spies.py, which are called before the command; signals
    in `ignored` are ignored, as of a command that a shell with such traps starts.
    """

    def __init__(
        self, args: list[Any], *, spies: tuple = (), ignored: tuple[int, ...] = (), **options: Any
    ) -> None:
        self._spies, self._ignored = spies, ignored
        words = [os.fspath(word) if isinstance(word, os.PathLike) else str(word) for word in args]
        if words[0] != sys.executable:
            raise ValueError(f"{words[0]}: only {sys.executable} can be forked")
        super().__init__(words, **options)

    def _execute_child(  # what Popen does once its pipes are made
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, restore_signals, gid, gids, uid, umask,
        start_new_session, *_,
    ) -> None:  # fmt: skip
        assert not (preexec_fn or pass_fds or shell or executable)
        with contextlib.ExitStack() as stack:
            null = stack.enter_context(open(os.devnull))
            own = (null.fileno(), 1, 2)
            files = [
                given if given != -1 else one
                for given, one in zip((p2cread, c2pwrite, errwrite), own, strict=True)
            ]
            request = {
                "words": args[1:], "env": dict(os.environ if env is None else env), "cwd": os.fspath(cwd or os.getcwd()),
                "session": bool(start_new_session), "spies": self._spies, "ignored": self._ignored,
            }  # fmt: skip
            self._told = SERVER.ask(request, files)
        for theirs, mine in ((p2cread, p2cwrite), (c2pwrite, c2pread), (errwrite, errread)):
            if mine != -1:  # a pipe; a file is the caller's
                os.close(theirs)
        if hasattr(self, "_devnull"):
            os.close(self._devnull)
        self._closed_child_pipe_fds = True
        self._heard = b""
        while b"\n" not in self._heard:
            self._hear()
        self._child_created = True
        pid, _, self._heard = self._heard.partition(b"\n")
        self.pid = int(pid)

    def _hear(self) -> None:
        more = self._told.recv(64)
        if not more:
            raise RuntimeError("the server of forks has ended")
        self._heard += more

    def _internal_poll(self, _deadstate: int | None = None) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._wait(0)
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if self.returncode is None:
            deadline = None if timeout is None else time.monotonic() + timeout
            with selectors.DefaultSelector() as ready:
                ready.register(self._told, selectors.EVENT_READ)
                while not self._heard.endswith(b"\n"):
                    left = None if deadline is None else max(0.0, deadline - time.monotonic())
                    if not ready.select(left):
                        raise subprocess.TimeoutExpired(self.args, timeout)
                    self._hear()
            self._told.close()
            self.returncode = os.waitstatus_to_exitcode(int(self._heard))
        return self.returncode


GATE_CLIENT = """#!{python} -IS
import json, os, signal, socket, sys

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

def family(pid):
    parents = {{}}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/" + name + "/stat") as file:
                parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            pass
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found

def pass_on(number, _):
    for one in family(pid):
        try:
            os.kill(one, number)
        except ProcessLookupError:
            pass

words, exempt = sys.argv[1:], os.environ.get("{exempt}")
known = tuple(words[:2]) in {forked} or words[:1] == ["launch/finetune.py"]
if known and not (exempt and any(word.endswith(exempt) for word in words)):
    gate = socket.socket(socket.AF_UNIX)
    gate.connect({gate!r})
    ignored = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    text = json.dumps([words, dict(os.environ), os.getcwd(), ignored]).encode()
    socket.send_fds(gate, [len(text).to_bytes(4, "big")], [0, 1, 2])
    gate.sendall(text)
    answer = gate.makefile()
    if pid := int(answer.readline()):
        for number in SIGNALS:
            signal.signal(number, pass_on)
        code = int(answer.readline())
        if code < 0:
            signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        sys.exit(code)
os.execv({python!r}, [{python!r}, *words])
"""
EXEMPT = "P2W_GATE_EXEMPT"  # a variable: a command with a word that ends like this is not forked


class ForkGate:
    """A program `folder/python`, for commands that other programs start: it runs some as forks, all else as it is.

    `forked` are the first two words of the commands that are forked, and `spies` are theirs, as those of `Forked`. A signal
    to the program is passed on to the fork and to all that it has started, as Slurm signals a tree of processes; what the
    program ignores the fork does, and its exit code is the fork's. The fork is in a session of its own, and is killed, with
    all that it has started, when the program is. `living` has the words of each fork that runs, by its process id.
    """

    def __init__(self, folder: Path, forked: set[tuple[str, str]], spies: tuple = ()) -> None:
        self.spies = spies
        self.living: dict[int, list[str]] = {}
        folder.mkdir()
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(os.fspath(folder / "gate"))
        self.server.listen(64)
        text = GATE_CLIENT.format(
            python=sys.executable, gate=os.fspath(folder / "gate"), forked=forked, exempt=EXEMPT
        )
        (folder / "python").write_text(text)
        (folder / "python").chmod(0o755)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                one, _ = self.server.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=[one], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            size, files, _, _ = socket.recv_fds(client, 4, 3)
            with client.makefile("rb") as reader:
                words, env, cwd, ignored = json.loads(reader.read(int.from_bytes(size, "big")))
            own = dict(zip(("stdin", "stdout", "stderr"), files, strict=True))
            try:
                process = Forked(
                    [sys.executable, *words],
                    env=env,
                    cwd=cwd,
                    start_new_session=True,
                    spies=self.spies,
                    ignored=tuple(ignored),
                    **own,
                )
            except ValueError:  # a variable that is read at imports
                client.sendall(b"0\n")
                return
            finally:
                for file in files:
                    os.close(file)
            self.living[process.pid] = words
            client.sendall(f"{process.pid}\n".encode())
            if client in select.select([client, process._told], [], [])[0]:
                kill_group(process)
            code = process.wait()
            del self.living[process.pid]
            with contextlib.suppress(OSError):
                client.sendall(f"{code}\n".encode())

    def close(self) -> None:
        """Fork no more."""
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()


def run(
    args: list[Any], *, capture_output: bool = False, check: bool = False, timeout: float | None = None,
    spies: tuple = (), **options: Any,
) -> subprocess.CompletedProcess:  # fmt: skip
    """`subprocess.run` of a Python command, [sys.executable, …], as a fork: see fork_server.py for what differs."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Forked(args, spies=spies, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args, out, err)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def call(function: Callable[..., object], *args: object, **options: Any) -> Forked:
    """Call a function of a test's module with plain arguments in a process of its own, a fork."""
    module = sys.modules[function.__module__]
    paths = [str(Path(str(module.__file__)).parent), str(REPO / "tests")]
    code = f"import sys; sys.path[:0] = {paths}; import {module.__name__} as test; test.{function.__name__}(*{args})"
    return Forked([sys.executable, "-c", code], cwd=REPO, **options)


def kill_group(process: subprocess.Popen) -> None:
    """SIGKILL the process, its group, and the workers of torchrun, which have sessions of their own."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for pid in [process.pid, *(child.pid for child in family)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
