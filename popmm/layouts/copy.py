"""Where the weights that decode reads lie."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from popmm.layouts.base import ChannelsStay, fix_addresses
from popmm.method.budget import RegionSizes
from popmm.method.ffn import FFNWeights, down_norm, gather, identities
from popmm.method.fingerprint import fingerprint
from popmm.method.partition import FFNPartition

if TYPE_CHECKING:
    pass


PAD = 16  # on the CPU, torch's 16-bit product with another number of rows takes twice as long


class CopyLayout(ChannelsStay):
    """Retained and candidate channels gathered into static buffers, in reading order [R | C].

    Buffers keep their addresses and shapes from prompt to prompt, so a compiled decode step stays valid.
    The model's own weights are only read.
    """

    name = "copy"
    by_operators = False
    reorders = False  # the model's own weights are only read

    def __init__(self, sizes: RegionSizes, fill_mean: bool) -> None:
        self.sizes = sizes
        self.fill_mean = fill_mean
        self.weights: FFNWeights | None = None
        self.padded: FFNWeights | None = None  # the same, gate and up with rows of zeros up to a multiple of PAD
        self.down_norm: Tensor | None = None  # float32 [(E,) |R| + |C|]
        self.mean: Tensor | None = None  # [(E,) |R| + |C|], with fill="mean"
        self.norms: Tensor | None = None  # float32 [(E,) d_ff], of all channels
        self.marks: list[Tensor] = []  # fingerprint of the weights
        self._order: Tensor | None = None
        self._source: tuple | None = None

    def allocate(self, source: FFNWeights) -> None:
        """Makes the buffers for weights like ``source``; call again when the model has moved."""
        n = self.sizes.read

        pads = source.gate.ndim == 2 and source.gate.device.type == "cpu" and source.gate.element_size() == 2
        n_rows = -(-n // PAD) * PAD if pads else n

        def rows(w: Tensor | None) -> Tensor | None:
            return None if w is None else w.new_zeros(*w.shape[:-2], n_rows, w.shape[-1])

        def vector(b: Tensor | None) -> Tensor | None:
            return None if b is None else b.new_zeros(*b.shape[:-1], n_rows)

        # inference tensors could not be rewritten outside inference mode
        self._source = identities(source)
        with torch.inference_mode(False), torch.no_grad():
            self.norms, self.marks = down_norm(source.down), fingerprint(source)
            if self.sizes.is_dense:  # decode is the model's own forward
                return
            down_bias = source.down_bias
            if self.fill_mean:
                like = source.down[..., 0] if down_bias is None else down_bias
                down_bias = torch.zeros_like(like)
                self.mean = source.down.new_zeros(*source.down.shape[:-2], n)
            self.padded = FFNWeights(
                rows(source.gate),
                rows(source.up),
                source.down.new_empty(*source.down.shape[:-1], n),
                vector(source.gate_bias),
                vector(source.up_bias),
                down_bias,
            )
            gate, up, down, gate_bias, up_bias, _ = self.padded
            if n_rows != n:
                own = (gate, up, gate_bias, up_bias)
                gate, up, gate_bias, up_bias = (None if t is None else t[:n] for t in own)
            self.weights = FFNWeights(gate, up, down, gate_bias, up_bias, down_bias)
            self.down_norm = self.norms.new_empty(*self.norms.shape[:-1], n)
            fix_addresses(self)

    def write(self, source: FFNWeights, partition: FFNPartition, mean: Tensor | None) -> None:
        """Gathers the partition's channels into the buffers, in place.

        Args:
            source: all channels of the FFN.
            partition: what to gather.
            mean: prompt mean of every channel, float32 ``[(E,) d_ff]``; needed with ``fill="mean"``.
        """
        order, mine = partition.reading_order, self.weights
        self._order = order
        with torch.inference_mode(False), torch.no_grad():
            order = order.clone()
            for own, theirs in ((mine.gate, source.gate), (mine.up, source.up)):
                if own is not None:
                    gather(theirs, order, -2, own)
            gather(source.down, order, -1, mine.down)
            for own, theirs in ((mine.gate_bias, source.gate_bias), (mine.up_bias, source.up_bias)):
                if own is not None:
                    gather(theirs, order, -1, own)
            gather(self.norms, order, -1, self.down_norm)
            if self.fill_mean:
                mean = mean.clone()
                gather(mean.to(self.mean.dtype), order, -1, self.mean)
                pruned = torch.zeros_like(mean).scatter_(-1, partition.pruned.clone(), 1.0) * mean
                constant = (source.down @ pruned.to(source.down.dtype).unsqueeze(-1)).squeeze(-1)
                mine.down_bias.copy_(constant if source.down_bias is None else constant + source.down_bias)

    @property
    def reading_order(self) -> Tensor:
        """Channels in the order in which decode reads them, int64 ``[(E,) |R| + |C|]``."""
        return self._order

    def release(self) -> None:
        """Drops the buffers."""
        self.weights = self.padded = self.down_norm = self.mean = None

    def bytes(self) -> int:
        """Memory that the buffers take."""
        tensors = [*(self.padded or ()), self.down_norm, self.mean, self.norms, *self.marks]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)
