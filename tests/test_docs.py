"""What the pages tell users to type is taken by the command line."""

import re

import pytest
from processes import REPO

from launch.train import parse
from p2w import config as settings
from p2w.config import Config

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
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
