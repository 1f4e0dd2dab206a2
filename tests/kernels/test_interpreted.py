"""Every test of this folder that needs Triton's interpreter, in one process that interprets.

Triton decides when it is imported whether kernels are interpreted, and importing it and torch takes seconds. By hand:
`TRITON_INTERPRET=1 python -m pytest tests/kernels`.
"""

import collections
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_crop_resize_triton import INTERPRETING, compiled, interpreter_is_broken

PASS = {  # how many tests of each file
    "test_crop_resize_triton.py": 20,
    "test_local_shuffle_triton.py": 3,
    "test_norm_relu_triton.py": 22,
    "test_sample_triton.py": 7,
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@compiled
@pytest.mark.skipif(interpreter_is_broken(), reason="triton 3.6's interpreter and NumPy 2.4 or later")
def test_every_interpreted_test_has_run_and_passed():
    assert not INTERPRETING
    files = [str(Path(__file__).with_name(name)) for name in PASS]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-rp", "-p", "no:cacheprovider", "-p", "no:xdist"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        check=False, capture_output=True, text=True, timeout=1150,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    passed = collections.Counter(re.findall(r"^PASSED \S*?(test_\w+\.py)::", run.stdout, re.MULTILINE))
    assert passed == PASS, run.stdout
