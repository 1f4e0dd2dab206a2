"""Every command that a page shows is taken by the parser of that command, and names only what an earlier line made."""

import importlib.util
import itertools
import re
import shlex
import sys

import pytest
from processes import REPO

from p2w.__main__ import COMMANDS
from p2w.commands import train
from p2w.errors import UserError

spec = importlib.util.spec_from_file_location("command_options", REPO / "docs" / "command_options.py")
assert spec and spec.loader
command_options = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(command_options)

PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
SCRIPTS = {
    "launch/train.py": "train",
    "launch/finetune.py": "finetune",
    "launch/analyze.py": "analyze",
    "launch/sweep.py": "sweep",
    "preprocess/shard_luna.py": "shard-luna",
    "preprocess/shard_scans.py": "shard",
    "preprocess/prepare_target.py": "prepare",
    "slurm/pretrain.sbatch": "train",
    "slurm/finetune.sbatch": "finetune",
}
BLOCK = re.compile(r"^```(?:sh)?\n(.*?)^```", re.DOTALL | re.MULTILINE)
MAKES = ("--out", "--run-dir", "--run", "--preview", "--page")


def lines(text):
    """The command lines of a page's blocks, as lists of words, without comments."""
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(p2w|python3?|torchrun|sbatch|srun|make|[A-Z0-9_]+=\S+) ", line):
                yield shlex.split(line, comments=True)


def command_of(words):
    """(command, its words) of a line that starts one of ours, else None."""
    words = [word for word in words if not re.match(r"[A-Z0-9_]+=", word)]
    for number, word in enumerate(words):
        if word == "p2w" and number + 1 < len(words) and words[number + 1] in COMMANDS:
            return words[number + 1], words[number + 2 :]
        if word in SCRIPTS:
            return SCRIPTS[word], words[number + 1 :]
        if word == "slurm/shard.sbatch":
            return ("shard" if "--scans" in words else "shard-luna"), words[number + 1 :]
        if word in command_options.PHANTOMS and words[number - 1] == "-m":
            return word, words[number + 1 :]
    return None


def shown():
    found = {}
    for page in PAGES:
        for words in lines(page.read_text()):
            ours = command_of(words)
            if ours and not {"…", "..."} & set(words) and "--help" not in words:
                found.setdefault(shlex.join([ours[0], *ours[1]]), (page.name, *ours))
    return list(found.values())


@pytest.mark.parametrize(
    ("page", "command", "words"), shown(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_command_in_the_docs_is_parsed(page, command, words, capsys):
    words = words[
        : min((words.index(end) for end in ("|", "&&", ">", ";") if end in words), default=len(words))
    ]
    if command == "finetune" and words and words[0].endswith(".txt"):
        return  # a file of commands, of which Slurm's script takes a line
    try:
        if command == "train":
            train.parse(["paper", *words[1:]] if words and words[0].endswith(".json") else words)
        else:
            command_options.parsed(command, words)
    except (SystemExit, UserError) as error:
        pytest.fail(f"{page}: p2w {shlex.join([command, *words])}: {error}\n{capsys.readouterr().err}")


def test_a_command_that_is_wrong_is_seen():
    """The test above can fail: an unknown option, a missing one, a word too many, a recipe that is none."""
    for command, words in (
        ("shard", ["--scan", "FOLDER", "--out", "shards"]),
        ("finetune", ["--task", "targets/ours", "--run-dir", "runs/ours"]),
        ("predict", ["runs/ours", "more", "--scan", "scan.nii.gz", "--out", "mask.nii.gz"]),
        ("prepare", ["generic", "--source", "A", "--out", "B"]),
    ):
        with pytest.raises((SystemExit, UserError)):
            command_options.parsed(command, words)
    assert command_of(["sbatch", "--nodes=2", "slurm/pretrain.sbatch", "papr"]) == ("train", ["papr"])
    with pytest.raises(UserError):
        train.parse(["papr"])


# What a reader brings along: their own scans, LUNA16, the checkout.
GIVEN = re.compile(
    r"FOLDER|LABELLED|LUNA16|scan\.nii\.gz|slurm/\w+\.sbatch|https?:.*|\*.*|\^.*|\d+/\d+|requirements.*"
)
NAMED = ("README.md", "tutorial_first_run.md", "tutorial_own_scans.md", "tutorial_slurm.md")


def unmade(text):
    """Names in the commands of a page that no earlier line made and no reader brings along."""
    made, missing = {"demo"} if "make demo" in text else set(), []
    for words in lines(text):
        ours = command_of(words)
        if not ours:
            continue
        command, rest = ours
        makes = [word for before, word in itertools.pairwise(rest) if before in MAKES]
        for before, word in zip(["", *rest], rest, strict=False):
            path = "/" in word or re.search(r"\.(gz|parquet|png|safetensors|csv|html)$", word)
            named = before in ("--shards", "--init", "--scans", "--source", "--luna", "--task")
            path = path or (named and not word.isdigit())
            known = any(word == one or word.startswith(f"{one}/") for one in made) or word == "random"
            if path and word not in makes and not known and not GIVEN.fullmatch(word):
                missing.append(f"p2w {shlex.join([command, *rest])}: {word}")
        made |= set(makes)
    return missing


@pytest.mark.parametrize("page", NAMED)
def test_a_name_was_made_by_an_earlier_line(page):
    (path,) = [one for one in PAGES if one.name == page]
    assert unmade(path.read_text()) == []


def test_a_name_that_nothing_made_is_seen():
    assert unmade("```\np2w report runs/paper\n```") == ["p2w report runs/paper: runs/paper"]
    assert unmade("```\np2w train demo --shards FOLDER --run-dir runs/x\np2w report runs/x\n```") == []


def test_the_reference_has_every_option_of_every_command():
    """Made in this process from the parsers, so it cannot be old; it is to be whole."""
    text = command_options.page()
    for command in COMMANDS:
        assert f"\n## p2w {command}" in text
    for one in (
        "`--optim.lr`",
        "`--repair`",
        "`--recipe.freeze`",
        "`--masks`",
        "`--one-per-study`",
        "`--scans`",
        "`--array`",
    ):
        assert one in text, one
    batch = re.search(r"^\| `--data.batch` .*$", text, re.MULTILINE)[0]
    assert "INT, at least 1" in batch and "`16`" in batch and "Wholes a step" in batch
    assert "FLOAT, 0 to 1" in re.search(r"^\| `--mae.ratio` .*$", text, re.MULTILINE)[0]
    for row in re.findall(r"^\| `.*$", text, re.MULTILINE):
        cells = re.split(r"(?<!\\)\|", row)
        assert len(cells) == 6, row
        assert re.search(r"[.)\]…]$", cells[-2].strip()), f"no sentence says what it does: {row}"
