"""Errors in the user's input: one line with the value, where it is, the rule and the remedy, then exit code 2."""

import functools
import os
import select
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


class UserError(ValueError):
    """Input that breaks a rule. The message is one line: the value, where it is, the rule, the remedy."""


class SharedError(UserError):
    """A UserError that all ranks raise together with the same message, which only one of them prints."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type where the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def refuse_old_options(argv: Sequence[str], renamed: Mapping[str, str]) -> None:
    """Raise UserError where `argv` holds an option that has another name now; `renamed` maps old names to new ones."""
    for argument in argv:
        option = argument.partition("=")[0].replace("_", "-")
        if option in renamed:
            raise UserError(f"{option}: is named {renamed[option]} now; pass that")


def program(command: str) -> str:
    """How this process's command was typed, for its help: `p2w COMMAND`, or the script that stands for it."""
    script = Path(sys.argv[0])
    return f"p2w {command}" if _is_module(script) else f"{script.parent.name}/{script.name}"


def command_line() -> str:
    """This process's command, quoted, as it follows `python` or `torchrun`: `-m p2w COMMAND …` or a script."""
    return shlex.join(["-m", "p2w", *sys.argv[1:]] if _is_module(Path(sys.argv[0])) else sys.argv)


def _is_module(script: Path) -> bool:
    return script.name in ("p2w", "__main__.py")


def exits(main: Callable[[], int | None]) -> Callable[[], None]:
    """Make `main` a command: its return value is the exit code; a UserError is one line on stderr and exit code 2.

    When the reader of stdout has ended (`| head`), the command ends without a message: exit code 0 after --help, else 141,
    the code that a shell reports for a program that SIGPIPE ended.
    """

    @functools.wraps(main)
    def command() -> None:
        try:
            code = _exit_code(main)
            sys.stdout.flush()
        except BrokenPipeError:
            if not _reader_is_gone():
                raise
            # The interpreter flushes stdout once more as it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0 if {"-h", "--help"} & set(sys.argv) else 128 + signal.SIGPIPE
        sys.exit(code)

    return command


def _exit_code(main: Callable[[], int | None]) -> int | str:
    """Run `main`; the exit code, or a text, which `sys.exit` prints before it exits with code 1."""
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("stopped: Ctrl-C", file=sys.stderr, flush=True)
        return 130
    except SystemExit as end:  # from the argument parser, after --help too
        return end.code or 0


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe without a reader; the error may also come from another pipe."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except (OSError, ValueError):  # stdout is closed, or is not a file
        return False
    return any(events & select.POLLERR for _, events in poll.poll(0))
