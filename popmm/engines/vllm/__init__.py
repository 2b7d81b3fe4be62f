"""The plug-in for vLLM (``--quantization popmm``), found by the entry-point group ``vllm.general_plugins``."""

from __future__ import annotations


def register() -> None:
    """Called by vLLM in each of its processes; may be called again."""
    from popmm.engines.vllm import quantization  # noqa: F401  (registers itself; imports vllm)
