"""Which implementation serves which weights, and each operation as an operator that ``torch.compile`` sees."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from popmm.kernels import native, planes, twin
from popmm.kernels.planes import Planes


def room_of(rows: Tensor) -> ModuleType:
    """The implementation that serves these rows fastest."""
    if rows.is_cuda and rows.stride(-1) == 1:
        try:
            from popmm.kernels import triton_rows
        except ImportError:
            return twin
        return triton_rows
    return native if native.serves(rows) else twin


def gather_dot(rows: Tensor, index: Tensor, x: Tensor) -> Tensor:
    return room_of(rows).gather_dot(rows, index, x).to(x.dtype)


def gather_sum(rows: Tensor, index: Tensor, h: Tensor) -> Tensor:
    return room_of(rows).gather_sum(rows, index, h).to(h.dtype)


def block_dot(matrices: Tensor, x: Tensor, block: Tensor) -> Tensor:
    return room_of(matrices).block_dot(matrices, x, block).to(x.dtype)


def quantised_dot(codes: Tensor, scale: Tensor, x: Tensor, bits: int, group: int, block: Tensor, n_rows: int) -> Tensor:
    room = native if x.is_cpu and native.library() is not None else room_of(scale)
    return room.quantised_dot(codes, scale, x, bits, group, block, n_rows).to(x.dtype)


def choose(score: Tensor, k: int) -> Tensor:
    score = score.float()
    if score.is_cuda:
        return score.topk(k, dim=-1, sorted=False)[1]
    return (native if score.is_cpu and native.library() is not None else twin).choose(score, k)


def planes_room(rows: Planes) -> ModuleType | None:
    """The implementation that reads these planes; None = the twin."""
    if rows.scale.is_cuda:
        try:
            from popmm.kernels import triton_planes
        except ImportError:
            return None
        return triton_planes
    return native if native.serves_planes(rows) else None


def planes_dot(rows: list[Tensor], bits: int, index: Tensor, x: Tensor) -> Tensor:
    own = Planes(*rows)
    room = planes_room(own)
    return planes.dot(own, bits, index, x) if room is None else room.planes_dot(own, bits, index, x)


def planes_linear(rows: list[Tensor], bits: int, x: Tensor) -> Tensor:
    own = Planes(*rows)
    room = planes_room(own)
    return room.PlanesLinear(own, bits)(x)


def planes_add(rows: list[Tensor], bits: int, index: Tensor, h: Tensor) -> Tensor:
    own = Planes(*rows)
    room = planes_room(own)
    return planes.add(own, bits, index, h) if room is None else room.planes_add(own, bits, index, h)


def planes_decode(rows: list[Tensor], bits: int, dtype: torch.dtype) -> Tensor:
    own = Planes(*rows)
    if dtype in (torch.float32, torch.bfloat16) and native.serves_planes(own):
        return native.planes_decode(own, bits, dtype)
    return planes.decode(own, bits).to(dtype)


def tiers_ffn(
    parts: list[Tensor],
    d_ff: int,
    rms: Tensor,
    norms: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    bits: list[int],
    counts: list[int],
    first: Tensor,
    x: Tensor,
    votes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    own: list[Planes | None] = [Planes(*parts[i : i + 4]) for i in range(0, len(parts), 4)]
    if len(own) == 2:  # without a gate
        own.insert(1, None)
    tiers = list(zip(bits, counts))
    return native.TiersFFN(own, d_ff, rms, norms, (gate_bias, up_bias), activation, tiers)(first, x, votes)


FUNCTIONS = (
    gather_dot,
    gather_sum,
    block_dot,
    quantised_dot,
    choose,
    planes_dot,
    planes_linear,
    planes_add,
    planes_decode,
    tiers_ffn,
)
ops = {
    function.__name__: torch.library.custom_op(f"popmm::{function.__name__}", function, mutates_args=())
    for function in FUNCTIONS
}
ops["gather_dot"].register_fake(lambda rows, index, x: x.new_empty(index.shape))
ops["gather_sum"].register_fake(lambda rows, index, h: h.new_empty(len(index), rows.shape[1]))
ops["block_dot"].register_fake(lambda matrices, x, block: x.new_empty(len(x), matrices.shape[1]))
ops["quantised_dot"].register_fake(lambda codes, scale, x, bits, group, block, n_rows: x.new_empty(len(x), n_rows))
ops["planes_dot"].register_fake(lambda rows, bits, index, x: x.new_empty(index.shape, dtype=torch.float32))
ops["planes_linear"].register_fake(lambda rows, bits, x: x.new_empty(len(x), len(rows[0]), dtype=torch.float32))
ops["planes_add"].register_fake(lambda rows, bits, index, h: h.new_empty(len(h), Planes(*rows).d, dtype=torch.float32))
ops["planes_decode"].register_fake(
    lambda rows, bits, dtype: rows[0].new_empty(len(rows[1]), Planes(*rows).d, dtype=dtype)
)
ops["tiers_ffn"].register_fake(
    lambda parts, d_ff, rms, norms, gate_bias, up_bias, activation, bits, counts, first, x, votes: (
        x.new_empty(x.shape, dtype=torch.float32),
        x.new_empty(len(x), sum(counts), dtype=torch.int64),
    )
)
ops["choose"].register_fake(lambda score, k: score.new_empty(len(score), k, dtype=torch.int64))
