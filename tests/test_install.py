"""What an editable install of a checkout gives, and the wheel, in an interpreter that knows nothing else."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from processes import REPO

import p2w

pytestmark = pytest.mark.slow
# Folders of a checkout that are packed, with the files beside them.
PACKED = ["p2w", "launch", "preprocess", "slurm", "docs", "examples", "containers", "bench", "tests"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout of the usual name, and beside it `site`, into which it is installed as `pip install --editable` does."""
    pytest.importorskip("setuptools")
    top = tmp_path_factory.mktemp("home")
    (top / "p2w" / "docs").mkdir(parents=True)
    for name in ("pyproject.toml", "setup.cfg", "docs/package.md", "LICENSE"):
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


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A virtual environment with the wheel of the sdist, and the packages it needs: (environment, wheel, unpacked sdist)."""
    pytest.importorskip("setuptools")
    top = tmp_path_factory.mktemp("wheel")
    source = top / "source"
    source.mkdir()
    for path in REPO.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    for name in PACKED:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / name, source / name, symlinks=True, ignore=ignored)
    build = "from setuptools import build_meta; build_meta.build_{}({!r})"
    subprocess.run(
        [sys.executable, "-c", build.format("sdist", f"{top}")], cwd=source, check=True, capture_output=True
    )
    shutil.rmtree(source)
    (packed,) = top.glob("*.tar.gz")
    with tarfile.open(packed) as file:
        file.extractall(top, filter="data")
    unpacked = packed.with_name(packed.name.removesuffix(".tar.gz"))
    subprocess.run(
        [sys.executable, "-c", build.format("wheel", f"{top}")], cwd=unpacked, check=True, capture_output=True
    )
    (wheel,) = top.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", top / "env"], check=True)
    (site,) = (top / "env" / "lib").glob("python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", top / "env" / "bin" / "python", "--quiet", "install"]
    # A checkout on PYTHONPATH that somebody has installed from would pass for the package.
    apart = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [*pip, "--disable-pip-version-check", "--no-index", "--no-deps", wheel], check=True, env=apart
    )
    needs = Path(sysconfig.get_paths()["purelib"])
    (site / "needs.pth").write_text(
        f"{needs}\n"
    )  # a path alone: its own .pth files, an editable p2w's too, are not read
    return top / "env", wheel, unpacked


def test_the_wheel_says_what_it_is(installed):
    _, wheel, _ = installed
    assert wheel.name.startswith("parts2whole-")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = file.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert {
        "p2w/py.typed",
        "p2w/sbatch/pretrain.sbatch",
        "p2w/report/style.css",
        "p2w/report/slider.js",
    } <= names
    assert "Name: parts2whole\n" in metadata and "Classifier: Typing :: Typed" in metadata
    assert not re.search(r"\]\((?!https?:)", metadata), "a relative link in the long description"


def test_the_sdist_has_what_the_pages_lead_to(installed):
    """The README of an unpacked sdist, its pages and its Makefile: pictures, examples and files that they name are there."""
    _, _, unpacked = installed
    for page in (unpacked / "README.md", unpacked / "CONTRIBUTING.md", *(unpacked / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
    for name in (
        "Makefile",
        "mkdocs.yml",
        "launch/train.py",
        "preprocess/shard_luna.py",
        "slurm/pretrain.sbatch",
    ):
        assert (unpacked / name).is_file(), name
    assert (unpacked / "containers" / "install.sh").is_file() and (
        unpacked / "docs" / "site_hooks.py"
    ).is_file()


@pytest.fixture(scope="module")
def without_network() -> tuple[str, ...]:
    """What a command is begun with to have no network but its own loopback; empty where this machine does not allow it."""
    inside = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    if (
        not shutil.which("unshare")
        or subprocess.run([*inside, "true"], capture_output=True, check=False).returncode
    ):
        return ()
    return inside


@pytest.mark.timeout(600)  # a dozen processes, each of which imports torch
def test_from_scans_to_predictions_with_the_wheel_alone(installed, without_network, tmp_path):
    """Every stage by the commands of the wheel, in a folder that has no checkout, and where possible without a network."""
    env, _, _ = installed
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    clean |= {"PATH": f"{env / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def run(*command: str) -> str:
        done = subprocess.run(
            [*without_network, *command], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        # What Python or a package has to say of deprecation would be the first thing that a user reads.
        assert not re.search(r"^.*Warning: .*$", done.stderr, re.MULTILINE), (
            f"{command}\n{done.stderr[-2000:]}"
        )
        return done.stdout

    where = run("python", "-c", "import p2w; print(p2w.__file__)")
    assert where.startswith(str(env))
    assert run("p2w", "--version") == f"p2w {p2w.__version__}\n"
    assert "slurm/pretrain.sbatch" in run("p2w", "slurm")
    run("python", "-m", "p2w.phantom", "--out", "LUNA16", "--scans", "3", "--shape", "64", "128", "128")
    run(
        "p2w",
        "shard-luna",
        "--luna",
        "LUNA16",
        "--out",
        "shards",
        "--subsets",
        "0-9",
        "--val-fraction",
        "0.25",
        "--workers",
        "1",
    )
    torchrun = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", "p2w")
    small = (
        "--train.steps",
        "4",
        "--data.batch",
        "2",
        "--model.width",
        "4",
        "--pretext.size",
        "8",
        "16",
        "16",
    )
    run(*torchrun, "train", "demo", "--shards", "shards", "--run-dir", "run", *small)
    assert "run/report.html" in run("p2w", "report", "run")
    run("p2w", "export", "run", "--to", "safetensors", "--out", "weights")
    phantom = ("python", "-m", "p2w.phantom.target_tasks", "--out", "T", "--tasks", "lcs")
    run(*phantom, "--patients", "3", "--shape", "32", "64", "64")
    split = ("--train", "0", "--val", "1", "--test", "2")
    run(
        "p2w",
        "prepare",
        "lcs",
        "--source",
        "T/LiTS",
        "--out",
        "lcs",
        "--size",
        "8",
        "16",
        "16",
        *split,
        "--workers",
        "1",
    )
    start = ("--init", "run", "--trials", "1", "--recipe.max-epochs", "1")
    run("p2w", "finetune", "--task", "lcs", "--run-dir", "tuned", *start)
    scan = next((tmp_path / "T").rglob("volume-2.nii*"))
    run("p2w", "predict", "tuned", "--scan", str(scan), "--out", "liver.nii.gz")
    assert (tmp_path / "liver.nii.gz").stat().st_size > 0
    assert not list(tmp_path.rglob("launch"))


def test_nothing_is_fetched_at_run_time(without_network):
    """The stages above ran without a network, if a command begun like this finds none."""
    if not without_network:
        pytest.skip("this machine gives no network namespace (unshare --net, ip): try it as root")
    code = "import socket; socket.create_connection(('192.0.2.1', 80), 5)"
    done = subprocess.run(
        [*without_network, sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "Network is unreachable" in done.stderr
