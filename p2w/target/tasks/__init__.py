"""The target tasks by name: one file and one line each."""

from p2w.target.tasks.bms import Bms
from p2w.target.tasks.ecc import Ecc
from p2w.target.tasks.general import General
from p2w.target.tasks.lcs import Lcs
from p2w.target.tasks.ncc import Ncc
from p2w.target.tasks.ncs import Ncs
from p2w.target.tasks.protocol import Task

TASKS: dict[str, type[Task]] = {
    "ncc": Ncc,
    "ncs": Ncs,
    "lcs": Lcs,
    "ecc": Ecc,
    "bms": Bms,
    "general": General,
}
