"""What an attached model gets where: everything that is put on it, before any of it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from popmm.adapters.vlm import Surroundings
from popmm.compat import CACHE_LENGTH, COMPILED, EXTRACT, internal, keeping_arguments
from popmm.kernels import operators
from popmm.runtime.attachment import Attachment
from popmm.runtime.attention import attention_overrides
from popmm.runtime.caches import StaticCaches
from popmm.runtime.drafts import Drafts
from popmm.runtime.experts_interface import ON_MODULE, dense_experts
from popmm.runtime.few import few_overrides
from popmm.runtime.freed import FreedWeights
from popmm.runtime.integrity import Integrity, leads_to
from popmm.runtime.lossless import drafting
from popmm.runtime.overrides import Hook, Kept, Override
from popmm.runtime.rest import RestLayer
from popmm.runtime.runner import Runner
from popmm.runtime.site import PrunedSite
from popmm.runtime.tower import PrunedTowerFFN
from popmm.runtime.wrappers import (
    chunked,
    compiled,
    compiles_on_cpu,
    exclusive,
    phased,
    refused_batching,
    with_modalities,
)


def wire(
    model: nn.Module,
    decoder: nn.Module,
    surroundings: Surroundings | None,
    state: Any,
    runner: Runner,
    ffns: list[PrunedSite],
    tower: list[PrunedTowerFFN],
    dense_modules: list[nn.Module],
    rest: list[RestLayer],
    freed: FreedWeights | None,
    drafts: Drafts | None,
) -> Attachment:
    """Overrides and hooks of everything that takes part, not yet installed.

    Args:
        surroundings: the module around the decoder that knows its image tokens; None = it reads text alone.
        state: what ``attach`` returns.
        dense_modules: experts that are left dense.
        rest: linear layers outside the FFNs that decode reads in fewer bits.
        freed: the FFNs' own weights, if they are to be freed.
        drafts: of lossless decoding.
    """
    caches = StaticCaches(0 if drafts is None else drafts.most + 1)
    by_operators = all(ffn.layout.by_operators for ffn in ffns)
    around = _around_generate(model, runner, drafts, caches, by_operators)
    overrides = [Override(model, name, ours) for name, ours in around]
    overrides += [Override(*refusal) for refusal in refused_batching(model, runner)]
    overrides += [override for layer in rest for override in layer.overrides()]
    if any(p.is_cpu and p.dtype == torch.bfloat16 for p in decoder.parameters()):
        operators.available()  # ``kernels.linear`` asks, and compiled code must find the answer
    few = list(few_overrides(model, decoder, runner.phase)) if runner.partitions.prunes else []
    taken = {id(layer.module) for layer in rest}
    overrides += [override for override in few if id(override.module) not in taken]
    # continuous batching sets an attention of its own
    overrides += attention_overrides(decoder, runner.phase) if (rest or few) and not runner.stateless else []
    overrides += [] if freed is None else freed.overrides()
    hooks, notes = [Hook(ffn.down, ffn.prune) for ffn in tower], []
    experts = [ffn for ffn in ffns if ffn.site.is_experts and ffn.site.routing is None]
    switches_experts = any(not ffn.sizes.is_dense for ffn in experts)
    for ffn in ffns:
        ffn.wire(runner.phase, switches_experts)
        ffn.integrity = Integrity(model, ffn.name, ffn.site.module, ffn.site.places)
        overrides += ffn.overrides()
        hooks += ffn.hooks()
        own = None if ffn in experts or ffn.site.entry is not None else ffn.forward
        notes.append(functools.partial(ffn.integrity.installed, own))
    if switches_experts:
        overrides += [Override(module, ON_MODULE, dense_experts(module, runner.phase)) for module in dense_modules]
    forward = phased(decoder, runner, switches_experts)
    overrides.append(Override(decoder, "forward", forward))
    runner.phase.is_wired = functools.partial(leads_to, decoder, forward)
    if surroundings is not None:
        overrides.append(Override(surroundings.module, "forward", with_modalities(surroundings, runner)))
    return Attachment(
        decoder,
        state,
        runner,
        caches,
        switches_experts,
        overrides,
        hooks,
        kept=[Kept(model, name) for name in (CACHE_LENGTH, *COMPILED)],
        holds=list(_held(ffns)),
        writes=any(ffn.layout.name == "permute" and not ffn.sizes.is_dense for ffn in ffns),
        after_install=[*notes, runner.begin],
        freed=freed,
    )


def _held(ffns: list[PrunedSite]) -> Iterator[tuple[nn.Module | nn.Parameter, str]]:
    """Modules and parameters that FFNs are made of, with their names."""
    for ffn in ffns:
        yield ffn.site.module, ffn.name
        for name, parameter in ffn.site.module.named_parameters():
            yield parameter, f"{ffn.name}.{name}"


def _around_generate(
    model: nn.Module, runner: Runner, drafts: Drafts | None, caches: StaticCaches, by_operators: bool
) -> Iterator[tuple[str, Callable]]:
    """What stands around ``generate`` and its steps, by name."""
    if hasattr(model, "generate"):
        yield "generate", exclusive(model.generate, runner, drafts)
    around = {
        "_prepare_static_cache": caches.wrap,
        "get_compiled_call": lambda call: compiled(call, runner),
        "_prefill": lambda call: chunked(call, runner),
    }
    if drafts is not None:
        drafts.decode = drafting(drafts)
        around[EXTRACT] = lambda call: keeping_arguments(call, drafts.decode)
    if by_operators:
        around["_valid_auto_compile_criteria"] = lambda call: compiles_on_cpu(call, runner)
    for name, wrap in around.items():
        call = internal(model, name)
        if call is not None:
            yield name, wrap(call)
