"""What `make docs` makes beside the pages of docs/: the first page, the options of every command, the public functions."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from p2w.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(
    r"\[([^\]]+)\]\((?:\.\./)+([^)]+)\)"
)  # links to files of the repository that are no pages
PUBLIC = (  # p2w.load is p2w.weights.load.load
    "p2w.weights.load.load", "p2w.weights.start.load_start", "p2w.model.decoder.build_decoder",
    "p2w.tasks.reader.open_target", "p2w.shards.manifest.read_manifest", "p2w.stream.stream.open_set",
    "p2w.report.write_report",
)  # fmt: skip


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    readme = (
        (ROOT / "README.md")
        .read_text()
        .replace("](docs/", "](")
        .replace("](CONTRIBUTING.md)", "](../CONTRIBUTING.md)")
    )
    readme = re.sub(r"\]\(((?:bench|examples)/[^)]+|CHANGELOG\.md)\)", r"](../\1)", readme)
    pages = {"index.md": readme, "reference/commands.md": commands(), "reference/python.md": functions()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name a file outside docs/ instead of linking to it: the site is read without the repository."""
    return OUTSIDE.sub(r"\1 (`\2` of the repository)", markdown)


def commands() -> str:
    """The help of every command, as it prints it."""
    env = os.environ | {"COLUMNS": "110", "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "TERM": "dumb"}
    parts = ["# Commands\n"]
    for name, (_, summary) in COMMANDS.items():
        line = [sys.executable, "-m", "p2w", name, "--help"]
        done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
        parts.append(f"## p2w {name}\n\n{summary}\n\n````text\n{done.stdout.rstrip()}\n````\n")
    return "\n".join(parts)


def functions() -> str:
    """References to the public functions, which mkdocstrings fills in from their docstrings."""
    return "# Python\n\n" + "\n\n".join(f"::: {name}" for name in PUBLIC) + "\n"
