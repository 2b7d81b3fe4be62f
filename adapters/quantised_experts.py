"""Stacks of experts that arrive quantised: parameters whose tensor class can say what it stands for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from popmm.method.ffn import hollow

from .quantised import packed_tensors, places_and_versions
from .weights import FLOATS, data_of, is_machine_failure

PROJECTIONS = ("gate_up_proj", "down_proj")


def tells_its_values(parameter: Tensor) -> bool:
    """Whether a parameter is of a tensor class with a ``dequantize`` of its own, and a float's dtype outside."""
    data = data_of(parameter)
    own = getattr(type(data), "dequantize", None)
    return own is not None and own is not Tensor.dequantize and data.dtype in FLOATS and data.ndim == 3


class PackedExperts:
    """The quantised stacks of one layer's experts."""

    exact = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.one_plane = False  # until the values are known
        self.names = [name for name in PROJECTIONS if tells_its_values(module._parameters[name])]
        self._stand_ins: dict[str, Tensor] = {}

    @property
    def kind(self) -> str:
        return type(self._data(self.names[0])).__name__

    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for name in PROJECTIONS for t in packed_tensors(self._data(name)))

    def identity(self) -> tuple:
        own = list(self.module.parameters(False))
        return places_and_versions([t for p in own for t in packed_tensors(p.data)], own)

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        """A stack with its values; an exception of its class if they cannot be told."""
        data = self._data(name)
        return data.dequantize().to(data.dtype) if name in self.names else self.module._parameters[name]

    def stand_in(self, name: str) -> Tensor:
        """Shape, dtype and device of a stack, without values."""
        data = self._data(name)
        if name not in self.names:
            return self.module._parameters[name]
        if name not in self._stand_ins:
            self._stand_ins[name] = hollow(data.shape, data.dtype, data.device)
        return self._stand_ins[name]

    def why_unreadable(self) -> str:
        """Why the stacks cannot be read after all; empty if they can."""
        for name in self.names:
            try:
                found = self.read(name)
            except Exception as error:
                if is_machine_failure(error):
                    raise
                return f"{name} is a {self.kind}, whose dequantize() raises {type(error).__name__}: {error}"
            if type(found) is not Tensor or found.shape != self._data(name).shape:
                return f"{name} is a {self.kind}, whose dequantize() gives no tensor of its shape"
        return ""

    def _data(self, name: str) -> Tensor:
        return data_of(self.module._parameters[name])
