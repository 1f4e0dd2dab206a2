"""What the pages tell users to type is taken by the command line; files, links and imports are as they say."""

import importlib
import json
import re

import pytest
from processes import REPO

from p2w import config as settings
from p2w.commands.train import parse
from p2w.config import Config
from p2w.pretext import build_pretext_and_network
from p2w.recipes import RECIPES
from p2w.train.estimate import SAMPLE_BYTES, describe_scaling, run_cost

PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
OPTION = re.compile(
    r"(--[a-z_]+\.[a-z-]+)((?: [^\s`-][^\s`]*)*)`"
)  # the last of an inline code: `… --group.name VALUE …`
SETTINGS = settings.flatten(Config())
GROUPS = {name.partition(".")[0] for name in SETTINGS if "." in name}


def options():
    """(page, option, values) for each setting of training that a page spells out; other commands' groups are left out."""
    for page in PAGES:
        for flag, values in OPTION.findall(page.read_text()):
            if flag[2:].partition(".")[0] in GROUPS:
                yield page.name, flag, tuple(values.split())


@pytest.mark.parametrize(("page", "flag", "values"), sorted(set(options())))
def test_an_option_in_the_docs_is_taken(page, flag, values):
    name = flag[2:].replace("-", "_").replace(".no_", ".")
    assert name in SETTINGS, f"{page}: {flag}: no such setting"
    stands_for_any = not values and not isinstance(SETTINGS[name], bool)
    if not stands_for_any and not any(value.isupper() for value in values):
        parse([flag, *values])


def test_extras_are_named_by_the_distribution():
    """The index's `p2w` is another project: what a page or a message tells users to install is `parts2whole[…]`."""
    extras = re.findall(
        r"^(\w+) =$", (REPO / "setup.cfg").read_text().partition("extras_require]")[2], re.MULTILINE
    )
    assert {"dicom", "wandb", "mlflow"} <= set(extras)
    files = [*PAGES, *(REPO / "p2w").rglob("*.py"), *(REPO / "examples").glob("*.py")]
    wrong = rf"p2w\[({'|'.join(extras)})\]"
    assert [str(file) for file in files if re.search(wrong, file.read_text())] == []


def test_an_image_takes_no_data_along():
    """Docker copies the folder of the checkout: what git ignores there, scans and environments among it, stays outside."""
    ignored, left_out = (
        {line.strip("/") for line in (REPO / name).read_text().splitlines() if line and line[0] != "#"}
        for name in (".gitignore", ".dockerignore")
    )
    assert ignored - {"__pycache__", "*.pyc"} <= left_out
    assert not left_out & needed_by_an_image()


def needed_by_an_image():
    """Files and folders of the checkout that `containers/install.sh` reads."""
    script = (REPO / "containers" / "install.sh").read_text()
    (copied,) = re.findall(r'cp -r (.*) "\$copy"', script)
    return {"containers", "constraints.txt", *re.findall(r'"?\$source"?/([\w.]+)', copied)}


def test_an_apptainer_image_takes_what_its_script_needs_and_no_more():
    """Apptainer has no .dockerignore: its definition names each file, so that no scans, runs or environments come along."""
    text = (REPO / "containers" / "p2w.def").read_text()
    files = text.partition("%files\n")[2].partition("\n\n")[0]
    pairs = [line.split() for line in files.splitlines() if not line.strip().startswith("#")]
    assert {source for source, _ in pairs} == needed_by_an_image()
    assert all(target == f"/src/{source}" for source, target in pairs)


TREE = (REPO / "docs" / "architecture.md").read_text().partition("## The tree")[2]
BLOCKS = re.findall(r"```\n(.*?)```", TREE, re.DOTALL)


def test_every_file_of_the_tree_is_there():
    """A line begins with a folder, below `p2w/` and `bench/` with one inside them, or goes on in the folder above it."""
    top, room, missing = "", "", []
    for line in BLOCKS[0].splitlines():
        indent = len(line) - len(line.lstrip())
        if indent == 0:
            top, room = line.split("/")[0], ""
        elif indent == 2:
            room = line.split("/")[0].strip() if re.match(r"  \w+/", line) else ""
        folder = REPO / top / room
        missing += [
            f"{top}/{room}: {name}"
            for name in re.findall(r"(?<![\w/.])[\w/]+\.(?:py|sbatch|md|sh)\b", line)
            if not any((where / name).is_file() for where in (folder, REPO / top, REPO))
        ]
    assert missing == []


def test_every_room_of_the_package_is_in_the_tree():
    rooms = {path.parent.name for path in (REPO / "p2w").glob("*/__init__.py")}
    assert rooms <= set(re.findall(r"^  (\w+)/", BLOCKS[0], re.MULTILINE))


def test_the_picture_of_the_imports_is_their_table():
    """Where one whole room may import another, it stands above it. Modules of a room that may do more are left out."""
    table = importlib.import_module("test_imports").MAY
    rows = {name: number for number, line in enumerate(BLOCKS[1].splitlines()) for name in line.split()}
    assert {path.parent.name for path in (REPO / "p2w").glob("*/__init__.py")} <= set(rows)
    names = {f"p2w.{name}": row for name, row in rows.items()} | {
        name: rows[name] for name in ("launch", "preprocess")
    }
    for room, below in table.items():
        if room in names:
            wrong = [one for one in below if one != room and one in names and names[one] <= names[room]]
            assert wrong == [], f"{room} may import {wrong}, which does not stand below it"


def test_every_module_of_the_package_is_in_the_tree():
    modules = {path.stem for path in (REPO / "p2w").rglob("*.py") if not path.stem.startswith("__")}
    assert modules <= set(re.findall(r"\w+", BLOCKS[0]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_imports_of_the_python_examples_work(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for module, names in re.findall(r"^from (p2w[\w.]*) import ([\w, ]+)$", code, re.MULTILINE):
            missing = [one for one in names.split(", ") if not hasattr(importlib.import_module(module), one)]
            assert missing == [], f"{page.name}: {module} has no {missing}"


LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for file, anchor in LINK.findall(page.read_text()):
        if "://" in file:
            continue
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name} links to {file}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert anchor in slugs, f"{page.name} links to {file}#{anchor}"


README = (REPO / "README.md").read_text()


@pytest.fixture(scope="module")
def costs():
    """recipe -> its cost on one rank of 16 samples in bf16, as `p2w train RECIPE --dry-run` counts it on a GPU."""
    return {
        name: run_cost(one.config, lambda config=one.config: build_pretext_and_network(config), 16, 2)
        for name, one in RECIPES.items()
    }


@pytest.mark.slow
def test_the_arithmetic_in_the_readme_is_that_of_the_dry_run(costs):
    rows = re.findall(r"^\| `(\w+)` \|(.*)\| ([\d,]+) GFLOP \|$", README, re.MULTILINE)
    assert {name for name, _, _ in rows} == set(RECIPES)
    for name, what, gflop in rows:
        assert f"{costs[name].flops_per_sample / 1e9:,.0f}" == gflop, name
        for parameters in re.findall(r"([\d.]+) M parameters", what):
            assert f"{costs[name].parameters / 1e6:.2f}" == parameters, name


@pytest.mark.slow
def test_hours_memory_and_disk_in_the_readme_are_the_forecasts(costs):
    paper, steps = costs["paper"], RECIPES["paper"].config.train.steps
    said = describe_scaling(paper, "", ranks=1, per_node=1, batch=16, steps=steps)[0]
    speed, hours = re.findall(r"([\d,.]+)-([\d,.]+) (?:samples/s|h)", said)
    assert "{} to {} hours".format(*hours) in README and "{} to {} samples/s".format(*speed) in README
    state, activations = paper.state_bytes / 2**30, paper.activation_bytes / 2**30
    assert f"{state:.2f} for weights, {activations:.2f} for activations" in README
    assert f"| {state + activations:.1f} GiB, beside" in README and f"all {steps:,} steps" in README
    (wholes,) = re.findall(r"the paper's ([\d,]+) sub-scans", README)
    wholes = int(wholes.replace(",", ""))
    assert wholes // 16 * 200 == steps and f"| {wholes * SAMPLE_BYTES / 2**30:.0f} GiB of shards" in README
    (days,) = re.findall(r"(\d+) to (\d+) days", README)
    seconds = re.findall(r"([\d.]+) s (?:a sample where|on another)", README)
    assert days == tuple(f"{float(one) * 16 * steps / 86400:.0f}" for one in seconds)
    assert f"(the defaults): {seconds[0]} s a sample" in (REPO / "bench" / "NOTES.md").read_text()
    rows = json.loads((REPO / "bench" / "results" / "end_to_end.json").read_text())["rows"]
    assert {f"{1 / row['value']:.1f}" for row in rows if row["unit"] == "samples/s"} == {seconds[1]}
