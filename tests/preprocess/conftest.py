"""The commands as a user types them, on small real files."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from processes import Forked

ROOT = Path(__file__).parents[2]


def start(name, *arguments, new_interpreter=False, **options):
    """Start `preprocess/NAME.py` with arguments; gives the process, a fork unless it is to be a `new_interpreter`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    line = [sys.executable, str(ROOT / "preprocess" / f"{name}.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    begin = subprocess.Popen if new_interpreter else Forked
    return begin(line, env=env, **{**pipes, **options})


def call(name, *arguments, **options):
    """Run `preprocess/NAME.py` to its end; gives exit code, stdout, stderr."""
    process = start(name, *arguments, **options)
    out, err = process.communicate(timeout=200)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def contents(folder):
    """Every file below a folder, by relative name: what two data sets are compared by."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def command():
    """Start and call the commands, and compare what they wrote."""
    return SimpleNamespace(start=start, call=call, contents=contents)


@pytest.fixture(scope="session")
def luna(tmp_path_factory):
    """Five scans in three subsets, one of them stored upside down."""
    root = tmp_path_factory.mktemp("LUNA 16 ü")
    from ct_files import SCANS, ct, write

    for number, (uid, (subset, slices)) in enumerate(SCANS.items()):
        turn = np.diag([1, -1, -1]) if uid == "1.3.3" else None
        shape = (slices, 256, 256) if uid == "1.3.1" else (slices, 128, 140)
        write(root / f"subset{subset}" / f"{uid}.mhd", ct(shape, number), direction=turn)
    return root


@pytest.fixture(scope="session")
def whole(command, luna, tmp_path_factory):
    """The set as one uninterrupted process with one worker writes it."""
    from ct_files import KEEP_ALL

    out = tmp_path_factory.mktemp("whole") / "shards"
    arguments = ("shard_luna", "--luna", luna, "--out", out, "--workers", 1, *KEEP_ALL)
    code, said, _ = command.call(*arguments)
    assert code == 0, said
    return out


@pytest.fixture(scope="session")
def many(tmp_path_factory):
    """Twelve scans that take one worker a second or two: there is time to stop it half-way, on any machine."""
    root = tmp_path_factory.mktemp("many")
    from ct_files import ct, write

    voxels = ct((66, 384, 384))
    for number in range(12):
        write(root / "subset0" / f"1.4.{number}.mhd", voxels)
    return root


@pytest.fixture(scope="session")
def many_whole(command, many, tmp_path_factory):
    """The set of `many` as one uninterrupted process writes it."""
    from ct_files import KEEP_ALL

    out = tmp_path_factory.mktemp("many_whole") / "shards"
    code, said, _ = command.call("shard_luna", "--luna", many, "--out", out, "--workers", 1, *KEEP_ALL)
    assert code == 0, said
    return out
