"""Static caches that serve prompt after prompt, so that a compiled decode step stays valid.

``generate(cache_implementation="static")`` makes a new cache for every call: new addresses, and with
them new CUDA graphs, and a new length for every length of prompt, and with it a new compilation. While a
model is attached its caches come from here: lengths in buckets, memory used again.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable

import torch
import torch._dynamo
from torch import Tensor
from transformers import StaticCache

KEPT = 4  # caches, of different batch sizes and lengths
BUCKET = 256  # cache lengths are rounded up to a multiple of this


def fix_addresses(owner: object) -> None:
    """Tells CUDA graphs that the tensors an object holds stay where they are: else each step would copy them."""
    for value in vars(owner).values():
        for t in value if isinstance(value, (tuple, list)) else (value, getattr(value, "rows", None)):
            if isinstance(t, Tensor):
                torch._dynamo.mark_static_address(t, guard=False)


class StaticCaches:
    """Caches by batch size and bucket, handed out again when nobody else holds them."""

    def __init__(self) -> None:
        self._caches: dict[tuple, StaticCache] = {}

    def wrap(self, prepare: Callable[..., StaticCache]) -> Callable[..., StaticCache]:
        """transformers' ``_prepare_static_cache``, in buckets."""
        signature = inspect.signature(prepare)

        @functools.wraps(prepare)
        def prepare_in_bucket(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            length = bound.arguments["max_cache_len"]
            bound.arguments["max_cache_len"] = length = -(-length // BUCKET) * BUCKET
            # tensors made in inference mode cannot be written outside it
            key = (bound.arguments["batch_size"], length, str(bound.arguments["cache_implementation"]))
            key += (bound.arguments.get("prefill_chunk_size"), torch.is_inference_mode_enabled())
            kept = self._caches.get(key)
            if kept is not None and sys.getrefcount(kept) <= _ONLY_OURS:
                kept.__dict__.pop("_popmm_sequence", None)
                kept.reset()
                return kept
            model = getattr(prepare, "__self__", None)
            if model is not None:  # or else it would be as long as the longest so far
                model.__dict__.pop("_previous_max_cache_length", None)
            self._caches.pop(key, None)
            while len(self._caches) >= KEPT:
                del self._caches[next(iter(self._caches))]
            self._caches[key] = cache = prepare(*bound.args, **bound.kwargs)
            return cache

        return prepare_in_bucket

    def release(self) -> None:
        """Frees the caches."""
        self._caches.clear()


def _references() -> int:
    """What ``sys.getrefcount`` says of a dictionary's value that one local name holds too."""
    values = {"": object()}
    kept = values.get("")
    return sys.getrefcount(kept)


_ONLY_OURS = _references()
