"""What an editable install of a checkout gives, in an interpreter that knows nothing else."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from processes import REPO

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout of the usual name, and beside it `site`, into which it is installed as `pip install --editable` does."""
    pytest.importorskip("setuptools")
    top = tmp_path_factory.mktemp("home")
    (top / "p2w").mkdir()
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(REPO / name, top / "p2w" / name)
    shutil.copytree(REPO / "p2w", top / "p2w" / "p2w", ignore=shutil.ignore_patterns("__pycache__"))
    (top / "p2w" / "launch").mkdir()
    build = "from setuptools import build_meta; build_meta.build_editable('../built')"
    (top / "built").mkdir()
    subprocess.run([sys.executable, "-c", build], cwd=top / "p2w", check=True, capture_output=True)
    (wheel,) = (top / "built").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(top / "site")
    return top


@pytest.mark.parametrize("where", [".", "p2w", "p2w/launch"])
def test_the_package_is_imported_from_any_folder(checkout, where):
    """From the folder above, the checkout has the package's name; it has no __init__.py, the package has."""
    code = f"import sys; sys.path.insert(0, ''); import site; site.addsitedir({str(checkout / 'site')!r}); "
    code += "import p2w; print(p2w.__version__, p2w.__file__)"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=checkout / where,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    version, file = done.stdout.split()
    assert version[0].isdigit() and os.path.samefile(file, checkout / "p2w" / "p2w" / "__init__.py")
