"""What stands around an attached model's own calls, so that each runs in its phase."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from popmm.adapters.vlm import Surroundings
from popmm.experts_interface import check_switched
from popmm.phase import Arguments, Phase, input_shape


def _is_compiled_step(phase: Phase, arguments: dict[str, Any]) -> bool:
    """Whether this call is a decode step being compiled, which must be nothing but tensor operations."""
    is_step = phase.decoding and not phase.in_prompt and input_shape(arguments)[1] == 1
    return torch.compiler.is_compiling() and is_step


def phased(decoder: nn.Module, phase: Phase, switches_experts: bool) -> Callable:
    """The decoder's forward, run in the phase that each call is."""
    forward = decoder.forward
    read = Arguments(forward)
    run = torch.compiler.disable(phase.run)

    @functools.wraps(forward)
    def phased_forward(*args, **kwargs):
        arguments = read(args, kwargs)
        if _is_compiled_step(phase, arguments):
            return forward(*args, **kwargs)
        if decoder.training:
            raise RuntimeError("the model is in training mode: call model.eval(), or popmm.detach(model) to train")
        if switches_experts:
            check_switched(decoder)
        return run(forward, args, kwargs, arguments)

    return phased_forward


def with_modalities(surroundings: Surroundings, phase: Phase) -> Callable:
    """The forward of the module around the decoder, which knows what the decoder cannot see: image tokens."""
    forward = surroundings.module.forward
    read = Arguments(forward)
    run = torch.compiler.disable(phase.run_around)

    @functools.wraps(forward)
    def reading_forward(*args, **kwargs):
        arguments = read(args, kwargs)
        if _is_compiled_step(phase, arguments):
            return forward(*args, **kwargs)
        return run(forward, args, kwargs, lambda: surroundings.modalities(arguments))

    return reading_forward


def exclusive(generate: Callable, phase: Phase) -> Callable:
    """``generate``, refused to a second thread from its first token to its last."""

    @functools.wraps(generate)
    def exclusive_generate(*args, **kwargs):
        with phase.exclusive("generate"):
            config = kwargs.get("generation_config") or generate.__self__.generation_config
            names = ("num_beams", "num_return_sequences")
            phase.copies = max(kwargs.get(name) or getattr(config, name, None) or 1 for name in names)
            phase.fillers = _tokens(
                *(kwargs.get(n, getattr(config, n, None)) for n in ("pad_token_id", "eos_token_id"))
            )
            try:
                return generate(*args, **kwargs)
            finally:
                phase.copies, phase.fillers = 1, set()

    return exclusive_generate


def _tokens(*given) -> set[int]:
    """Token ids given as numbers or lists of them."""
    flat = [token for own in given if own is not None for token in (own if isinstance(own, (list, tuple)) else [own])]
    return {int(token) for token in flat}


def refreshed(get_compiled_call: Callable, phase: Phase) -> Callable:
    """``generate``'s compiled step, which is left out where a step refreshes the partition."""

    @functools.wraps(get_compiled_call)
    def get_refreshed_call(*args, **kwargs):
        compiled, model = get_compiled_call(*args, **kwargs), get_compiled_call.__self__

        def step(*args, **kwargs):
            reads_prompt = phase.in_prompt or kwargs["input_ids"].shape[1] != 1
            return (compiled if reads_prompt or not phase.compiled_step() else model)(*args, **kwargs)

        return step

    return get_refreshed_call


def chunked(prefill: Callable, phase: Phase) -> Callable:
    """``generate``'s prefill, in which a last chunk of one token is told apart from a decode step."""

    @functools.wraps(prefill)
    def chunked_prefill(input_ids, generation_config, *args, **kwargs):
        if generation_config.prefill_chunk_size is None:
            return prefill(input_ids, generation_config, *args, **kwargs)
        with phase.reading_prompt():
            return prefill(input_ids, generation_config, *args, **kwargs)

    return chunked_prefill
