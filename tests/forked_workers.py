"""`pytest --workers N`: whole files of tests run in N forks of the process that has collected them.

Importing what the tests use and collecting them takes 14 s of a core. Workers that are interpreters of their own, as those
of pytest-xdist, spend them each; here they are spent once, and a worker costs a fork, so that there can be more workers than
cores for tests that wait.

A worker runs the quick tests of a file, or its slow ones, and asks for more; fixtures of a session are made once in each
worker. Reports reach this process as if it ran the tests itself: `-x`, `--durations` and `--junitxml` do as ever.
"""

import collections
import contextlib
import gc
import os
import signal
import sys
import time
import traceback
import warnings
from multiprocessing import connection

import pytest
from _pytest.runner import runtestprotocol

# Collecting asks torch whether there is a GPU, which leaves forks without it unless torch asks the driver's library.
NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
CROWD = 4  # threads a core that compute: half of the workers wait until there are no more
LEAVE_S = 20  # that workers have to end what their fixtures have started


class _Sender:
    """The plugin of a worker: runs a test and sends what is reported about it."""

    def __init__(self, config: pytest.Config, link: connection.Connection) -> None:
        self.config, self.link = config, link
        self.ready = False  # until then it hears again of warnings that were said before

    def send(self, report: pytest.TestReport) -> None:
        self.link.send(
            ("report", self.config.hook.pytest_report_to_serializable(config=self.config, report=report))
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        self.link.send(("start", (item.nodeid, item.location)))
        for report in runtestprotocol(item, log=False, nextitem=nextitem):
            self.send(report)
        self.link.send(("finish", (item.nodeid, item.location)))
        return True

    def pytest_warning_recorded(
        self, warning_message: warnings.WarningMessage, when, nodeid, location
    ) -> None:
        if not self.ready:
            return
        said = (str(warning_message.message), warning_message.category.__name__)
        self.link.send(
            ("warning", (*said, warning_message.filename, warning_message.lineno, when, nodeid, location))
        )


def _failed(nodeid: str, text: str) -> pytest.TestReport:
    """The report of what went wrong outside of a test's own phases."""
    place = (nodeid.partition("::")[0], None, nodeid)
    return pytest.TestReport(nodeid, place, {}, "failed", text, "teardown")


def _interrupt_once(*_: object) -> None:
    """SIGINT comes from the terminal and from the first process; the second one must not disturb how fixtures end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _work(session: pytest.Session, link: connection.Connection, number: int) -> None:
    """Run what the first process names, range after range of the session's items; then take down what fixtures made."""
    config = session.config
    os.environ.pop(NVML)
    if capture := config.pluginmanager.getplugin(
        "capturemanager"
    ):  # its files' positions are shared with other workers
        capture.stop_global_capturing()
        capture.start_global_capturing()
        capture.suspend_global_capture()
    folder = config._tmp_path_factory.getbasetemp() / f"w{number}"
    folder.mkdir(mode=0o700)
    config._tmp_path_factory._basetemp = folder
    sender = _Sender(config, link)
    config.pluginmanager.register(sender)
    sender.ready = True
    signal.signal(signal.SIGINT, _interrupt_once)
    try:
        while items := link.recv():
            chosen = [session.items[index] for index in items]
            for item, after in zip(
                chosen, [*chosen[1:], session], strict=True
            ):  # fixtures of the session stay
                config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            link.send(("idle", None))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        pass  # the first process ends, or wants an end
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            session._setupstate.teardown_exact(None)
        except BaseException:  # also what pytest.fail raises
            with contextlib.suppress(OSError):
                sender.send(_failed(f"fixtures of worker {number}", traceback.format_exc()))


class _Worker:
    """A fork, the link to it, the items that it was told to run, and the test that it is in."""

    def __init__(self, session: pytest.Session, number: int, others: list["_Worker"]) -> None:
        self.link, theirs = connection.Pipe()
        self.items: collections.deque[int] = collections.deque()
        self.at: str | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                self.link.close()
                for other in others:  # that the end of the first process is seen by all
                    other.link.close()
                _work(session, theirs, number)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        theirs.close()

    def run(self, items: list[int]) -> None:
        """Let it run these; none are its end."""
        self.items = collections.deque(items)
        with contextlib.suppress(OSError):  # it has died: its end is read from the link
            self.link.send(items)


class ForkedWorkers:
    """The plugin of the first process: hands out the tests in the order of the items, and takes the reports."""

    def __init__(self, config: pytest.Config, most: int) -> None:
        gc.disable()  # imports make few cycles, and collections among them take a second
        os.environ[NVML] = "1"
        self.config, self.most = config, most
        self.cores = len(os.sched_getaffinity(0))
        self.started = 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed or session.config.option.collectonly:
            return None  # as without workers
        session.config._tmp_path_factory.getbasetemp()
        gc.freeze()  # else each worker's collections walk through, and copy, all that is here
        gc.enable()
        groups: dict[tuple[bool, str], list[int]] = {}
        for index, item in enumerate(session.items):
            groups.setdefault((is_slow(item), item.nodeid.partition("::")[0]), []).append(index)
        left = collections.deque((slow, items) for (slow, _), items in groups.items())
        workers: list[_Worker] = []
        try:
            self._loop(session, left, workers)
        finally:
            self._end(workers)
        return True

    def _loop(self, session: pytest.Session, left: collections.deque, workers: list[_Worker]) -> None:
        idle: list[_Worker] = []
        while True:
            while left and self._may_begin(left[0][0], len(workers), len(idle)):
                if not idle:
                    workers.append(self._start(session, workers))
                    idle.append(workers[-1])
                idle.pop().run(left.popleft()[1])
            if not left:
                for worker in idle:
                    worker.run([])
                idle = []
            if not workers:
                return
            for link in connection.wait([worker.link for worker in workers], 0.5 if left else None):
                worker = next(one for one in workers if one.link is link)
                try:
                    kind, said = link.recv()
                except (EOFError, OSError):
                    workers.remove(worker)
                    idle = [one for one in idle if one is not worker]
                    self._died(worker, left)
                    continue
                if kind == "idle":
                    idle.append(worker)
                else:
                    self._take(worker, kind, said)
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)
                if session.shouldstop:
                    raise session.Interrupted(session.shouldstop)

    def _may_begin(self, slow: bool, workers: int, idle: int) -> bool:
        """Whether another file of tests begins now. Quick tests compute: a core each. Slow ones wait, for other processes
        mostly, and leave their core to another worker; their time limits are for a machine that is not overrun."""
        if not slow:
            return idle > 0 or workers < min(self.most, self.cores)
        few = workers - idle < max(self.cores, self.most // 2)
        return (idle > 0 or workers < self.most) and (few or runnable() <= CROWD * self.cores)

    def _start(self, session: pytest.Session, workers: list[_Worker]) -> _Worker:
        self.started += 1
        return _Worker(session, self.started, workers)

    def _take(self, worker: _Worker, kind: str, said) -> None:
        """What a worker says of a test."""
        hook = self.config.hook
        if kind == "start":
            worker.at = said[0]
            worker.items.popleft()
            hook.pytest_runtest_logstart(nodeid=said[0], location=said[1])
        elif kind == "report":
            report = hook.pytest_report_from_serializable(config=self.config, data=said)
            hook.pytest_runtest_logreport(report=report)
        elif kind == "finish":
            worker.at = None
            hook.pytest_runtest_logfinish(nodeid=said[0], location=said[1])
        else:
            text, category, filename, lineno, when, nodeid, location = said
            message = warnings.WarningMessage(text, type(category, (Warning,), {}), filename, lineno)
            hook.pytest_warning_recorded.call_historic(
                kwargs={"warning_message": message, "when": when, "nodeid": nodeid, "location": location}
            )

    def _died(self, worker: _Worker, left: collections.deque) -> None:
        """A worker has ended: as it should, or in a test, which fails by that; others run what it had still to run."""
        worker.link.close()
        _, status = os.waitpid(worker.pid, 0)
        if worker.at is None and not worker.items and not status:
            return
        said = f"the worker ended with exit code {os.waitstatus_to_exitcode(status)}"
        if worker.at is None and worker.items:
            said += f"; not run: {len(worker.items)} tests"
        elif worker.items:
            left.appendleft((True, list(worker.items)))
        self.config.hook.pytest_runtest_logreport(
            report=_failed(worker.at or "a worker, between tests", said)
        )

    def _end(self, workers: list[_Worker]) -> None:
        """Interrupt what still runs; after a while by force."""
        for worker in workers:
            worker.link.close()
            os.kill(worker.pid, signal.SIGINT)
        deadline = time.monotonic() + LEAVE_S
        for worker in workers:
            while not os.waitpid(worker.pid, os.WNOHANG)[0]:
                if time.monotonic() > deadline:
                    os.kill(worker.pid, signal.SIGKILL)
                time.sleep(0.05)


def runnable() -> int:
    """Threads of the machine that compute now or could."""
    with open("/proc/loadavg") as file:
        return int(file.read().split()[3].partition("/")[0])


def is_slow(item: pytest.Item) -> bool:
    return bool(item.get_closest_marker("slow") or item.get_closest_marker("slurm"))
