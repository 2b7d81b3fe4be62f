"""All that popmm knows of transformers' internals: what may change from version to version stands here alone.

A cache is told by its type, never by the name of an argument or of an output's field: both were ``past_key_values``
up to transformers 5.23 and are ``cache`` since. What a version lacks raises or warns, here, at import or at attach, and
so never turns into a model that is silently dense.
"""

from __future__ import annotations

import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._dynamo import eval_frame as _eval_frame
from transformers import GenerationMixin, StaticCache
from transformers import masking_utils as _masking
from transformers import modeling_utils as _modeling
from transformers.cache_utils import Cache, StaticLayer
from transformers.integrations import moe as _moe

__all__ = [
    "ALL_EXPERTS_FUNCTIONS",
    "Cache",
    "StaticCache",
    "cache_argument",
    "cache_of",
    "default_apply_gate",
    "find_cache",
    "grouped_mm",
    "tokens_in",
]

# Caches -----------------------------------------------------------------------------------------------------------

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


# Experts ----------------------------------------------------------------------------------------------------------

ALL_EXPERTS_FUNCTIONS = _moe.ALL_EXPERTS_FUNCTIONS
default_apply_gate = _moe._default_apply_gate
grouped_mm = _moe._grouped_mm


def experts_implementation(config) -> str | None:
    """Name of the experts implementation that a configuration asks for, None if it has none."""
    return getattr(config, "_experts_implementation", None)


def set_back_experts(config, name: str | None) -> None:
    """Undoes ``model.set_experts_implementation`` exactly, without its checks."""
    config._experts_implementation_internal = name


def is_expert_parallel(module: nn.Module) -> bool:
    """Whether each device holds some of the experts only."""
    return bool(getattr(module, "_is_expert_parallel", False))


# Attention --------------------------------------------------------------------------------------------------------

ATTENTION = "_attn_implementation_internal"  # where a configuration keeps the name of its attention


def attention_of(config) -> str | None:
    """Name of the attention that a configuration asks for."""
    return getattr(config, ATTENTION, None)


def register_attention(name: str, forward: Callable, like: str) -> Callable:
    """Adds an attention to transformers' own, with the masks of another; returns the forward of that other."""
    _modeling.ALL_ATTENTION_FUNCTIONS.register(name, forward)
    _masking.ALL_MASK_ATTENTION_FUNCTIONS.register(name, _masking.ALL_MASK_ATTENTION_FUNCTIONS[like])
    return _modeling.ALL_ATTENTION_FUNCTIONS[like]


# generate ---------------------------------------------------------------------------------------------------------

CONTINUOUS_BATCHING = (
    "continuous batching (generate_batch, cache_implementation='paged') mixes prompts and decode steps in one pass, "
    "which popmm does not prune: call popmm.detach(model) first, or use model.generate"
)
BATCHING_CALLS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def internal(model: nn.Module, name: str) -> Callable | None:
    """A step of ``generate`` that popmm wraps, None if the model does not generate; warns where a version lacks it."""
    if not hasattr(model, "generate"):
        return None
    found = getattr(model, name, None)
    if found is None and isinstance(model, GenerationMixin):
        warnings.warn(
            f"transformers {transformers.__version__} has no GenerationMixin.{name}, which popmm builds on: what it "
            "serves (static caches, chunked prompts, compiled steps) may run slower or dense; state.passes tells",
            stacklevel=4,
        )
    return found


COMPILED = ("_compiled_call", "_last_compile_config")  # where ``generate`` keeps a compiled step
CACHE_LENGTH = "_previous_max_cache_length"  # where ``generate`` notes the longest static cache that it has made


def forget_cache_length(model: nn.Module) -> None:
    """Static caches would be as long as the model's longest so far."""
    model.__dict__.pop(CACHE_LENGTH, None)


def static_cache_signature(prepare: Callable) -> inspect.Signature | None:
    """How ``_prepare_static_cache`` is called, also where a model hands arguments on; warns if that cannot be told."""
    needed = {"batch_size", "max_cache_len", "cache_implementation"}
    base = getattr(GenerationMixin, "_prepare_static_cache", None)
    own = inspect.signature(prepare)
    if needed <= own.parameters.keys():
        return own
    if base is not None and needed <= (parameters := inspect.signature(base).parameters).keys():
        return inspect.Signature(list(parameters.values())[1:])  # without self
    warnings.warn(
        f"transformers {transformers.__version__} makes static caches in a way that popmm does not know: they are made "
        "anew for each call, which compiles decode steps again",
        stacklevel=4,
    )
    return None


def generate_settings(generate: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Callable[[str], Any]:
    """Reads a setting of a ``generate`` call, given by keyword, in a configuration of any place, or the model's own."""
    bound = inspect.signature(generate).bind_partial(*args, **kwargs).arguments
    given = bound.get("generation_config")
    own = getattr(getattr(generate, "__self__", None), "generation_config", None)

    def read(name: str) -> Any:
        for value in (kwargs.get(name), getattr(given, name, None), getattr(own, name, None)):
            if value is not None:
                return value
        return None

    return read


def is_default_stance() -> bool:
    """Whether the compiler does as it does by itself: nobody has asked for eager steps, or for guards to be held."""
    stance = getattr(_eval_frame, "_stance", None)
    return stance is not None and stance.stance == "default" and not stance.skip_guard_eval_unsafe


def is_alone() -> bool:
    """Whether no other thread of the process could be running a model; the compiler's own workers run none."""
    known = {threading.current_thread(), *_compilers_workers()}
    return all(t in known or t.daemon for t in threading.enumerate())


def _compilers_workers() -> set[threading.Thread]:
    """Threads in which the compiler has kernels built."""
    pool = getattr(getattr(sys.modules.get("torch._inductor.async_compile"), "AsyncCompile", None), "pool", None)
    made = pool is not None and getattr(pool, "cache_info", None) is not None and pool.cache_info().currsize
    return set(getattr(pool(), "_threads", ())) if made else set()


def compile_on_cpu(generation_config) -> None:
    """Has ``generate`` compile its steps on the CPU too, which it does on accelerators alone."""
    config = generation_config.compile_config
    if config is None:
        config = generation_config.compile_config = transformers.CompileConfig(fullgraph=False, mode="default")
    config._compile_all_devices = True


# attributes of a module that are calls without being its own parts: accelerate's hooks, the compiler
NOT_PARTS = ("forward", "_old_forward", "_hf_hook", "_compiled_call_impl")

# Where weights lie ------------------------------------------------------------------------------------------------


def device_map(model: nn.Module) -> set[str]:
    """Devices over which accelerate has spread a model, as text; empty if it has not."""
    return {str(device) for device in getattr(model, "hf_device_map", {}).values()}


def load_again(model: nn.Module) -> nn.Module:
    """The same model, read once more from the files that it came from, on the CPU.

    Raises:
        Whatever ``from_pretrained`` raises; ValueError: the model does not say where it came from.
    """
    source = getattr(model, "name_or_path", "")
    if not source or not hasattr(type(model), "from_pretrained"):
        raise ValueError("it was not loaded with from_pretrained")
    return type(model).from_pretrained(source, dtype=model.dtype)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings a module's weights for each call."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


def forward_below_hooks(module: nn.Module) -> Callable | None:
    """The forward that accelerate's hooks on a module call, None without hooks."""
    return module.__dict__.get("_old_forward")


def hook_of(module: nn.Module) -> str:
    """What accelerate has put on a module, empty if nothing."""
    hook = getattr(module, "_hf_hook", None)
    return "" if hook is None else f"accelerate's {type(hook).__name__} is on it"


def is_exporting() -> bool:
    """Whether the call is being traced to be run elsewhere, by ``torch.export`` or ``torch.jit``."""
    # torch 2.11's compiler takes is_exporting() for true in whatever it compiles, but reads the flag behind it
    exporting = getattr(torch.compiler, "_is_exporting_flag", None)
    return (torch.compiler.is_exporting() if exporting is None else exporting) or torch.jit.is_tracing()
