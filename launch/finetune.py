"""Fine-tune a starting point on a target task: the command `p2w finetune`, all of it in p2w/commands/finetune.py."""

from p2w.commands.finetune import main
from p2w.errors import exits

if __name__ == "__main__":
    exits(main)()
