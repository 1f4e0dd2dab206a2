"""docs/add_a_pretext.md is followed to the letter: what it says suffices, and what a pretext must say is asked for."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import pytest
import torch
from processes import REPO

from p2w import pretext as pretexts
from p2w.config import Config
from p2w.errors import UserError
from p2w.pretext import PRETEXTS, pretext_class, pretext_groups
from p2w.pretext.parts2whole import Parts2Whole
from p2w.pretext.protocol import Pretext
from p2w.pretext.settings import Bounds, check_bounds

PAGE = (REPO / "docs" / "add_a_pretext.md").read_text()
SMALL = """
--data.batch 4 --data.reader-threads 0 --pretext.size 8 16 16 --model.width 2 --train.steps 4 --train.validate-every 2
--train.probe-every 4 --train.precision fp32
""".split()  # noqa: SIM905


@pytest.mark.slow
def test_a_pretext_added_by_the_page_trains_exports_and_is_in_the_docs(tiny_set, tmp_path):
    for part in ("p2w", "launch", "bench/evidence"):
        shutil.copytree(REPO / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "docs").mkdir()
    shutil.copy(REPO / "docs" / "methods.md", tmp_path / "docs")

    file, line = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (path,) = set(re.findall(r"Write `(p2w/pretext/\w+\.py)`", PAGE))
    (tmp_path / path).write_text(file)
    table = tmp_path / "p2w" / "pretext" / "__init__.py"
    before, after = table.read_text().split("\n}\n", 1)
    table.write_text(f"{before}\n{line}}}\n{after}")

    commands = [
        one.split() for one in re.search(r"```\n(python launch.*?)```", PAGE, re.DOTALL)[1].splitlines()
    ]
    commands[0] += SMALL
    commands.append(re.search(r"`(python bench\S+ --names-only)`", PAGE)[1].split())
    shutil.copytree(tiny_set, tmp_path / "demo" / "shards")
    # As in jobs of tests/slurm: training draws nothing, and the optimizer does not import torch._dynamo.
    path = os.pathsep.join(map(str, [REPO / "tests/slurm/site", tmp_path, REPO]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "P2W_DEVICE": "cpu"}
    for command in commands:
        start = [sys.executable] if command[0] == "python" else [sys.executable, "-m"]
        run = subprocess.run(
            start + command[command[0] == "python" :],
            cwd=tmp_path, check=False, env=environment, capture_output=True, text=True, timeout=140,
        )  # fmt: skip
        assert run.returncode == 0, f"{command}\n{run.stdout}{run.stderr}"

    config = json.loads((tmp_path / "demo" / "denoise" / "config.json").read_text())
    assert (config["pretext"]["name"], config["denoise"]) == ("denoise", {"deviation": 0.2})
    card = json.loads((tmp_path / "demo" / "encoder" / "card.json").read_text())
    assert card["training"]["step"] in (2, 4) and card["training"]["config"]["denoise"] == {"deviation": 0.2}
    spacing = card["input"]["spacing_mm_zyx"]  # of the whole: the same for all of its input
    assert spacing["network_smallest"] == spacing["network"] == spacing["network_largest"] != None  # noqa: E711
    row = "| `denoise` | the whole with noise in it -> the whole | `--denoise.*` |"
    assert row in (tmp_path / "docs" / "methods.md").read_text()


def test_the_table_in_the_docs_is_the_one_of_the_files():
    text = (REPO / "docs" / "methods.md").read_text()
    rows = re.search(r"<!-- pretexts -->\n(.*?)\n<!-- /pretexts -->", text, re.DOTALL)[1].splitlines()[2:]
    shown = [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in rows]
    assert shown == [
        (f"`{name}`", kind.summary, ", ".join(f"`--{group}.*`" for group in kind.groups))
        for name, kind in ((name, pretext_class(name)) for name in PRETEXTS)
    ], "run: python bench/evidence/methods.py --names-only"


def test_what_has_no_default_must_be_said():
    class Silent(Parts2Whole):
        """It does not say what it shows."""

        shows = Pretext.shows
        loss = Pretext.loss

    with pytest.raises(TypeError, match=r"loss.*shows"):
        Silent(Config().pretext)


@pytest.mark.parametrize(
    ("name", "cube", "shows"),
    [
        ("parts2whole", "crop", "part"),
        ("autoencoder", "crop", "whole"),
        ("models_genesis", "crop", "crop"),
        ("models_genesis", "whole", "whole"),
        ("rubiks_cube", "crop", "whole"),
        ("rubiks_cube_pp", "crop", "whole"),
        ("mae", "crop", "whole"),
        ("parts2whole_contrast", "crop", "part"),
        ("moco", "crop", "part"),
    ],
)
def test_what_each_shows(name, cube, shows):
    config = Config()
    config = replace(
        config, pretext=replace(config.pretext, name=name), genesis=replace(config.genesis, cube=cube)
    )
    assert pretexts.build_pretext(config).shows == shows


def test_two_pretexts_may_share_a_group_but_not_its_name_alone(monkeypatch):
    class Other(Parts2Whole):
        """Another group of a name that is taken."""

        groups: ClassVar = {"mae": Bounds}

    monkeypatch.setattr(sys.modules[__name__], "Other", Other, raising=False)
    monkeypatch.setitem(PRETEXTS, "other", f"{__name__}:Other")
    with pytest.raises(TypeError, match="other: mae is already the group of MaeConfig"):
        pretext_groups.__wrapped__()


@dataclass(frozen=True)
class Toy:
    """One setting of each kind."""

    share: Annotated[float, Bounds(0, 0.5)] = 0.1
    most_rounds: Annotated[int, Bounds(1)] = 1
    grid: Annotated[tuple[int, int, int], Bounds(1, usual="2 2 2")] = (1, 1, 1)
    free: float = 0.0


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"share": 0.6}, "toy.share=0.6: must be from 0 to 0.5; pass --toy.share"),
        ({"share": float("nan")}, "toy.share=nan: must be finite; pass --toy.share"),
        ({"most_rounds": 0}, "toy.most_rounds=0: must be at least 1; pass --toy.most-rounds"),
        ({"most_rounds": 2**63}, "toy.most_rounds=9223372036854775808…: must be below 2^63; pass --toy.most-rounds"),
        ({"grid": (1, 0, 1)}, "toy.grid=(1, 0, 1): needs three numbers of at least 1; pass e.g. --toy.grid 2 2 2"),
        ({"free": float("inf")}, "toy.free=inf: must be finite; pass --toy.free"),
    ],
)  # fmt: skip
def test_bounds_name_value_rule_and_remedy(change, line):
    check_bounds("toy", Toy())
    with pytest.raises(UserError) as error:
        check_bounds("toy", Toy(**change))
    assert str(error.value) == line


def test_every_number_of_a_pretext_has_bounds():
    for group, kind in pretext_groups().items():
        hints = {name: hint for name, hint in kind.__annotations__.items() if hint in (int, float)}
        assert not hints, f"{group}: {hints}"


@pytest.mark.slow
def test_settings_are_read_without_torch():
    code = "import sys, p2w.config; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "False" and torch.__version__
