"""The house rule: imports point one way (ARCHITECTURE.md, "Rooms"). Read from the source, imports in functions too."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
FILES = sorted(path for top in ("p2w", "launch", "preprocess") for path in (REPO / top).rglob("*.py"))
BASE = (
    "p2w.errors",
    "p2w.file_lock",
    "p2w.resources",
    "p2w.config",
    "p2w.world",
    "p2w.log",
    "p2w.geometry",
    "p2w.model",
    "p2w.data.stream",
)
MAY = {  # the longest prefix that fits a module says which modules of p2w it may import
    "launch": ("p2w",),
    "preprocess": ("p2w.errors", "p2w.data", "p2w.target"),
    "p2w": ("p2w.errors",),
    "p2w.__main__": ("p2w",),  # names the commands
    "p2w.doctor": ("p2w",),  # looks at everything a run uses
    "p2w.rank_errors": ("p2w.errors", "p2w.world"),
    "p2w.world": ("p2w.errors", "p2w.resources"),
    "p2w.pretrain": ("p2w",),  # puts the run together
    "p2w.analyze": ("p2w",),  # puts the analysis together
    "p2w.recipes": ("p2w.errors", "p2w.config"),
    "p2w.geometry": ("p2w.errors", "p2w.kernels"),
    "p2w.kernels": ("p2w.errors", "p2w.kernels"),
    "p2w.model": ("p2w.errors", "p2w.kernels", "p2w.model"),
    "p2w.data": ("p2w.errors", "p2w.file_lock", "p2w.resources", "p2w.data"),
    "p2w.config": ("p2w.errors", "p2w.pretext_config"),
    "p2w.pretext": (
        "p2w.errors",
        "p2w.config",
        "p2w.pretext_config",
        "p2w.geometry",
        "p2w.kernels",
        "p2w.model",
        "p2w.pretext",
    ),
    "p2w.train": (*BASE, "p2w.pretext.protocol", "p2w.train"),
    "p2w.target": (*BASE, "p2w.data", "p2w.train", "p2w.weights", "p2w.target"),
    "p2w.target.origin": (*BASE, "p2w.data", "p2w.pretext", "p2w.weights", "p2w.target"),  # loads runs
    "p2w.weights": (*BASE, "p2w.train.checkpoint", "p2w.weights"),
    "p2w.analysis": (*BASE, "p2w.pretext.protocol", "p2w.analysis"),
    "p2w.analysis.subjects": (*BASE, "p2w.train", "p2w.pretrain", "p2w.analysis"),  # loads runs
    "p2w.analysis.measure": (*BASE, "p2w.data.progress", "p2w.analysis"),
    "p2w.analysis.showcase": (*BASE, "p2w.train.optim", "p2w.analysis"),
    "p2w.target.results": ("p2w.errors", "p2w.data.typed", "p2w.target"),
    "p2w.target.statistics": ("p2w.errors",),
    "p2w.target.intervals": ("p2w.errors",),
    "p2w.target.paper": ("p2w.target.statistics",),
    "p2w.tables": ("p2w.errors", "p2w.log", "p2w.data.typed", "p2w.target", "p2w.analysis", "p2w.tables"),
    "p2w.sweep": (*BASE, "p2w.data.progress", "p2w.train.checkpoint", "p2w.target", "p2w.sweep"),
}
OFFLINE = {f"p2w.data.{name}" for name in ("scan", "subscan", "shard", "manifest", "phantom")}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


def below(name: str, tops: tuple[str, ...]) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in tops)


@functools.cache
def imports(path: Path) -> set[str]:
    """Modules a file imports; `from p2w import geometry` and `from p2w.data import order` name the submodule."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = inside & {name_of(file) for file in FILES}
            found |= submodules or {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path):
    name = name_of(path)
    room = max((top for top in MAY if below(name, (top,))), key=len)
    inside = {found for found in imports(path) if found.startswith("p2w.")}
    wrong = sorted(found for found in inside if not below(found, MAY[room]))
    assert not wrong, f"{name} is in room {room} and may not import {wrong}"
    assert not below("torchvision", tuple(found.split(".")[0] for found in imports(path)))
    assert not any(below(found, ("launch", "preprocess", "tests")) for found in imports(path))


def test_offline_modules_reach_no_torch():
    of = {name_of(path): imports(path) for path in FILES}
    for start in OFFLINE & set(of) | {name for name in of if below(name, ("preprocess",))}:
        reached, todo = set(), [start]
        while todo:
            name = todo.pop()
            if name in of and name not in reached:
                todo += of[name]
            reached.add(name)
        heavy = sorted(name for name in reached if below(name, ("torch", "p2w.train", "p2w.model")))
        assert not heavy, f"{start} reaches {heavy}"


@pytest.mark.parametrize("path", [path for path in FILES if name_of(path) != "p2w.world"], ids=name_of)
def test_only_world_reads_the_environment(path):
    for node in ast.walk(ast.parse(path.read_text())):
        reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
        assert not reads, f"{path}:{node.lineno} reads the environment; p2w.world does"


def test_help_waits_for_nothing_that_only_a_run_needs():
    """Every rank imports launch/train.py; drawing, statistics, TensorBoard, Triton and streaming come in when used."""
    heavy = {"matplotlib", "sklearn", "scipy", "tensorboard", "triton", "webdataset", "SimpleITK"}
    code = f"import sys, runpy; runpy.run_path('launch/train.py'); print(*({heavy} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPO,
        env={"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == []
