"""Key-value caches, told by their type and never by the name of an argument."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, StaticCache
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

__all__ = ["Cache", "StaticCache"]

CONTINUOUS_BATCHING = (
    "continuous batching (generate_batch, cache_implementation='paged') mixes prompts and decode steps of many "
    "sequences in one pass, which a partition by one prompt does not serve: attach with statistics='weights' "
    "(bytes=0.33, say), or call popmm.detach(model) first"
)
BATCHING_CALLS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")

CACHE_NAMES = ("cache", "past_key_values")  # of arguments, newest first
OTHER_STATES = ("cache_params", "mems", "past_buckets_states", "state", "layer_past")


def find_cache(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache among a call's arguments, whatever its name.

    Raises:
        TypeError: an argument that ought to be a cache is none that transformers knows; or there are several.
    """
    found = list({id(value): value for value in arguments.values() if isinstance(value, Cache)}.values())
    if len(found) > 1:
        kinds = " and ".join(type(cache).__name__ for cache in found)
        raise TypeError(f"the language model was called with two caches ({kinds}): popmm cannot tell its tokens")
    if found:
        return found[0]
    for name in (*CACHE_NAMES, *OTHER_STATES):
        value = arguments.get(name)
        if value is not None:
            raise TypeError(_unknown_cache(name, value))
    return None


def alone_in_pass(arguments: Mapping[str, Any], n_tokens: int) -> tuple[Tensor, bool] | None:
    """Of a pass of continuous batching, which tokens are the only ones of their sequence in it, and whether all are.

    Returns:
        bool ``[n_tokens]``, and True if there is no prompt in the pass; None if this is no such pass.
    """
    if not any("Paged" in type(arguments.get(name)).__name__ for name in CACHE_NAMES):
        return None
    ends = arguments["cu_seq_lens_q"].long()
    places = torch.arange(n_tokens, dtype=torch.int64, device=ends.device)
    whose = torch.searchsorted(ends, places, right=True)  # from 1; beyond the last end lies padding
    lengths = torch.cat([ends.new_zeros(1), ends.diff(), ends.new_zeros(1)])
    longest = arguments.get("max_length_q", arguments.get("max_seqlen_q"))  # its name up to transformers 5.23
    return lengths[whose] == 1, longest == 1


def _unknown_cache(name: str, value: Any) -> str:
    if "Paged" in type(value).__name__:
        return CONTINUOUS_BATCHING
    return (
        f"the language model was called with {name} of type {type(value).__name__}: popmm reads caches of "
        "transformers' Cache classes, such as DynamicCache; popmm.detach(model) runs it dense"
    )


def cache_of(output: Any) -> Cache | None:
    """The cache in a model's or in ``generate``'s output, of either form and under any name."""
    if isinstance(output, Mapping):
        values: Iterable = output.values()
    elif isinstance(output, (tuple, list)):
        values = output
    else:
        values = vars(output).values() if hasattr(output, "__dict__") else ()
    return next((value for value in values if isinstance(value, Cache)), None)


def cache_argument(model: nn.Module, cache: Cache | None) -> dict[str, Cache]:
    """``cache`` as the keyword argument that ``model`` and its ``generate`` take it by; empty for None."""
    if cache is None:
        return {}
    parameters = inspect.signature(model.forward).parameters
    return {next((name for name in CACHE_NAMES if name in parameters), _handed_on_as()): cache}


def _handed_on_as() -> str:
    """The name by which this version's ``generate`` hands on the cache."""
    parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[0])


def tokens_in(cache: Cache | None) -> int | Tensor | None:
    """Tokens that a cache holds: a number, of a static cache a tensor on its device; None if it does not count them."""
    if cache is None:
        return 0
    try:
        return cache.get_seq_length()
    except ValueError:  # layers of linear attention alone
        return None


def holds_state(cache: Cache) -> bool:
    """Whether a cache that does not count tokens (``tokens_in``) has read any."""
    return bool(cache.layers) and cache.has_previous_state()


def stays_compiled(cache: Cache | None) -> bool:
    """Whether a cache changes nothing but tensors from step to step: sliding windows count in Python."""
    return cache is not None and all(type(layer) is StaticLayer for layer in cache.layers)


def is_static(cache: Cache | None) -> bool:
    """Whether a cache has a fixed size, over which steps can be compiled."""
    return cache is not None and cache.is_compileable and type(cache) is not DynamicCache


def can_crop(cache: Cache | None) -> bool:
    """Whether tokens can be taken off the end of a cache that has read a prompt."""
    if cache is None or isinstance(cache, transformers.EncoderDecoderCache):
        return False
    return stays_compiled(cache) or cache.is_croppable


def crop(cache: Cache, n_tokens: int) -> None:
    """Takes tokens off the end of a cache. To be called with 0 too: what slides drops then what it no longer needs."""
    for layer in cache.layers:
        _crop(layer, n_tokens)


def _crop(layer, n_tokens: int) -> None:
    if type(layer) is StaticLayer:  # transformers 5.17 has no crop for it
        if n_tokens:
            layer.cumulative_length.sub_(n_tokens)
    elif getattr(layer, "is_initialized", True):
        layer.crop(-n_tokens)


Marks = list[tuple[Any, dict[str, Any]]]


def mark(cache: Cache) -> Marks:
    """What a cache's layers hold, for ``undo``. Static ones are written in place, up to their length."""
    found = []
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):
            found.append((layer, {"cumulative_length": layer.cumulative_length.clone()}))
        else:  # of which each step makes new tensors
            parts = {name: dict(value) if isinstance(value, dict) else value for name, value in vars(layer).items()}
            found.append((layer, {name: list(v) if isinstance(v, list) else v for name, v in parts.items()}))
    return found


def undo(marks: Marks) -> None:
    """Takes off a cache what was read since, be it that a step ended half way."""
    for layer, held in marks:
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.copy_(held["cumulative_length"])
        else:
            vars(layer).update(held)


def slide(cache: Cache) -> None:
    """Has sliding windows forget as they go on, and no longer wait for ``crop``: their masks count on that."""
    for layer in cache.layers:
        if type(layer) is DynamicSlidingWindowLayer:
            layer.record_past = False


def recording(cache: Cache) -> list[bool | None]:
    """Which layers keep what ``crop`` needs, until it is called."""
    return [getattr(layer, "record_past", None) for layer in cache.layers]


def keep_past(cache: Cache) -> None:
    """Has layers that slide, or hold states, keep what ``crop`` needs, until it is called."""
    cache.activate_past_recording()


def set_recording(cache: Cache, before: list[bool | None]) -> None:
    """As ``recording`` has found it."""
    for layer, records in zip(cache.layers, before):
        if records is not None:
            layer.record_past = records


def hold_all(cache: Cache, length: int, also_short: bool) -> None:
    """Has sliding windows of a new static cache of so many tokens be layers that hold all, and count by tensors alone.

    What a layer attends to follows from its mask, which is as long as what the cache holds.

    Args:
        also_short: windows shorter than the cache too, so that tokens can be taken off it; others never slide.
    """
    for i, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer and (also_short or layer.max_cache_len == length):
            cache.layers[i] = StaticLayer(length)


def capacity(cache: Cache) -> int | None:
    """Tokens that a static cache holds at most; None = it grows."""
    sizes = [layer.max_cache_len for layer in cache.layers if isinstance(layer, StaticLayer)]
    return min(sizes, default=None)
