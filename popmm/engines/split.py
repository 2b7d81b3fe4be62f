"""An FFN in tiers at two calls, with the engine's own activation between them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from popmm import kernels
from popmm.kernels.twin import group_of
from popmm.layouts.tiers import TiersLayout
from popmm.layouts.traffic import LEAST_GROUP
from popmm.method.activations import ACTIVATIONS, activate
from popmm.method.ffn import FFNWeights
from popmm.method.tiers import TierSizes, tier_sizes
from popmm.runtime.ranking import row_norms

TOLERANCE = {torch.float32: 1e-4}  # of h's size, by which it may differ from act(g) * u; else:
NARROW_TOLERANCE = 2e-2
ROWS_TO_TELL = 4  # tokens whose h tells the activation


def sizes_of(name: str, d_ff: int, d_model: int, share: float, weight_bits: int | None, tokens: int = 1) -> TierSizes:
    """Tiers of an FFN, or of each expert, for so many ``tokens`` that choose together.

    Raises:
        ValueError: d_model cannot be quantised in groups, or the share is too small.
    """
    if group_of(d_model) < LEAST_GROUP:
        raise ValueError(
            f"{name} has d_model={d_model}, and planes take groups of {LEAST_GROUP} weights or more: give bytes=1"
        )
    return tier_sizes(d_ff, share, group_of(d_model), weight_bits, tokens)


def laid_out(
    name: str, sizes: TierSizes, several: dict[int, TierSizes], source: FFNWeights, combine: Callable
) -> TiersLayout:
    """Weights in planes, channels predicted by the norms of their weights, which needs no prompt."""
    layout = TiersLayout(sizes, several, combine, name)
    layout.allocate(source)
    layout.rms.copy_(row_norms(source)[1])
    return layout


class SplitFFN:
    """``gate_up`` chooses channels and computes them, ``down`` reads the same ones.

    Which activation stands between the two is told by what it makes of a dense pass.

    Args:
        name: of the FFN, for messages.
        share: of the 16-bit bytes that a token reads.
        weight_bits: all channels in so many bits instead.
        together: the tokens of a call choose together and read the same channels; else each chooses for itself.
        share_together: in place of ``share`` where several do.
        replaces: the engine frees its own weights, and dense passes read the planes' most bits too.
    """

    def __init__(
        self,
        name: str,
        share: float,
        weight_bits: int | None = None,
        together: bool = True,
        share_together: float | None = None,
        replaces: bool = False,
    ) -> None:
        self.name, self.share, self.weight_bits = name, share, weight_bits
        self.together, self.replaces = together, replaces
        self.share_together = share if share_together is None else share_together
        self.layout: TiersLayout | None = None
        self.activation: str | None = None
        self.left_dense = ""  # why; empty = it is not
        self.held: dict[str, tuple[Tensor, Tensor | None]] = {}  # weights and bias, until both parts are there
        self._seen: Tensor | None = None
        self._chosen: list[tuple[int, Tensor]] = []  # how rows are read, and which

    @property
    def ready(self) -> bool:
        """Whether tokens can be computed by chosen channels."""
        return self.layout is not None and self.activation is not None and not self.left_dense

    @property
    def settled(self) -> bool:
        """Whether dense passes have nothing to tell any more."""
        return bool(self.left_dense) or self.activation is not None or self.layout is None

    def hold(self, part: str, weight: Tensor, bias: Tensor | None) -> None:
        """Takes weights, which are laid out once both parts are there.

        Args:
            part: ``"gate_up"``, weights ``[2 * d_ff, d_model]``, gate first; or ``"down"``, ``[d_model, d_ff]``.
            bias: of ``"gate_up"``; that of ``"down"`` is the engine's to add.
        """
        self.held[part] = weight.detach(), None if bias is None else bias.detach()
        if len(self.held) < 2:
            return
        (both, bias), (down, _) = self.held.pop("gate_up"), self.held.pop("down")
        biases = (None, None) if bias is None else tuple(half.float() for half in bias.chunk(2))
        source = FFNWeights(*both.chunk(2), down, *biases)
        own = self.name, source.d_ff, source.d_model
        sizes = sizes_of(*own, self.share, self.weight_bits)
        several = {2: sizes_of(*own, self.share_together, self.weight_bits, tokens=2)} if self.together else {}
        self.layout = laid_out(self.name, sizes, several, source, self._combine)

    def _combine(self, g: Tensor, u: Tensor) -> Tensor:
        return activate(ACTIVATIONS[self.activation or "silu"], g, u)

    def saw(self, gate_up: Tensor) -> None:
        """Keeps what gate and up ``[n, 2 * d_ff]`` made of a dense pass."""
        self._seen = gate_up[:ROWS_TO_TELL].float()  # a copy, for engines reuse memory

    def tell(self, h: Tensor) -> None:
        """Learns the activation from h ``[n, d_ff]`` of the same pass."""
        if self._seen is None:
            return
        (g, u), own, self._seen = self._seen.chunk(2, dim=-1), h[:ROWS_TO_TELL].float(), None
        size = own.norm()
        if not size > 0:
            return
        errors = {name: float((activate(act, g, u) - own).norm() / size) for name, act in ACTIVATIONS.items()}
        name = min(errors, key=errors.get)  # both of gelu are alike in 16 bits: only scores need it
        if errors[name] <= TOLERANCE.get(h.dtype, NARROW_TOLERANCE):
            self.activation = name
        else:
            self.left_dense = f"what stands between its projections is none of {', '.join(ACTIVATIONS)}"
            self.layout = self.layout if self.replaces else None

    def all_of(self, part: str, dtype: torch.dtype) -> Tensor:
        """All that the planes hold of ``"gate_up"``, ``[2 * d_ff, d_model]``, or of ``"down"``, ``[d_model, d_ff]``."""
        layout = self.layout
        parts = (layout.gate, layout.up) if part == "gate_up" else (layout.down,)
        rows = [kernels.planes_decode(own, layout.most, dtype) for own in parts]
        return torch.cat(rows) if part == "gate_up" else rows[0].mT

    def gate_up(self, x: Tensor) -> Tensor:
        """Projections of rows x ``[n, d_model]``: ``[n, 2 * d_ff]`` in the dtype of x, zero where not read."""
        d_ff = self.layout.sizes.d_ff
        votes = x.new_ones(len(x), dtype=torch.float32) if self.together and len(x) > 1 else None
        y, self._chosen = x.new_zeros(len(x), 2 * d_ff), []
        for bits, index, g, u in self.layout.chosen(x.float(), self._combine, votes=votes):
            y.scatter_(1, index, g.to(x.dtype)).scatter_(1, index + d_ff, u.to(x.dtype))
            self._chosen.append((bits, index))
        return y

    def down(self, h: Tensor) -> Tensor:
        """y ``[n, d_model]`` in the dtype of h, of h ``[n, d_ff]`` that the activation made of ``gate_up``'s answer."""
        y = 0.0
        for bits, index in self._chosen:
            y = y + kernels.planes_add(self.layout.down, bits, index, h.gather(1, index).float())
        self._chosen = []
        return y.to(h.dtype)
