"""The target tasks by name: one file and one line each."""

from p2w.target.tasks.ncc import Ncc
from p2w.target.tasks.protocol import Task

TASKS: dict[str, type[Task]] = {
    "ncc": Ncc,
}
