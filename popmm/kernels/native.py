"""Calls of the C kernels; without a compiler the torch twins serve.

C takes for granted what is made sure of here: types, shapes, memory in one piece, indexes that name a row.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from popmm.kernels import operators
from popmm.kernels.build import library
from popmm.kernels.planes import MIDDLE, Planes, base_of, number_of, reading

_KINDS = {torch.float32: 0, torch.bfloat16: 1}
_CODES = {8: torch.int8, 4: torch.uint8}
_INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8)
OUT_OF_MEMORY = 2**63 - 1
PARTS = 16  # partial sums of gather_sum, whatever the number of threads


def serves(rows: Tensor) -> bool:
    """Whether the C kernels can read a matrix's rows where they lie."""
    plain = rows.is_cpu and rows.dtype in _KINDS and rows.layout is torch.strided and not rows.is_neg()
    return plain and rows.stride(-1) == 1 and library() is not None


def gather_dot(rows: Tensor, index: Tensor, x: Tensor) -> Tensor:
    matrix, index = _rows(rows, "rows", 2), _index(index, "index", 2)
    n, k = index.shape
    x = _floats(x, "x", (n, rows.shape[1]))
    out = torch.empty(n, k, dtype=torch.float32, device="cpu")
    sizes = rows.shape[0], rows.stride(0), rows.shape[1]
    _run("gather_dot", index, rows.shape[0], *matrix, *sizes, _p(index), n, k, _p(x), _p(out))
    return out


def gather_sum(rows: Tensor, index: Tensor, h: Tensor) -> Tensor:
    matrix, index = _rows(rows, "rows", 2), _index(index, "index", 2)
    n, k = index.shape
    h = _floats(h, "h", (n, k))
    parts = torch.empty(PARTS, n, rows.shape[1], dtype=torch.float32, device="cpu")
    sizes = rows.shape[0], rows.stride(0), rows.shape[1]
    _run("gather_sum", index, rows.shape[0], *matrix, *sizes, _p(index), n, k, _p(h), PARTS, _p(parts))
    return parts.sum(0)


def block_dot(matrices: Tensor, x: Tensor, block: Tensor) -> Tensor:
    stack, block = _rows(matrices, "matrices", 3), _index(block, "block", 1)
    n_matrices, n_rows, d = matrices.shape
    n = len(block)
    x = _floats(x, "x", (n, d))
    out = torch.empty(n, n_rows, dtype=torch.float32, device="cpu")
    sizes = n_matrices, matrices.stride(0), matrices.stride(1), n_rows, d
    _run("block_dot", block, n_matrices, *stack, *sizes, _p(block), n, _p(x), _p(out))
    return out


def quantised_dot(codes: Tensor, scale: Tensor, x: Tensor, bits: int, group: int, block: Tensor, n_rows: int) -> Tensor:
    block = _index(block, "block", 1)
    if codes.dtype is not _CODES.get(bits) or scale.dtype is not torch.float16 or codes.ndim != 2 or scale.ndim != 2:
        raise TypeError(
            f"codes are {_kind(codes)} and scales {_kind(scale)} for bits={bits}: give what quantise makes, "
            "int8 codes for 8 bits, uint8 ones for 4, float16 scales"
        )
    (total, width), (n_scales, groups), n = codes.shape, scale.shape, len(block)
    d = width * 8 // bits
    if group < 1 or group * bits % 8 or groups * group != d or n_scales != total or n_rows < 1 or total % n_rows:
        raise ValueError(
            f"codes of shape {tuple(codes.shape)} and scales of shape {tuple(scale.shape)} are not blocks of "
            f"n_rows={n_rows} rows in groups of {group} at bits={bits}"
        )
    codes, scale, x = _plain(codes, "codes"), _plain(scale, "scale"), _floats(x, "x", (n, d))
    out = torch.empty(n, n_rows, dtype=torch.float32, device="cpu")
    sizes = bits, total // n_rows, n_rows, d, group
    _run("quantised_dot", block, total // n_rows, _p(codes), _p(scale), *sizes, _p(x), _p(block), n, _p(out))
    return out


def serves_planes(rows: Planes) -> bool:
    """Whether the C kernels read these planes."""
    return rows.scale.is_cpu and library() is not None


def planes_dot(rows: Planes, bits: int, index: Tensor, x: Tensor) -> Tensor:
    planes, n_rows, d = _planes(rows, bits)
    index = _index(index, "index", 2)
    n, k = index.shape
    x = _floats(x, "x", (n, d))
    out = torch.empty(n, k, dtype=torch.float32, device="cpu")
    _run("planes_dot", index, n_rows, *planes, _p(index), n, k, _p(x), _p(out))
    return out


class PlanesLinear:
    """``x @ rows.T`` of rows that stay where they are: checked once, called many times."""

    def __init__(self, rows: Planes, bits: int) -> None:
        found, self.n_rows, self.d = _planes(rows, bits)
        self._held, self._before = rows, [*found, None]
        self.group, self.bits = rows.group, bits

    def operator(self, bias: Tensor | None) -> int | None:
        """The handle of a native operator that adds ``bias`` (float32 ``[n_rows]``) too; None if there are none."""
        if not operators.available():
            return None
        if bias is not None:
            bias = _floats(bias, "bias", (self.n_rows,))
        self._bias = bias  # whose address follows
        own = _addresses(self._held), self.n_rows, self.d, self.group, self.bits
        return operators.linear(self, [*own, None if bias is None else _p(bias)], self.n_rows)

    def __call__(self, x: Tensor) -> Tensor:
        x = _floats(x, "x", (len(x), self.d))
        out = torch.empty(len(x), self.n_rows, dtype=torch.float32, device="cpu")
        _run("planes_dot", x, self.n_rows, *self._before, len(x), self.n_rows, _p(x), _p(out))
        return out


def planes_add(rows: Planes, bits: int, index: Tensor, h: Tensor) -> Tensor:
    planes, n_rows, d = _planes(rows, bits)
    index = _index(index, "index", 2)
    n, k = index.shape
    h = _floats(h, "h", (n, k))
    out = torch.empty(n, d, dtype=torch.float32, device="cpu")
    _run("planes_add", index, n_rows, *planes, _p(index), n, k, _p(h), _p(out))
    return out


def planes_decode(rows: Planes, bits: int, dtype: torch.dtype) -> Tensor:
    planes, n_rows, d = _planes(rows, reading(rows, bits))
    out = torch.empty(n_rows, d, dtype=dtype, device="cpu")
    library().planes_decode(*planes, dtype is torch.bfloat16, _p(out), torch.get_num_threads())
    return out


ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu", "relu2")  # in the order of tiers.c


class TiersFFN:
    """``popmm.kernels.TiersFFN``: of weights that stay where they are: checked once, called many times."""

    def __init__(
        self,
        parts: Sequence[Planes | None],
        d_ff: int,
        rms: Tensor,
        norms: Tensor,
        biases: Sequence[Tensor | None],
        activation: str,
        tiers: Sequence[tuple[int, int]],
    ) -> None:
        there = [rows for rows in parts if rows is not None]
        found = [_planes(rows, rows.base_bits) for rows in there]
        _, n_rows, self.d = found[0]
        group = parts[0].group
        same = all(sizes[1:] == (n_rows, self.d) and rows.group == group for sizes, rows in zip(found, there))
        if not same or n_rows % d_ff:
            raise ValueError(f"planes of {[tuple(rows.base.shape) for rows in there]} are no FFNs of d_ff={d_ff}")
        bits, counts = ([tier[i] for tier in tiers] for i in (0, 1))
        known = 0 < len(tiers) <= len(parts[-1].precisions) and {*map(number_of, bits)} <= {*parts[-1].precisions}
        if not known or min(counts) < 0 or not 0 < sum(counts) <= d_ff:
            raise ValueError(
                f"tiers {tuple(tiers)} of {d_ff} channels: give (bits that the planes can be read in, channels)"
            )
        vectors = [_floats(t.flatten(), name, (n_rows,)) for t, name in ((rms, "rms"), (norms, "norms"))]
        vectors += [None if bias is None else _floats(bias.flatten(), "bias", (n_rows,)) for bias in biases]
        self._held = (parts, vectors)  # whose addresses follow
        self.read, self.last = sum(counts), n_rows - d_ff
        self._before = [None if rows is None else _addresses(rows) for rows in parts]
        self._before += [n_rows, self.d, group, d_ff, *(None if t is None else _p(t) for t in vectors)]
        self._before += [ACTIVATIONS.index(activation), len(tiers)]
        self._before += [(ctypes.c_int64 * len(tiers))(*own) for own in (bits, counts)]

    def operator(self) -> int | None:
        """The handle of a native operator; None if there are none."""
        return operators.ffn(self, self._before) if operators.available() else None

    def __call__(self, first: Tensor, x: Tensor, votes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        first = _index(first, "first", 1)
        n = len(first)
        x = _floats(x, "x", (n, self.d))
        votes = None if votes is None else _floats(votes, "votes", (n,))
        y = torch.empty(n, self.d, dtype=torch.float32, device="cpu")
        index = torch.empty(n, self.read, dtype=torch.int64, device="cpu")
        _run(
            "tiers_ffn",
            first,
            self.last + 1,
            *self._before,
            _p(first),
            None if votes is None else _p(votes),
            n,
            _p(x),
            _p(y),
            _p(index),
        )
        return y, index


def choose(score: Tensor, k: int) -> Tensor:
    if score.ndim != 2 or not 0 <= k <= score.shape[1]:
        raise ValueError(f"the k={k} highest of scores of shape {tuple(score.shape)}: give [n, u] scores, k at most u")
    score = _floats(score, "score", score.shape)
    n, u = score.shape
    index = torch.empty(n, k, dtype=torch.int64, device="cpu")
    if k:
        work = torch.empty(u, dtype=torch.int32, device="cpu")
        library().choose(_p(score), n, u, k, _p(work), _p(index))
    return index


def _run(name: str, index: Tensor, end: int, *arguments: int) -> None:
    outside = getattr(library(), name)(*arguments, torch.get_num_threads())
    if outside == OUT_OF_MEMORY:
        raise MemoryError(f"{name}: there is no memory for a vector of the model")
    if outside >= 0:
        raise ValueError(f"{name} was given the index {int(index.flatten()[outside])}: there are rows 0 to {end - 1}")


# what is handed to C, by address: each of these makes sure of what C takes for granted


def _rows(rows: Tensor, name: str, ndim: int) -> tuple[int, int]:
    """Address and kind of rows that are read where they lie."""
    if not serves(rows) or rows.ndim != ndim:
        raise TypeError(
            f"{name} are {_kind(rows)}: the C kernels read {ndim}-D float32 or bfloat16 on the CPU, rows in one piece "
            "each, where a compiler has built them"
        )
    return _p(rows), _KINDS[rows.dtype]


def _planes(rows: Planes, bits: int) -> tuple[tuple[int, ...], int, int]:
    """Addresses and sizes of nested planes, their number of rows and d."""
    n_rows, d, base = len(rows.fine), rows.d, base_of(bits)
    groups, quarters = rows.scale.shape[-1], [plane.shape[1] and d // 4 for plane in (rows.fine, rows.finest)]
    shapes = [(n_rows, base * d // 8), *((n_rows, quarter) for quarter in quarters), (n_rows, groups)]
    kinds = [torch.uint8] * 3 + [torch.float16]
    there = number_of(bits) <= rows.precisions[0] or rows.precisions == (4,)  # one plane is read whatever is asked
    right = [t.shape == s and t.dtype is k and t.is_contiguous() and t.is_cpu for t, s, k in zip(rows, shapes, kinds)]
    group = d // groups if groups else 0
    if not (all(right) and there and number_of(bits) in MIDDLE) or not group or group % 8 or group > 64 or d % group:
        raise TypeError(
            f"planes of {', '.join(map(_kind, rows))} at bits={bits}: give what planes.encode makes on the CPU, 4, 6 "
            "or 8 bits (3, 5 or 7 of those of 3)"
        )
    return (*map(_p, rows), n_rows, d, group, bits), n_rows, d


def _index(index: Tensor, name: str, ndim: int) -> Tensor:
    if index.dtype is not torch.int64:
        if index.dtype not in _INTEGERS:
            raise TypeError(f"{name} is {_kind(index)}: give int64")
        index = index.to(torch.int64)
    if index.ndim != ndim:
        raise ValueError(f"{name} is {_kind(index)}: give {ndim} dimensions")
    return _plain(index, name)


def _floats(values: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    """As float32 in one piece."""
    if values.dtype is not torch.float32:
        if not values.is_floating_point():
            raise TypeError(f"{name} is {_kind(values)}: give floating-point numbers")
        values = values.to(torch.float32)
    if values.shape != shape:
        raise ValueError(f"{name} is {_kind(values)}: give {tuple(shape)}")
    return _plain(values, name)


def _plain(t: Tensor, name: str) -> Tensor:
    """In one piece on the CPU, its memory as its values say."""
    if not t.is_cpu:
        raise ValueError(f"{name} is {_kind(t)}: give a tensor on the CPU")
    return t.resolve_neg().contiguous()


def _kind(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)} on {t.device}, strides {t.stride()}"


def _addresses(rows: Planes) -> ctypes.Array:
    return (ctypes.c_void_p * len(rows))(*map(_p, rows))


def _p(t: Tensor) -> int:
    address = t.data_ptr() if t.numel() else 0
    if not address and t.numel():
        raise ValueError(f"a tensor of shape {tuple(t.shape)} has no memory ({type(t).__name__})")
    return address
