"""POP (Partition-guided Online Pruning, arXiv 2602.06822) for Hugging Face transformers.

state = popmm.attach(model, popmm.PopConfig(pruning_ratio=0.4))
model.generate(**inputs, max_new_tokens=64)
popmm.detach(model)
"""

from popmm.adapters import UnsupportedModelError
from popmm.attach import attach, detach, pruned
from popmm.config import PopConfig
from popmm.partition import FFNPartition
from popmm.state import PartitionState

from popmm import budget, zoo  # isort: skip

__version__ = "0.1.0"
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
