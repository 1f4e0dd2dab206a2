"""Completion of p2w's commands and options in a shell.

eval "$(p2w completion bash)"        in this shell; for all to come, the same line in ~/.bashrc
"""

import re
import sys
from typing import Annotated, Literal

import tyro

SCRIPT = """# of p2w: commands, then options, else files. The options of a command are
# what its --help lists, asked once a shell.
declare -gA _p2w_options
_p2w() {
    local word=${COMP_WORDS[COMP_CWORD]} command=${COMP_WORDS[1]}
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        mapfile -t COMPREPLY < <(compgen -W "COMMANDS" -- "$word")
    elif [[ $word == -* && " COMMANDS " == *" $command "* ]]; then
        if [[ ! -v _p2w_options[$command] ]]; then
            _p2w_options[$command]=$("${COMP_WORDS[0]}" "$command" --help 2>/dev/null \\
                | grep -oE -- '--[a-z][a-z0-9.-]*[a-z0-9]' | sort -u)
        fi
        mapfile -t COMPREPLY < <(compgen -W "${_p2w_options[$command]}" -- "$word")
    fi
}
complete -o default -F _p2w p2w
"""


def script(commands: list[str]) -> str:
    """The lines that bash reads, for these commands."""
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in commands), commands
    return SCRIPT.replace("COMMANDS", " ".join(commands))


def main(argv: list[str]) -> int:
    """The command: prints the script."""
    shell = Annotated[Literal["bash"], tyro.conf.Positional, tyro.conf.arg(metavar="bash")]
    tyro.cli(shell, args=argv, prog="p2w completion", description=__doc__)
    # The table of commands is the caller's: p2w/__main__.py, which no room imports.
    table = sys.modules.get("p2w.__main__") or sys.modules["__main__"]
    print(script(list(table.COMMANDS)), end="")
    return 0
