"""The list of checks, and how one is held to its time."""

import threading
from collections.abc import Callable, Iterator

from p2w.doctor import data, machine, network, slurm, software
from p2w.doctor.row import Case, Row, problem

Check = Callable[[Case], Iterator[Row]]

CHECKS: tuple[Check, ...] = (
    software.python, software.torch_build, software.devices, software.nccl, software.triton, software.apex,
    software.libraries, software.arithmetic,
    machine.cores, machine.memory, machine.speed, machine.shared_memory, machine.disk, machine.limits, machine.clock,
    data.shards, slurm.cluster, slurm.job,
    network.host_name, network.interfaces, network.ports, network.all_reduce,
)  # fmt: skip
LIMIT_S = 60.0


def answer(check: Check, case: Case, limit_s: float = LIMIT_S) -> list[Row]:
    """What a check finds. One that raises, or hangs (a dead file server, a driver), is a problem like any other."""
    rows: list[Row] = []
    broken: list[Exception] = []

    def ask() -> None:
        try:
            rows.extend(check(case))
        except Exception as error:
            broken.append(error)

    name = check.__name__.replace("_", " ")
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        hangs = problem(
            name,
            f"no answer in {limit_s:.0f} s: a file server, a driver or a name server hangs",
            "dmesg | tail; df; nvidia-smi",
        )
        return [*rows, hangs]
    for error in broken:
        text = (str(error).splitlines() or [""])[0]
        rows.append(
            problem(
                name,
                f"the check itself failed: {type(error).__name__}: {text}",
                "a mistake of p2w doctor: please report this line",
            )
        )
    return rows
