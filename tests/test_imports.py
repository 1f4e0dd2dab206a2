"""The house rule: imports point one way. Read from the source, imports in functions too."""

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
FILES = sorted(path for top in ("p2w", "launch", "preprocess") for path in (REPO / top).rglob("*.py"))
BASE = tuple(
    f"p2w.{room}"
    for room in "errors files run_owner http_client resources config world log trackers rng geometry model stream".split()  # noqa: SIM905
)
MAY = {  # the longest prefix that fits a module says which modules of p2w it may import
    "launch": ("p2w.errors", "p2w.commands"),
    "preprocess": ("p2w.errors", "p2w.commands"),
    "p2w.commands": ("p2w",),  # the mains
    **dict.fromkeys(
        tuple(f"p2w.commands.{name}" for name in ("shard_luna", "shard_scans", "prepare_target", "slurm")),
        ("p2w.errors", "p2w.files", "p2w.progress", "p2w.ct", "p2w.shards", "p2w.tasks"),
    ),
    "p2w": ("p2w.errors",),
    "p2w.__main__": ("p2w",),  # names the commands
    "p2w.doctor": ("p2w",),  # looks at everything a run uses
    "p2w.pretrain": ("p2w",),  # puts the run together
    "p2w.analysis_run": ("p2w",),  # puts the analysis together
    "p2w.rank_errors": ("p2w.errors", "p2w.world", "p2w.log", "p2w.files"),
    "p2w.world": ("p2w.errors", "p2w.resources", "p2w.meeting"),
    "p2w.log": ("p2w.errors", "p2w.files", "p2w.trackers"),
    "p2w.trackers": ("p2w.errors", "p2w.files", "p2w.world"),
    "p2w.tracker_process": ("p2w.trackers",),
    "p2w.recipes": ("p2w.errors", "p2w.config"),
    "p2w.config": ("p2w.errors", "p2w.files", "p2w.pretext", "p2w.trackers"),  # collects the settings in the pretexts' files
    "p2w.kernels": ("p2w.errors", "p2w.kernels"),
    "p2w.geometry": ("p2w.errors", "p2w.rng", "p2w.kernels"),
    "p2w.model": ("p2w.errors", "p2w.kernels", "p2w.model"),
    "p2w.ct": ("p2w.errors", "p2w.files", "p2w.ct"),
    "p2w.phantom": ("p2w.errors", "p2w.files", "p2w.progress", "p2w.phantom"),
    "p2w.rng": ("p2w.errors", "p2w.kernels"),
    "p2w.shards": ("p2w.errors", "p2w.files", "p2w.http_client", "p2w.resources", "p2w.progress", "p2w.ct", "p2w.shards"),
    "p2w.stream": ("p2w.errors", "p2w.files", "p2w.http_client", "p2w.resources", "p2w.rng", "p2w.shards", "p2w.stream"),
    "p2w.pretext": (
        "p2w.errors", "p2w.rng", "p2w.geometry", "p2w.kernels", "p2w.model",
        "p2w.pretext",
    ),
    "p2w.train": (*BASE, "p2w.kernels", "p2w.pretext.protocol", "p2w.train"),
    "p2w.weights": (  # the card
        *BASE, "p2w.pretext", "p2w.shards.manifest", "p2w.shards.training_scans", "p2w.train.checkpoint", "p2w.weights",
    ),
    "p2w.tasks": (
        "p2w.errors", "p2w.files", "p2w.resources", "p2w.progress", "p2w.ct", "p2w.shards", "p2w.stream", "p2w.tasks",
    ),
    "p2w.finetune": (*BASE, "p2w.stats", "p2w.train", "p2w.weights", "p2w.tasks", "p2w.finetune"),
    "p2w.finetune.init": (  # loads runs
        *BASE, "p2w.pretext", "p2w.shards.training_scans", "p2w.weights", "p2w.tasks", "p2w.finetune",
    ),
    "p2w.inference": (
        *BASE, "p2w.progress", "p2w.ct", "p2w.train.optim", "p2w.tasks", "p2w.weights", "p2w.finetune", "p2w.inference",
        "p2w.stats", "p2w.shards.grouping", "p2w.shards.build_folder", "p2w.report.markup", "p2w.analysis.features",
    ),
    "p2w.analysis": (*BASE, "p2w.stats", "p2w.progress", "p2w.pretext.protocol", "p2w.analysis"),
    "p2w.analysis.feature_sources": (*BASE, "p2w.train", "p2w.pretext", "p2w.analysis"),  # loads runs
    "p2w.analysis.qualitative": (*BASE, "p2w.train.optim", "p2w.pretext.protocol", "p2w.analysis"),
    "p2w.run_owner": ("p2w.errors", "p2w.files"),
    "p2w.report": ("p2w.errors", "p2w.files", "p2w.run_owner", "p2w.log", "p2w.config", "p2w.report"),
    "p2w.reproduce": (
        "p2w.errors", "p2w.files", "p2w.resources", "p2w.log", "p2w.progress", "p2w.world", "p2w.stats",
        "p2w.train.checkpoint",
        "p2w.tasks", "p2w.finetune", "p2w.analysis", "p2w.report", "p2w.reproduce",
    ),
}  # fmt: skip
OFFLINE = (
    "preprocess",
    "p2w.files",
    "p2w.http_client",
    "p2w.run_owner",
    "p2w.slurm_nodes",
    "p2w.progress",
    "p2w.stats",
    "p2w.ct",
    "p2w.shards",
    "p2w.phantom",
)  # without torch


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


NAMES = frozenset(map(name_of, FILES))


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Every node of a file's syntax tree."""
    return tuple(ast.walk(ast.parse(path.read_text())))


def below(name: str, tops: tuple[str, ...]) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in tops)


@functools.cache
@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Modules a file imports; `from p2w import geometry` and `from p2w.shards import order` name the submodule."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = inside & NAMES
            found |= submodules or {node.module}
    return frozenset(found)


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
    for start in [name for name in of if below(name, OFFLINE)]:
        reached, todo = set(), [start]
        while todo:
            name = todo.pop()
            if name in of and name not in reached:
                todo += of[name]
            reached.add(name)
        heavy = sorted(name for name in reached if below(name, ("torch", "p2w.train", "p2w.model")))
        assert not heavy, f"{start} reaches {heavy}"


READS_ENVIRONMENT = (
    "p2w.world",
    "p2w.weights.prepare_nnunet",
)  # the second runs without p2w, beside exported weights


@pytest.mark.parametrize(
    "path", [path for path in FILES if name_of(path) not in READS_ENVIRONMENT], ids=name_of
)
def test_only_world_reads_the_environment(path):
    for node in nodes(path):
        reads = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
        assert not reads, f"{path}:{node.lineno} reads the environment; p2w.world does"


@pytest.mark.slow
def test_help_imports_nothing_that_only_a_run_needs():
    """Drawing, statistics, TensorBoard, Triton and streaming come in when used: every rank imports these scripts."""
    heavy = {"matplotlib", "sklearn", "scipy", "tensorboard", "triton", "webdataset"}
    scripts = {
        "train": {"SimpleITK"},
        "analyze": {"SimpleITK"},
        "finetune": set(),
        "sweep": set(),
    }  # what besides
    code = "import json, runpy, sys\nfound = {}\n"
    for name, more in scripts.items():
        code += f"runpy.run_path('launch/{name}.py')\nfound['{name}'] = sorted({heavy | more} & set(sys.modules))\n"
    run = subprocess.run(
        [sys.executable, "-c", f"{code}print(json.dumps(found))"],
        cwd=REPO,
        env={"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(run.stdout) == {name: [] for name in scripts}


def graph() -> dict[str, set[str]]:
    """Modules of p2w and those they import, without what is imported for types alone."""
    names = {name_of(path): path for path in FILES if name_of(path).startswith("p2w")}
    typed = {
        name: {
            inner
            for node in nodes(path)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        for name, path in names.items()
    }
    found: dict[str, set[str]] = {}
    for name, path in names.items():
        of = set()
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("p2w"):
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                of |= inside if inside <= set(names) else inside | {node.module}
        quoted = {
            f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in names else node.module
            for node in typed[name]
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        found[name] = {one for one in of & set(names) if one not in quoted and one != "p2w"}
    return found


def test_imports_have_no_cycle():
    """Neither at the top of modules nor in functions. A package's `__init__` stands for what it brings in."""
    arrows, done = graph(), set()

    def follow(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for further in sorted(arrows[name]):
                if not name.startswith(f"{further}."):  # a module and its own package
                    follow(further, (*path, name))
            done.add(name)

    for name in sorted(arrows):
        follow(name, ())


def test_no_two_modules_have_one_basename():
    """So that a name in a traceback, or in an editor's list, says which one it is."""
    names = [
        path.stem
        for path in FILES
        if path.parts[-2] not in ("launch", "preprocess") and not path.stem.startswith("__")
    ]
    assert sorted(names) == sorted(set(names)), sorted({name for name in names if names.count(name) > 1})
