"""One forge for all tests of launch/."""

import subprocess

import pytest
from launch_runs import Forge


@pytest.fixture(scope="session")
def forge():
    forge = Forge()
    yield forge
    forge.process.stdin.close()
    try:
        forge.process.wait(10)
    except subprocess.TimeoutExpired:
        forge.process.kill()
