"""Wires partitions and phases to a model, and takes them off again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from popmm.adapters import FFNSite, ModelDescription, UnsupportedModelError, describe, find_surroundings, tower_ffns
from popmm.adapters.base import find_decoder
from popmm.budget import MAX_FFN_RATIO, ratio_of, region_sizes
from popmm.config import PopConfig
from popmm.decode import StaticCaches
from popmm.experts import PrunedExperts
from popmm.experts_interface import ON_MODULE, dense_experts, switch_off, switch_on
from popmm.layout import Layout, choose_layout, shared_parameters, why_not_in_place
from popmm.phase import Phase
from popmm.site import PrunedFFN
from popmm.state import PartitionState
from popmm.tower import PrunedTowerFFN, tower_ratio
from popmm.traffic import SizesRule, sizes_for, with_bits
from popmm.wrappers import chunked, exclusive, phased, refreshed, with_modalities

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ATTACHMENT = "_popmm_attachment"
_MISSING = object()


def attach(model: nn.Module, config: PopConfig | None = None, **settings) -> PartitionState:
    """Prunes the FFNs of ``model`` online from now on, in place, until ``detach(model)``.

    Args:
        model: a transformers decoder-only or vision-language model, in eval mode, with its
            floating-point weights loaded.
        config: how to prune; ``PopConfig(**settings)`` if None.

    Returns:
        The model's partition state. Use the model as before: ``model.generate(...)``.

    Raises:
        UnsupportedModelError: quantised or offloaded weights, or no FFN of a known form.
        ValueError: a ratio that this model cannot reach, or training mode.
        RuntimeError: already attached.
    """
    if config is None:
        config = PopConfig(**settings)
    elif not isinstance(config, PopConfig):
        raise TypeError(f"config is {config!r}: give a PopConfig, such as popmm.PopConfig(pruning_ratio=0.4)")
    elif settings:
        config = config.replace(**settings)
    return attach_with(model, config, region_sizes)


def attach_with(model: nn.Module, config: PopConfig, sizes: SizesRule) -> PartitionState:
    """``attach`` with region sizes of another rule, for baselines."""
    decoder = find_decoder(model)
    if _ATTACHMENT in decoder.__dict__:
        raise RuntimeError(
            f"this {type(model).__name__} is attached already ({decoder.__dict__[_ATTACHMENT].state!r}): "
            "call popmm.detach(model) first"
        )
    _check_weights(model)
    if model.training or decoder.training:
        raise ValueError(f"this {type(model).__name__} is in training mode: call model.eval() before popmm.attach")
    with next(model.parameters()).device:  # whatever default device is set
        attachment = _build(model, describe(model), config, sizes)
    attachment.install()
    return attachment.state


def detach(model: nn.Module) -> None:
    """Gives the model back as it was before ``attach``.

    Raises:
        RuntimeError: the model is not attached, or another thread is running it.
    """
    attachment = find_decoder(model).__dict__.get(_ATTACHMENT)
    if attachment is None:
        raise RuntimeError(f"this {type(model).__name__} is not attached: call popmm.attach(model, config) first")
    with attachment.phase.exclusive("detach"):
        attachment.remove()


@contextmanager
def pruned(model: nn.Module, config: PopConfig | None = None, **settings) -> Iterator[PartitionState]:
    """``attach`` for the length of a ``with`` block; detaches also when its body raises."""
    state = attach(model, config, **settings)
    try:
        yield state
    finally:
        if _ATTACHMENT in find_decoder(model).__dict__:
            detach(model)


@dataclass
class _Attachment:
    """What was put on a model, and what stood there before. Kept on the decoder, and so freed with it."""

    decoder: nn.Module
    switches_experts: bool  # to our implementation of transformers' experts interface
    state: PartitionState
    phase: Phase
    caches: StaticCaches
    overrides: list[tuple[Any, str, Any]]  # (module, attribute, value to set)
    hooks: list[Callable[[], Any]]  # register a hook each, and return its handle
    replaced: list[tuple[Any, str, Any]] = field(default_factory=list)
    handles: list = field(default_factory=list)
    switched: bool = False

    def install(self) -> None:
        self.overrides.append((self.decoder, _ATTACHMENT, self))
        try:
            for module, attribute, value in self.overrides:
                self.replaced.append((module, attribute, module.__dict__.get(attribute, _MISSING)))
                module.__dict__[attribute] = value
            for register in self.hooks:
                self.handles.append(register())
            if self.switches_experts:
                switch_on(self.decoder)
                self.switched = True
        except BaseException:  # an interrupt too must leave the model as it was
            self.remove()
            raise

    def remove(self) -> None:
        self.phase.restore()  # may fail for want of memory: then the model is still attached
        if self.switched:
            self.switched = False
            switch_off(self.decoder)
        for handle in self.handles:
            handle.remove()
        for module, attribute, before in reversed(self.replaced):
            if before is _MISSING:
                module.__dict__.pop(attribute, None)
            else:
                module.__dict__[attribute] = before
        self.handles, self.replaced = [], []
        self.phase.release()
        self.caches.release()


def _build(model: nn.Module, description: ModelDescription, config: PopConfig, sizes_of: SizesRule) -> _Attachment:
    """Everything that can fail, before anything of the model is touched but, with ``gate``, how down is stored."""
    layouts: list[Layout] = []
    try:
        return _wire(model, description, config, sizes_of, layouts)
    except BaseException:
        for layout in layouts:
            layout.release()
        raise


def _wire(
    model: nn.Module,
    description: ModelDescription,
    config: PopConfig,
    sizes_of: SizesRule,
    layouts: list[Layout],
) -> _Attachment:
    ratio = ratio_of(description, config)
    given, config = config, with_bits(config, list(description.sites()), ratio)
    ffns, left_dense, shared = [], [], shared_parameters(model)
    # a module that several layers share is one FFN
    for site in {site.name: site for site in description.sites()}.values():
        _check_site(site)
        if site.layer in config.skip_layers:
            left_dense.append(site)
        elif not site.shared or config.shared_experts == "prune":
            sizes = sizes_for(site, ratio, config, sizes_of)
            layouts.append(choose_layout(site, sizes, config, why_not_in_place(site.module, shared)))
            ffns.append((PrunedExperts if site.is_experts else PrunedFFN)(site, sizes, config, layouts[-1]))
        else:
            left_dense.append(site)
    phase = Phase(ffns, config.refresh_every)
    tower = []
    if config.vision == "prune":
        found = tower_ffns(model)
        vision_ratio = tower_ratio(found, config, MAX_FFN_RATIO)
        tower = [PrunedTowerFFN(ffn, vision_ratio, config) for ffn in found]
    state = PartitionState(given, ratio, ffns, left_dense, phase, tower)

    decoder = description.decoder
    overrides: list[tuple[Any, str, Any]] = []
    if hasattr(model, "generate"):
        overrides.append((model, "generate", exclusive(model.generate, phase)))
    caches = StaticCaches()
    if hasattr(model, "_prepare_static_cache"):
        overrides.append((model, "_prepare_static_cache", caches.wrap(model._prepare_static_cache)))
    if config.refresh_every and hasattr(model, "get_compiled_call"):
        overrides.append((model, "get_compiled_call", refreshed(model.get_compiled_call, phase)))
    if hasattr(model, "_prefill"):
        overrides.append((model, "_prefill", chunked(model._prefill, phase)))
    hooks: list[Callable[[], Any]] = []
    switches_experts = any(ffn.site.is_experts and not ffn.sizes.is_dense for ffn in ffns)
    for ffn in ffns:
        ffn.wire(phase)
        if not ffn.site.is_experts:
            overrides.append((ffn.site.module, "forward", ffn.forward))
            hooks.append(functools.partial(ffn.site.down.register_forward_pre_hook, ffn.observe))
            if ffn.wants_up and ffn.site.up is not None:
                hooks.append(functools.partial(ffn.site.up.register_forward_hook, ffn.keep_up))
        elif switches_experts:
            overrides.append((ffn.site.module, ON_MODULE, ffn.forward))
        else:
            hooks.append(functools.partial(ffn.site.module.register_forward_pre_hook, ffn.observe, with_kwargs=True))
    if switches_experts:
        experts = [site.module for site in left_dense if site.is_experts]
        overrides += [(module, ON_MODULE, dense_experts(module, phase)) for module in experts]
    overrides.append((decoder, "forward", phased(decoder, phase, switches_experts)))
    surroundings = find_surroundings(model)
    if surroundings is not None:
        overrides.append((surroundings.module, "forward", with_modalities(surroundings, phase)))
    elif config.modality_balance is not None:
        raise ValueError(
            f"modality_balance={config.modality_balance}: this {type(model).__name__} reads text alone; leave it None"
        )
    hooks += [functools.partial(ffn.down.register_forward_pre_hook, ffn.prune) for ffn in tower]
    return _Attachment(decoder, switches_experts, state, phase, caches, overrides, hooks)


def _check_weights(model: nn.Module) -> None:
    """Refuses quantised and offloaded models."""
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        method = getattr(getattr(model, "config", None), "quantization_config", None)
        raise UnsupportedModelError(
            f"this {type(model).__name__} is quantised ({type(method).__name__}): popmm reads floating-point weights; "
            "load the model without quantization_config"
        )
    devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
    offloaded = "disk" in devices or ("cpu" in devices and len(devices) > 1)
    if offloaded or any(getattr(getattr(m, "_hf_hook", None), "offload", False) for m in model.modules()):
        raise UnsupportedModelError(
            f"weights of this {type(model).__name__} are offloaded (devices: {', '.join(sorted(devices)) or 'hooks'}): "
            "load the whole model on accelerators, or the whole of it on the CPU"
        )
    meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise UnsupportedModelError(
            f"{meta} has no data (meta device): load the weights first; popmm.budget.ffn_ratio takes such a model"
        )


def _check_site(site: FFNSite) -> None:
    for w in site.weights():
        if w is not None and w.dtype not in _FLOATS:
            raise UnsupportedModelError(
                f"{site.name} has {w.dtype} weights: popmm reads floating-point weights; load the model unquantised"
            )
