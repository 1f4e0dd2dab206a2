"""Pretrain an encoder: the command `p2w train`, all of it in p2w/commands/train.py."""

from p2w.commands.train import main
from p2w.errors import exits

if __name__ == "__main__":
    exits(main)()
