"""What stands around an attached model's own calls, so that each runs in its phase.

Somebody may keep one of these beyond detach (accelerate's hooks call the forward that they found): then it is
transparent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from popmm.adapters.vlm import Surroundings
from popmm.compat import (
    BATCHING_CALLS,
    CONTINUOUS_BATCHING,
    bound_call,
    compile_on_cpu,
    compiled_by,
    find_cache,
    generate_settings,
    is_exporting,
    is_static,
    other_way,
    stays_compiled,
)
from popmm.runtime.calls import Arguments, input_shape
from popmm.runtime.drafts import Drafts
from popmm.runtime.experts_interface import check_switched
from popmm.runtime.guards import held_after
from popmm.runtime.replay import compile_apart
from popmm.runtime.runner import Runner


def _is_compiled_step(runner: Runner, arguments: dict[str, Any]) -> bool:
    """Whether this call is a decode step being compiled, which must be nothing but tensor operations."""
    if not torch.compiler.is_compiling():
        return False
    if runner.around.kind:
        return True
    steps = runner.phase.decoding or runner.phase.lossless
    return steps and not runner.around.in_prompt and input_shape(arguments)[1] == 1


def phased(decoder: nn.Module, runner: Runner, switches_experts: bool) -> Callable:
    """The decoder's forward, run in the phase that each call is."""
    forward = decoder.forward
    read = Arguments(forward)
    run = torch.compiler.disable(runner.run)

    @functools.wraps(forward)
    def phased_forward(*args, **kwargs):
        if runner.phase.released:
            return forward(*args, **kwargs)
        if is_exporting():
            raise RuntimeError(
                "torch.export and torch.jit.trace fix one path, and an attached model takes another at decode than at "
                "its prompt: call popmm.detach(model) first"
            )
        arguments = read(args, kwargs)
        if _is_compiled_step(runner, arguments):
            return forward(*args, **kwargs)
        if decoder.training:
            raise RuntimeError("the model is in training mode: call model.eval(), or popmm.detach(model) to train")
        if switches_experts:
            check_switched(decoder)
        return run(forward, args, kwargs, arguments)

    return phased_forward


def with_modalities(surroundings: Surroundings, runner: Runner) -> Callable:
    """The forward of the module around the decoder, which knows what the decoder cannot see: image tokens."""
    forward = surroundings.module.forward
    read = Arguments(forward)
    run = torch.compiler.disable(runner.run_around)

    @functools.wraps(forward)
    def reading_forward(*args, **kwargs):
        if runner.phase.released or is_exporting():  # the decoder inside refuses to be exported
            return forward(*args, **kwargs)
        arguments = read(args, kwargs)
        if _is_compiled_step(runner, arguments):
            return forward(*args, **kwargs)
        return run(forward, args, kwargs, lambda: surroundings.modalities(arguments))

    return reading_forward


def exclusive(generate: Callable, runner: Runner, drafts: Drafts | None) -> Callable:
    """``generate``, refused to a second thread from its first token to its last, or kept waiting."""

    @functools.wraps(generate)
    def exclusive_generate(*args, **kwargs):
        if runner.phase.released:
            return generate(*args, **kwargs)
        setting = generate_settings(generate, args, kwargs)
        if setting("cache_implementation") == "paged":  # continuous batching, whose passes another thread runs
            if not runner.stateless:
                raise RuntimeError(CONTINUOUS_BATCHING)
            return generate(*args, **kwargs)
        if kwargs.get("adapter_names") is not None and runner.partitions.adapted:
            raise ValueError(
                "adapter_names gives rows adapters of their own, and pruned steps read FFNs with the active ones: call "
                "generate for each adapter (set_adapter), or call popmm.detach(model) before it"
            )
        with runner.phase.exclusive("generate", queues=True):
            copies = max(setting("num_beams") or 1, setting("num_return_sequences") or 1)
            fillers = _tokens(setting("pad_token_id"), setting("eos_token_id"))
            with runner.around.generating(copies, fillers, drafts=bool(setting("is_assistant"))) as watch:
                if drafts is not None:
                    args, kwargs = _with_drafts(drafts, generate, args, kwargs, setting)
                output = generate(*args, **kwargs)
            if not watch.begun:
                runner.phase.warn_if_unwired()
            return output

    return exclusive_generate


def _with_drafts(
    drafts: Drafts, generate: Callable, args: tuple, kwargs: dict[str, Any], setting: Callable[[str], Any]
) -> tuple[tuple, dict[str, Any]]:
    """A ``generate`` call that decodes by drafts, if they serve what it asks for."""
    around = drafts.runner.around
    around.why_dense = other_way(setting)
    if around.why_dense:
        return args, kwargs
    call = bound_call(generate, args, kwargs)
    if "custom_generate" in call.signature.parameters:
        call.arguments["custom_generate"] = drafts.decode
    else:  # of a wrapper, such as PEFT's
        rest = next(p.name for p in call.signature.parameters.values() if p.kind is p.VAR_KEYWORD)
        call.arguments[rest] = {**call.arguments.get(rest, {}), "custom_generate": drafts.decode}
    return call.args, call.kwargs


def refused_batching(model: nn.Module, runner: Runner) -> list[tuple[nn.Module, str, Callable]]:
    """Overrides that refuse continuous batching before anything is started, where a partition is of one prompt."""

    def refusing(call: Callable) -> Callable:
        @functools.wraps(call)
        def refuse(*args, **kwargs):
            if runner.phase.released or runner.stateless:
                return call(*args, **kwargs)
            raise RuntimeError(CONTINUOUS_BATCHING)

        return refuse

    return [(model, name, refusing(getattr(model, name))) for name in BATCHING_CALLS if hasattr(model, name)]


def _tokens(*given) -> set[int]:
    """Token ids given as numbers or lists of them."""
    flat = [token for own in given if own is not None for token in (own if isinstance(own, (list, tuple)) else [own])]
    return {int(token) for token in flat}


def compiled(get_compiled_call: Callable, runner: Runner) -> Callable:
    """``generate``'s compiled step, counted, and left out where a step has another partition to make, or none.

    Its code is compiled for this attachment alone: code for another one's weights would count against the number of
    graphs that the compiler makes of one function.
    """
    own: dict[str, Callable] = {}  # by the settings of the compiler

    @functools.wraps(get_compiled_call)
    def get_counted_call(compile_config):
        model = get_compiled_call.__self__
        if runner.phase.released:
            return get_compiled_call(compile_config)
        step = get_compiled_call(compile_config)
        settings = compiled_by(model, step)
        if settings is not None:
            key = repr(settings)
            if key not in own:
                own[key] = _compiled_call(model, settings)
            step = own[key]

        def counted(*args, **kwargs):
            ids = kwargs.get("input_ids")
            is_step = not runner.around.in_prompt and ids is not None and ids.shape[1] == 1
            if is_step and not runner.runs_compiled(find_cache(kwargs)):
                return model(*args, **kwargs)
            before = runner.passes.total
            runner.phase.step = is_step and not runner.phase.lossless
            runner.phase.votes = runner.around.votes(kwargs, tuple(ids.shape)) if is_step else None
            watch = runner.around.watch
            cache, form = find_cache(kwargs), None
            if is_step and stays_compiled(cache):
                form = ids.shape, id(cache), id(runner.partitions.active)
            with held_after(0 if watch is None else watch.steps_like(form)):
                output = step(*args, **kwargs)
            if watch is not None and runner.passes.total != before:
                watch.ran_eagerly()
            if is_step and runner.passes.total == before:
                runner.ran_compiled()
            return output

        return counted

    return get_counted_call


def _compiled_call(model: nn.Module, settings: dict[str, Any]) -> Callable:
    def call(args: tuple, kwargs: dict[str, Any]):
        return model(*args, **kwargs)

    compiled = compile_apart(call, settings, model.device)
    return lambda *args, **kwargs: compiled(args, kwargs)


LARGE = 64 << 20  # bytes of a model's weights from which on compiling its step on the CPU is worth the wait


def compiles_on_cpu(criteria: Callable, runner: Runner) -> Callable:
    """``generate``'s judgement whether to compile steps over a static cache: on the CPU too, where that is faster.

    That is where they are made of native operators; a compilation takes some 20 seconds, once.
    """

    @functools.wraps(criteria)
    def judge(model_kwargs, generation_config, *args, **kwargs):
        model = criteria.__self__
        fits = model.device.type == "cpu" and is_static(find_cache(model_kwargs))
        fits = fits and not (runner.phase.released or generation_config.disable_compile)
        if fits and sum(p.numel() * p.element_size() for p in model.parameters()) >= LARGE:
            compile_on_cpu(generation_config)
        return criteria(model_kwargs, generation_config, *args, **kwargs)

    return judge


def chunked(prefill: Callable, runner: Runner) -> Callable:
    """``generate``'s prefill, whose passes are a prompt however few tokens they bring."""

    @functools.wraps(prefill)
    def chunked_prefill(input_ids, generation_config, *args, **kwargs):
        if runner.phase.released or generation_config.prefill_chunk_size is None:
            return prefill(input_ids, generation_config, *args, **kwargs)
        with runner.around.reading_prompt():
            return prefill(input_ids, generation_config, *args, **kwargs)

    return chunked_prefill
