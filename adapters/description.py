"""Describes a model: its language model, its layers, the FFNs that can be pruned and those that cannot."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import nn

from popmm.compat import decompress

from .base import (
    BrokenWeightsError,
    DecoderLayer,
    FFNSite,
    ModelDescription,
    UnsupportedModelError,
    find_decoder,
    registry,
)
from .forms import (
    base_of,
    is_block,
    is_ffn,
    is_mixer,
    linear_shape,
    linear_weights,
    outside_mixers,
    projections,
    stacked,
    ungated,
)
from .moe import verify_experts
from .own_experts import verify_caller
from .quantised import activations_in
from .reasons import why_never_decoding, why_nothing
from .spread import pair_site, verify_pairs
from .stacks import beside, find_layers

logger = logging.getLogger("popmm")


def describe(model: nn.Module, probe: bool = True, skip_layers: tuple[int, ...] = ()) -> ModelDescription:
    """Finds the decoder, its layers and their FFN sites.

    FFNs that cannot be pruned are listed in ``left_out`` with the reason and stay dense; their linear weights count
    among their layer's ``attention_weights``.

    Args:
        probe: verify each site against its module's own output; needs weights with data, in eval mode. Weights that a
            first forward would unpack are unpacked now.
        skip_layers: layers that are left dense anyway: nothing in them is verified or listed as left out.

    Raises:
        UnsupportedModelError: no FFN of the whole model can be pruned, and why; or weights that are not finite.
    """
    decoder = find_decoder(model)
    names = {id(module): name for name, module in model.named_modules()}
    reason = why_never_decoding(model, decoder)
    if reason:
        raise UnsupportedModelError(reason)
    search = _Search(names, probe)
    if probe:
        decompress(model)
    blocks = find_layers(decoder)
    with activations_in(_activations_of(model)):
        layers = [search.layer(index, block, index in skip_layers) for index, block in enumerate(blocks)]
        if probe:
            search.settle(decoder, [layer for layer in layers if layer.index not in skip_layers])
    for ffn, stack in beside(model, decoder):
        search.beside(ffn, f"{names[id(stack)]} ({type(stack).__name__})", names.get(id(decoder), ""))
    description = ModelDescription(decoder, names.get(id(decoder), ""), layers, search.left_out)
    if not any(layer.sites for layer in layers):
        types = {name: type(module).__name__ for name, module in model.named_modules() if name in search.every_reason}
        raise UnsupportedModelError(why_nothing(model, layers, search.every_reason, types))
    if probe and search.left_out:
        name, reason = next(iter(search.left_out.items()))
        logger.warning(
            "%d FFN%s of this %s cannot be pruned and stay dense, such as %s: %s",
            len(search.left_out), "s"[: len(search.left_out) > 1], type(model).__name__, name, reason,
        )  # fmt: skip
    return description


def _activations_of(model: nn.Module) -> torch.dtype | None:
    embeddings = model.get_input_embeddings()
    return getattr(getattr(embeddings, "weight", None), "dtype", None)


class _Search:
    """What is found on the way through the layers."""

    def __init__(self, names: dict[int, str], probe: bool) -> None:
        self.names = names
        self.probe = probe
        self.left_out: dict[str, str] = {}
        self.every_reason: dict[str, str] = {}  # those of skipped layers too
        self._verdicts: dict[tuple, FFNSite | str | None] = {}  # a module that several layers share is asked once

    def layer(self, index: int, module: nn.Module, skipped: bool) -> DecoderLayer:
        layer = DecoderLayer(index, self.names[id(module)], module)
        self._probing, self._skipped = self.probe and not skipped, skipped
        self._left: list[tuple[nn.Module, nn.Module]] = []
        self._visit(module, module, module, layer)
        if not layer.sites and not self._left:
            self._find_spread(layer)
        routed = {id(site.module) for site in layer.sites if site.is_routed}
        routed |= {id(left) for left, _ in self._left if _is_routed(left) and not routed}
        for site in layer.sites:
            site.name, site.layer = site.name or self.names[id(site.module)], index
            site.shared = bool(routed) and not site.is_routed
        for left, top in self._left:
            if not routed or id(left) in routed:  # shared experts count on neither side
                layer.attention_weights += _active_weights(left, top)
        return layer

    def _visit(self, module: nn.Module, parent: nn.Module, top: nn.Module, layer: DecoderLayer) -> bool:
        """Collects the FFNs in a module, which stands in the layer's part ``top``; whether there are any."""
        is_layer = module is layer.module
        if is_mixer(module) and not is_layer:
            return False
        verdict = self._ask(module, parent, top)
        if isinstance(verdict, FFNSite):
            layer.sites.append(replace(verdict))
            return True
        if verdict is not None:
            self._leave_out(module, verdict)
            self._left.append((module, top))
            return True
        inside = [(child, self._visit(child, module, child if is_layer else top, layer)) for child in module.children()]
        holds = any(found for _, found in inside)
        if is_layer or (holds and is_block(module)):  # routers and gates beside FFNs do not count
            layer.attention_weights += sum(linear_weights(child) for child, found in inside if not found)
        return holds

    def beside(self, module: nn.Module, stack: str, decoder: str) -> None:
        """Lists an FFN of another decoder in the model."""
        self._skipped = False
        self._leave_out(
            module, f"{type(module).__name__} is part of {stack}: popmm prunes the FFNs of one decoder, here {decoder}"
        )

    def _find_spread(self, layer: DecoderLayer) -> None:
        """A block's only FFN may be no module by itself: its projections stand in the block, or in several parts."""
        block, layers = layer.module, outside_mixers(layer.module)
        pair = ungated(layers)
        if pair is None:
            return
        kind, shapes = type(block).__name__, {name: linear_shape(layer) for name, layer in layers.items()}
        wide = [name for name, shape in shapes.items() if shape == shapes[pair[0]]]
        if len(wide) == 2:
            names = ", ".join([*wide, pair[1]])
            reason = f"{kind} holds the projections of a gated FFN ({names}) among other parts: popmm prunes FFNs that "
            self._leave_out(block, reason + "are modules by themselves")
            return
        try:
            site = self._pair(block, pair)
        except BrokenWeightsError as error:
            raise BrokenWeightsError(f"{self.names[id(block)]}.{error}") from error
        except UnsupportedModelError as error:
            self._leave_out(block, str(error))
            return
        layer.sites.append(site)
        layer.attention_weights -= site.active_weights()

    def _pair(self, block: nn.Module, pair: tuple[str, str]) -> FFNSite:
        """The site of two projections in a block that is more than an FFN, or is called with more than x."""
        site, name = pair_site(block, pair, self._probing), self.names[id(block)]
        site.name = name
        site.places = {f"{name}.{own}": part for own, part in site.places.items()}
        return site

    def settle(self, decoder: nn.Module, layers: list[DecoderLayer]) -> None:
        """Verifies the FFNs that are no modules by themselves; those that fail are left out."""
        found = [(layer, site) for layer in layers for site in layer.sites if site.entry is not None]
        reasons = verify_pairs(decoder, [site for _, site in found]) if found else {}
        for layer, site in found:
            if site.name in reasons:
                layer.sites.remove(site)
                layer.attention_weights += site.active_weights()
                self.every_reason.setdefault(site.name, reasons[site.name])
                self.left_out.setdefault(site.name, reasons[site.name])

    def _ask(self, module: nn.Module, parent: nn.Module, top: nn.Module) -> FFNSite | str | None:
        """The site that a module is, why it can be none, or None if it is no FFN."""
        key = id(module), self._probing
        if key not in self._verdicts:
            try:
                self._verdicts[key] = self._judge(module, parent, top)
            except BrokenWeightsError as error:
                raise BrokenWeightsError(f"{self.names[id(module)]}.{error}") from error
            except UnsupportedModelError as error:
                self._verdicts[key] = str(error)
        return self._verdicts[key]

    def _judge(self, module: nn.Module, parent: nn.Module, top: nn.Module) -> FFNSite | None:
        if base_of(module) is not None and _is_routed(_innermost(module)):
            raise UnsupportedModelError(
                f"{type(module).__name__} computes the weights of {type(_innermost(module)).__name__} anew at each "
                "call (an adapter such as LoRA on experts): merge it first, merge_and_unload()"
            )
        if _is_expert_list(module) and not is_block(parent):
            raise UnsupportedModelError(
                f"{type(module).__name__} is a list of {len(module)} experts, each run with the tokens routed to it: "
                "popmm prunes experts that transformers' experts interface runs, stacked in one tensor"
            )
        try:
            site = next(filter(None, (adapter.site(module, self._probing) for adapter in registry())), None)
        except BrokenWeightsError:
            raise
        except UnsupportedModelError:
            pair = ungated(projections(module)) if len(projections(module)) == 2 else None
            if pair is None:
                raise
            site = self._pair(module, pair)
        if site is not None and site.is_experts:
            if site.is_routed:
                site.top_k = _router_top_k(top) or site.top_k
            if not site.top_k:
                config = type(getattr(module, "config", None)).__name__
                raise UnsupportedModelError(
                    f"{type(module).__name__} has experts, but neither the router nor {config} says how many of them "
                    "a token activates"
                )
            if site.routing is not None:
                verify_caller(site, parent, self._probing)
            elif self._probing:
                verify_experts(site)
        return site

    def _leave_out(self, module: nn.Module, reason: str) -> None:
        name = self.names[id(module)]
        self.every_reason.setdefault(name, reason)
        if not self._skipped:
            self.left_out.setdefault(name, reason)


def _innermost(module: nn.Module) -> nn.Module:
    """What stands inside of all adapters."""
    base = base_of(module)
    return module if base is None else _innermost(base)


def _is_expert_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) and sum(map(is_ffn, module.children())) > 1


def _is_routed(module: nn.Module) -> bool:
    return _is_expert_list(module) or bool(stacked(module))


def _router_top_k(block: nn.Module) -> int:
    """``top_k`` of the router in an FFN block, 0 if none says."""
    inside_out = [*list(block.modules())[1:], block]  # the block's own number may be a copy
    values = (getattr(module, "top_k", None) for module in inside_out)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), 0)


def _active_weights(module: nn.Module, top: nn.Module) -> int:
    """Weights of an FFN, or of the experts that one token activates."""
    if not _is_routed(module):
        return linear_weights(module)
    parameters = [p for p in module.parameters() if p.ndim == 3]
    experts = parameters[0].shape[0] if parameters else len(list(module.children()))
    every = sum(p.numel() for p in parameters) or linear_weights(module)
    return every * min(_router_top_k(top) or experts, experts) // max(experts, 1)
