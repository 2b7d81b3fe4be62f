"""The linear layers outside the FFNs, read at decode in fewer bits: attention's projections, the output layer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from popmm import kernels
from popmm.adapters.forms import is_mixer
from popmm.kernels import planes
from popmm.kernels.planes import Planes
from popmm.kernels.precision import output_dtype, without_autocast
from popmm.kernels.twin import check_finite, group_of
from popmm.method.ffn import identity
from popmm.method.fingerprint import marks_of, same
from popmm.method.tiers import row_bits
from popmm.runtime.few import FewTokens, is_plain, output_layer, served
from popmm.runtime.overrides import Override
from popmm.runtime.phase import Phase

SMALL_BATCH = 8  # tokens of a step, up to which each reads the planes; larger ones read the weights as they are


class Mates:
    """The linear layers of one mixer, of which some are called one after the other with the same input (q, k and v)."""

    def __init__(self) -> None:
        self._seen: Callable[[], Tensor | None] = lambda: None  # the last input
        self._first: RestLayer | None = None  # that it was given to
        self.x: Tensor | None = None  # the input of a step whose answers are here, as it was
        self.version = 0
        self.answers: dict[RestLayer, Tensor] = {}

    def saw(self, layer: RestLayer, x: Tensor) -> None:
        """Learns from the prompt who follows whom."""
        if self._seen() is not x:
            self._seen, self._first = weakref.ref(x), layer
            layer.followers = []
        elif layer is not self._first and layer.fits(self._first) and layer not in self._first.followers:
            self._first.followers.append(layer)


class RestLayer:
    """A linear layer in nested planes. Prompts, and steps of large batches, run the layer as it is."""

    def __init__(self, name: str, module: nn.Linear, bits: int, phase: Phase, mates: Mates) -> None:
        self.name, self.module, self.bits, self.phase, self.mates = name, module, bits, phase, mates
        self.followers: list[RestLayer] = []
        self.dense_forward = FewTokens(module, phase).forward if served(module) else module.forward
        self.planes: Planes | None = None
        self.encode()

    def encode(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            weight = self.module.weight.detach()
            check_finite(weight, f"{self.name} holds", "rest_bits=16")
            self.planes, self._reading = planes.encode_plain(weight, self.bits), planes.plainly(self.bits)
            self._identity, self._marks = identity(weight), self._read_marks()
            served = kernels.serves_planes(self.planes)
            self._product = kernels.PlanesLinear(self.planes, self._reading, self.module.bias) if served else None

    def _read_marks(self) -> list[Tensor]:
        bias = self.module.bias
        return [marks_of(self.module.weight), *([] if bias is None else [bias.detach().float().clone()])]

    def check(self) -> None:
        """Called before each prompt: reads weights that have changed again."""
        weight = self.module.weight
        if self._identity != identity(weight) or not same(self._marks, self._read_marks()):
            self.encode()

    def overrides(self) -> list[Override]:
        return [Override(self.module, "forward", self.forward)]

    def forward(self, x: Tensor) -> Tensor:
        """Stands in for the layer's forward."""
        phase = self.phase
        n_tokens = x.numel() // x.shape[-1]
        if not phase.step or phase.released or (n_tokens > SMALL_BATCH and not phase.simulating):
            if not (phase.step or phase.checking):
                self.mates.saw(self, x)
            return self.dense_forward(x)
        dtype = output_dtype(self.module.weight)
        if self._product is not None and n_tokens <= SMALL_BATCH and not kernels.needs_gradient(x):
            return self._answer(x, x.to(dtype))
        with without_autocast(x.device):
            y = F.linear(x.float(), kernels.planes_decode(self.planes, self._reading))
            if self.module.bias is not None:
                y = y + self.module.bias
        return y.to(dtype)

    def fits(self, other: RestLayer) -> bool:
        """Whether both can be computed at one call."""
        own, theirs = self._product, other._product
        return own is not None and theirs is not None and own.group == theirs.group

    def _answer(self, x: Tensor, own: Tensor) -> Tensor:
        """By the layer that is called first with x, for those that will be called with it next."""
        mates = self.mates
        if mates.x is x and mates.version == _version(x) and self in mates.answers:
            y = mates.answers.pop(self)
            if not mates.answers:
                mates.x = None
            return y
        if not self.followers:
            return self._product(own)
        layers = [self, *self.followers]
        found = kernels.together([layer._product for layer in layers], own)
        if found is None:
            return self._product(own)
        mates.x, mates.version, mates.answers = x, _version(x), dict(zip(self.followers, found[1:]))
        return found[0]

    def read(self) -> tuple[int, int]:
        """(in planes, as it came) weight bytes that one token reads."""
        weight = self.module.weight
        own = weight.numel() * row_bits(self.bits, group_of(weight.shape[1])) / 8
        return round(own), weight.numel() * weight.element_size()

    def release(self) -> None:
        self.planes = self._product = None


def _version(x: Tensor) -> int:
    """Changes when x is written; compiled code writes no input of several layers."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def rest_layers(
    model: nn.Module, decoder: nn.Module, bits: int, phase: Phase, ffns: Iterable[nn.Module]
) -> Iterator[RestLayer]:
    """Plain linear layers of the decoder's mixers (attention), and the output layer, whose width can be grouped.

    Args:
        ffns: modules whose layers are not among them.
    """
    inside = {id(part) for ffn in ffns for part in ffn.modules()}
    head = output_layer(model)
    mixers = [part for part in decoder.modules() if is_mixer(part)]
    found = {id(layer): (layer, mates) for mixer in mixers for mates in (Mates(),) for layer in mixer.modules()}
    if head is not None:
        found.setdefault(id(head), (head, Mates()))
    names = {id(module): name for name, module in model.named_modules()}
    for module, mates in (pair for key, pair in found.items() if key not in inside):
        if is_plain(module) and group_of(module.weight.shape[1]) >= 16:
            yield RestLayer(names.get(id(module), ""), module, bits, phase, mates)
