"""What an adapter tells popmm about an architecture: where its FFNs are and how their weights lie."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Protocol

from torch import Tensor, nn

from popmm.ffn import FFNWeights


class UnsupportedModelError(ValueError):
    """The model, or a part of it, is not of a form that popmm can prune."""


@dataclass
class FFNSite:
    """One FFN, or one stack of experts, that an adapter found.

    ``weights`` returns views of the model's own parameters in the canonical orientation of
    ``FFNWeights``, whatever the architecture's own arrangement.
    """

    module: nn.Module  # called as module(x) for an FFN, module(x, top_k_index, top_k_weights) for experts
    weights: Callable[[], FFNWeights]
    combine: Callable[[Tensor, Tensor], Tensor]  # (gate [..., n], up [..., n]) -> h [..., n]
    down: nn.Module | None = None  # the FFN's down projection: its input is h
    up: nn.Module | None = None  # the FFN's up projection, if it is a layer by itself
    split: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None  # experts: joint output [n, 2 d_ff] to (gate, up)
    n_experts: int = 0  # 0: a plain FFN
    top_k: int = 0  # experts that one token activates
    name: str = ""
    layer: int = -1
    shared: bool = False  # a shared expert beside routed ones

    @property
    def is_experts(self) -> bool:
        return self.n_experts > 0

    def active_channels(self) -> int:
        """Channels that one token activates, over all of its experts."""
        return self.weights().d_ff * (self.top_k if self.is_experts else 1)

    def active_weights(self) -> int:
        """Weights (elements) that one token activates."""
        return 3 * self.weights().d_model * self.active_channels()

    def active_bytes(self) -> int:
        """Weight bytes that one token reads."""
        return self.weights().bytes_per_channel() * self.active_channels()


class Adapter(Protocol):
    """Recognises one kind of FFN by its structure."""

    def site(self, module: nn.Module, probe: bool) -> FFNSite | None:
        """The site that ``module`` is, or None if this adapter does not know its form.

        With ``probe`` the weights hold data and the description must be verified against the module's
        own output; without it they may lie on the meta device.
        """


@dataclass
class DecoderLayer:
    """One block of the language model: its FFN sites and the linear weights outside the FFN."""

    index: int
    name: str
    module: nn.Module
    sites: list[FFNSite] = field(default_factory=list)
    attention_weights: int = 0


@dataclass
class ModelDescription:
    """The language model inside a model, and all of its FFN sites."""

    decoder: nn.Module
    decoder_name: str
    layers: list[DecoderLayer]

    def sites(self) -> Iterator[FFNSite]:
        for layer in self.layers:
            yield from layer.sites


logger = logging.getLogger("popmm")

_REGISTRY: list[Adapter] = []
_plugins_loaded = False


def register(adapter: Adapter) -> Adapter:
    """Adds an adapter; later ones are asked first, so that a special form can precede a general one."""
    _REGISTRY.insert(0, adapter)
    return adapter


def registry() -> list[Adapter]:
    """Adapters in the order in which they are asked; loads the entry points of group ``popmm.adapters``."""
    global _plugins_loaded
    if not _plugins_loaded:
        _plugins_loaded = True
        for entry in entry_points(group="popmm.adapters"):
            register(entry.load()())
    return _REGISTRY


def find_decoder(model: nn.Module) -> nn.Module:
    """The language model's stack of decoder layers, wherever it lies inside ``model``."""
    if not hasattr(model, "get_decoder"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model: give a PreTrainedModel, such as "
            "AutoModelForCausalLM.from_pretrained(...)"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder-decoder: popmm prunes decoder-only models")
    decoder = model
    while hasattr(decoder, "get_decoder"):
        inner = decoder.get_decoder()
        if inner is decoder or not hasattr(inner, "get_decoder"):  # some heads are called decoder too
            break
        decoder = inner
    if not _layer_stacks(decoder):
        # a head whose get_decoder returns itself
        inner = [child for child in decoder.children() if hasattr(child, "get_decoder") and _layer_stacks(child)]
        decoder = inner[0] if inner else decoder
    return decoder


def _layer_stacks(decoder: nn.Module) -> list[nn.ModuleList]:
    return [child for child in decoder.children() if isinstance(child, nn.ModuleList) and len(child)]


def describe(model: nn.Module, probe: bool = True) -> ModelDescription:
    """Finds the decoder, its layers and their FFN sites.

    Raises:
        UnsupportedModelError: no layer holds an FFN of a known form; the error names what stands there.
    """
    decoder = find_decoder(model)
    names = {id(module): name for name, module in model.named_modules()}
    stacks = _layer_stacks(decoder) or [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not stacks:
        raise UnsupportedModelError(f"{type(decoder).__name__} has no list of decoder layers")
    stack = max(stacks, key=len)
    layers = [_describe_layer(index, module, names, probe) for index, module in enumerate(stack)]
    if not any(layer.sites for layer in layers):
        raise UnsupportedModelError(_explain_no_site(layers[0]))
    without = [layer.name for layer in layers if not layer.sites]
    if without and probe:
        logger.warning("no FFN of a known form in %s: these layers stay dense", ", ".join(without))
    return ModelDescription(decoder, names.get(id(decoder), ""), layers)


def _describe_layer(index: int, module: nn.Module, names: dict[int, str], probe: bool) -> DecoderLayer:
    layer = DecoderLayer(index, names[id(module)], module)
    for child in module.children():
        sites = list(_find_sites(child, names, probe))
        for site in sites:
            if site.is_experts:
                site.top_k = _router_top_k(child) or site.top_k
                if not site.top_k:
                    raise UnsupportedModelError(
                        f"{names[id(site.module)]}: neither the router nor {type(site.module.config).__name__} says "
                        "how many experts a token activates"
                    )
        layer.sites += sites
        if not any(site.is_experts for site in sites):
            _refuse_unknown_experts(child, names)
        if not sites:
            layer.attention_weights += sum(m.weight.numel() for m in child.modules() if is_linear(m))
    has_experts = any(site.is_experts for site in layer.sites)
    for site in layer.sites:
        site.name, site.layer = names[id(site.module)], index
        site.shared = has_experts and not site.is_experts
    return layer


def _find_sites(module: nn.Module, names: dict[int, str], probe: bool) -> Iterator[FFNSite]:
    for adapter in registry():
        try:
            site = adapter.site(module, probe)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{names[id(module)]}: {error}") from error
        if site is not None:
            yield site
            return
    for child in module.children():
        yield from _find_sites(child, names, probe)


def _router_top_k(block: nn.Module) -> int:
    """``top_k`` of the router in an FFN block, 0 if none says."""
    inside_out = [*list(block.modules())[1:], block]  # the block's own number may be a copy
    values = (getattr(module, "top_k", None) for module in inside_out)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), 0)


def _refuse_unknown_experts(block: nn.Module, names: dict[int, str]) -> None:
    """Stacked weights of a form that no adapter knows would silently stay dense."""
    for module in block.modules():
        stacked = [name for name, p in module.named_parameters(recurse=False) if p.ndim == 3]
        if len(stacked) > 1 and not isinstance(module, nn.modules.conv._ConvNd):
            raise UnsupportedModelError(
                f"{names[id(module)]} ({type(module).__name__}) holds stacked experts ({', '.join(stacked)}) that do "
                "not use transformers' experts interface: register an adapter for this form (entry-point group "
                "'popmm.adapters')"
            )


def is_linear(module: nn.Module) -> bool:
    # transformers' Conv1D is a linear layer with a transposed weight
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _explain_no_site(layer: DecoderLayer) -> str:
    """Names the FFN of a form that no adapter knows, or else what the layer holds."""
    for name, module in layer.module.named_modules():
        linears = {child: m for child, m in module.named_children() if is_linear(m)}
        shapes = [tuple(m.weight.shape) for m in linears.values()]
        if len(shapes) == 2 and shapes[0] == shapes[1][::-1]:
            where = f"{layer.name}.{name}".rstrip(".")
            return (
                f"{where} ({type(module).__name__}) is an FFN without a gate ({' and '.join(linears)} only): "
                "popmm prunes gated FFNs (gate, up and down projections)"
            )
    parts = ", ".join(f"{name} ({type(child).__name__})" for name, child in layer.module.named_children())
    return (
        f"{layer.name} ({type(layer.module).__name__}) holds no FFN of a known form; it has {parts}. popmm prunes "
        "gated FFNs of plain nn.Linear layers: merge LoRA adapters and load unquantised weights, or register an "
        "adapter for this form (entry-point group 'popmm.adapters')"
    )
