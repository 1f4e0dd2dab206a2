"""What the tests share: a small data set written by the package's own writers, and real processes to train on it."""

import os
import subprocess
from pathlib import Path

import pytest
from ct_sets import write_structured_set
from processes import REPO, kill_group

LONG = ("slurm", "launch", "preprocess")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Folders of long files begin: the short ones then fill up both workers to the end."""
    folders = [item.path.parent.name for item in items]
    order = {folder: (*LONG, folder).index(folder) for folder in folders}
    items.sort(key=lambda item: order[item.path.parent.name])


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> None:
    """Tests neither read nor leave anything in the user's cache folder, Matplotlib's list of fonts aside."""
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("MPLCONFIGDIR", str(users / "matplotlib"))
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


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
