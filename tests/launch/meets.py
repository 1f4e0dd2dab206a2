"""Rank RANK of two, on a node of its own, meets the other: says in one line why not. Arguments: RANK ADDRESS PORT SECONDS"""

import os
import sys

from p2w.errors import UserError
from p2w.world import World

rank, address, port, seconds = sys.argv[1:]
os.environ.update(RANK=rank, WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
os.environ.update(MASTER_ADDR=address, MASTER_PORT=port)
try:
    World.start(20, float(seconds))
except UserError as error:
    sys.exit(f"error: {error}")
