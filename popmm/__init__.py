"""POP (Partition-guided Online Pruning, arXiv 2602.06822) for Hugging Face transformers.

state = popmm.attach(model, popmm.PopConfig(pruning_ratio=0.4))
model.generate(**inputs, max_new_tokens=64)
popmm.detach(model)
"""

import importlib
import importlib.util
import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from popmm import budget, zoo
    from popmm.adapters import UnsupportedModelError
    from popmm.attach import attach, detach, pruned
    from popmm.config import PopConfig
    from popmm.method.partition import FFNPartition
    from popmm.state import PartitionState

__version__ = "0.2.0"
__all__ = [
    "FFNPartition",
    "PartitionState",
    "PopConfig",
    "UnsupportedModelError",
    "attach",
    "budget",
    "detach",
    "pruned",
    "zoo",
]
_HOMES = {
    "FFNPartition": "method.partition",
    "PartitionState": "state",
    "PopConfig": "config",
    "UnsupportedModelError": "adapters",
    "attach": "attach",
    "detach": "attach",
    "pruned": "attach",
}


def __getattr__(name: str):
    """Loads what is asked for, and torch with it, when it is asked for."""
    if name in _HOMES:
        found = getattr(importlib.import_module(f"popmm.{_HOMES[name]}"), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"popmm.{name}") is not None:
        return importlib.import_module(f"popmm.{name}")
    else:
        raise AttributeError(f"module 'popmm' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Surface(types.ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # an import of the module popmm.attach would put it in the place of the function
        is_module = name == "attach" and isinstance(value, types.ModuleType)
        super().__setattr__(name, value.attach if is_module else value)


sys.modules[__name__].__class__ = _Surface
