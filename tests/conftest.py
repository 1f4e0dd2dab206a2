"""What the tests share: their order, a small data set written by the package's own writers, and processes to train on it."""

import collections
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
from pathlib import Path

os.environ.setdefault(
    "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
)  # a GPU that is looked at otherwise is none in a fork

import processes
import pytest
from ct_sets import write_structured_set
from forked_workers import ForkedWorkers, is_slow
from processes import REPO, kill_group

PROCESSES = (
    "slurm",
    "launch",
    "bench",
    "preprocess",
)  # folders whose every test starts processes; in this order
DURATIONS = Path(__file__).with_name("durations.json")  # file -> seconds, of files that take long
SLOW_TESTS = Path(__file__).with_name(
    "slow_tests.json"
)  # tests that count as marked `slow`, since they take long

# As a terminal starts it: `nohup`, and `&` of a script, leave signals ignored, which every process of a test would inherit.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--workers", type=int, default=0, help="run the files of tests in so many forks of this process"
    )
    parser.addoption(
        "--record-durations",
        action="store_true",
        help="write tests/durations.json and slow_tests.json: long files start early, `make quick` leaves long tests out",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests come first, so that what is broken is said soon; then files of slow tests, the longest first.

    Workers take the quick tests of a file, or its slow ones, in this order: they come to the long files together, and the
    shortest of those keep all workers busy up to the end.
    """
    seconds, slow = json.loads(DURATIONS.read_text()), set(json.loads(SLOW_TESTS.read_text()))
    for item in items:
        if item.path.parent.name in PROCESSES or item.nodeid in slow:
            item.add_marker(pytest.mark.slow)

    def rank(item: pytest.Item) -> tuple[bool, float, int]:
        folder = item.path.parent.name
        return (
            is_slow(item),
            -seconds.get(item.nodeid.partition("::")[0], 0),
            PROCESSES.index(folder) if folder in PROCESSES else len(PROCESSES),
        )

    items.sort(key=rank)


def cpu_seconds() -> float:
    """CPU time of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def note_cpu(item: pytest.Item, name: str):
    began = cpu_seconds()
    try:
        return (yield)
    finally:
        item.user_properties.append((name, cpu_seconds() - began))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item):
    """Note the CPU time of a test's fixtures, those included that it is the first to need."""
    return (yield from note_cpu(item, "fixtures_cpu_s"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Note the CPU time of a test, which a busy machine changes less than its seconds."""
    return (yield from note_cpu(item, "cpu_s"))


class QuickTests:
    """Names the tests that are not marked `slow` and take more than `MOST_S` of CPU time: `make quick` waits for them."""

    MOST_S = 1.0

    def __init__(self) -> None:
        self.long: list[tuple[float, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        noted = dict(report.user_properties)
        seconds = noted.get("cpu_s", 0.0) + noted.get("fixtures_cpu_s", 0.0)
        if (
            report.when == "call"
            and seconds > self.MOST_S
            and not {"slow", "slurm", "gpu"} & set(report.keywords)
        ):
            self.long.append((seconds, report.nodeid))

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self.long:
            terminalreporter.section(f"not marked slow, and more than {self.MOST_S:.0f} s of CPU time")
        for seconds, name in sorted(self.long, reverse=True):
            terminalreporter.line(f"{seconds:6.1f} s  {name}")


class DurationRecorder:
    """Writes the seconds of each file's slow tests, where they are at least `LEAST`; and which tests are slow without being
    marked so: those that take `SLOW` times the CPU time of the median test, on any machine, busy or not."""

    LEAST, SLOW = 5, 15

    def __init__(self) -> None:
        self.seconds: collections.Counter[str] = collections.Counter()
        self.cpu: dict[str, float] = {}  # of tests that nobody has marked
        self.marked: set[str] = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.marked = {item.nodeid for item in items if is_slow(item) or item.path.parent.name in PROCESSES}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if {"slow", "slurm"} & set(report.keywords):
            self.seconds[report.nodeid.partition("::")[0]] += report.duration
        if report.when == "call" and report.nodeid not in self.marked:
            self.cpu[report.nodeid] = dict(report.user_properties)["cpu_s"]

    def pytest_sessionfinish(self) -> None:
        long = {name: round(took) for name, took in self.seconds.most_common() if took >= self.LEAST}
        DURATIONS.write_text(json.dumps(long, indent=1) + "\n")
        most = self.SLOW * statistics.median(self.cpu.values())
        slow = sorted(name for name, seconds in self.cpu.items() if seconds >= most)
        SLOW_TESTS.write_text(json.dumps(slow, indent=0) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # pytest-xdist's workers report to the process that started them
        return
    config.pluginmanager.register(QuickTests())
    if config.getoption("--record-durations"):
        config.pluginmanager.register(DurationRecorder())
    if workers := config.getoption("--workers"):
        config.pluginmanager.register(ForkedWorkers(config, workers))
        if not config.option.markexpr:  # slow tests start processes: let its imports be done meanwhile
            processes.SERVER.start()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> None:
    """Tests neither read nor leave anything in the user's cache folder, Matplotlib's list of fonts aside."""
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("MPLCONFIGDIR", str(users / "matplotlib"))
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def float32_as_it_was():
    """A run sets how this process computes in float32; the next test finds what torch begins with."""
    yield
    if torch := sys.modules.get("torch"):
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory) -> Path:
    """24 + 8 sub-scans of (16, 32, 32) in tar shards; not to be changed."""
    return write_structured_set(tmp_path_factory.mktemp("tar") / "set")


@pytest.fixture(scope="session")
def tiny_arrow_set(tmp_path_factory) -> Path:
    """The same in Arrow shards."""
    return write_structured_set(tmp_path_factory.mktemp("arrow") / "set", "arrow")


@pytest.fixture
def start():
    """Start a command in a process group of its own, output to files; whatever is left of it is killed after the test."""
    running = []

    def begin(command: list[str], folder: Path, **environment: str) -> subprocess.Popen:
        folder.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
        with open(folder / "out.txt", "ab") as out, open(folder / "err.txt", "ab") as err:
            process = subprocess.Popen(
                ["timeout", "-k", "5", "150", *command],
                stdout=out, stderr=err, env=env, cwd=REPO, start_new_session=True,
            )  # fmt: skip
        running.append(process)
        return process

    yield begin
    for process in running:
        kill_group(process)
