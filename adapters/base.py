"""What an adapter tells popmm about an architecture: where its FFNs are and how their weights lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Protocol

from torch import Tensor, nn

from popmm.method.ffn import FFNWeights

from .routing import Routing


class UnsupportedModelError(ValueError):
    """The model, or a part of it, is not of a form that popmm can prune."""


class BrokenWeightsError(UnsupportedModelError):
    """Weights that no form explains: they are not finite."""


class PackedWeights(Protocol):
    """The layers of one FFN, or the stacks of its experts, whose weights are no plain tensor: quantised, or adapted."""

    kind: str  # the format's name
    exact: bool  # whether they are read as they are: adapters, and no format
    one_plane: bool  # whether gate and up came in 4 bits, on grids that one plane holds

    def bytes(self) -> int:
        """Memory that their weights take."""

    def identity(self) -> tuple:
        """What changes when they are replaced or written."""


@dataclass
class FFNSite:
    """One FFN, or one stack of experts, that an adapter found.

    ``weights`` returns views of the model's own parameters in the canonical orientation of
    ``FFNWeights``, whatever the architecture's own arrangement.
    """

    module: nn.Module  # called as module(x) for an FFN, module(x, top_k_index, top_k_weights) for most experts
    weights: Callable[[], FFNWeights]
    combine: Callable[[Tensor, Tensor | None], Tensor]  # (gate [..., n], up [..., n] or None) -> h [..., n]
    down: nn.Module | None = None  # the FFN's down projection: its input is h
    up: nn.Module | None = None  # the FFN's up projection, if it is a layer by itself
    split: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None  # experts: joint output [n, 2 d_ff] to (gate, up)
    n_experts: int = 0  # 0: a plain FFN
    top_k: int = 0  # experts that one token activates
    routing: Routing | None = None  # of experts outside transformers' interface: how their module is called
    after: Callable[[Tensor], Tensor] | None = None  # what each expert's output [n, d_model] goes through
    factor: Callable[[], Tensor | float] | None = None  # of the output, if any: combine's h is down's input times it
    values: Callable[[], FFNWeights] | None = None  # of packed ones, computed; ``weights`` has shapes alone
    packed: PackedWeights | None = None  # quantised layers or stacks, and layers with adapters
    entry: nn.Module | None = None  # the first projection, where no module is called: it is given x, down gives y
    likely: list[Callable] = field(default_factory=list)  # with ``entry``: combinations that are to be verified
    places: dict[str, nn.Module] = field(default_factory=dict)  # with ``entry``: its layers, by their full names
    reduce: Callable[[Tensor], Tensor] | None = None  # sums the outputs of processes that hold some channels each
    processes: int = 1  # that hold its channels; ``weights`` are this one's
    name: str = ""
    layer: int = -1
    shared: bool = False  # a shared expert beside routed ones

    @property
    def is_experts(self) -> bool:
        return self.n_experts > 0

    @property
    def is_routed(self) -> bool:
        """Whether a token goes to some of several experts."""
        return self.is_experts and not (self.routing is not None and self.routing.all_experts)

    def read(self) -> FFNWeights:
        """The weights with their values, which quantised layers compute at each call."""
        return self.weights() if self.values is None else self.values()

    def active_channels(self) -> int:
        """Channels that one token activates, over all of its experts."""
        return self.weights().d_ff * (self.top_k if self.is_experts else 1)

    def active_weights(self) -> int:
        """Weights (elements) that one token activates."""
        weights = self.weights()
        return len(weights.matrices) * weights.d_model * self.active_channels()

    def active_bytes(self) -> int:
        """Weight bytes that one token reads."""
        if self.packed is not None:
            return self.packed.bytes() * self.top_k // self.n_experts if self.is_experts else self.packed.bytes()
        return self.weights().bytes_per_channel() * self.active_channels()


class Adapter(Protocol):
    """Recognises one kind of FFN by its structure."""

    def site(self, module: nn.Module, probe: bool) -> FFNSite | None:
        """The site that ``module`` is, or None if this adapter does not know its form.

        With ``probe`` the weights hold data and the description must be verified against the module's
        own output; without it they may lie on the meta device.

        Raises:
            UnsupportedModelError: ``module`` is an FFN or a stack of experts, and cannot be pruned: it stays dense,
                and the message, one sentence, is listed as the reason. ``BrokenWeightsError`` refuses the model.
        """


@dataclass
class DecoderLayer:
    """One block of the language model: its FFN sites and the linear weights outside of them.

    ``attention_weights`` counts all linear weights of the block that can not be pruned: attention, other mixers, and
    FFNs that are left dense because of their form.
    """

    index: int  # counted through over all stacks of layers, in their order
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
    left_out: dict[str, str] = field(default_factory=dict)  # FFNs that stay dense: module name to the reason

    def sites(self) -> Iterator[FFNSite]:
        for layer in self.layers:
            yield from layer.sites


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
    if not _has_list(decoder):
        # a head whose get_decoder returns itself
        inner = [child for child in decoder.children() if hasattr(child, "get_decoder") and _has_list(child)]
        decoder = inner[0] if inner else decoder
    return decoder


def _has_list(module: nn.Module) -> bool:
    return any(isinstance(child, nn.ModuleList) and len(child) for child in module.children())
