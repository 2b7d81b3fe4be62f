"""Which weights popmm can read as they lie, judged tensor by tensor and layer by layer."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .base import BrokenWeightsError
from .forms import is_linear


class BeingRead:
    """Whether layers are called to be read: what stands in for some of them lets such calls through."""

    active = False

    def __enter__(self) -> None:
        self._before, BeingRead.active = BeingRead.active, True

    def __exit__(self, *raised) -> None:
        BeingRead.active = self._before


UNIT_VECTORS = 1024  # that a layer is given at once
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LOAD = (
    "load the model with unquantised weights (no quantization_config), or call model.dequantize() where it is offered"
)


def data_of(weight: Tensor | None) -> Tensor | None:
    """What a plain parameter holds, which may be of another class; anything else as it is."""
    return weight.data if type(weight) is nn.Parameter else weight


def why_not_readable(weight: Tensor) -> str:
    """Why popmm cannot read a weight as it lies, a phrase such as "is an Int8Tensor: ..."; empty if it can.

    A plain strided tensor of float32, bfloat16, float16 or float64 is readable, wherever the model came from.
    """
    kind = type(weight)
    if kind not in (nn.Parameter, Tensor):
        return f"{_a(kind.__name__)}: {_advice(kind)}"
    data = data_of(weight)
    if type(data) is not Tensor:  # a subclass inside a plain Parameter
        return f"{_a(type(data).__name__)}: {_advice(type(data))}"
    if weight.is_meta:
        return "has no data (meta device): load the weights first"
    if weight.layout != torch.strided:
        return f"is stored as {weight.layout}: convert it by to_dense() first"
    if weight.dtype not in FLOATS:
        return f"is stored as {str(weight.dtype).removeprefix('torch.')}: {_LOAD}"
    return ""


def why_not_plain(linear: nn.Module, name: str) -> str:
    """Why a linear layer is not ``weight @ x + bias`` with readable weights; empty if it is. Meta weights may pass."""
    kind = type(linear).__name__
    if parametrize.is_parametrized(linear):
        computed = ", ".join(linear.parametrizations)
        return (
            f"{name} computes its {computed} anew at each call (torch.nn.utils.parametrize): call "
            "remove_parametrizations first"
        )
    weight = linear._parameters.get("weight")
    if hasattr(linear, "base_layer"):
        return f"{name} is a {kind} around another layer (an adapter such as LoRA): merge it first, merge_and_unload()"
    if weight is None:
        packed = [key for key, _ in (*linear.named_parameters(recurse=False), *linear.named_buffers(recurse=False))]
        if isinstance(getattr(linear, "weight", None), Tensor) and isinstance(linear, nn.Linear):
            return f"{name} computes its weight from {', '.join(packed)} (weight_norm?): remove that first"
        return f"{name} is a {kind} that keeps {', '.join(packed) or 'no parameters'}: {_LOAD}"
    for key, tensor in linear.named_parameters(recurse=False):
        reason = "" if tensor.is_meta and type(tensor) is nn.Parameter else why_not_readable(tensor)
        if reason:
            return f"{name}.{key} {reason}"
    if not is_linear(linear) or not _is_a_product(type(linear)):
        return f"{name} is a {kind}, which computes by a forward of its own: popmm reads plain nn.Linear layers"
    return ""


def weight_of(linear: nn.Module) -> Tensor:
    """The weight of a plain linear layer, ``[out, in]``, as a view where it lies transposed (Conv1D)."""
    return linear.weight.mT if type(linear).__name__ == "Conv1D" else linear.weight


@functools.cache
@torch.no_grad()
def _is_a_product(kind: type) -> bool:
    """Whether a linear layer's forward is ``x @ weight.T + bias`` and nothing else, of its weight and bias alone."""
    if kind.forward is nn.Linear.forward:
        return True
    generator, plain = torch.Generator("cpu").manual_seed(0), dict(dtype=torch.float64, device="cpu")
    weight, bias, x = (torch.randn(s, generator=generator, **plain) for s in ((5, 3), (5,), (2, 3)))
    for own in (bias, None) if issubclass(kind, nn.Linear) else (bias,):
        turned = weight if issubclass(kind, nn.Linear) else weight.mT.contiguous()
        layer = SimpleNamespace(weight=turned, bias=own, nf=5, nx=3, in_features=3, out_features=5)
        try:
            y = kind.forward(layer, x)
        except Exception:  # it needs more than these
            return False
        expected = torch.nn.functional.linear(x, weight, own)
        if not isinstance(y, Tensor) or y.shape != expected.shape or not torch.allclose(y, expected):
            return False
    return True


def by_unit_vectors(
    answer: Callable[[Tensor], Tensor], inputs: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The weights ``[out, in]`` of a linear map, from its answers to the unit vectors."""
    unit = torch.eye(inputs, dtype=dtype, device=device)
    return torch.cat([answer(part) for part in unit.split(UNIT_VECTORS)]).mT.contiguous()


def without_bias(layer: nn.Module, y: Tensor) -> Tensor:
    """A linear layer's answer without its bias."""
    bias = getattr(layer, "bias", None)
    return y - bias if isinstance(bias, Tensor) else y


def check_finite(weights: dict[str, Tensor]) -> None:
    """Reads weights once.

    Raises:
        BrokenWeightsError: naming the first that holds values that are not finite.
    """
    for name, weight in weights.items():
        if weight.numel() and not all(torch.isfinite(end) for end in weight.detach().aminmax()):
            raise BrokenWeightsError(f"{name} holds weights that are not finite (NaN or infinity): mend the checkpoint")


def is_machine_failure(error: BaseException) -> bool:
    """Whether an error says nothing about a model, only about the machine: no memory, a broken device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError, getattr(torch, "AcceleratorError", MemoryError))):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


_NO_MEMORY = re.compile(r"out of memory|not enough memory|allocate memory", re.IGNORECASE)


def _a(name: str) -> str:
    return f"is {'an' if name[:1] in 'AEIOU' else 'a'} {name}"


def _advice(kind: type) -> str:
    if kind.__name__ == "DTensor":
        return "weights spread over devices cannot be read in one place; load the model without tensor parallelism"
    return _LOAD
