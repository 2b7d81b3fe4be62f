"""One room per kind of architecture: adapters find FFN sites and describe them, they do not compute."""

from . import dense, moe  # noqa: F401  (they register themselves)
from .base import Adapter, FFNSite, ModelDescription, UnsupportedModelError, describe, register
from .vlm import find_surroundings, tower_ffns

__all__ = [
    "Adapter",
    "FFNSite",
    "ModelDescription",
    "UnsupportedModelError",
    "describe",
    "find_surroundings",
    "register",
    "tower_ffns",
]
