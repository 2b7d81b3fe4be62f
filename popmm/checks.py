"""What a setting's value must be, in words that say what was given and what would do."""

from __future__ import annotations

import math
import numbers


def is_number(value) -> bool:
    """Whether a value is a real number, and no truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def layer_indices(value) -> tuple[int, ...]:
    """``skip_layers``, sorted, each once."""
    try:
        indices = tuple(value)
    except TypeError:
        indices = (None,)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in indices):
        raise ValueError(f"skip_layers={value!r}: give layer indices counted from 0, such as (0, 1)")
    return tuple(sorted(set(indices)))


def check_bits(name: str, value, allowed: tuple, what: str) -> None:
    """Refuses what is none of some whole numbers of bits, or None where that is allowed."""
    if value not in allowed or isinstance(value, bool) or not (value is None or isinstance(value, int)):
        raise ValueError(f"{name}={value!r}: give {what}")


def check_count(name: str, value, what: str) -> None:
    """Refuses what is no whole number from 0 on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name}={value!r}: give a number of {what}")
