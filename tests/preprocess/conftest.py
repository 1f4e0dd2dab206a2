"""The commands as a user types them, on small real files."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "data"))  # ct_files


def start(name, *arguments, **options):
    """Start `preprocess/NAME.py` with arguments; gives the process."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    line = [sys.executable, str(ROOT / "preprocess" / f"{name}.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, env=env, **{**pipes, **options})


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
