"""One room per kind of architecture: adapters find FFN sites and describe them, they do not compute."""

from . import dense, moe  # noqa: F401  (they register themselves)
from .base import (
    Adapter,
    BrokenWeightsError,
    DecoderLayer,
    FFNSite,
    ModelDescription,
    UnsupportedModelError,
    find_decoder,
    register,
)
from .description import describe
from .vlm import find_surroundings, tower_ffns
from .weights import why_not_readable

__all__ = [
    "Adapter",
    "BrokenWeightsError",
    "DecoderLayer",
    "FFNSite",
    "ModelDescription",
    "UnsupportedModelError",
    "describe",
    "find_decoder",
    "find_surroundings",
    "register",
    "tower_ffns",
    "why_not_readable",
]
