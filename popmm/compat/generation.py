"""``generate``, its steps, and the compiler."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch._dynamo.exc
import transformers
from torch import Tensor, nn
from torch._dynamo import eval_frame as _eval_frame
from transformers import GenerationMixin
from transformers.cache_utils import Cache

from popmm.compat.caches import CACHE_NAMES


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


def bound_call(generate: Callable, args: tuple, kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """A ``generate`` call's arguments by name, whatever way they were given."""
    return inspect.signature(generate).bind_partial(*args, **kwargs)


def generate_settings(generate: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Callable[[str], Any]:
    """Reads a setting of a ``generate`` call, given by keyword, in a configuration of any place, or the model's own."""
    bound = bound_call(generate, args, kwargs).arguments
    bound = {**bound, **bound.get("kwargs", {})}
    given = bound.get("generation_config")
    own = getattr(getattr(generate, "__self__", None), "generation_config", None)

    def read(name: str) -> Any:
        for value in (bound.get(name), getattr(given, name, None), getattr(own, name, None)):
            if value is not None:
                return value
        return None

    return read


# by which ``generate`` does something else than to sample one sequence, or the best token, step by step
OTHER_WAYS = {
    "num_beams": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "assistant_model": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": None,
    "custom_generate": None,
    "guidance_scale": 1,
    "output_attentions": None,
    "output_hidden_states": None,
    "is_assistant": None,  # the other model's loop crops the cache
    "watermarking_config": None,  # counts the texts that it is given
}
EXTRACT = "_extract_generation_mode_kwargs"  # by which ``generate`` tells what its way of decoding is to be given


def keeping_arguments(extract: Callable, decode: Callable) -> Callable:
    """That step of ``generate``, which drops the tokenizer and the streamer of a ``custom_generate``: not of ours."""

    @functools.wraps(extract)
    def keep(custom_generate, *args, **kwargs):
        return extract(None if custom_generate is decode else custom_generate, *args, **kwargs)

    return keep


def other_way(setting: Callable[[str], Any]) -> str:
    """The setting by which a ``generate`` call is no plain greedy search or sampling, empty if it is one."""
    for name, plain in OTHER_WAYS.items():
        value = setting(name)
        if value is not None and value is not False and value != plain:
            return f"{name}={value}" if isinstance(value, (int, float, str)) else name
    return "" if setting("use_cache") is not False else "use_cache=False"


def sample(model: nn.Module) -> Callable:
    """transformers' own loop of greedy search and sampling, unbound."""
    return type(model)._sample


def prefill(model: nn.Module, ids: Tensor, generation_config, model_kwargs: dict[str, Any]):
    """``generate``'s pass over its prompt."""
    begins = not generation_config.is_assistant
    return model._prefill(ids, generation_config, model_kwargs, is_first_iteration=begins)


def inputs_of_step(model: nn.Module, ids: Tensor, n_tokens: int, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """What ``generate`` calls the model with to read the last tokens of ids, and to have logits of each."""
    inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=n_tokens, **model_kwargs)
    if "logits_to_keep" in inputs:
        inputs["logits_to_keep"] = n_tokens
    return inputs


def follow(model: nn.Module, output, model_kwargs: dict[str, Any], n_tokens: int) -> dict[str, Any]:
    """What the next step is made of, after so many new tokens, one after the other."""
    model_kwargs = dict(model_kwargs)
    for _ in range(n_tokens):  # at once some models count one
        model_kwargs = model._update_model_kwargs_for_generation(output, model_kwargs, is_encoder_decoder=False)
    return model_kwargs


def ends(generation_config) -> set[int]:
    """Tokens that end a text."""
    given = getattr(generation_config, "_eos_token_tensor", None)
    return set() if given is None else set(given.flatten().tolist())


def compiles(model: nn.Module, model_kwargs: dict[str, Any], generation_config) -> bool:
    """Whether ``generate`` compiles its steps over this cache."""
    return model._valid_auto_compile_criteria(model_kwargs, generation_config)


def compiled_by(model: nn.Module, step: Callable) -> dict[str, Any] | None:
    """The settings with which ``get_compiled_call`` has just had ``step`` compiled; None if it is not compiled."""
    config = getattr(model, "_last_compile_config", None)
    return config.to_dict() if config is not None and step is getattr(model, "_compiled_call", None) else None


def compile_settings(config) -> dict[str, Any]:
    """Of a ``CompileConfig`` or None, as ``torch.compile`` takes them; one graph of fixed shapes."""
    given = (transformers.CompileConfig() if config is None else config).to_dict()
    return {**given, "dynamic": False, "fullgraph": True}


# what cannot be compiled, or not once more, raises before it runs
NOT_COMPILED = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)


def optimised_for_decode(model: nn.Module):
    """What ``generate`` runs its decode steps in."""
    return model._optimize_model_for_decode()


def generated(sequences: Tensor, scores, logits, cache: Cache | None):
    """What ``generate`` returns with ``return_dict_in_generate``, whatever the name of its cache."""
    output = transformers.generation.GenerateDecoderOnlyOutput(sequences=sequences, scores=scores, logits=logits)
    fields = {f.name for f in dataclasses.fields(output)}
    output[next(name for name in CACHE_NAMES if name in fields)] = cache
    return output


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


def compiled_anywhere(**settings) -> transformers.CompileConfig:
    """A ``CompileConfig`` by which ``generate`` compiles its steps on the CPU too, else on accelerators alone."""
    config = transformers.CompileConfig(**settings)
    config._compile_all_devices = True
    return config


def compile_on_cpu(generation_config) -> None:
    """Has ``generate`` compile its steps on the CPU too."""
    if generation_config.compile_config is None:
        generation_config.compile_config = compiled_anywhere(fullgraph=False, mode="default")
    generation_config.compile_config._compile_all_devices = True


# attributes of a module that are calls without being its own parts: accelerate's hooks, the compiler
NOT_PARTS = ("forward", "_old_forward", "_hf_hook", "_compiled_call_impl")
