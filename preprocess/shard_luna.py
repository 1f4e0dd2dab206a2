"""Cut LUNA16 into shards: the command `p2w shard-luna`, all of it in p2w/commands/shard_luna.py."""

from p2w.commands.shard_luna import main
from p2w.errors import exits

if __name__ == "__main__":
    exits(main)()
