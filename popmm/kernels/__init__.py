"""Products with chosen rows of a weight matrix, read where they lie.

Each operation has a torch twin (``twin``), a C kernel on the CPU (``native``) and a Triton kernel on CUDA
(``triton_rows``), all with float32 accumulation. ``torch.compile`` sees them as operators of ``popmm``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from popmm.kernels import dispatch, native, operators, planes, twin
from popmm.kernels.dispatch import ops
from popmm.kernels.planes import Planes
from popmm.kernels.precision import output_dtype
from popmm.kernels.prepared import PlanesLinear, TiersFFN, together

__all__ = [
    "PlanesLinear",
    "TiersFFN",
    "block_dot",
    "choose",
    "gather_dot",
    "gather_sum",
    "linear",
    "needs_gradient",
    "planes_add",
    "planes_decode",
    "planes_dot",
    "quantised_dot",
    "reads_blocks",
    "serves_planes",
    "serves_tiers",
    "together",
]


def reads_blocks(matrices: Tensor) -> bool:
    """Whether ``block_dot`` has a kernel for these matrices, whose twin would copy them. Not for compiled code."""
    return matrices.stride(-1) == 1 and dispatch.room_of(matrices) is not twin


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd must see the arithmetic: the kernels would cut it."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


FEW_TOKENS = 17  # up to which our kernel is faster: the widest pass that checks a draft, and the largest batch


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` in a decode step: of a few tokens in bfloat16 on the CPU by our kernel.

    torch's product of so few tokens takes the weights at a third of the memory's speed. Ours sums in float32 and rounds
    once, as torch's, in another order. In float16 one token by a slice of columns has a kernel too.
    """
    few = x.is_cpu and x.dtype == weight.dtype == output_dtype(weight) and x.numel() <= FEW_TOKENS * x.shape[-1]
    if not few or needs_gradient(x, weight, *(() if bias is None else (bias,))):
        return F.linear(x, weight, bias)
    if operators.serves_few(weight, bias):
        return operators.few_linear(x, weight.detach(), None if bias is None else bias.detach())
    one = x.numel() == x.shape[-1] and not torch.compiler.is_compiling()
    if one and weight.element_size() == 2 and not weight.is_contiguous() and reads_blocks(weight):
        y = block_dot(weight.unsqueeze(0), x.reshape(1, -1), torch.zeros(1, dtype=torch.int64, device="cpu"))
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


def gather_dot(rows: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """``out[n, k] = rows[index[n, k]] . x[n]``.

    Args:
        rows: ``[n_rows, d]``, any stride between rows.
        index: int64 ``[n, k]``.
        x: ``[n, d]``.
    """
    if needs_gradient(rows, x):
        return twin.gather_dot(rows, index, x).to(x.dtype)
    return (ops["gather_dot"] if torch.compiler.is_compiling() else dispatch.gather_dot)(rows, index, x)


def gather_sum(rows: Tensor, index: Tensor, h: Tensor) -> Tensor:
    """``out[n] = sum over k of h[n, k] * rows[index[n, k]]``, ``[n, d]``.

    Args:
        rows, index: as in ``gather_dot``.
        h: ``[n, k]``.
    """
    if needs_gradient(rows, h):
        return twin.gather_sum(rows, index, h).to(h.dtype)
    return (ops["gather_sum"] if torch.compiler.is_compiling() else dispatch.gather_sum)(rows, index, h)


def block_dot(matrices: Tensor, x: Tensor, block: Tensor) -> Tensor:
    """``out[n] = matrices[block[n]] @ x[n]``, ``[n, n_rows]``, reading each matrix where it lies.

    Args:
        matrices: ``[n_matrices, n_rows, d]``, rows in one piece each.
        x: ``[n, d]``.
        block: int64 ``[n]``.
    """
    if needs_gradient(matrices, x):
        return twin.block_dot(matrices, x, block).to(x.dtype)
    return (ops["block_dot"] if torch.compiler.is_compiling() else dispatch.block_dot)(matrices, x, block)


def quantised_dot(codes: Tensor, scale: Tensor, x: Tensor, bits: int, group: int, block: Tensor, n_rows: int) -> Tensor:
    """``out[n] = rows[block[n] * n_rows : (block[n] + 1) * n_rows] @ x[n]``, ``[n, n_rows]``.

    Args:
        codes, scale, bits, group: rows of ``twin.quantise``, blocks of ``n_rows`` each.
        x: ``[n, d]``.
        block: int64 ``[n]``.
    """
    if needs_gradient(x):
        return twin.quantised_dot(codes, scale, x, bits, group, block, n_rows).to(x.dtype)
    op = ops["quantised_dot"] if torch.compiler.is_compiling() else dispatch.quantised_dot
    return op(codes, scale, x, bits, group, block, n_rows)


def choose(score: Tensor, k: int) -> Tensor:
    """Places of the k highest scores of each row ``[n, u]``, int64 ``[n, k]``; on the CPU rising, ties to the lower."""
    return (ops["choose"] if torch.compiler.is_compiling() else dispatch.choose)(score, k)


def planes_dot(rows: Planes, bits: int, index: Tensor, x: Tensor) -> Tensor:
    """``out[n, k] = rows[index[n, k]] . x[n]``, float32 ``[n, k]``, rows read in ``bits`` bits (4, 6 or 8; 3, 5 or 7).

    Args:
        rows: nested planes of ``[n_rows, d]``.
        index: int64 ``[n, k]``.
        x: float32 ``[n, d]``.
    """
    if needs_gradient(x):
        return planes.dot(rows, bits, index, x)
    return (ops["planes_dot"] if torch.compiler.is_compiling() else dispatch.planes_dot)([*rows], bits, index, x)


def planes_add(rows: Planes, bits: int, index: Tensor, h: Tensor) -> Tensor:
    """``out[n] = sum over k of h[n, k] * rows[index[n, k]]``, float32 ``[n, d]``, rows read in ``bits`` bits."""
    if needs_gradient(h):
        return planes.add(rows, bits, index, h)
    return (ops["planes_add"] if torch.compiler.is_compiling() else dispatch.planes_add)([*rows], bits, index, h)


def planes_decode(rows: Planes, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """All rows as they are read in ``bits`` bits, ``[n_rows, d]``."""
    return (ops["planes_decode"] if torch.compiler.is_compiling() else dispatch.planes_decode)([*rows], bits, dtype)


def serves_planes(rows: Planes) -> bool:
    """Whether products with planes have a kernel, whose twin writes the rows out."""
    return dispatch.planes_room(rows) is not None


def serves_tiers(rows: Planes) -> bool:
    """Whether ``TiersFFN`` serves FFNs of such planes."""
    return native.serves_planes(rows)
