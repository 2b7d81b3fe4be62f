"""Weights reordered in place to [R | C | P], so that decode reads plain slices of the model's own weights.

The same permutation of gate rows, up rows and down columns leaves an FFN's function unchanged. A new
partition moves only channels that change region. Whatever is raised in between, the weights end up in
one order or another, never half way, and ``release`` gives back the exact bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from popmm.act import uninterrupted
from popmm.layouts.base import fix_addresses
from popmm.method.budget import RegionSizes
from popmm.method.ffn import FFNWeights, down_norm
from popmm.method.fingerprint import fingerprint, order_of, same
from popmm.method.partition import FFNPartition


def region_moves(now: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fewest moves that bring every channel into its region.

    Args:
        now: region (0, 1, 2) of each position, int ``[E, d_ff]``.
        wanted: region that the channel at each position belongs to; each row has as many of each as ``now``.

    Returns:
        (expert, from, to), int64 ``[n]``: what lies at one position goes to another. Positions that are
        left are also positions that are filled: swaps, and rounds of three where swaps do not suffice.
    """
    leaving = {(a, b): (now == a) & (wanted == b) for a in range(3) for b in range(3) if a != b}
    moves = []

    def take(*steps: tuple[int, int]) -> None:
        """Moves along a closed round of regions, as often as every step has a channel left."""
        masks = [leaving[step] for step in steps]
        often = torch.stack([mask.sum(-1) for mask in masks]).amin(0)
        taken = [mask & (mask.cumsum(-1) <= often[:, None]) for mask in masks]
        places = [mask.nonzero() for mask in taken]  # by expert, as many of each step
        for here, there in zip(places, places[1:] + places[:1]):
            # the channel at ``here`` wants the region that the next step leaves
            moves.append(torch.cat([here, there[:, 1:]], dim=1))
        for step, mask in zip(steps, taken):
            leaving[step] = leaving[step] & ~mask

    for a, b in ((0, 1), (0, 2), (1, 2)):
        take((a, b), (b, a))
    for a, b, c in ((0, 1, 2), (0, 2, 1)):
        take((a, b), (b, c), (c, a))
    return tuple(torch.cat(moves).unbind(1))


class PermuteLayout:
    """Retained and candidate channels first, in the model's own weights."""

    name = "permute"
    by_operators = False
    reorders = True  # writes the model's own weights at each prompt

    def __init__(self, sizes: RegionSizes, fill_mean: bool, module: nn.Module, views: Callable[[], FFNWeights]) -> None:
        self.sizes = sizes
        self.fill_mean = fill_mean
        self.weights: FFNWeights | None = None  # slices of the model's weights, and a down bias of ours with fill
        self.down_norm: Tensor | None = None  # float32 [(E,) |R| + |C|]
        self.mean: Tensor | None = None  # [(E,) |R| + |C|], with fill="mean"
        self.norms: Tensor | None = None  # float32 [(E,) d_ff], of all channels as they lie
        self.order: Tensor | None = None  # int64 [(E,) d_ff], on the CPU: the channel at each position
        self._module, self._views = module, views
        self.marks: list[Tensor] = []  # fingerprint of the weights as they lie
        self._sizes: list[Tensor] = []  # norms of the same rows, columns and biases, which survive a change of sign
        self._held: list[Tensor] = []  # the tensors that we have reordered
        self._contents: list | None = None
        self._place: tuple | None = None

    def allocate(self, source: FFNWeights) -> None:
        """Reads the norms of the weights; weights that were replaced are in the model's own order."""
        with torch.inference_mode(False), torch.no_grad():
            self._settle(source)
            if self.order is None:
                here = torch.arange(source.d_ff, dtype=torch.int64, device="cpu")
                self.order = here.expand(source.gate.shape[:-1]).clone()
            self.norms = down_norm(source.down)
            self.marks, self._sizes = fingerprint(source), _sizes(source)
            if not self.sizes.is_dense:
                self._slice(source)
                fix_addresses(self)
            self._remember(source)

    def fits(self, source: FFNWeights) -> bool:
        """Whether norms and order still belong to these weights: the model may have moved or been reloaded."""
        return self._are_ours(source) and self._place == _place(source)

    @property
    def reading_order(self) -> Tensor:
        """Channels in the order in which decode reads them, int64 ``[(E,) |R| + |C|]``."""
        return self.order[..., : self.sizes.read]

    @property
    def padded(self) -> FFNWeights | None:
        """What decode computes h from: here the slices themselves."""
        return self.weights

    def by_channel(self, values: Tensor) -> Tensor:
        """Values ``[(E,) d_ff]`` of h as it lies, in the model's own channel numbers."""
        return torch.empty_like(values).scatter_(-1, self.order.to(values.device), values)

    def positions(self, channels: Tensor) -> Tensor:
        """Where channels ``[(E,) n]`` lie."""
        return self.order.argsort(dim=-1).to(channels.device).gather(-1, channels)

    def write(self, source: FFNWeights, partition: FFNPartition, mean: Tensor | None) -> None:
        """Moves the channels that change region.

        Args:
            source: the model's weights.
            partition: what must lie where.
            mean: prompt mean of every channel, float32 ``[(E,) d_ff]``; needed with ``fill="mean"``.
        """
        sizes = self.sizes
        with torch.inference_mode(False), torch.no_grad():
            wanted = torch.full_like(self.order, 2)
            wanted.scatter_(-1, partition.candidate.to("cpu").clone(), 1)
            wanted.scatter_(-1, partition.retained.to("cpu").clone(), 0)
            now = torch.full_like(self.order, 2)
            now[..., : sizes.read] = 1
            now[..., : sizes.retained] = 0
            wanted = wanted.gather(-1, self.order)
            self._move(source, *region_moves(_stacked(now), _stacked(wanted)))
            self.down_norm.copy_(self.norms[..., : sizes.read])
            if self.fill_mean:
                self._set_mean(source, mean.clone())

    def rewind(self) -> None:
        """Puts every channel back where it was, unless the weights have been replaced."""
        with torch.inference_mode(False), torch.no_grad():
            if self._contents is not None:
                source = self._views()
                self._settle(source)
                if self.order is not None:
                    self._move(source, *self._way_home())

    def release(self) -> None:
        """Puts every channel back where it was, and lets go of the weights."""
        self.rewind()
        self.weights = self.down_norm = self.mean = self.order = self._contents = None
        self._held = []

    def bytes(self) -> int:
        """Memory held beside the model's own weights."""
        own = [self.norms, self.down_norm, self.mean, self.order, *self.marks, *self._sizes]
        if self.fill_mean and self.weights is not None:
            own.append(self.weights.down_bias)
        return sum(t.numel() * t.element_size() for t in own if t is not None)

    def _move(self, source: FFNWeights, expert: Tensor, here: Tensor, there: Tensor) -> None:
        """Moves channels of all weights, or of none if anything is raised."""
        if not len(here):
            return
        rows = [*source.by_channel(), self.norms, self.order, *self.marks, *self._sizes]
        self._move_rows(rows, expert, here, there)
        self._remember(source)

    def _move_rows(self, rows: list[Tensor], expert: Tensor, here: Tensor, there: Tensor) -> None:
        stacked = self.order.ndim == 2

        def at(t: Tensor, place: Tensor) -> tuple[Tensor, ...]:
            return (expert.to(t.device), place.to(t.device)) if stacked else (place.to(t.device),)

        current: tuple[int, Tensor] | None = None  # the tensor being written, and what it held where rows leave
        with uninterrupted():
            try:
                for place, t in enumerate(rows):
                    current = place, t[at(t, here)]
                    t[at(t, there)] = current[1]
            except BaseException:
                if current is not None:
                    place, kept = current
                    rows[place][at(rows[place], here)] = kept  # positions that are left are those that are filled
                    for t in rows[:place]:
                        t[at(t, here)] = t[at(t, there)]
                raise

    def _slice(self, source: FFNWeights) -> None:
        n = self.sizes.read

        def vector(b: Tensor | None) -> Tensor | None:
            return None if b is None else b.detach()[..., :n]

        down_bias = source.down_bias
        if self.fill_mean:
            down_bias = torch.zeros_like(source.down[..., 0].detach())
            self.mean = source.down.new_zeros(*source.down.shape[:-2], n)
        self.weights = FFNWeights(
            source.gate.detach()[..., :n, :],
            None if source.up is None else source.up.detach()[..., :n, :],
            source.down.detach()[..., :n],
            vector(source.gate_bias),
            vector(source.up_bias),
            down_bias,
        )
        self.down_norm = self.norms[..., :n].clone()

    def _set_mean(self, source: FFNWeights, mean: Tensor) -> None:
        lying = mean.gather(-1, self.order.to(mean.device))
        n = self.sizes.read
        self.mean.copy_(lying[..., :n])
        pruned = lying[..., n:].to(source.down.dtype).unsqueeze(-1)
        constant = (source.down.detach()[..., n:] @ pruned).squeeze(-1)
        self.weights.down_bias.copy_(constant if source.down_bias is None else constant + source.down_bias)

    def _way_home(self) -> tuple[Tensor, Tensor, Tensor]:
        """Moves that put every channel back where it was."""
        order = _stacked(self.order)
        here = torch.arange(order.shape[-1], dtype=torch.int64, device="cpu")
        expert, place = (order != here).nonzero().unbind(1)
        return expert, place, order[expert, place]

    def _settle(self, source: FFNWeights) -> None:
        """Finds out what lies in weights that somebody has written since.

        What is still in our order, channel by channel, stays (a move to another device or dtype, a write that changed
        nothing or little). What is not was loaded, in the model's own order: then the rest follows it there.
        """
        if self._contents is None or self.order is None or self._are_ours(source):
            return
        with uninterrupted():
            self._find_order(source)

    def _find_order(self, source: FFNWeights) -> None:
        weights = source.by_channel()
        # tensors that were put aside go home before anything else: whoever has them expects them as they were
        aside = [old for old, new in zip(self._held, weights, strict=True) if _is_elsewhere(old, new)]
        self._move_rows(aside, *self._way_home())
        before, now = zip(self.marks, self._sizes), zip(fingerprint(source), _sizes(source))
        orders = [order_of(list(a), list(b), self.order) for a, b in zip(before, now, strict=True)]
        if "unknown" in orders and len(set(orders)) > 1:
            warnings.warn(
                "popmm: weights that were written while permuted resemble nothing that stood there; they are taken to "
                "be loaded, in the model's own order",
                stacklevel=2,
            )
        if any(order != "ours" for order in orders):
            self._move_rows([w for w, order in zip(weights, orders) if order == "ours"], *self._way_home())
            self.order = None
        self._remember(source)

    def _are_ours(self, source: FFNWeights) -> bool:
        """Whether nobody has written the weights since we did, through whatever tensor."""
        untouched = self._contents is not None and self._contents == _contents(self._module)
        return untouched and same(self.marks, fingerprint(source))

    def _remember(self, source: FFNWeights) -> None:
        self._contents, self._place, self._held = _contents(self._module), _place(source), source.by_channel()


def _contents(module: nn.Module) -> list:
    return [(id(p), p._version) for p in module.parameters()]


def _place(source: FFNWeights) -> tuple:
    return source.down.device, source.down.dtype, source.down.data_ptr()


def _sizes(source: FFNWeights) -> list[Tensor]:
    """Norm of each channel in each of its weights and biases, float32 ``[(E,) d_ff]``."""
    rows, accumulate = source.by_channel(), torch.promote_types(source.gate.dtype, torch.float32)
    n = len(source.matrices)
    norms = [torch.linalg.vector_norm(w, dim=-1, dtype=accumulate).to(torch.float32) for w in rows[:n]]
    return norms + [b.to(torch.float32).abs() for b in rows[n:]]


def _is_elsewhere(old: Tensor, new: Tensor) -> bool:
    return old.device != new.device or old.data_ptr() != new.data_ptr()


def _stacked(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.unsqueeze(0)
