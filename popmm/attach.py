"""Wires partitions and phases to a model, and takes them off again."""

from __future__ import annotations

import contextlib
import difflib

import torch
from torch import nn

from popmm.act import whole_act
from popmm.adapters import (
    FFNSite,
    ModelDescription,
    UnsupportedModelError,
    describe,
    find_decoder,
    find_surroundings,
    tower_ffns,
)
from popmm.budget import ratio_of
from popmm.compat import device_map, is_offloaded
from popmm.config import PopConfig
from popmm.kernels.twin import group_of
from popmm.layouts.choose import Layout, choose_layout, shared_parameters, why_not_in_place
from popmm.layouts.traffic import LEAST_GROUP, SizesRule, sizes_for, sizes_together, with_bits
from popmm.method.budget import MAX_FFN_RATIO, region_sizes
from popmm.runtime.attachment import MARKER, Attachment
from popmm.runtime.dense import PrunedFFN
from popmm.runtime.drafts import Drafts
from popmm.runtime.experts import PrunedExperts
from popmm.runtime.freed import FreedWeights
from popmm.runtime.own_experts import PrunedOwnExperts
from popmm.runtime.pair import PrunedPair
from popmm.runtime.partitions import Partitions
from popmm.runtime.phase import Phase
from popmm.runtime.rest import RestLayer, rest_layers
from popmm.runtime.runner import Runner
from popmm.runtime.site import PrunedSite
from popmm.runtime.tower import PrunedTowerFFN, tower_ratio
from popmm.runtime.wiring import wire
from popmm.state import PartitionState


def attach(model: nn.Module, config: PopConfig | None = None, **settings) -> PartitionState:
    """Prunes the FFNs of ``model`` online from now on, in place, until ``detach(model)``.

    Args:
        model: a transformers decoder-only or vision-language model, in eval mode, with its
            floating-point weights loaded.
        config: how to prune; ``PopConfig(**settings)`` if None.

    Returns:
        The model's partition state. Use the model as before: ``model.generate(...)``.

    Raises:
        UnsupportedModelError: no FFN that can be pruned, offloaded weights, or weights that are not finite.
        ValueError: a ratio that this model cannot reach, or training mode.
        RuntimeError: already attached.
    """
    unknown = [name for name in settings if name not in PopConfig.__dataclass_fields__]
    if unknown:
        near = difflib.get_close_matches(unknown[0], PopConfig.__dataclass_fields__, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(PopConfig.__dataclass_fields__)}"
        raise TypeError(f"PopConfig has no {unknown[0]}: {hint}")
    if config is None:
        config = PopConfig(**settings)
    elif not isinstance(config, PopConfig):
        raise TypeError(f"config is {config!r}: give a PopConfig, such as popmm.PopConfig(pruning_ratio=0.4)")
    elif settings:
        config = config.replace(**settings)
    return attach_with(model, config, region_sizes)


def attach_with(model: nn.Module, config: PopConfig, sizes: SizesRule) -> PartitionState:
    """``attach`` with region sizes of another rule, for baselines."""
    decoder, ours = find_decoder(model), []
    try:
        with whole_act():
            if MARKER in decoder.__dict__:
                raise RuntimeError(
                    f"this {type(model).__name__} is attached already ({decoder.__dict__[MARKER].state!r}): "
                    "call popmm.detach(model) first"
                )
            _check_weights(model)
            if model.training or decoder.training:
                name = type(model).__name__
                raise ValueError(f"this {name} is in training mode: call model.eval() before popmm.attach")
            layouts: list[Layout] = []
            ours.append(layouts)
            device = next(model.parameters()).device
            with device, torch.autocast(device.type, enabled=False):  # whatever is set
                description = describe(model, skip_layers=config.skip_layers)
                attachment = _plan(model, description, config, sizes, layouts)
            ours.append(attachment)
            attachment.install()
        return attachment.state
    except BaseException:  # an interrupt too must leave the model as it was
        with whole_act():
            for attached in ours[1:]:
                attached.remove()
            for layout in ours[0] if ours else []:
                layout.release()
        raise


def detach(model: nn.Module, *, wait: bool = False) -> None:
    """Gives the model back as it was before ``attach``. Interrupted, it finishes first.

    Args:
        wait: until another thread that is running the model has done.

    Raises:
        RuntimeError: the model is not attached, or is running (in another thread, unless ``wait``). Whatever else is
            raised (such as for want of memory) leaves it attached, and ``detach`` may be called again.
    """
    attachment = find_decoder(model).__dict__.get(MARKER)
    if attachment is None:
        raise RuntimeError(f"this {type(model).__name__} is not attached: call popmm.attach(model, config) first")
    with attachment.runner.phase.exclusive.between_passes("detach", wait):
        try:
            with whole_act():
                attachment.remove()
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C
                with whole_act():
                    attachment.remove()  # what is done already is left out
            raise


class pruned(contextlib.AbstractContextManager):
    """``attach`` for the length of a ``with`` block; detaches also when its body raises.

    Takes what ``attach`` takes; yields the ``PartitionState``.
    """

    _state: PartitionState | None = None

    def __init__(self, model: nn.Module, config: PopConfig | None = None, **settings) -> None:
        self._model, self._config, self._settings = model, config, settings

    def __enter__(self) -> PartitionState:
        try:
            self._state = attach(self._model, self._config, **self._settings)
            return self._state
        except BaseException:
            self._leave()
            raise

    def __exit__(self, *raised) -> None:
        try:
            self._leave()
        except BaseException:
            self._leave()  # whatever came in between, the block does not stay attached
            raise

    def __del__(self) -> None:
        self._leave()  # interrupted before __exit__ had begun

    def _leave(self) -> None:
        """Detaches what this block has attached, unless its body did."""
        attachment = find_decoder(self._model).__dict__.get(MARKER) if self._state is not None else None
        if attachment is not None and attachment.state is self._state:
            detach(self._model, wait=True)
        self._state = None


def _plan(
    model: nn.Module, description: ModelDescription, config: PopConfig, rule: SizesRule, layouts: list[Layout]
) -> Attachment:
    """Everything that can fail, before anything of the model is touched but, with ``gate``, how down is stored.

    Args:
        layouts: gets each layout as soon as there is one, to be released if a later one fails.
    """
    surroundings = find_surroundings(model)
    if surroundings is None and config.modality_balance is not None:
        raise ValueError(
            f"modality_balance={config.modality_balance}: this {type(model).__name__} reads text alone; leave it None"
        )
    ratio = ratio_of(description, config)
    # a module that several layers share is one FFN
    sites = list({site.name: site for site in description.sites()}.values())
    if any(group_of(site.weights().d_model) < LEAST_GROUP for site in sites):
        config = config.without_default()
        ratio = ratio_of(description, config)
    if any(site.processes > 1 for site in sites):
        _check_spread(config)
    given, config = config, with_bits(config, sites, ratio)
    left_dense = [site for site in sites if site.layer in config.skip_layers or _is_left_alone(site, config)]
    ffns, shared = [], shared_parameters(model)
    for site in sites:
        if site in left_dense:
            continue
        sizes, several = sizes_for(site, ratio, config, rule), sizes_together(site, ratio, config)
        layouts.append(choose_layout(site, sizes, several, config, why_not_in_place(site.module, shared)))
        ffns.append(_kind(site)(site, sizes, config, layouts[-1]))
    tower = _pruned_tower(model, config)
    phase = Phase(config.waiting_calls, config.lossless)
    rest: list[RestLayer] = []
    modules = [site.module for site in sites]
    if config.rest_bits < 16:
        rest = list(rest_layers(model, description.decoder, config.rest_bits, phase, modules))
    runner = Runner(phase, Partitions(ffns, rest, phase), config.refresh_every, config.statistics == "weights")
    drafts = Drafts(runner, config.draft_tokens) if config.lossless else None
    freed = FreedWeights(model, ffns, shared) if config.weights == "replace" else None
    state = PartitionState(given, ratio, ffns, left_dense, rest, runner, tower, description.left_out, freed)
    experts = [site.module for site in left_dense if site.is_experts and site.routing is None]
    return wire(model, description.decoder, surroundings, state, runner, ffns, tower, experts, rest, freed, drafts)


def _kind(site: FFNSite) -> type[PrunedSite]:
    if site.is_experts:
        return PrunedExperts if site.routing is None else PrunedOwnExperts
    return PrunedFFN if site.entry is None else PrunedPair


def _check_spread(config: PopConfig) -> None:
    """Refuses what a process cannot do that holds some of the channels of each FFN."""
    if config.importance not in ("wanda", "routed"):
        raise ValueError(
            f"importance={config.importance!r} weighs a channel by all of its FFN's, and this model's are spread over "
            "processes (tensor parallelism): give 'wanda'"
        )
    for name, plain in (("weights", "keep"), ("lossless", False), ("rest_bits", 16)):
        if getattr(config, name) != plain:
            raise ValueError(
                f"{name}={getattr(config, name)!r}: not for weights that are spread over processes (tensor "
                f"parallelism): leave it {plain!r}"
            )


def _is_left_alone(site: FFNSite, config: PopConfig) -> bool:
    return site.shared and config.shared_experts == "dense"


def _pruned_tower(model: nn.Module, config: PopConfig) -> list[PrunedTowerFFN]:
    if config.vision != "prune":
        return []
    found = tower_ffns(model)
    ratio = tower_ratio(found, config, MAX_FFN_RATIO)
    return [PrunedTowerFFN(ffn, ratio, config) for ffn in found]


def _check_weights(model: nn.Module) -> None:
    """Refuses offloaded models, and those without data."""
    devices = device_map(model)
    offloaded = "disk" in devices or ("cpu" in devices and len(devices) > 1)
    if offloaded or any(map(is_offloaded, model.modules())):
        raise UnsupportedModelError(
            f"weights of this {type(model).__name__} are offloaded (devices: {', '.join(sorted(devices)) or 'hooks'}): "
            "load the whole model on accelerators, or the whole of it on the CPU"
        )
    meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise UnsupportedModelError(
            f"{meta} has no data (meta device): load the weights first; popmm.budget.ffn_ratio takes such a model"
        )
