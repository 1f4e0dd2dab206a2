"""Cut any folder of CT scans into shards: the command `p2w shard`, all of it in p2w/commands/shard_scans.py."""

from p2w.commands.shard_scans import main
from p2w.errors import exits

if __name__ == "__main__":
    exits(main)()
