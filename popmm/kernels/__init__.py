"""Products with chosen rows of a weight matrix, read where they lie.

Each operation has a torch twin (``twin``), a C kernel on the CPU (``native``) and a Triton kernel on CUDA
(``triton_rows``), all with float32 accumulation. ``torch.compile`` sees them as operators of ``popmm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from popmm.kernels import native, operators, planes, twin
from popmm.kernels.planes import Planes


def _room(rows: Tensor) -> ModuleType:
    """The implementation that serves these rows fastest."""
    if rows.is_cuda and rows.stride(-1) == 1:
        try:
            from popmm.kernels import triton_rows
        except ImportError:
            return twin
        return triton_rows
    return native if native.serves(rows) else twin


def reads_blocks(matrices: Tensor) -> bool:
    """Whether ``block_dot`` has a kernel for these matrices, whose twin would copy them. Not for compiled code."""
    return matrices.stride(-1) == 1 and _room(matrices) is not twin


def _gather_dot(rows: Tensor, index: Tensor, x: Tensor) -> Tensor:
    return _room(rows).gather_dot(rows, index, x).to(x.dtype)


def _gather_sum(rows: Tensor, index: Tensor, h: Tensor) -> Tensor:
    return _room(rows).gather_sum(rows, index, h).to(h.dtype)


def _block_dot(matrices: Tensor, x: Tensor, block: Tensor) -> Tensor:
    return _room(matrices).block_dot(matrices, x, block).to(x.dtype)


def _quantised_dot(
    codes: Tensor, scale: Tensor, x: Tensor, bits: int, group: int, block: Tensor, n_rows: int
) -> Tensor:
    room = native if x.is_cpu and native.library() is not None else _room(scale)
    return room.quantised_dot(codes, scale, x, bits, group, block, n_rows).to(x.dtype)


def _choose(score: Tensor, k: int) -> Tensor:
    score = score.float()
    if score.is_cuda:
        return score.topk(k, dim=-1, sorted=False)[1]
    return (native if score.is_cpu and native.library() is not None else twin).choose(score, k)


def _planes_room(rows: Planes) -> ModuleType | None:
    """The implementation that reads these planes; None = the twin."""
    if rows.scale.is_cuda:
        try:
            from popmm.kernels import triton_planes
        except ImportError:
            return None
        return triton_planes
    return native if native.serves_planes(rows) else None


def _planes_dot(rows: list[Tensor], bits: int, index: Tensor, x: Tensor) -> Tensor:
    own = Planes(*rows)
    room = _planes_room(own)
    return planes.dot(own, bits, index, x) if room is None else room.planes_dot(own, bits, index, x)


def _planes_linear(rows: list[Tensor], bits: int, x: Tensor) -> Tensor:
    own = Planes(*rows)
    room = _planes_room(own)
    return room.PlanesLinear(own, bits)(x)


def _planes_add(rows: list[Tensor], bits: int, index: Tensor, h: Tensor) -> Tensor:
    own = Planes(*rows)
    room = _planes_room(own)
    return planes.add(own, bits, index, h) if room is None else room.planes_add(own, bits, index, h)


def _planes_decode(rows: list[Tensor], bits: int, dtype: torch.dtype) -> Tensor:
    own = Planes(*rows)
    if dtype in (torch.float32, torch.bfloat16) and native.serves_planes(own):
        return native.planes_decode(own, bits, dtype)
    return planes.decode(own, bits).to(dtype)


def _tiers_ffn(
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
) -> tuple[Tensor, Tensor]:
    own = [Planes(*parts[i : i + 4]) for i in (0, 4, 8)]
    tiers = list(zip(bits, counts))
    return native.TiersFFN(own, d_ff, rms, norms, (gate_bias, up_bias), activation, tiers)(first, x)


_FUNCTIONS = (
    _gather_dot,
    _gather_sum,
    _block_dot,
    _quantised_dot,
    _choose,
    _planes_dot,
    _planes_linear,
    _planes_add,
    _planes_decode,
    _tiers_ffn,
)
_ops = {
    function.__name__: torch.library.custom_op(f"popmm::{function.__name__[1:]}", function, mutates_args=())
    for function in _FUNCTIONS
}
_ops["_gather_dot"].register_fake(lambda rows, index, x: x.new_empty(index.shape))
_ops["_gather_sum"].register_fake(lambda rows, index, h: h.new_empty(len(index), rows.shape[1]))
_ops["_block_dot"].register_fake(lambda matrices, x, block: x.new_empty(len(x), matrices.shape[1]))
_ops["_quantised_dot"].register_fake(lambda codes, scale, x, bits, group, block, n_rows: x.new_empty(len(x), n_rows))
_ops["_planes_dot"].register_fake(lambda rows, bits, index, x: x.new_empty(index.shape, dtype=torch.float32))
_ops["_planes_linear"].register_fake(lambda rows, bits, x: x.new_empty(len(x), len(rows[0]), dtype=torch.float32))
_ops["_planes_add"].register_fake(
    lambda rows, bits, index, h: h.new_empty(len(h), 4 * rows[1].shape[1], dtype=torch.float32)
)
_ops["_planes_decode"].register_fake(
    lambda rows, bits, dtype: rows[0].new_empty(len(rows[1]), 4 * rows[1].shape[1], dtype=dtype)
)
_ops["_tiers_ffn"].register_fake(
    lambda parts, d_ff, rms, norms, gate_bias, up_bias, activation, bits, counts, first, x: (
        x.new_empty(x.shape, dtype=torch.float32),
        x.new_empty(len(x), sum(counts), dtype=torch.int64),
    )
)
_ops["_choose"].register_fake(lambda score, k: score.new_empty(len(score), k, dtype=torch.int64))


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd must see the arithmetic: the kernels would cut it."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def gather_dot(rows: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """``out[n, k] = rows[index[n, k]] . x[n]``.

    Args:
        rows: ``[n_rows, d]``, any stride between rows.
        index: int64 ``[n, k]``.
        x: ``[n, d]``.
    """
    if needs_gradient(rows, x):
        return twin.gather_dot(rows, index, x).to(x.dtype)
    return (_ops["_gather_dot"] if torch.compiler.is_compiling() else _gather_dot)(rows, index, x)


def gather_sum(rows: Tensor, index: Tensor, h: Tensor) -> Tensor:
    """``out[n] = sum over k of h[n, k] * rows[index[n, k]]``, ``[n, d]``.

    Args:
        rows, index: as in ``gather_dot``.
        h: ``[n, k]``.
    """
    if needs_gradient(rows, h):
        return twin.gather_sum(rows, index, h).to(h.dtype)
    return (_ops["_gather_sum"] if torch.compiler.is_compiling() else _gather_sum)(rows, index, h)


def block_dot(matrices: Tensor, x: Tensor, block: Tensor) -> Tensor:
    """``out[n] = matrices[block[n]] @ x[n]``, ``[n, n_rows]``, reading each matrix where it lies.

    Args:
        matrices: ``[n_matrices, n_rows, d]``, rows in one piece each.
        x: ``[n, d]``.
        block: int64 ``[n]``.
    """
    if needs_gradient(matrices, x):
        return twin.block_dot(matrices, x, block).to(x.dtype)
    return (_ops["_block_dot"] if torch.compiler.is_compiling() else _block_dot)(matrices, x, block)


def quantised_dot(codes: Tensor, scale: Tensor, x: Tensor, bits: int, group: int, block: Tensor, n_rows: int) -> Tensor:
    """``out[n] = rows[block[n] * n_rows : (block[n] + 1) * n_rows] @ x[n]``, ``[n, n_rows]``.

    Args:
        codes, scale, bits, group: rows of ``twin.quantise``, blocks of ``n_rows`` each.
        x: ``[n, d]``.
        block: int64 ``[n]``.
    """
    if needs_gradient(x):
        return twin.quantised_dot(codes, scale, x, bits, group, block, n_rows).to(x.dtype)
    op = _ops["_quantised_dot"] if torch.compiler.is_compiling() else _quantised_dot
    return op(codes, scale, x, bits, group, block, n_rows)


def choose(score: Tensor, k: int) -> Tensor:
    """Places of the k highest scores of each row ``[n, u]``, int64 ``[n, k]``; on the CPU rising, ties to the lower."""
    return (_ops["_choose"] if torch.compiler.is_compiling() else _choose)(score, k)


def planes_dot(rows: Planes, bits: int, index: Tensor, x: Tensor) -> Tensor:
    """``out[n, k] = rows[index[n, k]] . x[n]``, float32 ``[n, k]``, rows read in ``bits`` bits (4, 6 or 8; 3, 5 or 7).

    Args:
        rows: nested planes of ``[n_rows, d]``.
        index: int64 ``[n, k]``.
        x: float32 ``[n, d]``.
    """
    if needs_gradient(x):
        return planes.dot(rows, bits, index, x)
    return (_ops["_planes_dot"] if torch.compiler.is_compiling() else _planes_dot)([*rows], bits, index, x)


class PlanesLinear:
    """``x @ rows.T + bias`` of few x ``[..., d]``, rows read in ``bits`` bits for each of them, in the dtype of x."""

    def __init__(self, rows: Planes, bits: int, bias: Tensor | None = None) -> None:
        self._rows, self._bits = [*rows], bits
        self.n_rows, self.group = len(rows.fine), rows.group
        self._bias = None if bias is None else bias.detach().float()
        self._eager = native.PlanesLinear(rows, bits) if native.serves_planes(rows) else None
        self._handle = None if self._eager is None else self._eager.operator(self._bias)

    def __call__(self, x: Tensor) -> Tensor:
        if self._handle is not None:
            return operators.planes_linear(x.contiguous(), [self._handle])
        flat = x.reshape(-1, x.shape[-1]).float()
        if torch.compiler.is_compiling():
            y = _ops["_planes_linear"](self._rows, self._bits, flat)
        else:
            y = _planes_linear(self._rows, self._bits, flat) if self._eager is None else self._eager(flat)
        if self._bias is not None:
            y = y + self._bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def together(layers: Sequence[PlanesLinear], x: Tensor) -> list[Tensor] | None:
    """What several layers make of the same x, at one call; None where there is none for them."""
    handles = [layer._handle for layer in layers]
    if None in handles:
        return None
    y = operators.planes_linear(x.contiguous(), handles)
    return list(y.split([layer.n_rows for layer in layers], dim=-1))


def planes_add(rows: Planes, bits: int, index: Tensor, h: Tensor) -> Tensor:
    """``out[n] = sum over k of h[n, k] * rows[index[n, k]]``, float32 ``[n, d]``, rows read in ``bits`` bits."""
    if needs_gradient(h):
        return planes.add(rows, bits, index, h)
    return (_ops["_planes_add"] if torch.compiler.is_compiling() else _planes_add)([*rows], bits, index, h)


def planes_decode(rows: Planes, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """All rows as they are read in ``bits`` bits, ``[n_rows, d]``."""
    return (_ops["_planes_decode"] if torch.compiler.is_compiling() else _planes_decode)([*rows], bits, dtype)


class TiersFFN:
    """FFNs in tiers at one call, on the CPU with the C kernels (``serves_tiers``), of weights that stay where they are.

    Args:
        parts: nested planes of gate, up and down, rows ``[n_ffns * d_ff, d_model]``.
        rms, norms: of all rows, float32: what predicts a channel's weight beside its gate.
        biases: of gate and up, of all rows, or None.
        activation: one of ``native.ACTIVATIONS``.
        tiers: (bits, channels), the best first.
    """

    def __init__(
        self,
        parts: Sequence[Planes],
        d_ff: int,
        rms: Tensor,
        norms: Tensor,
        biases: tuple[Tensor | None, Tensor | None],
        activation: str,
        tiers: Sequence[tuple[int, int]],
    ) -> None:
        self._eager = native.TiersFFN(parts, d_ff, rms, norms, biases, activation, tiers)
        bits, counts = [b for b, _ in tiers], [n for _, n in tiers]
        self._arguments = [t for rows in parts for t in rows], d_ff, rms, norms, *biases, activation, bits, counts
        self._handle = self._eager.operator()

    @property
    def steps(self) -> bool:
        """Whether ``step`` can be called."""
        return self._handle is not None

    def step(self, x: Tensor, first: Tensor | None = None, wide: bool = False) -> Tensor:
        """What a call gives, without saying which channels were read.

        Args:
            first: as in a call; None = all tokens through the first FFN.
            wide: y in float32, else in the dtype of x.
        """
        return operators.tiers_ffn(x.contiguous(), first, wide, self._handle)

    def __call__(self, first: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens x, float32 ``[n, d_model]``, each through the FFN whose rows begin at ``first``, int64 ``[n]``.

        Returns:
            y, float32 ``[n, d_model]``, without down's bias; channels read, int64 ``[n, K]``.
        """
        if torch.compiler.is_compiling():
            return _ops["_tiers_ffn"](*self._arguments, first, x)
        return self._eager(first, x)


def serves_planes(rows: Planes) -> bool:
    """Whether products with planes have a kernel, whose twin writes the rows out."""
    return _planes_room(rows) is not None


def serves_tiers(rows: Planes) -> bool:
    """Whether ``TiersFFN`` serves FFNs of such planes."""
    return native.serves_planes(rows)
