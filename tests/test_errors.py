"""One line and exit code 2 for bad input, whatever is raised inside a command."""

import pytest

from p2w.errors import UserError, exits


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "said"),
    [
        (lambda: None, 0, ""),
        (lambda: 1, 1, ""),
        (raising(UserError("x: wrong; pass y")), 2, "error: x: wrong; pass y\n"),
        (raising(KeyboardInterrupt()), 130, "stopped: Ctrl-C\n"),
    ],
)
def test_exit_codes(main, code, said, capsys):
    with pytest.raises(SystemExit) as end:
        exits(main)()
    assert (end.value.code, capsys.readouterr().err) == (code, said)


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        exits(raising(ZeroDivisionError()))()
