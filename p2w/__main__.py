"""The command `p2w`: from scans to weights.

p2w COMMAND --help        the same as  python -m p2w COMMAND --help
"""

import importlib
import re
import sys

from p2w import __version__
from p2w.errors import UserError, exits

COMMANDS: dict[str, tuple[str, str]] = {
    "shard-luna": ("p2w.commands.shard_luna", "cut LUNA16 into shards of sub-scans, for pretraining"),
    "shard": (
        "p2w.commands.shard_scans",
        "cut any folder of scans into shards of sub-scans, for pretraining",
    ),
    "train": ("p2w.commands.train", "pretrain an encoder; on several processes: torchrun -m p2w train"),
    "analyze": (
        "p2w.commands.analyze",
        "does a run learn what the paper says? also by torchrun -m p2w analyze",
    ),
    "prepare": ("p2w.commands.prepare_target", "prepare the samples of a target task"),
    "finetune": (
        "p2w.commands.finetune",
        "fine-tune a starting point on a target task, in trials; also by torchrun -m p2w finetune",
    ),
    "sweep": ("p2w.commands.sweep", "run the fine-tunings behind Table 1, Table 2 and Fig. 3"),
    "slurm": ("p2w.commands.slurm", "write the Slurm scripts into a folder, for an installed p2w"),
    "predict": (
        "p2w.inference.predict_cohort",
        "apply a fine-tuned network to a scan, or to many: masks, or scores of candidates",
    ),
    "score": (
        "p2w.inference.score",
        "predicted masks beside the true ones: Dice, IoU, surfaces in mm, by class",
    ),
    "embed": (
        "p2w.inference.embed",
        "pooled features of an encoder for every scan of a cohort, without training",
    ),
    "probe": (
        "p2w.inference.probe",
        "what embeddings tell about a label: k-NN and a linear probe, by patient",
    ),
    "neighbours": ("p2w.inference.neighbours", "the most similar scans of a cohort; a t-SNE page"),
    "export": ("p2w.weights.export", "write a run's weights for other programs"),
    "push": (
        "p2w.weights.export:main_push",
        "publish a run's encoder on the Hugging Face Hub, with its card",
    ),
    "inspect": (
        "p2w.weights.start:main_inspect",
        "which network the weights in a file belong to, and whether all of them can be loaded",
    ),
    "report": ("p2w.report", "RUN/report.html: one page of a run, with curves and a slice slider"),
    "verify": ("p2w.shards.verify", "check that a data set is as it was written; repair it from the scans"),
    "doctor": (
        "p2w.doctor.command",
        "check this machine against the needs of a run, with the remedy of each problem",
    ),
    "completion": ("p2w.__main__:main_completion", "completion of commands and options in bash"),
    "table1": (
        "p2w.reproduce.commands:main_table1",
        "starting points on the target tasks, beside the paper's Table 1",
    ),
    "table2": (
        "p2w.reproduce.commands:main_table2",
        "scale of the parts and skip connections, beside the paper's Table 2",
    ),
    "fig3": (
        "p2w.reproduce.commands:main_fig3",
        "reconstruction against transfer over checkpoints, beside the paper's Fig. 3",
    ),
}


def usage() -> str:
    """The help text: all commands with a summary of each."""
    width = max(map(len, COMMANDS), default=0)
    lines = [f"    p2w {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join([(__doc__ or "").rstrip(), "", *lines])


# Of the command `p2w completion`, whose --help begins with this text.
COMPLETION = """Completion of p2w's commands and options in a shell.

eval "$(p2w completion bash)"        in this shell; for all to come, the same line in ~/.bashrc
"""
SCRIPT = """# of p2w: commands, then options, else files. The options of a command are
# what its --help lists, asked once a shell.
declare -gA _p2w_options
_p2w() {
    local word=${COMP_WORDS[COMP_CWORD]} command=${COMP_WORDS[1]}
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        mapfile -t COMPREPLY < <(compgen -W "COMMANDS" -- "$word")
    elif [[ $word == -* && " COMMANDS " == *" $command "* ]]; then
        if [[ ! -v _p2w_options[$command] ]]; then
            _p2w_options[$command]=$("${COMP_WORDS[0]}" "$command" --help 2>/dev/null \\
                | grep -oE -- '--[a-z][a-z0-9.-]*[a-z0-9]' | sort -u)
        fi
        mapfile -t COMPREPLY < <(compgen -W "${_p2w_options[$command]}" -- "$word")
    fi
}
complete -o default -F _p2w p2w
"""


def completion_script(commands: list[str]) -> str:
    """The lines that bash reads, for these commands."""
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in commands), commands
    return SCRIPT.replace("COMMANDS", " ".join(commands))


def main_completion(argv: list[str]) -> int:
    """The command `p2w completion`: prints the script."""
    from typing import Annotated, Literal  # noqa: PLC0415 - other commands need neither of these

    import tyro  # noqa: PLC0415

    shell = Annotated[Literal["bash"], tyro.conf.Positional, tyro.conf.arg(metavar="bash")]
    tyro.cli(shell, args=argv, prog="p2w completion", description=COMPLETION)
    print(completion_script([*COMMANDS]), end="")
    return 0


@exits
def main() -> int:
    """Call `main(argv)` of the command's module, which is imported now, with the rest of the command line."""
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"p2w {__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"p2w {name}: no such command; one of {', '.join(COMMANDS)}")
    module, _, function = COMMANDS[name][0].partition(":")
    return int(getattr(importlib.import_module(module), function or "main")(rest) or 0)


if __name__ == "__main__":
    main()
