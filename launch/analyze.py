"""Ask whether a run learns what the paper says: the command `p2w analyze`, all of it in p2w/commands/analyze.py."""

from p2w.commands.analyze import main
from p2w.errors import exits

if __name__ == "__main__":
    exits(main)()
