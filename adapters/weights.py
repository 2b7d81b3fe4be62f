"""Which weights popmm can read as they lie, judged tensor by tensor and layer by layer."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .base import BrokenWeightsError
from .forms import is_linear

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LOAD = (
    "load the model with unquantised weights (no quantization_config), or call model.dequantize() where it is offered"
)


def why_not_readable(weight: Tensor) -> str:
    """Why popmm cannot read a weight as it lies, a phrase such as "is an Int8Tensor: ..."; empty if it can.

    A plain strided tensor of float32, bfloat16, float16 or float64 is readable, wherever the model came from.
    """
    kind = type(weight)
    if kind not in (nn.Parameter, Tensor):
        return f"{_a(kind.__name__)}: {_advice(kind)}"
    data = weight.data if kind is nn.Parameter else weight
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
    if not is_linear(linear) or (isinstance(linear, nn.Linear) and type(linear).forward is not nn.Linear.forward):
        return f"{name} is a {kind}, which computes by a forward of its own: popmm reads plain nn.Linear layers"
    if type(linear).__name__ == "Conv1D":
        return f"{name} is a Conv1D, whose weight lies transposed: popmm reads plain nn.Linear layers"
    return ""


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
