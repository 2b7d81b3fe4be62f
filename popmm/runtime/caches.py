"""Static caches that serve prompt after prompt, so that a compiled decode step stays valid.

``generate(cache_implementation="static")`` makes a new cache for every call: new addresses, and with
them new CUDA graphs, and a new length for every length of prompt, and with it a new compilation. While a
model is attached its caches come from here: lengths in buckets, memory used again.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable

import torch
import torch._dynamo
from torch import Tensor

from popmm.compat import StaticCache, forget_cache_length, hold_all, static_cache_signature
from popmm.runtime.sequence import ON_CACHE

KEPT = 4  # caches, of different batch sizes and lengths
BUCKET = 256  # cache lengths are rounded up to a multiple of this


class StaticCaches:
    """Caches by batch size and bucket, handed out again when nobody else holds them.

    Args:
        beside: tokens that lossless decoding reads beside the text, and takes off the cache again; 0 = it is not that.
    """

    def __init__(self, beside: int = 0) -> None:
        self._beside = beside
        self._caches: dict[tuple, StaticCache] = {}
        self._collected: set[tuple] = set()
        self.released = False

    def wrap(self, prepare: Callable[..., StaticCache]) -> Callable[..., StaticCache]:
        """transformers' ``_prepare_static_cache``, in buckets."""
        signature = static_cache_signature(prepare)
        if signature is None:
            return prepare

        @functools.wraps(prepare)
        def prepare_in_bucket(*args, **kwargs):
            if self.released:
                return prepare(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            length = bound.arguments["max_cache_len"]
            length += self._beside
            bound.arguments["max_cache_len"] = length = -(-length // BUCKET) * BUCKET
            # tensors made in inference mode cannot be written outside it
            key = (bound.arguments["batch_size"], length, str(bound.arguments["cache_implementation"]))
            key += (bound.arguments.get("prefill_chunk_size"), torch.is_inference_mode_enabled())
            model = getattr(prepare, "__self__", None)
            key += (getattr(model, "dtype", None), str(getattr(model, "device", None)))
            kept = self._caches.get(key)
            free = kept is not None and sys.getrefcount(kept) <= _ONLY_OURS and not _parts_are_held(kept)
            if kept is not None and not free and key not in self._collected:
                self._collected.add(key)
                gc.collect()  # a compilation leaves cycles that hold its arguments
                free = sys.getrefcount(kept) <= _ONLY_OURS and not _parts_are_held(kept)
            if free:
                kept.__dict__.pop(ON_CACHE, None)
                kept.reset()
                return kept
            if model is not None:
                forget_cache_length(model)
            self._caches.pop(key, None)
            while len(self._caches) >= KEPT:
                del self._caches[next(iter(self._caches))]
            self._caches[key] = cache = prepare(*bound.args, **bound.kwargs)
            hold_all(cache, length, also_short=self._beside > 0 and bound.arguments["batch_size"] == 1)
            return cache

        return prepare_in_bucket

    def release(self) -> None:
        """Frees the caches; what is left of the wrapper is transparent."""
        self.released = True
        self._caches.clear()


def _references() -> int:
    """What ``sys.getrefcount`` says of a dictionary's value that one local name holds too."""
    values = {"": object()}
    kept = values.get("")
    return sys.getrefcount(kept)


def _parts_are_held(cache: StaticCache) -> bool:
    """Whether somebody holds a cache's layers or their tensors."""
    if sys.getrefcount(cache.layers) > _AS_ATTRIBUTE:
        return True
    for layer in cache.layers:
        held = sys.getrefcount(layer) > _ONLY_OURS
        tensors = [value for value in vars(layer).values() if isinstance(value, Tensor)]
        if held or any(sys.getrefcount(t) > _IN_LIST for t in tensors):
            return True
    return False


class _Holder:
    def __init__(self) -> None:
        self.value = object()


def _as_attribute() -> int:
    holder = _Holder()
    return sys.getrefcount(holder.value)


def _in_list() -> int:
    """Of an object that is an attribute, an element of a list and a loop's variable."""
    holder = _Holder()
    values = [*vars(holder).values()]
    return max(sys.getrefcount(t) for t in values)


_ONLY_OURS = _references()
_AS_ATTRIBUTE = _as_attribute()
_IN_LIST = _in_list()
