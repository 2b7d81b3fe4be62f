"""Recorded masks: which channels passed at each decode step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class Trace(Mapping[str, Tensor]):
    """Masks by FFN name: bool ``[steps, batch, d_ff]``, experts ``[steps, batch, n_experts, d_ff]``.

    Channels are in the model's own numbers. Masks lie on the CPU.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes  # of one token's mask, by FFN name
        self._steps: dict[str, list[Tensor]] = {name: [] for name in shapes}

    def add(self, name: str, mask: Tensor) -> None:
        """Appends steps ``[n, batch, ...]``."""
        self._steps[name].append(mask.cpu())

    def __getitem__(self, name: str) -> Tensor:
        steps = self._steps[name]
        batches = {step.shape[1] for step in steps}
        if len(batches) > 1:
            raise ValueError(
                f"this trace holds steps of batch sizes {sorted(batches)}: trace one generate call at a time"
            )
        return torch.cat(steps) if steps else torch.zeros(0, 0, *self._shapes[name], dtype=torch.bool, device="cpu")

    def __iter__(self) -> Iterator[str]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def __repr__(self) -> str:
        steps = max((sum(len(s) for s in parts) for parts in self._steps.values()), default=0)
        return f"Trace({len(self)} FFNs, {steps} decode steps)"
