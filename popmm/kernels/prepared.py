"""Weights that stay where they are, checked once and multiplied many times: linear layers and whole FFNs in planes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from popmm.kernels import dispatch, native, operators
from popmm.kernels.planes import Planes

_ATTACHED = "this model is attached: call popmm.detach(model) before copying or pickling it"


class _Stays:
    """Holds addresses: a copy would read the weights of the original."""

    def __deepcopy__(self, memo: dict):
        raise RuntimeError(_ATTACHED)

    def __reduce__(self):
        raise RuntimeError(_ATTACHED)


class PlanesLinear(_Stays):
    """``x @ rows.T + bias`` of few x ``[..., d]``, rows read in ``bits`` bits for each of them, in the dtype of x."""

    def __init__(self, rows: Planes, bits: int, bias: Tensor | None = None) -> None:
        self._rows, self._bits = [*rows], bits
        self.n_rows, self.group = len(rows.fine), rows.group
        self._bias = None if bias is None else bias.detach().float()
        self._eager = native.PlanesLinear(rows, bits) if native.serves_planes(rows) else None
        self._handle = None if self._eager is None else self._eager.operator(self._bias)

    def __call__(self, x: Tensor) -> Tensor:
        if self._handle is not None and x.dtype in operators.DTYPES:
            return operators.planes_linear(x.contiguous(), [self._handle])
        flat = x.reshape(-1, x.shape[-1]).float()
        if torch.compiler.is_compiling():
            y = dispatch.ops["planes_linear"](self._rows, self._bits, flat)
        else:
            y = dispatch.planes_linear(self._rows, self._bits, flat) if self._eager is None else self._eager(flat)
        if self._bias is not None:
            y = y + self._bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def together(layers: Sequence[PlanesLinear], x: Tensor) -> list[Tensor] | None:
    """What several layers make of the same x, at one call; None where there is none for them."""
    handles = [layer._handle for layer in layers]
    if None in handles or x.dtype not in operators.DTYPES:
        return None
    y = operators.planes_linear(x.contiguous(), handles)
    return list(y.split([layer.n_rows for layer in layers], dim=-1))


class TiersFFN(_Stays):
    """FFNs in tiers at one call, on the CPU with the C kernels (``serves_tiers``), of weights that stay where they are.

    Args:
        parts: nested planes of gate, up and down, rows ``[n_ffns * d_ff, d_model]``; no up without a gate.
        rms, norms: of all rows, float32: what predicts a channel's weight beside its gate.
        biases: of gate and up, of all rows, or None.
        activation: one of ``native.ACTIVATIONS``.
        tiers: (bits, channels), the best first.
    """

    def __init__(
        self,
        parts: Sequence[Planes | None],
        d_ff: int,
        rms: Tensor,
        norms: Tensor,
        biases: tuple[Tensor | None, Tensor | None],
        activation: str,
        tiers: Sequence[tuple[int, int]],
    ) -> None:
        self._eager = native.TiersFFN(parts, d_ff, rms, norms, biases, activation, tiers)
        bits, counts = [b for b, _ in tiers], [n for _, n in tiers]
        self._arguments = (
            [t for rows in parts if rows is not None for t in rows],
            d_ff,
            rms,
            norms,
            *biases,
            activation,
            bits,
            counts,
        )
        self._handle = self._eager.operator()

    @property
    def steps(self) -> bool:
        """Whether ``step`` can be called."""
        return self._handle is not None

    def step(self, x: Tensor, first: Tensor | None = None, wide: bool = False, votes: Tensor | None = None) -> Tensor:
        """What a call gives, without saying which channels were read.

        Args:
            first: as in a call; None = all tokens through the first FFN.
            wide: y in float32, else in the dtype of x.
            votes: as in a call.
        """
        return operators.tiers_ffn(x.contiguous(), first, votes, wide, self._handle)

    def __call__(self, first: Tensor, x: Tensor, votes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens x, float32 ``[n, d_model]``, each through the FFN whose rows begin at ``first``, int64 ``[n]``.

        Args:
            votes: float32 ``[n]``: all tokens go through one FFN and choose together, each counting for so much;
                None = each chooses for itself.

        Returns:
            y, float32 ``[n, d_model]``, without down's bias; channels read, int64 ``[n, K]``.
        """
        if torch.compiler.is_compiling():
            return dispatch.ops["tiers_ffn"](*self._arguments, first, x, votes)
        return self._eager(first, x, votes)
