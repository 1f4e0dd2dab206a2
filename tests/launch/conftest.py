"""One forge for all tests of launch/."""

import pytest
from launch_runs import Forge


@pytest.fixture(scope="session")
def forge():
    forge = Forge()
    yield forge
    forge.end()
