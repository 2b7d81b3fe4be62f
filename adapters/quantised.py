"""Linear layers that arrive quantised: their weights are read without knowing the format.

A quantised layer still is ``W x + b``: where neither its tensor nor the layer can say W (``dequantize``), its own
forward does, of the unit vectors. All are verified against the layer on random vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from popmm.method.ffn import hollow

from . import adapted
from .base import UnsupportedModelError
from .forms import linear_shape
from .weights import FLOATS, BeingRead, by_unit_vectors, data_of, is_machine_failure, without_bias

CLOSE = 2e-2  # of the largest output: layers round what they are given
QUANTISED_CLOSE = 5 * CLOSE  # two layers one after the other, whose inputs may be 8-bit floats

_REFUSED = "load the model with unquantised weights (no quantization_config), or in another format"
_COMPUTES = "dequantize", "dequantize_weight"  # what layers of hqq and gptqmodel call it

# some layers repack their weights for the dtype of the first input that they are given, so that it must be the model's
_activations: ContextVar[torch.dtype | None] = ContextVar("dtype of a model's activations", default=None)


@contextmanager
def activations_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, layers are read by inputs of this dtype; None: of the likeliest in which they run."""
    token = _activations.set(dtype if dtype in FLOATS else None)
    try:
        yield
    finally:
        _activations.reset(token)


def is_quantised(layer: nn.Module) -> bool:
    """Whether a linear layer keeps its weights in some packed form."""
    if hasattr(layer, "base_layer") or parametrize.is_parametrized(layer) or linear_shape(layer) is None:
        return False
    if _by_compressed_tensors(layer):
        return True
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return any(t.dtype not in FLOATS for t in (*layer.parameters(False), *layer.buffers(False)))
    if weight.is_meta or weight.layout != torch.strided:
        return False
    data = data_of(weight)
    if type(data).__name__ == "DTensor":
        return False
    if type(data) in (Tensor, nn.Parameter):
        return data.dtype not in FLOATS and type(layer) is not nn.Linear  # whose forward could not run
    return True


def kind_of(layer: nn.Module) -> str:
    """What to call a quantised layer's form."""
    if _by_compressed_tensors(layer):
        return "compressed-tensors layer"
    data = data_of(getattr(layer, "weight", None))
    plain = not isinstance(data, Tensor) or type(data) in (Tensor, nn.Parameter)
    return type(layer).__name__ if plain else type(data).__name__


def _by_compressed_tensors(layer: nn.Module) -> bool:
    """Whether a layer rounds its weights, and maybe its inputs, in a forward that the library has put on it."""
    return hasattr(layer, "quantization_scheme") and "forward" in vars(layer)


@torch.no_grad()
def dequantised(layer: nn.Module, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """The weights ``[out, in]`` that a layer computes with, in the dtype in which it or its package tells them.

    Args:
        dtype: in which it is given inputs; None: the likeliest in which it runs.

    Raises:
        UnsupportedModelError: they cannot be told.
    """
    inputs, outputs = linear_shape(layer)
    dtype = dtype or _first_that_runs(layer, name, inputs)
    for told in _told(layer):
        for found in (told, told.mT) if told.ndim == 2 else ():
            if tuple(found.shape) == (outputs, inputs) and _answers_by(layer, found, name, dtype):
                return found.contiguous()
    device = next(packed(layer)).device
    found = by_unit_vectors(lambda x: without_bias(layer, _run(layer, x, name)), inputs, dtype, device)
    if not _answers_by(layer, found, name, dtype):
        raise UnsupportedModelError(
            f"{name} is a {kind_of(layer)}, whose answers are not those of the weights it can be read as: {_REFUSED}"
        )
    return found


def _told(layer: nn.Module) -> Iterator[Tensor]:
    """What a layer's tensor, or its class, says of its weights."""
    data = data_of(getattr(layer, "weight", None))
    if type(data) in (Tensor, nn.Parameter):
        found = [lambda: data.detach()]
    else:
        found = [data.dequantize] if isinstance(data, Tensor) else []
        found += [getattr(layer, name) for name in _COMPUTES if callable(getattr(layer, name, None))]
    for compute in found:
        try:
            told = compute()
        except Exception as error:
            if is_machine_failure(error):
                raise
            continue
        if type(told) is Tensor and told.dtype in FLOATS:
            yield told


def _answers_by(layer: nn.Module, weights: Tensor, name: str, dtype: torch.dtype) -> bool:
    """Whether a layer's answers to random vectors are those of these weights.

    Their numbers are powers of two, which layers that round their inputs, to integers or to floats, hardly move.
    """
    generator, shape = torch.Generator("cpu").manual_seed(0), (4, weights.shape[1])
    size = torch.randint(-2, 1, shape, generator=generator, dtype=torch.int64, device="cpu").float().exp2()
    sign = torch.randint(0, 2, shape, generator=generator, dtype=torch.int64, device="cpu") * 2 - 1
    x = (size * sign).to(dtype=dtype, device=weights.device)
    expected, ours = without_bias(layer, _run(layer, x, name)).float(), x.float() @ weights.float().mT
    return bool(torch.isfinite(ours).all() and (ours - expected).abs().max() <= CLOSE * expected.abs().max())


def _run(layer: nn.Module, x: Tensor, name: str) -> Tensor:
    try:
        with BeingRead():
            return layer(x)
    except Exception as error:
        if is_machine_failure(error):
            raise
        said = next(iter(str(error).splitlines()), "")
        raise UnsupportedModelError(
            f"{name} is a {kind_of(layer)} that does not run here ({type(error).__name__}: {said}): {_REFUSED}"
        ) from error


def _first_that_runs(layer: nn.Module, name: str, inputs: int) -> torch.dtype:
    device, errors = next(packed(layer)).device, []
    for dtype in _dtypes(layer):
        try:
            _run(layer, torch.zeros(1, inputs, dtype=dtype, device=device), name)
            return dtype
        except UnsupportedModelError as error:
            errors.append(error)
    raise errors[0]


def _dtypes(layer: nn.Module) -> list[torch.dtype]:
    """dtypes in which a layer may want its input, likeliest first."""
    named = [getattr(layer, "compute_dtype", None), getattr(getattr(layer, "bias", None), "dtype", None)]
    named += [t.dtype for t in packed(layer) if t.dtype in FLOATS]
    every = [dtype for dtype in named if dtype in FLOATS] + [torch.bfloat16, torch.float16, torch.float32]
    return list(dict.fromkeys(every))


def packed(layer: nn.Module) -> Iterator[Tensor]:
    """The plain tensors in which a layer keeps its weights, without the bias."""
    inside = adapted.is_adapted(layer)
    own = (*layer.named_parameters(recurse=inside), *layer.named_buffers(recurse=inside))
    for name, tensor in own:
        if name.rpartition(".")[2] != "bias":
            yield from packed_tensors(data_of(tensor))
    state = vars(getattr(getattr(layer, "weight", None), "quant_state", None) or object).get("absmax")  # bitsandbytes
    if isinstance(state, Tensor):
        yield state


def packed_tensors(t: Tensor) -> Iterator[Tensor]:
    """The plain tensors inside of one that is of some other class, itself if it is plain."""
    if hasattr(t, "__tensor_flatten__") and type(t) is not Tensor:
        for name in t.__tensor_flatten__()[0]:
            inner = getattr(t, name)
            if isinstance(inner, Tensor):
                yield from packed_tensors(inner)
    else:
        yield t


def identity(layers: list[nn.Module]) -> tuple:
    """What changes when a layer's packed weights are replaced or written."""
    own = [t for layer in layers for t in (*layer.parameters(False), *layer.buffers(False))]  # biases too
    answers = tuple(adapted.answer_of(layer) for layer in layers if adapted.is_adapted(layer))
    return answers, places_and_versions([t for layer in layers for t in packed(layer)], own)


def places_and_versions(inside: list[Tensor], outside: list[Tensor]) -> tuple:
    """What changes when tensors are replaced or written.

    Args:
        inside: the plain ones that hold the values.
        outside: those that they stand in, which count writes by themselves.
    """
    places = tuple((t.data_ptr(), tuple(t.shape)) for t in inside)
    return places, tuple(None if t.is_inference() else t._version for t in (*outside, *inside))


class Packed:
    """The layers of one FFN whose weights are not there as a tensor: quantised ones, and ones with adapters."""

    def __init__(self, layers: dict[str, nn.Module], plain: list[nn.Module]) -> None:
        self.layers, self._all = layers, [*layers.values(), *plain]
        self.one_plane = False  # until the values are known
        self._dtype = _activations.get()
        self._stand_ins: dict[int, Tensor] = {}

    @property
    def kind(self) -> str:
        layer = next(iter(self.layers.values()))
        return adapted.kind_of(layer) if adapted.is_adapted(layer) else kind_of(layer)

    @property
    def exact(self) -> bool:
        """Whether the weights are read as they are: adapters alone, no quantised layer."""
        return all(adapted.is_adapted(layer) for layer in self.layers.values())

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self._all for t in packed(layer))

    def identity(self) -> tuple:
        return identity(self._all)

    def weight(self, layer: nn.Module) -> Tensor:
        """A layer's weights, dequantised."""
        name = next((name for name, own in self.layers.items() if own is layer), None)
        if name is None:
            return layer.weight
        found = adapted.values_of(layer, name) if adapted.is_adapted(layer) else dequantised(layer, name, self._dtype)
        if id(layer) not in self._stand_ins:
            self._stand_ins[id(layer)] = hollow(found.shape, self._dtype or found.dtype, found.device)
        return found

    def in_its_dtype(self, layer: nn.Module) -> Tensor:
        """A layer's weights in the dtype in which it answers."""
        found = self.weight(layer)
        return found.to(self.stand_in(layer).dtype)

    def stand_in(self, layer: nn.Module) -> Tensor:
        """Shape and device of a layer's weights, and the dtype in which it answers, without values."""
        if layer not in self.layers.values():
            return layer.weight
        if id(layer) not in self._stand_ins:
            self.weight(layer)
        return self._stand_ins[id(layer)]
