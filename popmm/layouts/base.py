"""The contract of a layout: where decode reads an FFN's weights."""

from __future__ import annotations

from typing import Protocol

import torch
import torch._dynamo
from torch import Tensor

from popmm.method.budget import RegionSizes
from popmm.method.ffn import FFNWeights, identities
from popmm.method.fingerprint import fingerprint, same
from popmm.method.partition import FFNPartition


class LayoutContract(Protocol):
    """What every layout has. Buffers keep their addresses and shapes from prompt to prompt.

    Values of h, and marks, are "as they lie": in the order in which the model's weights lie while attached.
    """

    name: str
    reorders: bool  # whether it writes the model's own weights at each prompt
    sizes: RegionSizes
    norms: Tensor | None  # ||W_down[:, i]|| of all channels as they lie, float32 [(E,) d_ff]
    marks: list[Tensor]  # fingerprint of the weights as they lie
    by_operators: bool  # whether a token's FFN is one native operator

    def allocate(self, source: FFNWeights) -> None:
        """Makes the buffers for weights like ``source``; again when the model has moved or its weights have changed."""

    def fits(self, source: FFNWeights) -> bool:
        """Whether norms and buffers still belong to these weights: same places, same contents."""

    def write(self, source: FFNWeights, partition: FFNPartition, *prompt: Tensor) -> None:
        """Lays a new partition out: ``prompt`` is each channel's mean, and with ``gate`` the up projection's rms."""

    @property
    def reading_order(self) -> Tensor:
        """Channels in the order in which decode reads them, int64 ``[(E,) |R| + |C|]``."""

    def by_channel(self, values: Tensor) -> Tensor:
        """Values ``[(E,) d_ff]`` of h as it lies, in the model's own channel numbers."""

    def positions(self, channels: Tensor) -> Tensor:
        """Where channels ``[(E,) n]`` lie."""

    def rewind(self) -> None:
        """Puts every channel back where it was in the model's own weights."""

    def release(self) -> None:
        """Gives the weights back and drops the buffers. May be called again after whatever it raised."""

    def bytes(self) -> int:
        """Memory held beside the model's own weights."""


class ChannelsStay:
    """Of a layout whose channels stay where they are in the model's own weights."""

    norms: Tensor | None
    marks: list[Tensor]
    _source: tuple | None  # ``identities`` of the weights that it was made for

    def fits(self, source: FFNWeights) -> bool:
        return self._source == identities(source) and same(self.marks, fingerprint(source))

    def rewind(self) -> None:
        """Nothing."""

    def by_channel(self, values: Tensor) -> Tensor:
        return values

    def positions(self, channels: Tensor) -> Tensor:
        return channels


def fix_addresses(owner: object) -> None:
    """Tells CUDA graphs that the tensors an object holds stay where they are: else each step would copy them."""
    for value in vars(owner).values():
        for t in value if isinstance(value, (tuple, list)) else (value, getattr(value, "rows", None)):
            if isinstance(t, Tensor):
                torch._dynamo.mark_static_address(t, guard=False)
