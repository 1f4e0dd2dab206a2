"""`pytest --workers`: every test is run once, whatever happens to a worker, and said as one process would say it."""

import re
import sys
from xml.etree import ElementTree

import processes
import pytest
from processes import REPO

pytestmark = pytest.mark.slow

CONFTEST = f"""
import os, sys
sys.path.insert(0, {str(REPO / "tests")!r})
import pytest
from forked_workers import ForkedWorkers

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs later")
    config.pluginmanager.register(ForkedWorkers(config, 3))

@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    yield folder
    with open("ends.txt", "a") as file:
        file.write(f"{{os.getpid()}}\\n")
    assert "torn" not in os.environ

@pytest.fixture(scope="module")
def part():
    with open("parts.txt", "a") as file:
        file.write(f"{{os.getpid()}}\\n")
"""
FILES = {
    "test_a.py": """
import os, warnings, pytest
def test_one(whole, part, capfd):
    print("to be captured")
    assert capfd.readouterr().out == "to be captured\\n"
    warnings.warn("mind the gap")
def test_two(whole, part):
    print("said by the second")
    assert 1 == 2
@pytest.mark.slow
def test_later(part):
    assert os.getpid() != os.getpgid(0)
""",
    "test_b.py": """
import os, signal, pytest
def test_killed():
    os.kill(os.getpid(), signal.SIGKILL)
@pytest.mark.parametrize("number", range(20))
def test_after(number, whole):
    pass
def test_skipped():
    pytest.skip("not here")
""",
}


def run(folder, *words: str, files: dict[str, str], **env: str):
    for name, text in {"conftest.py": CONFTEST, **files}.items():
        (folder / name).write_text(text)
    quiet = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"  # the server of forks has typeguard
    options = ["-p", "no:cacheprovider", "-W", quiet, "--junitxml=all.xml"]
    command = [sys.executable, "-m", "pytest", *options, *words, "."]
    return processes.run(
        command, cwd=folder, env={"PATH": "", "PYTHONPATH": str(REPO), **env},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip


def test_all_tests_are_run_once_and_said(tmp_path):
    done = run(tmp_path, files=FILES, torn="1")
    cases = ElementTree.parse(tmp_path / "all.xml").getroot().iter("testcase")
    ends: dict[str, list[str]] = {}
    for case in cases:
        ends.setdefault(f"{case.get('classname')}.{case.get('name')}", []).extend(child.tag for child in case)
    assert len([name for name in ends if name.startswith("test_b.test_after")]) == 20
    assert ends["test_a.test_one"] == [] and ends["test_a.test_later"] == []
    assert ends["test_b.test_skipped"] == ["skipped"]
    assert "the worker ended with exit code -9" in done.stdout and "said by the second" in done.stdout
    assert done.stdout.count("UserWarning: mind the gap") == 1
    assert "fixtures of worker" in done.stdout and "assert 'torn' not in" in done.stdout
    assert done.returncode == 1 and re.search(
        r"1 failed, 22 passed, 1 skipped, 1 warning, \d errors", done.stdout
    )
    assert (
        len((tmp_path / "parts.txt").read_text().splitlines()) == 2
    )  # of the quick tests and of the slow one
    of_workers = (tmp_path / "ends.txt").read_text().splitlines()
    assert len(set(of_workers)) == len(of_workers) >= 1


def test_the_first_failure_is_an_end_that_takes_down_fixtures(tmp_path):
    slow = "import time\ndef test_waits(whole):\n    open('up.txt', 'w').close()\n    time.sleep(90)\n"
    fails = "import os, time\ndef test_fails():\n    while not os.path.exists('up.txt'): time.sleep(0.01)\n    assert 0\n"
    done = run(tmp_path, "-x", files={"test_slow.py": slow, "test_fails.py": fails})
    assert done.returncode == 1 and "stopping after 1 failures" in done.stdout, done.stdout
    assert len((tmp_path / "ends.txt").read_text().splitlines()) == 1


def test_tests_that_cannot_be_collected_are_an_end(tmp_path):
    done = run(tmp_path, files={"test_a.py": "import no_such_module\n"})
    assert done.returncode == 2 and "1 error during collection" in done.stdout
