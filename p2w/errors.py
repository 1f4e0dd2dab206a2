"""Bad input is the user's business: one line that says what, where, the rule and the remedy, then exit code 2."""

import functools
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Input that breaks a rule. The message is one line: what, where, the rule, the remedy."""


class SharedError(UserError):
    """A UserError that every rank raises together, with the same words: one of them says it for all."""


def exits(main: Callable[[], int | None]) -> Callable[[], None]:
    """Make `main` a command: its return value is the exit code, a UserError is one line on stderr and code 2."""

    @functools.wraps(main)
    def command() -> None:
        try:
            code = main() or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = 2
        except KeyboardInterrupt:
            print("stopped: Ctrl-C", file=sys.stderr, flush=True)
            code = 130
        sys.exit(code)

    return command
