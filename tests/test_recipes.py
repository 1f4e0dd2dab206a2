"""The named runs: what the paper says stands in `paper`, and every recipe can be built."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from p2w import config as settings
from p2w.errors import UserError
from p2w.pretext import build_pretext_and_network
from p2w.recipes import RECIPES, named


def test_paper_holds_what_the_paper_publishes():
    paper = named("paper")
    assert paper.data.batch == 16
    assert paper.pretext.volume_fraction == (1 / 16, 1 / 4)
    assert not paper.pretext.skips
    assert paper.pretext.window_hu == (-1000, 1000)
    assert paper.train.steps == 200 * paper.train.validate_every
    assert paper.train.validate_every == 28_144 // paper.data.batch


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_sound_and_can_be_built(name):
    config = settings.check_config(named(name))
    with torch.device("meta"):
        _, network = build_pretext_and_network(config)
        part = torch.zeros(1, 1, *config.pretext.size)
        assert network(part).shape == part.shape
    assert "\n" not in RECIPES[name].summary


def test_large_has_the_network_size_of_a_sub_scan():
    assert named("large").pretext.size == (64, 128, 128)


def test_unified_is_for_the_papers_arithmetic_and_differs_in_nothing_else():
    unified, paper = named("unified"), named("paper")
    assert unified.pretext == replace(paper.pretext, name="parts2whole_contrast")
    assert unified.train == replace(paper.train, steps=paper.train.steps // 2)
    assert unified.optim == paper.optim and unified.data == paper.data and unified.model == paper.model
    assert unified.contrast.weight == 0.01 and unified.contrast.temperature is None


def test_an_unknown_recipe_is_named_with_the_known_ones():
    with pytest.raises(UserError, match=r"recipe papr: unknown; one of demo, paper, large"):
        named("papr")


@pytest.mark.parametrize("page", ["README.md", "slurm/pretrain.sbatch"])
def test_the_commands_shown_ask_for_a_number_of_gpus_that_divides_the_batch(page):
    text = (Path(__file__).resolve().parent.parent / page).read_text()
    shown = re.findall(r"--nodes=(\d+) --gpus-per-node=(\d+) .*pretrain\.sbatch (\w+)(.*)", text)
    assert shown
    for nodes, gpus, recipe, rest in shown:
        other = re.search(r"--data\.batch (\d+)", rest)
        batch = int(other[1]) if other else named(recipe).data.batch
        assert batch % (int(nodes) * int(gpus)) == 0, f"{recipe}: {batch} over {nodes} x {gpus}"
