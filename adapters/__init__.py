"""One room per kind of architecture: adapters find FFN sites and describe them, they do not compute."""

from .base import Adapter, FFNSite, ModelDescription, UnsupportedModelError, describe, register
from . import dense, moe  # noqa: F401  (they register themselves)

__all__ = ["Adapter", "FFNSite", "ModelDescription", "UnsupportedModelError", "describe", "register"]
