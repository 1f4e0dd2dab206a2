"""On the path of the cluster's jobs, for steps that are no forks: training draws nothing, and each step sleeps a while.

So a run lasts long enough to be disturbed, without two cores being busy meanwhile. A new process of torch takes 7 s of a
core: the ranks that torchrun starts are forks of it, as in fork_server.py, and torch._dynamo, which every optimizer imports
for two decorators, is left out. All else is the real program, in the tree of processes that Slurm knows.
"""

import _posixsubprocess
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

SLEEP_S = (
    0.5  # seconds, beside some 0.025 that a step computes: few steps that last take less of a core than many
)


def spy(module: ModuleType) -> None:
    """What a run of tests/launch would be given as spies."""
    sys.modules["p2w"].pretrain = module  # as will be once it is imported
    from tests.launch import spies

    spies.draw_nothing(0)
    spies.recalibrate_on_few(0)
    spies.lag(0, 0, SLEEP_S)


def leave_out_dynamo(module: ModuleType) -> None:
    """Have the decorator that imports torch._dynamo do nothing: without torch.compile it has nothing to do."""
    module._disable_dynamo = lambda fn=None, recursive=True: fn if fn else lambda one: one


def leave_out_graph_breaks(module: ModuleType) -> None:
    """Have an optimizer's `step` set whether gradients are recorded, and not import torch._dynamo for a graph break."""

    def set_grad(step: Callable) -> Callable:
        @functools.wraps(step)
        def stepped(self, *args, **kwargs):
            import torch

            with torch.set_grad_enabled(self.defaults["differentiable"]):
                return step(self, *args, **kwargs)

        return stepped

    module._use_grad_for_differentiable = set_grad


def fork_ranks(_: ModuleType) -> None:
    """Have torchrun fork its ranks, which then need not import torch again."""
    tests = str(Path(__file__).parents[2])
    sys.path.append(tests)
    import fork_server

    sys.path.remove(tests)
    fork_server.BARE_PATH.remove(tests)
    fork_server.Spies.torchrun = True
    _posixsubprocess.fork_exec = subprocess._fork_exec = fork_server.fork_exec


CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "p2w.pretrain": spy,
    "torch._compile": leave_out_dynamo,
    "torch.optim.optimizer": leave_out_graph_breaks,
    "torch.distributed.elastic.agent.server.api": fork_ranks,  # torchrun's, before it starts anything
}


class Changes(importlib.abc.MetaPathFinder):
    """Changes a module as soon as it is imported."""

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        if name not in CHANGES:
            return None
        change = CHANGES.pop(name)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def changed(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = changed
        return spec


sys.meta_path.insert(0, Changes())
