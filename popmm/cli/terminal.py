"""Where output goes: what was asked for to stdout, figures and progress to stderr."""

from __future__ import annotations

import json
import math
from typing import Any


def print_json(data: Any) -> None:
    """Data as JSON on stdout, numbers that are none as null."""
    print(json.dumps(_plain(data), indent=1))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
