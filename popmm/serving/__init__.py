"""A server in OpenAI's form, of transformers' own, that decodes by popmm: limits, figures, start and end."""

from __future__ import annotations

import importlib.util

NEEDED = ("fastapi", "uvicorn", "openai", "pydantic", "prometheus_client")


def check_installed() -> None:
    """Refuses to start without the packages of ``popmm[serve]``."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"popmm serve needs {', '.join(missing)}: pip install 'popmm[serve]'")
