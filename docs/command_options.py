"""The options of every command, read from the parsers that the commands use: for docs/ as a site, and for its tests.

Nothing is listed by hand. A command's `main` is called up to the point where it would parse its command line, and what it
gives to tyro there is the source of the table.
"""

import importlib
import re
import sys
import textwrap
import typing
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tyro

from p2w.__main__ import COMMANDS
from p2w.pretext.settings import Bounds
from p2w.tasks import TASKS

PHANTOMS = {"p2w.phantom": "p2w.phantom.__main__", "p2w.phantom.target_tasks": "p2w.phantom.target_tasks"}
# Words after a command that choose another parser: those of `prepare` are its tasks, `predict` has one for many scans.
VARIANTS: dict[str, list[list[str]]] = {
    "prepare": [[name] for name in TASKS],
    "predict": [["RUN", "--scan", "SCAN"], ["RUN", "--scans", "FOLDER"]],
}
TITLES = {("predict", "--scans"): "p2w predict --scans: many scans"}
ANY = {"{None}|": "", "[": "", "]": "", " ...": " …"}


class Reached(BaseException):  # no Exception: whatever a command catches, this passes
    """A command has come to its parser, and says what it gave to it."""

    def __init__(self, form: Any, keywords: dict[str, Any], values: Any = None) -> None:
        self.form, self.keywords, self.values = form, keywords, values


@contextmanager
def _stopping_at_the_parser(parse: bool) -> Iterator[None]:
    """Until the end of the block tyro.cli raises `Reached`, after it has parsed or without."""
    real, errors, arguments = tyro.cli, sys.stderr, sys.argv

    def cli(form: Any, **keywords: Any) -> Any:
        raise Reached(form, keywords, real(form, **keywords) if parse else None)

    tyro.cli = cli
    try:
        yield
    finally:
        tyro.cli, sys.stderr, sys.argv = real, errors, arguments


def parsed(command: str, words: list[str], parse: bool = True) -> Reached:
    """What `p2w COMMAND WORDS…` gives to its parser, and what the parser makes of it. Starts nothing.

    `command` may also be `p2w.phantom` or `p2w.phantom.target_tasks`. A wrong command line ends as it does on a terminal: a
    message on stderr, and SystemExit or UserError.
    """
    module, _, function = PHANTOMS.get(command, COMMANDS.get(command, ("",))[0]).partition(":")
    main = getattr(importlib.import_module(module), function or "main")
    try:
        with _stopping_at_the_parser(parse):
            if command in PHANTOMS:
                sys.argv = [command, *words]
                main()
            else:
                main(words)
    except Reached as reached:
        return reached
    raise AssertionError(f"p2w {command}: did not come to its parser")


@dataclass(frozen=True)
class Form:
    """What a command asks for: its title, one line, its usage text, its options as argparse has them, and what tyro read."""

    title: str
    summary: str
    text: str
    options: list[Any]
    declared: Any


def forms() -> Iterator[Form]:
    """Every command, variant and subcommand."""
    for command, (_, summary) in COMMANDS.items():
        for words in VARIANTS.get(command, [[]]):
            reached = parsed(command, words, parse=False)
            name = f"p2w {command}" + (f" {words[0]}" if len(words) == 1 else "")
            title = TITLES.get((command, words[1] if len(words) > 1 else ""), name)
            yield from _with_subcommands(title, summary, reached)
    for module in PHANTOMS:
        yield from _with_subcommands(f"python -m {module}", "write phantom scans", parsed(module, [], False))


def _with_subcommands(title: str, summary: str, reached: Reached) -> Iterator[Form]:
    keywords = {
        name: value
        for name, value in reached.keywords.items()
        if name in ("prog", "description", "default", "config")
    }
    with warnings.catch_warnings():  # deprecated without a successor, tyro 1.0
        warnings.simplefilter("ignore", DeprecationWarning)
        parser = tyro.extras.get_parser(reached.form, **keywords)
    form = keywords.get("default", reached.form)
    text = textwrap.dedent(str(keywords.get("description") or "")).strip()
    yield Form(title, summary, text, options(parser), form)
    for one in parser._actions:
        if _chooses(one):
            for name, inner in one.choices.items():
                summary = (inner.description or "").split("\n")[0].rstrip(".")
                yield Form(f"{title} {name}", summary, "", options(inner), form)


def _chooses(action: Any) -> bool:
    """Whether the action is the choice of a subcommand. tyro has a copy of argparse of its own, whose classes are others."""
    return type(action).__name__ == "_SubParsersAction"


def options(parser: Any) -> list[Any]:
    """Options and positional arguments, without --help and the choice of a subcommand."""
    return [one for one in parser._actions if one.dest != "help" and not _chooses(one)]


def page() -> str:
    """The page of all commands in Markdown."""
    parts = [
        "# Commands\n\nMade from the commands' own parsers by `make docs`. `p2w COMMAND --help` prints the same.\n"
    ]
    for form in forms():
        parts.append(f"## {form.title}\n")
        parts.append(
            _prose(form.text) if "\n" in form.text else f"{form.summary[:1].upper()}{form.summary[1:]}.\n"
        )
        groups: dict[str, list[Any]] = {}
        for one in form.options:
            flag = one.option_strings[0] if one.option_strings else ""
            groups.setdefault(flag[2:].partition(".")[0] if "." in flag else "", []).append(one)
        if form.title == "p2w doctor":
            groups = {"": groups[""]}
            parts.append("It also takes every setting of [p2w train](#p2w-train), since it checks them.\n")
        for group, actions in groups.items():
            parts.append(f"**`--{group}.*`**\n" if group else "")
            rows = "\n".join(_row(one, form.declared) for one in actions)
            parts.append(f"| option | takes | default | what it does |\n| --- | --- | --- | --- |\n{rows}\n")
    return "\n".join(parts)


def _prose(text: str) -> str:
    """A usage text in Markdown: what is indented as code, the rest as paragraphs."""
    parts = []
    for block in re.split(r"\n\s*\n", text):
        if all(line.startswith("    ") for line in block.splitlines()):
            parts.append(f"````text\n{textwrap.dedent(block).rstrip()}\n````")
        else:
            parts.append(_escaped(block))
    return "\n\n".join(parts) + "\n"


def _escaped(text: str) -> str:
    """The text with what Markdown would take for emphasis or HTML escaped, but for inline code."""
    parts = text.split("`")
    for number in range(0, len(parts), 2):
        parts[number] = re.sub(r"([*_])", r"\\\1", parts[number]).replace("<", "&lt;")
    return "`".join(parts)


def _row(one: Any, form: Any) -> str:
    """One option as a row of the table."""
    alone = one.dest.startswith("__tyro")  # a command that takes one word and nothing else
    place = "SHELL" if alone else one.dest.upper()
    names = ", ".join(f"`{name}`" for name in one.option_strings) or f"`{place}`"
    takes = str(one.metavar or "")
    for old, new in ANY.items():
        takes = takes.replace(old, new)
    takes = re.sub(r"(.+) \1 …", r"\1 …", takes)
    text = "Which shell." if alone else re.sub(r"\s+", " ", str(one.help or "")).strip()
    text, _, default = text.rpartition(" (default: ") if " (default: " in text else (text, "", "")
    default = default.removesuffix(")").strip("'")
    if text.endswith("(required)"):
        text, default = text.removesuffix("(required)").rstrip(), "required"
    bounds = _bounds(one.dest, form)
    if bounds:
        high = "" if bounds.high is None else f" to {bounds.high:g}"
        takes += f", {bounds.low:g}{high}" if high else f", at least {bounds.low:g}"
    flag = one.nargs == 0 or isinstance(getattr(one, "const", None), bool)
    text = _escaped(text)
    cells = [names, "" if flag else f"`{takes}`", f"`{default}`" if default not in ("", "None") else "", text]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _bounds(dest: str, form: Any) -> Bounds | None:
    """The `Bounds` in the annotation of the field that an option sets, if it has any."""
    hint: Any = form if isinstance(form, type) else type(form)
    found = None
    for name in dest.replace("-", "_").split("."):
        try:
            hints = typing.get_type_hints(typing.get_origin(hint) or hint, include_extras=True)
        except (TypeError, NameError):
            return None
        if name not in hints:
            return None
        hint = hints[name]
        found = next((one for one in getattr(hint, "__metadata__", ()) if isinstance(one, Bounds)), None)
        if hasattr(hint, "__metadata__"):
            hint = typing.get_args(hint)[0]
    return found
