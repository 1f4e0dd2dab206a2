"""What `make docs` makes beside the pages of docs/: the first page, the options of every command, every public function."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import command_options  # noqa: E402  (beside this file, which mkdocs loads by its path)

OUTSIDE = re.compile(
    r"\[([^\]]+)\]\((?:\.\./)+([^)]+)\)"
)  # links to files of the repository that are no pages
MAIN = {  # what most people call; p2w.load is p2w.weights.load.load
    "p2w.weights.load.load": "an encoder from a run, a checkpoint or an exported file",
    "p2w.weights.load.card": "what the weights say of themselves: window, spacing, size, data",
    "p2w.weights.start.load_start": "the same, or weights that others published",
    "p2w.model.build_encoder": "a new encoder by its name",
    "p2w.model.decoder.build_decoder": "a decoder behind any encoder",
    "p2w.shards.manifest.read_manifest": "what a data set says of itself",
    "p2w.stream.stream.open_set": "the data set as batches in a fixed order",
    "p2w.tasks.reader.open_target": "the samples of a target task",
    "p2w.ct.scan.read_scan": "one scan as int16 HU [z, y, x]",
    "p2w.phantom.chest.make_scan": "a phantom scan with known anatomy",
    "p2w.report.write_report": "the page of a run",
}


def rooms() -> list[str]:
    """Folders and single modules of p2w that have a page of their own. Commands have the page of their options."""
    folders = [path.parent.name for path in sorted((ROOT / "p2w").glob("*/__init__.py"))]
    modules = [path.stem for path in sorted((ROOT / "p2w").glob("*.py")) if not path.stem.startswith("_")]
    return [name for name in [*folders, *modules] if name != "commands"]


def on_config(config: Any) -> Any:
    """Add the rooms to the menu of the reference."""
    (reference,) = (entry["Reference"] for entry in config["nav"] if "Reference" in entry)
    reference.append({"Python, room by room": [f"reference/python/{room}.md" for room in rooms()]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    pages = {
        "index.md": first_page(),
        "reference/commands.md": command_options.page(),
        "reference/python.md": functions(),
    }
    pages["notebook.md"] = notebook()
    for room in rooms():
        pages[f"reference/python/{room}.md"] = f"::: p2w.{room}\n    options: {{heading_level: 1}}\n"
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def first_page() -> str:
    """The README, and the pictures of docs/look.md behind it."""
    readme = (ROOT / "README.md").read_text().replace("](docs/", "](")
    readme = re.sub(
        r"\]\(((?:bench|examples)/[^)]+|CHANGELOG\.md|CONTRIBUTING\.md|CITATION\.cff)\)", r"](../\1)", readme
    )
    look = (ROOT / "docs" / "look.md").read_text()
    return f"{readme}\n{look.replace('# ', '## ', 1)}"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name a file outside docs/ instead of linking to it: the site is read without the repository."""
    markdown = re.sub(r"\]\((?:\.\./)+examples/look_inside\.ipynb\)", "](notebook.md)", markdown)
    return OUTSIDE.sub(lambda found: _outside(found[1], found[2]), markdown)


def _outside(text: str, path: str) -> str:
    """What stands for a link to `path` in the repository: its text and where it leads, or the path alone if they are one."""
    return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}` of the repository)"


INLINE = re.compile(r"(?<!<span></span>)<code>([^<\n]+)</code>")  # code in a sentence or a table, not a block


def on_page_content(html: str, **_: Any) -> str:
    """Let a line break inside code between its words and after commas alone, never inside `--run-dir`."""
    return INLINE.sub(lambda found: f"<code>{_unbroken(found[1])}</code>", html)


def _unbroken(code: str) -> str:
    words = (re.split(r"(?<=,)", word) for word in code.split(" "))
    kept = ("<wbr>".join(f"<span>{one}</span>" if len(one) <= 30 else one for one in word) for word in words)
    return " ".join(kept)


def notebook() -> str:
    """The notebook as a page: its text, its code, and what it printed and drew when it was committed."""
    path = ROOT / "examples" / "look_inside.ipynb"
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text.replace("../docs/", ""))
            continue
        parts.append(f"```python\n{text}\n```")
        for one in cell["outputs"]:
            data = one.get("data", {})
            if "image/png" in data:
                picture = "".join(data["image/png"].split())
                parts.append(f'<img src="data:image/png;base64,{picture}" alt="what this cell draws">')
            elif text := "".join(one.get("text", data.get("text/plain", ""))).rstrip():
                parts.append(f"```text\n{text}\n```")
    parts.insert(1, f"(It is `examples/{path.name}` in the repository, shown as it was last run.)")
    return "\n\n".join(parts) + "\n"


def functions() -> str:
    """The page of the main functions, with links to the rooms; mkdocstrings fills in docstrings and signatures."""
    main = "\n".join(f"| [`{name}`](#{name}) | {what} |" for name, what in MAIN.items())
    others = ", ".join(f"[{room}](python/{room}.md)" for room in rooms())
    text = f"# Python\n\n| function | gives |\n| --- | --- |\n{main}\n\nEverything public, by room: {others}.\n\n"
    return (
        text + "\n\n".join(f"::: {name}\n    options: {{show_root_full_path: true}}" for name in MAIN) + "\n"
    )
