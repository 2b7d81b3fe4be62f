"""Linear layers that a few tokens read as they are, in steps and in checks: on the CPU in bfloat16 by our kernel."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from popmm import kernels
from popmm.kernels import operators
from popmm.runtime.overrides import Override
from popmm.runtime.phase import Phase

FEW_ROWS = 16  # of a layer that is not worth it


class FewTokens:
    """A linear layer by the kernel, in decode steps and where a draft is checked."""

    def __init__(self, module: nn.Linear, phase: Phase) -> None:
        self.module, self.phase, self._own = module, phase, module.forward

    def forward(self, x: Tensor) -> Tensor:
        """Stands in for the layer's forward."""
        phase, module = self.phase, self.module
        few = (phase.step or (phase.checking and phase.lossless)) and not (phase.released or phase.simulating)
        return kernels.linear(x, module.weight, module.bias) if few else self._own(x)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer of some size that nobody has wrapped.

    What is more than one (adapters, quantised layers) may compute something else.
    """
    if type(module) is not nn.Linear or "forward" in module.__dict__ or type(module.weight) is not nn.Parameter:
        return False
    return module.weight.is_floating_point() and module.weight.shape[0] >= FEW_ROWS


def output_layer(model: nn.Module) -> nn.Module | None:
    """What makes logits, None if the model makes none."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def served(module: nn.Module) -> bool:
    """Whether the kernel takes a module."""
    return is_plain(module) and operators.serves_few(module.weight, module.bias)


def few_overrides(model: nn.Module, decoder: nn.Module, phase: Phase) -> Iterator[Override]:
    """Of a decoder's linear layers and the output layer."""
    head = output_layer(model)
    found = {id(layer): layer for layer in (*decoder.modules(), *([] if head is None else [head]))}
    for layer in filter(served, found.values()):
        yield Override(layer, "forward", FewTokens(layer, phase).forward)
