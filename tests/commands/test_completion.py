"""Completion as bash does it."""

import shutil
import subprocess
import sys

import pytest
from processes import REPO

from p2w.__main__ import COMMANDS

BASH = shutil.which("bash")


def complete(*words):
    """What bash offers after these words, of which the last is being typed."""
    typed = " ".join(f"'{word}'" for word in words)
    lines = f"""
        p2w() {{ "{sys.executable}" -m p2w "$@"; }}
        eval "$(p2w completion bash)"
        COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}
        _p2w; printf '%s\\n' "${{COMPREPLY[@]}}"
        complete -p p2w >&2
    """
    done = subprocess.run(
        [BASH, "--norc", "-euc", lines], cwd=REPO, capture_output=True, text=True, timeout=60, check=True
    )
    assert "-F _p2w p2w" in done.stderr
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.skipif(BASH is None, reason="no bash here")
def test_bash_offers_commands_then_options_of_the_command():
    assert sorted(complete("p2w", "")) == sorted(COMMANDS)
    assert complete("p2w", "ver") == ["verify"]
    assert set(complete("p2w", "verify", "--")) == {
        "--help",
        "--luna",
        "--privacy",
        "--repair",
        "--scans",
        "--workers",
    }
    assert complete("p2w", "verify", "shards", "--re") == ["--repair"]
    assert complete("p2w", "verify", "sh") == []  # bash then offers files
    assert complete("p2w", "no-such-command", "--") == []
