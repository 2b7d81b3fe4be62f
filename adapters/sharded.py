"""Weights that tensor parallelism spreads over processes: each holds some channels of every FFN.

A process ranks and chooses among its own channels; what its down projection makes of them is summed over the processes,
as the model itself does it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(weight: Tensor | None) -> bool:
    """Whether a weight is spread over processes (a ``DTensor``)."""
    return type(weight).__name__ == "DTensor"


def is_spread(layer: nn.Module) -> bool:
    """The same of a layer's weight; packed layers have none."""
    return is_sharded(getattr(layer, "weight", None))


def local(weight: Tensor | None) -> Tensor | None:
    """What this process holds of a weight."""
    return weight.detach().to_local() if is_sharded(weight) else weight


def why_not_local(linear: nn.Module, name: str) -> str:
    """Why a process cannot compute with its own part of a spread linear layer; empty if it can."""
    weight, bias = linear.weight, linear.bias
    if weight.device_mesh.ndim > 1 or len(weight.placements) != 1:
        return f"{name} is spread over a mesh of {weight.device_mesh.ndim} dimensions: popmm reads tensor parallelism"
    (placement,) = weight.placements
    if not (type(placement).__name__ == "Shard" and placement.dim in (0, 1, -1)):
        return f"{name} is spread as {placement}: popmm reads projections that are cut by whole channels"
    if bias is not None and not is_sharded(bias):
        return f"{name} is spread over processes and its bias is not"
    return ""


def by_channels(widening: list[nn.Module], down: nn.Module) -> str:
    """Why the layers of an FFN do not hold the same channels in each process; empty if they do."""
    spread = [is_spread(layer) for layer in (*widening, down)]
    if not any(spread):
        return ""
    dims = [getattr(layer.weight, "placements", [None])[0] for layer in (*widening, down)]
    right = all(spread) and all(p.dim == 0 for p in dims[:-1]) and dims[-1].dim % 2 == 1
    return "" if right else "its projections are not all cut by the same channels (colwise gate and up, rowwise down)"


def bias_of_sum(down: nn.Module) -> Tensor | None:
    """The bias that this process adds before the sum over processes: the first one adds it for all."""
    bias = getattr(down, "bias", None)
    if not is_spread(down):
        return bias
    return local(bias) if dist.get_rank(_group(down)) == 0 else None


def sum_over_processes(down: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What makes the output of the parts that processes compute; None where this process computes it all."""
    if not is_spread(down):
        return None
    group = _group(down)

    def reduce(y: Tensor) -> Tensor:
        y = y.contiguous()
        dist.all_reduce(y, group=group)
        return y

    return reduce


def processes(down: nn.Module) -> int:
    """How many hold the channels of an FFN."""
    return dist.get_world_size(_group(down)) if is_spread(down) else 1


def _group(layer: nn.Module):
    return layer.weight.device_mesh.get_group()
