"""On the path of the cluster's jobs: launch/train.py there draws nothing, and each of its steps sleeps a while.

So a run lasts long enough to be disturbed, without two cores being busy meanwhile. All else is the real program.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

SLEEP_S = 0.06
SPIED = "p2w.pretrain"


class Spy(importlib.abc.MetaPathFinder):
    """Puts the spies in as soon as what they spy on is imported."""

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        if name != SPIED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def spied(module: ModuleType) -> None:
            execute(module)
            sys.modules["p2w"].pretrain = module  # as will be once it is imported
            from tests.launch import spies

            spies.draw_nothing(0)
            spies.lag(0, 0, SLEEP_S)

        spec.loader.exec_module = spied
        return spec


sys.meta_path.insert(0, Spy())
