"""examples/look_inside.ipynb runs from top to bottom, and was committed with what it printed and drew."""

import base64
import functools
import io
import json
import os
import subprocess
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import matplotlib as mpl
import processes
import pytest
from processes import REPO

NOTEBOOK = REPO / "examples" / "look_inside.ipynb"


def cells(kind):
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.mark.slow
def test_every_cell_runs(monkeypatch, tmp_path):
    """In one namespace and this process, as a kernel does it; a picture is drawn wherever one was committed.

    Its training, of four steps, is a fork, and leaves out the pictures and the report that no cell shows.
    """
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("P2W_DEVICE", "cpu")
    monkeypatch.setenv("STEPS", "4")
    monkeypatch.setattr(
        subprocess,
        "run",
        functools.partial(processes.run, spies=(("draw_nothing",), ("recalibrate_on_few",))),
    )
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr(plt, "show", lambda: (drawn.append(len(plt.gcf().axes)), plt.close("all")))
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells("code")):
        code, out = "".join(cell["source"]), io.StringIO()
        before = len(drawn)
        with redirect_stdout(out), redirect_stderr(io.StringIO()):
            exec(compile(code, f"{NOTEBOOK.name} cell {number}", "exec"), names)
        assert len(drawn) - before == code.count("plt.show()")
        printed = any("text" in one or "text/html" in one.get("data", {}) for one in cell["outputs"])
        assert bool(out.getvalue().strip()) == printed, f"cell {number}: {out.getvalue()}"
        if "metrics.jsonl" in code:
            assert "step 4 " in out.getvalue()
    assert os.listdir(tmp_path) == [], "it leaves nothing behind"


def test_it_is_committed_with_small_pictures():
    pictures = [
        one["data"]["image/png"]
        for cell in cells("code")
        for one in cell["outputs"]
        if "image/png" in one.get("data", {})
    ]
    assert len(pictures) == sum("".join(cell["source"]).count("plt.show()") for cell in cells("code"))
    assert all(base64.b64decode(one).startswith(b"\x89PNG") for one in pictures)
    assert NOTEBOOK.stat().st_size < 400_000
    assert not any(one["output_type"] == "error" for cell in cells("code") for one in cell["outputs"])
    assert str(Path.home()) not in NOTEBOOK.read_text() and "/work/" not in NOTEBOOK.read_text()
