"""Tiers: gate, up and down by channel in nested planes, of which a token reads the more, the more a channel weighs.

A channel's weight is predicted as with ``gate``, ``|combine(g_i, rms_i)| * ||W_down[:, i]||``, from the first plane of
all gate rows. ``popmm.method.tiers`` says how many channels are then read in how many bits. Without a gate there are no
up rows, and the first projection stands for the gate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from popmm import kernels
from popmm.kernels import planes
from popmm.kernels.grid import encode_grid
from popmm.kernels.planes import Planes
from popmm.kernels.precision import without_autocast
from popmm.kernels.twin import check_finite
from popmm.layouts.base import ChannelsStay, fix_addresses
from popmm.method.activations import recognised
from popmm.method.expert_linear import expert_linear
from popmm.method.ffn import Combine, FFNWeights, down_norm, identities
from popmm.method.fingerprint import fingerprint
from popmm.method.one_plane import OnePlaneSizes
from popmm.method.partition import FFNPartition
from popmm.method.tiers import TierSizes, assign, together

SMALL_BATCH = 16  # tokens, up to which kernels read each token's own rows


class TiersLayout(ChannelsStay):
    """A copy of an FFN, or of a stack of experts, in nested planes: 8.25 bits a weight beside the model's own."""

    name = "planes"
    reorders = False

    def __init__(self, sizes: TierSizes, several: dict[int, TierSizes], combine: Combine, site: str) -> None:
        """Args:
        sizes: of a token that chooses for itself.
        several: of tokens that choose together, by how many they are at the least.
        """
        self.site, self.sizes, self.several = site, sizes, several
        self.norms: Tensor | None = None  # float32 [(E,) d_ff]
        self.marks: list[Tensor] = []
        self.gate = self.up = self.down = None  # Planes of rows [(E *) d_ff, d_model]
        self.combine = combine
        self.whole: kernels.TiersFFN | None = None  # the FFN at one call, where its activation has a kernel
        self._wholes: dict[tuple, kernels.TiersFFN] = {}  # the same by tiers
        self._source: tuple | None = None
        self.replaced = False  # the model's own weights were freed
        whole = {tier for own in (sizes, *several.values()) for tier in own.tiers}
        one = len(whole) == 1 and whole.pop()[1] == sizes.d_ff
        self.plain = one and not isinstance(sizes, OnePlaneSizes)  # all channels are read in one precision alone
        self._reading: Callable[[int], int] = planes.plainly if self.plain else int
        self.most = 0  # how all that the planes hold is read

    def dequantised(self, source: FFNWeights) -> FFNWeights:
        """All that the planes hold of the weights, in the shapes and the dtype of ``source``."""
        most, dtype, shape = self.most, source.down.dtype, source.gate.shape
        gate, up, down = (
            None if part is None else kernels.planes_decode(part, most, dtype).view(shape)
            for part in (self.gate, self.up, self.down)
        )
        return source._replace(gate=gate, up=up, down=down.mT)

    def allocate(self, source: FFNWeights) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.norms, self.marks = down_norm(source.down), fingerprint(source)
            if not self.sizes.is_dense:
                for part, rows in (("gate", source.gate), ("up", source.up), ("down", source.down.mT)):
                    setattr(self, part, None if rows is None else self._encoded(part, rows))
                self.most = self._reading(self.down.precisions[0])
                self.has_kernels = kernels.serves_planes(self.gate)
                self.rms = torch.ones_like(self.norms)
                self.gate_bias, self.up_bias, self.down_bias = source.gate_bias, source.up_bias, source.down_bias
                self.order = torch.arange(source.d_ff, dtype=torch.int64, device=self.norms.device).expand(
                    self.norms.shape
                )
                fix_addresses(self)
                self._wholes = self._at_one_call()
                self.whole = self._wholes.get(self.sizes.tiers)
            self._source = identities(source)

    def _at_one_call(self) -> dict[tuple, kernels.TiersFFN]:
        """By tiers; empty where the activation has no kernel."""
        if not kernels.serves_tiers(self.gate):
            return {}
        name = recognised(self.combine, self.norms.device, self.up is not None)
        if name is None:
            return {}
        parts, biases = (self.gate, self.up, self.down), (self.gate_bias, self.up_bias)
        held = parts, self.sizes.d_ff, self.rms, self.norms, biases, name
        every = {sizes.tiers for sizes in (self.sizes, *self.several.values())}
        return {tiers: kernels.TiersFFN(*held, [(self._reading(bits), n) for bits, n in tiers]) for tiers in every}

    def sizes_of(self, tokens: int) -> TierSizes:
        """Sizes for so many tokens that choose together."""
        found = self.sizes
        for least, sizes in self.several.items():
            found = sizes if tokens >= least else found
        return found

    def _whole_of(self, votes: Tensor | None) -> kernels.TiersFFN:
        return self.whole if votes is None else self._wholes[self.sizes_of(len(votes)).tiers]

    def _encoded(self, part: str, rows: Tensor) -> Planes:
        """Of experts one after the other, for their float32 copies are large."""
        stack = rows.detach() if rows.ndim == 3 else rows.detach().unsqueeze(0)
        check_finite(stack, f"{self.site} holds {part}", "selection='gate' with gate_bits=16")
        if part != "down" and isinstance(self.sizes, OnePlaneSizes):
            encoded = map(encode_grid, stack)
        elif self.plain:
            encoded = (planes.encode_plain(own, self.sizes.tiers[0][0]) for own in stack)
        else:
            encoded = (planes.encode(own, self.sizes.base) for own in stack)
        return Planes(*map(torch.cat, zip(*encoded)))

    def write(self, source: FFNWeights, partition: FFNPartition, mean: Tensor, rms: Tensor | None) -> None:
        """Sets what the prediction needs of a prompt: the up projection's root mean square, float32 ``[(E,) d_ff]``.

        None without a gate, where nothing is needed.
        """
        if rms is not None:
            self.rms.copy_(rms)

    def gathers(self, n_tokens: int) -> bool:
        """Whether ``decode`` is to be preferred to ``decode_all``, which writes all weights out for any number."""
        return n_tokens * self.sizes.budget <= self.sizes.read * (SMALL_BATCH if self.has_kernels else 1)

    @property
    def reading_order(self) -> Tensor:
        return self.order

    def decode(
        self, x: Tensor, combine: Combine, experts: Tensor | None = None, votes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """FFN of rows x ``[n, d_model]``, each by its own choice of channels.

        Args:
            votes: float32 ``[n]``: all rows choose together and read the same channels, each row by so much.

        Returns:
            y ``[n, d_model]`` in float32, of experts before they are mixed; channels read, int64 ``[n, K]``.
        """
        with without_autocast(x.device):
            x, first = x.float(), self._first(x, experts)
            if self.whole is not None and not kernels.needs_gradient(x):
                y, index = self._whole_of(votes)(first.squeeze(1), x, votes)
                return _with(y, self.down_bias, experts), index
            y, places = x.new_zeros(x.shape), []
            for read, index, g, u in self.chosen(x, combine, experts, votes):
                y = y + kernels.planes_add(self.down, read, first + index, combine(g, u))
                places.append(index)
            return _with(y, self.down_bias, experts), torch.cat(places, dim=1)

    def chosen(
        self, x: Tensor, combine: Combine, experts: Tensor | None = None, votes: Tensor | None = None
    ) -> list[tuple[int, Tensor, Tensor, Tensor | None]]:
        """What rows x, float32 ``[n, d_model]``, read of gate and up, the first half of ``decode``.

        Returns:
            For each tier how its rows are read, its channels, int64 ``[n, k]``, and their gate and up projections,
            float32 ``[n, k]``; None of an FFN that has no gate.
        """
        with without_autocast(x.device):
            first, found = self._first(x, experts), []
            g = kernels.planes_dot(self.gate, self.sizes.base, first + self.order.view(-1, self.sizes.d_ff)[:1], x)
            g = _with(g, self.gate_bias, experts)
            score, sizes = self._score(g, combine, experts), self.sizes
            if votes is not None:
                score, sizes = together(score, votes).expand(len(x), -1), self.sizes_of(len(x))
            for (bits, _), index in zip(sizes.tiers, assign(score, sizes.tiers)):
                rows, own, u, read = first + index, g.gather(1, index), None, self._reading(bits)
                if min(bits, self.gate.precisions[0]) > self.sizes.base:
                    own = _with(kernels.planes_dot(self.gate, read, rows, x), self.gate_bias, experts, index)
                if self.up is not None:
                    u = _with(kernels.planes_dot(self.up, read, rows, x), self.up_bias, experts, index)
                found.append((read, index, own, u))
            return found

    @property
    def by_operators(self) -> bool:
        return self.whole is not None and self.whole.steps

    def step(
        self, x: Tensor, combine: Combine, experts: Tensor | None = None, votes: Tensor | None = None
    ) -> Tensor | None:
        """``decode`` by one native operator, in the dtype of x (of experts float32); None where there is none."""
        if not self.by_operators or x.dtype not in kernels.operators.DTYPES or kernels.needs_gradient(x):
            return None
        first = None if experts is None else experts * self.sizes.d_ff
        return _with(self._whole_of(votes).step(x, first, experts is not None, votes), self.down_bias, experts)

    def decode_all(
        self,
        x: Tensor,
        combine: Combine,
        source: FFNWeights,
        choose: Callable | None,
        experts: Tensor | None = None,
        votes: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The same for many rows at once, each plane read once: channels a token does not read are masked.

        Args:
            votes: float32 ``[batch, steps]`` of as many rows: those of a step choose together.

        Returns:
            y as in ``decode``; channels that were read, bool ``[n, d_ff]``.
        """
        with without_autocast(x.device):
            x = x.float()
            g = _with(self._product(self.gate, self.sizes.base, x, experts), self.gate_bias, experts)
            score, sizes = self._score(g, combine, experts), self.sizes
            if votes is not None:
                sizes = self.sizes_of(len(votes))
                of_steps = score.view(*votes.shape, -1).transpose(0, 1)
                chosen = together(of_steps, votes.mT).expand(of_steps.shape)
                score = chosen.transpose(0, 1).reshape(score.shape)
            places = assign(score, sizes.tiers)
            read, y = torch.zeros_like(g, dtype=torch.bool), x.new_zeros(x.shape)
            for (bits, _), index in zip(sizes.tiers, places):
                own = g
                if min(bits, self.gate.precisions[0]) > self.sizes.base:
                    own = _with(self._product(self.gate, bits, x, experts), self.gate_bias, experts)
                u = None
                if self.up is not None:
                    u = _with(self._product(self.up, bits, x, experts), self.up_bias, experts)
                mine = torch.zeros_like(read).scatter_(1, index, True)
                h = combine(own, u).masked_fill(~mine, 0.0)
                y = y + self._product(self.down, bits, h, experts, transposed=True)
                read |= mine
            return _with(y, self.down_bias, experts), read

    def _product(self, part: Planes, bits: int, x: Tensor, experts: Tensor | None, transposed=False) -> Tensor:
        rows = kernels.planes_decode(part, self._reading(bits))
        if experts is None:
            return F.linear(x, rows.mT if transposed else rows)
        stack = rows.view(-1, self.sizes.d_ff, rows.shape[1])
        return expert_linear(x, stack.mT if transposed else stack, experts)

    def _first(self, x: Tensor, experts: Tensor | None) -> Tensor:
        """Row of each x's first channel, int64 ``[n, 1]``."""
        if experts is None:
            return torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
        return (experts * self.sizes.d_ff).unsqueeze(-1)

    def _score(self, g: Tensor, combine: Combine, experts: Tensor | None) -> Tensor:
        rms, norms = (self.rms, self.norms) if experts is None else (self.rms[experts], self.norms[experts])
        return combine(g, rms.expand(g.shape)).abs() * norms

    def release(self) -> None:
        """Drops the planes. May be called again."""
        self.gate = self.up = self.down = self.whole = self._source = None
        self._wholes = {}

    def bytes(self) -> int:
        held = [*([self.norms] if self.norms is not None else []), *self.marks]
        parts = [part for part in (self.gate, self.up, self.down) if part is not None]
        return sum(part.bytes() for part in parts) + sum(t.numel() * t.element_size() for t in held)


def _with(values: Tensor, bias: Tensor | None, experts: Tensor | None, index: Tensor | None = None) -> Tensor:
    """Values ``[n, m]`` with the bias of their channels, of all or those at ``index``."""
    if bias is None:
        return values
    own = bias.detach() if experts is None else bias.detach()[experts]
    own = own.expand(len(values), -1)
    return values + (own if index is None else own.gather(1, index))
