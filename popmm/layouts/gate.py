"""Gate first: read the gate rows, predict which channels will weigh most, read up and down rows of those alone.

A channel's weight is predicted as ``|combine(g_i, rms_i)| * ||W_down[:, i]||``, where ``g_i`` is the token's own
gate value and ``rms_i`` the up projection's root mean square over the prompt: what the prompt pass
buys. With ``gate_bits`` 8 or 4 a quantised copy of the gate rows gives ``g_i``, for the prediction and as its value.

Of an FFN without a gate the first projection's rows are read so: ``|act(g_i)| * ||W_down[:, i]||`` is then what the
channel weighs, with 16 bits exactly, and only down rows are left to read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from popmm import kernels
from popmm.kernels.precision import without_autocast
from popmm.kernels.twin import check_finite, group_of, quantise
from popmm.layouts.base import ChannelsStay, fix_addresses
from popmm.layouts.turned import Turned
from popmm.method.budget import RegionSizes
from popmm.method.expert_linear import expert_linear
from popmm.method.ffn import Combine, FFNWeights, down_norm, gather, identities, up_values
from popmm.method.fingerprint import fingerprint
from popmm.method.partition import FFNPartition


@dataclass(frozen=True)
class Rows:
    """Rows ``[n, d_model]`` of a stack of matrices: channel i of expert e is row ``e * step + i``."""

    rows: Tensor
    step: int

    def of(self, channels: Tensor, experts: Tensor | None) -> Tensor:
        return channels if experts is None else channels + (experts * self.step).unsqueeze(-1)


def as_rows(w: Tensor) -> tuple[Rows, bool]:
    """A matrix or stack ``[(E,) n, d_model]`` as rows, in place if its rows lie in one piece; and whether they did."""
    if w.ndim == 2:
        w = w.unsqueeze(0)
    in_place = w.stride(-1) == 1 and w.stride(0) % w.stride(1) == 0
    w = w.detach() if in_place else w.detach().contiguous()
    step = w.stride(0) // w.stride(1)
    n = (w.shape[0] - 1) * step + w.shape[1]
    return Rows(w.as_strided((n, w.shape[2]), (w.stride(1), 1), w.storage_offset()), step), in_place


class GateLayout(ChannelsStay):
    """Gate rows of the U channels in R and C together, up rows where they are, down by channel.

    ``copy`` holds down's columns a second time as rows; ``permute`` stores the model's own down projection by
    channel in memory, its logical shape unchanged, until ``release``.
    """

    reorders = False  # down's memory is turned once, at attach
    by_operators = False

    def __init__(self, sizes: RegionSizes, fill_mean: bool, bits: int, in_place: bool, site: str) -> None:
        self.site = site
        self.name = "permute" if in_place else "copy"
        self.sizes, self.fill_mean, self.bits = sizes, fill_mean, bits
        self.in_place = in_place
        self.norms: Tensor | None = None  # float32 [(E,) d_ff]
        self.gate: Tensor | tuple | None = None  # [(E,) U, d_model], or (codes, scales)
        self._buffers: list[Tensor] = []
        self._turned: list[Turned] = []
        self.marks: list[Tensor] = []  # fingerprint of the weights
        self._source: tuple | None = None

    @property
    def all_channels(self) -> bool:
        return self.sizes.read == self.sizes.d_ff

    def allocate(self, source: FFNWeights) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.norms, self.marks = down_norm(source.down), fingerprint(source)
            if self.sizes.is_dense:
                self._source = identities(source)
                return
            d_model, u = source.d_model, self.sizes.read
            stack = source.gate.shape[:-2]
            self._buffers = []
            self.dtype, self.up = source.down.dtype, None
            if source.up is not None:
                self.up, own_up = as_rows(source.up)
                if not own_up:
                    self._buffers.append(self.up.rows)
            if self.in_place and source.down.is_contiguous() and isinstance(source.down, nn.Parameter):
                self._turn(source.down)
            self.down, own_down = as_rows(source.down.mT)
            if not own_down:
                self._buffers.append(self.down.rows)
            if self.bits < 16:
                flat = source.gate.detach().reshape(-1, d_model)
                check_finite(flat, f"{self.site} holds gate", "gate_bits=16")
                self.gate = quantise(flat, self.bits, group_of(d_model))
                self._buffers += self.gate
            elif self.all_channels:
                self.gate = source.gate.detach()
            else:
                self.gate = self._new(source.gate.new_empty(*stack, u, d_model))
            self.order = self._new(torch.zeros(*stack, u, dtype=torch.int64, device=source.gate.device))
            self.rms = self._new(self.norms.new_ones(*stack, u))
            self.norm = self._new(self.norms.new_zeros(*stack, u))
            self.gate_bias = None if source.gate_bias is None else self._new(source.gate_bias.new_zeros(*stack, u))
            self.up_bias = None if source.up_bias is None else self._new(source.up_bias.new_zeros(*stack, u))
            self.down_bias, self.mean = source.down_bias, None
            if self.fill_mean:
                self.mean = self._new(source.gate.new_zeros(*stack, u))
                self.down_bias = self._new(source.gate.new_zeros(*stack, d_model))
            fix_addresses(self)
            self._source = identities(source)

    def gathers(self, n_tokens: int) -> bool:
        """Whether reading each token's own rows is less than reading all of U."""
        return n_tokens * self.sizes.budget <= self.sizes.read

    @property
    def reading_order(self) -> Tensor:
        return self.order

    def write(self, source: FFNWeights, partition: FFNPartition, mean: Tensor, rms: Tensor | None) -> None:
        """Sets what decode needs of a prompt.

        Args:
            source: the model's weights.
            partition: its retained and candidate channels are the U whose gate rows are read.
            mean: prompt mean of every channel, float32 ``[(E,) d_ff]``.
            rms: root mean square of the up projection over the prompt, float32 ``[(E,) d_ff]``; None without a gate.
        """
        with torch.inference_mode(False), torch.no_grad():
            # rising, so that rows are read forward
            order = partition.reading_order.to(self.order.device).sort(dim=-1)[0]
            self.order.copy_(order)
            if rms is not None:
                self.rms.copy_(rms.to(order.device).gather(-1, order))
            self.norm.copy_(self.norms.gather(-1, order))
            if self.bits == 16 and not self.all_channels:
                gather(source.gate, order, -2, self.gate)
            for own, theirs in ((self.gate_bias, source.gate_bias), (self.up_bias, source.up_bias)):
                if own is not None:
                    own.copy_(theirs.detach().gather(-1, order))
            if self.fill_mean:
                mean = mean.to(order.device).to(source.down.dtype)
                self.mean.copy_(mean.gather(-1, order))
                constant = (source.down.detach() @ mean.unsqueeze(-1)).squeeze(-1)
                self.down_bias.copy_(constant if source.down_bias is None else constant + source.down_bias)

    def gates(self, x: Tensor, experts: Tensor | None) -> Tensor:
        """Gate values of rows x ``[n, d_model]``, ``[n, U]``."""
        bias = self.gate_bias if self.gate_bias is None or experts is None else self.gate_bias[experts]
        if self.bits < 16:
            block = torch.zeros(len(x), dtype=torch.int64, device=x.device) if experts is None else experts
            d_ff, group = self.sizes.d_ff, group_of(x.shape[1])
            g = kernels.quantised_dot(*self.gate, x, self.bits, group, block, d_ff)
        elif experts is None:
            g = kernels.linear(x, self.gate)
        else:
            g = expert_linear(x, self.gate, experts)
        return g if bias is None else g + bias

    def score(self, g: Tensor, combine: Combine, experts: Tensor | None) -> Tensor:
        """Predicted weight of each of the U channels, float32 ``[n, U]``."""
        rms, norm = (self.rms, self.norm) if experts is None else (self.rms[experts], self.norm[experts])
        return combine(g.float(), rms.expand(g.shape)).abs() * norm

    def decode(self, x: Tensor, combine: Combine, experts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """FFN of rows x ``[n, d_model]`` by the best K of each row's own channels, read where they lie.

        Returns:
            y ``[n, d_model]`` in the weights' dtype, under autocast too, of experts before they are mixed; places
            among the U that passed.
        """
        with without_autocast(x.device):
            return self._decode(x.to(self.dtype), combine, experts)

    def _decode(self, x: Tensor, combine: Combine, experts: Tensor | None) -> tuple[Tensor, Tensor]:
        g = self.gates(x, experts)
        index = kernels.choose(self.score(g, combine, experts), self.sizes.budget)
        order = self.order if experts is None else self.order[experts]
        channels = order[index] if experts is None else order.gather(1, index)
        u = None if self.up is None else kernels.gather_dot(self.up.rows, self.up.of(channels, experts), x)
        if self.up_bias is not None:
            u = u + _pick(self.up_bias, index, experts)
        h = combine(g.gather(1, index), u)
        if self.mean is not None:
            h = h - _pick(self.mean, index, experts)
        y = kernels.gather_sum(self.down.rows, self.down.of(channels, experts), h)
        if self.down_bias is not None:
            y = y + (self.down_bias if experts is None else self.down_bias[experts])
        return y, index

    def step(self, x: Tensor, combine: Combine, experts: Tensor | None = None) -> None:
        """Nothing: there is no operator of the whole FFN."""

    def decode_all(
        self, x: Tensor, combine: Combine, source: FFNWeights, choose: Callable | None, experts: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The same with every up row computed: for many rows at once.

        Args:
            choose: what passes of each row, from scores and K (``ffn.best``: one pass over a text is then as if
                token by token); None = all U.

        Returns:
            y as in ``decode``; which of the U channels passed, bool ``[n, U]``, None = all.
        """
        with without_autocast(x.device):
            return self._decode_all(x.to(self.dtype), combine, source, choose, experts)

    def _decode_all(
        self, x: Tensor, combine: Combine, source: FFNWeights, choose: Callable | None, experts: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        g = self.gates(x, experts)
        order = self.order.expand(len(x), -1) if experts is None else self.order[experts]
        if experts is None or source.up is None:
            u = up_values(x, source)
        else:
            u = expert_linear(x, source.up, experts, source.up_bias)
        h = combine(g, None if u is None else u.gather(1, order))
        passing = None if choose is None else choose(self.score(g, combine, experts), self.sizes.budget)
        if self.mean is not None:
            h = h - (self.mean if experts is None else self.mean[experts])
        if passing is not None:
            h = h.masked_fill(~passing, 0.0)
        full = x.new_zeros(len(x), self.sizes.d_ff).scatter(1, order, h.to(x.dtype))
        if experts is None:
            return F.linear(full, source.down, self.down_bias), passing
        return expert_linear(full, source.down, experts, self.down_bias), passing

    def release(self) -> None:
        """Drops the buffers and stores down as it was. May be called again after whatever it raised."""
        with torch.inference_mode(False), torch.no_grad():
            for turned in reversed(self._turned):
                turned.back()
        self._turned, self._buffers = [], []
        self.gate = self.up = self.down = self._source = None

    def bytes(self) -> int:
        tensors = [*self._buffers, *([self.norms] if self.norms is not None else []), *self.marks]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _new(self, t: Tensor) -> Tensor:
        self._buffers.append(t)
        return t

    def _turn(self, down: Tensor) -> None:
        """Stores a down projection by channel; its shape, its values and its memory stay."""
        turned = Turned(down)
        self._turned.append(turned)
        turned.forth()


def gate_row_bytes(source: FFNWeights, bits: int) -> float:
    """Bytes of one gate row as ``selection="gate"`` reads it: codes, and 16 bits of scale per group."""
    d_model = source.d_model
    if bits == 16:
        return d_model * source.gate.element_size()
    return d_model * bits / 8 + d_model / group_of(d_model) * 2


def _pick(values: Tensor, index: Tensor, experts: Tensor | None) -> Tensor:
    return values[index] if experts is None else values[experts].gather(1, index)
