"""The target tasks by name: one file and one line each."""

from p2w.tasks.bms import Bms
from p2w.tasks.custom import Custom
from p2w.tasks.ecc import Ecc
from p2w.tasks.lcs import Lcs
from p2w.tasks.ncc import Ncc
from p2w.tasks.ncs import Ncs
from p2w.tasks.task import Task

TASKS: dict[str, type[Task]] = {
    "ncc": Ncc,
    "ncs": Ncs,
    "lcs": Lcs,
    "ecc": Ecc,
    "bms": Bms,
    "general": Custom,
    "custom": Custom,  # another name of the same; data sets say general
}
