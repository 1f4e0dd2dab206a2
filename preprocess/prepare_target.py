"""Prepare the samples of a target task: the command `p2w prepare`, all of it in p2w/commands/prepare_target.py."""

from p2w.commands.prepare_target import main
from p2w.errors import exits

if __name__ == "__main__":
    exits(main)()
