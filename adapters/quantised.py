"""Linear layers that arrive quantised: their weights are read without knowing the format.

A quantised layer still is ``W x + b``: where its tensor cannot say W (``dequantize``), the layer's own forward does, of
the unit vectors. Both are verified against the layer on random vectors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import adapted
from .base import UnsupportedModelError
from .forms import linear_shape
from .weights import FLOATS, is_machine_failure

CLOSE = 2e-2  # of the largest output: layers round what they are given
AT_ONCE = 1024  # unit vectors

_REFUSED = "load the model with unquantised weights (no quantization_config), or in another format"


def is_quantised(layer: nn.Module) -> bool:
    """Whether a linear layer keeps its weights in some packed form."""
    if hasattr(layer, "base_layer") or parametrize.is_parametrized(layer) or linear_shape(layer) is None:
        return False
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return any(t.dtype not in FLOATS for t in (*layer.parameters(False), *layer.buffers(False)))
    if weight.is_meta or weight.layout != torch.strided:
        return False
    data = weight.data if type(weight) is nn.Parameter else weight
    if type(data).__name__ == "DTensor":
        return False
    if type(data) in (Tensor, nn.Parameter):
        return data.dtype not in FLOATS and type(layer) is not nn.Linear  # whose forward could not run
    return True


def kind_of(layer: nn.Module) -> str:
    """What to call a quantised layer's form."""
    weight = getattr(layer, "weight", None)
    data = weight.data if type(weight) is nn.Parameter else weight
    plain = data is None or type(data) in (Tensor, nn.Parameter)
    return type(layer).__name__ if plain else type(data).__name__


@torch.no_grad()
def dequantised(layer: nn.Module, name: str) -> Tensor:
    """The weights ``[out, in]`` that a layer computes with, in the dtype in which it answers.

    Raises:
        UnsupportedModelError: they cannot be told.
    """
    inputs, outputs = linear_shape(layer)
    found = _by_its_tensor(layer)
    if found is not None and tuple(found.shape) == (outputs, inputs) and _answers_by(layer, found):
        return found
    found = _by_unit_vectors(layer, name, inputs)
    if not _answers_by(layer, found):
        raise UnsupportedModelError(
            f"{name} is a {kind_of(layer)}, whose answers are not those of the weights it can be read as: {_REFUSED}"
        )
    return found


def _answers_by(layer: nn.Module, weights: Tensor) -> bool:
    """Whether a layer's answers to random vectors are those of these weights."""
    plain = dict(dtype=torch.float32, device="cpu")
    x = torch.randn(4, weights.shape[1], generator=torch.Generator("cpu").manual_seed(0), **plain).to(weights)
    expected, ours = _without_bias(layer, layer(x)).float(), x.float() @ weights.float().mT
    return bool(torch.isfinite(ours).all() and (ours - expected).abs().max() <= CLOSE * expected.abs().max())


def _by_its_tensor(layer: nn.Module) -> Tensor | None:
    weight = getattr(layer, "weight", None)
    data = weight.data if type(weight) is nn.Parameter else weight
    if not isinstance(data, Tensor) or type(data) in (Tensor, nn.Parameter):
        return None
    try:
        found = data.dequantize()
    except Exception as error:
        if is_machine_failure(error):
            raise
        return None
    return found if type(found) is Tensor and found.dtype in FLOATS else None


def _by_unit_vectors(layer: nn.Module, name: str, inputs: int) -> Tensor:
    errors = []
    for dtype in _dtypes(layer):
        try:
            device = next(iter(packed(layer))).device
            unit = torch.eye(inputs, dtype=dtype, device=device)
            rows = [_without_bias(layer, layer(part)) for part in unit.split(AT_ONCE)]
            return torch.cat(rows).mT.contiguous()
        except Exception as error:
            if is_machine_failure(error):
                raise
            errors.append(f"{type(error).__name__}: {error}")
    raise UnsupportedModelError(
        f"{name} is a {kind_of(layer)} that does not run here ({errors[0].splitlines()[0]}): {_REFUSED}"
    )


def _dtypes(layer: nn.Module) -> list[torch.dtype]:
    """dtypes in which a layer may want its input, likeliest first."""
    named = [getattr(layer, "compute_dtype", None), getattr(getattr(layer, "bias", None), "dtype", None)]
    named += [t.dtype for t in packed(layer) if t.dtype in FLOATS]
    every = [dtype for dtype in named if dtype in FLOATS] + [torch.bfloat16, torch.float16, torch.float32]
    return list(dict.fromkeys(every))


def _without_bias(layer: nn.Module, y: Tensor) -> Tensor:
    bias = getattr(layer, "bias", None)
    return y if not isinstance(bias, Tensor) else y - bias


def packed(layer: nn.Module) -> Iterator[Tensor]:
    """The plain tensors in which a layer keeps its weights, without the bias."""
    inside = adapted.is_adapted(layer)
    own = (*layer.named_parameters(recurse=inside), *layer.named_buffers(recurse=inside))
    for name, tensor in own:
        if name.rpartition(".")[2] != "bias":
            yield from _plain(tensor.data if type(tensor) is nn.Parameter else tensor)
    state = vars(getattr(getattr(layer, "weight", None), "quant_state", None) or object).get("absmax")  # bitsandbytes
    if isinstance(state, Tensor):
        yield state


def _plain(t: Tensor) -> Iterator[Tensor]:
    if hasattr(t, "__tensor_flatten__") and type(t) is not Tensor:
        for name in t.__tensor_flatten__()[0]:
            inner = getattr(t, name)
            if isinstance(inner, Tensor):
                yield from _plain(inner)
    else:
        yield t


def identity(layers: list[nn.Module]) -> tuple:
    """What changes when a layer's packed weights are replaced or written."""
    tensors = [t for layer in layers for t in packed(layer)]
    own = [t for layer in layers for t in (*layer.parameters(False), *layer.buffers(False))]  # biases too
    places = tuple((t.data_ptr(), tuple(t.shape)) for t in tensors)
    answers = tuple(adapted.answer_of(layer) for layer in layers if adapted.is_adapted(layer))
    return places, answers, tuple(None if t.is_inference() else t._version for t in (*own, *tensors))


class Packed:
    """The layers of one FFN whose weights are not there as a tensor: quantised ones, and ones with adapters."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.layers = layers
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
        return sum(t.numel() * t.element_size() for layer in self.layers.values() for t in packed(layer))

    def identity(self) -> tuple:
        return identity(list(self.layers.values()))

    def weight(self, layer: nn.Module) -> Tensor:
        """A layer's weights, dequantised."""
        name = next((name for name, own in self.layers.items() if own is layer), None)
        if name is None:
            return layer.weight
        found = (adapted.values_of if adapted.is_adapted(layer) else dequantised)(layer, name)
        if id(layer) not in self._stand_ins:  # of the shape, and holding nothing
            nothing = torch.full((1, 1), torch.nan, dtype=found.dtype, device=found.device)
            self._stand_ins[id(layer)] = nothing.expand(found.shape)
        return found

    def stand_in(self, layer: nn.Module) -> Tensor:
        """Shape, dtype and device of a layer's weights, without values."""
        if layer not in self.layers.values():
            return layer.weight
        if id(layer) not in self._stand_ins:
            self.weight(layer)
        return self._stand_ins[id(layer)]
