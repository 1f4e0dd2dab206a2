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
    assert all(f"p2w {name}</h2>" in re.sub(r"<a [^>]*>.*?</a>", "", commands) for name in COMMANDS)
    assert "--optim.lr" in commands and "--repair" in commands
    assert "build_decoder" in (tmp_path / "reference" / "python.html").read_text()
    for page in (path.name for path in (REPO / "docs").glob("*.md") if path.name != "package.md"):
        text = (tmp_path / page.replace(".md", ".html")).read_text()
        assert not re.search(r'(?:src|href)="(?:https?:)?//[^"]*\.(?:js|css|woff2?)"', text), page
        for target in re.findall(r'href="([^":#]+\.html)', text):
            assert (tmp_path / target).is_file(), f"{page}: {target}"
