"""docs/ as a site: built strictly, and whole without a server."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
from processes import REPO

from p2w.__main__ import COMMANDS


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("material", "mkdocstrings")),
    reason="needs mkdocs-material and mkdocstrings: pip install 'parts2whole[docs]'",
)
def test_the_site_builds_strictly_and_opens_from_disk(tmp_path):
    line = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(line, cwd=REPO, env=env, capture_output=True, text=True, timeout=230, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    commands = (tmp_path / "reference" / "commands.html").read_text()
    assert all(re.search(rf"<h2[^>]*>p2w {name}\b", commands) for name in COMMANDS)
    assert "--optim.lr" in commands and "--repair" in commands
    assert "build_decoder" in (tmp_path / "reference" / "python.html").read_text()
    rooms = {path.parent.name for path in (REPO / "p2w").glob("*/__init__.py")} - {"commands"}
    assert rooms <= {path.stem for path in (tmp_path / "reference" / "python").glob("*.html")}
    assert "read_scan" in (tmp_path / "reference" / "python" / "ct.html").read_text()
    assert (tmp_path / "notebook.html").read_text().count("data:image/png;base64,") == 3
    apart = {"package", "look"}  # of the index; on the first page
    sources = {path.stem for path in (REPO / "docs").glob("*.md")} - apart
    pages = [path for path in tmp_path.glob("**/*.html") if path.name != "404.html"]  # of web servers alone
    assert sources | {"index", "notebook"} <= {path.stem for path in pages}
    for page in pages:
        text = page.read_text()
        assert not re.search(r'(?:src|href)="(?:https?:)?//[^"]*\.(?:js|css|woff2?)"', text), page
        for target in re.findall(r'(?:href|src)="([^":#?]+\.(?:html|png|svg|js|css))', text):
            assert (page.parent / target).is_file(), f"{page}: {target}"
