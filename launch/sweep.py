"""Run the fine-tunings behind Table 1, Table 2 and Fig. 3: the command `p2w sweep`, all of it in p2w/commands/sweep.py."""

from p2w.commands.sweep import main
from p2w.errors import exits

if __name__ == "__main__":
    exits(main)()
