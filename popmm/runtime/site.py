"""What the FFNs and the experts of an attached model have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from popmm.layouts.choose import Layout
from popmm.layouts.traffic import at_once, bytes_read
from popmm.method import ffn as arithmetic
from popmm.method.budget import RegionSizes
from popmm.method.fingerprint import IDENTIFYING
from popmm.method.modality import JointStatistics
from popmm.method.one_plane import OnePlaneSizes
from popmm.method.partition import FFNPartition
from popmm.runtime.integrity import Integrity
from popmm.runtime.ranking import Ranking

if TYPE_CHECKING:
    from popmm.adapters import FFNSite
    from popmm.config import PopConfig
    from popmm.method.ffn import FFNWeights
    from popmm.runtime.prompt import PromptPass
    from popmm.runtime.trace import Trace


Choose = Callable[[Tensor, int], Tensor]  # (scores [..., n], k) -> mask of those that pass


class PrunedSite:
    """An FFN or the experts of a layer under POP: a partition, a layout, a trace."""

    choose: Choose = staticmethod(arithmetic.best)  # which of the scored channels pass

    def __init__(self, site: FFNSite, sizes: RegionSizes, config: PopConfig, layout: Layout) -> None:
        self.name = site.name
        self.site = site
        self.sizes = sizes
        self.config = config
        self.integrity: Integrity | None = None  # set by attach
        self.identity: Tensor | None = None  # float32 [n], by which a saved sequence knows the model again
        self.origin = ""  # of quantised or adapted weights
        self.note = ""  # what a reader must know of the partition's origin
        self.partition: FFNPartition | None = None
        self.stale = False  # the weights were read again since the partition was laid out
        self.trace: Trace | None = None
        self.layout = layout
        self.ranking = Ranking(site, sizes, config, layout)
        self.allocate()

    def allocate(self) -> None:
        """Reads the weights, and makes what the layout keeps of them."""
        source = self.site.read()
        self.layout.allocate(source)
        if self.site.packed is not None:
            self._packed = self.site.packed.identity()
            self.origin = _origin(self.site.packed.kind, self.layout, source)
        gate = self.layout.by_channel(self.layout.marks[0])
        self.identity = gate.flatten()[:IDENTIFYING].to("cpu", copy=True)

    @property
    def replaced(self) -> bool:
        """Whether the weights were freed, and the planes are all there is."""
        return getattr(self.layout, "replaced", False)

    def weights(self) -> FFNWeights:
        """What a prompt is read with: the module's weights, or what the planes hold of them."""
        return self.layout.dequantised(self.site.weights()) if self.replaced else self.site.read()

    def keep_norms(self) -> None:
        """Reads what ranking needs of the weights, before they are freed."""
        self.ranking.prior()

    def check(self) -> bool:
        """Called before each prompt: refuses a module that was replaced, reads weights that have changed again.

        Returns:
            Whether hooks have been added to its layers.
        """
        hooked = self.integrity.check()
        if self.replaced:
            return hooked
        if self.site.packed is not None:
            fits = self._packed == self.site.packed.identity()
        else:
            fits = self.layout.fits(self.site.weights())
        if not fits:
            self.allocate()
            self.ranking.forget_weights()
            self.stale = True
        return hooked

    def marked(self, index: Tensor) -> Tensor:
        """Places in reading order ``[n, K]`` as a mask, bool ``[n, |R| + |C|]``."""
        none = torch.zeros(len(index), self.sizes.read, dtype=torch.bool, device=index.device)
        return none.scatter_(1, index, True)

    def gathers(self, n_tokens: int) -> bool:
        """Whether ``gate`` and ``tiers`` read each token's own rows: in small batches, where that is less than all."""
        return not self.phase.simulating and self.layout.gathers(n_tokens)

    def mixed(self, x: Tensor, *routed: Tensor) -> Tensor:
        """A pass of prompts and decode steps, each token as it is.

        Args:
            x: ``[..., d_model]``.
            routed: by what, ``[tokens, k]`` each.
        """
        alone, flat = self.phase.alone, x.reshape(-1, x.shape[-1])
        if len(alone) != len(flat):  # a pass inside the pass
            return self.dense_forward(x, *routed)
        y, others = torch.empty_like(flat), ~alone
        y[alone] = self.decode(flat[alone], *(own[alone] for own in routed))[0].to(y.dtype)
        y[others] = self.dense_forward(flat[others], *(own[others] for own in routed))
        return y.view(x.shape)

    def votes(self, n_tokens: int) -> Tensor | None:
        """What tokens count in a choice that they make together: with ``tiers``, those of a batch's step do."""
        votes = self.phase.votes
        together = votes is not None and self.config.selection == "tiers" and votes.numel() == n_tokens
        return votes if together else None

    def layout_order(self) -> Tensor:
        """Channels in the order of h at decode, int64 ``[(E,) n]``; all of them if the FFN is left dense."""
        return self.partition.reading_order if self.sizes.is_dense else self.layout.reading_order

    def add(self, prompt: PromptPass, new: JointStatistics) -> JointStatistics:
        """Adds a pass's statistics to what the sequence has; kept by the phase if the pass ends well."""
        known = prompt.statistics.get(self.name) or prompt.sequence.statistics.get(self.name)
        prompt.statistics[self.name] = new if known is None else known + new
        return prompt.statistics[self.name]

    def apply(self, statistics: JointStatistics | None, tokens: int) -> None:
        """Partitions by the statistics and lays the weights out for decode.

        Args:
            statistics: None if the FFN did not run.
            tokens: of the prompt, that the FFN should have been given.
        """
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.layout.norms.device.type, enabled=False):
            ranking = self.ranking
            statistics = ranking.nothing() if statistics is None else statistics
            short = ranking.is_short(statistics, tokens)
            asked = self.config.statistics == "weights"
            self.note = _note(statistics.n_tokens, tokens) if short and not asked else ""
            pooled = ranking.pooled(statistics)
            self.partition, self.stale = ranking.split(pooled, statistics.tokens, short), False
            if self.sizes.is_dense:
                return
            rms = (ranking.up_rms(pooled, short) if ranking.wants_up else None,) if self.config.predicts else ()
            # copies are gathered from the values, which adapted layers compute; planes hold all channels already
            source = self.site.read() if self.layout.name == "copy" else self.site.weights()
            self.layout.write(source, self.partition, pooled.mean, *rms)

    def release(self) -> None:
        """Frees the layout, after detach."""
        self.layout.release()
        self.ranking.forget_weights()

    def sizes_of(self, batch: int) -> RegionSizes:
        """Sizes of the regions in a step of so many tokens."""
        return self.layout.sizes_of(batch) if self.config.selection == "tiers" else self.sizes

    def bytes_per_step(self, batch: int = 1, passing: float | None = None, plain: int | None = None) -> float:
        """Weight bytes that a pruned step of ``batch`` tokens reads, each weight once.

        Tokens that choose for themselves (``gate``, experts) read rows of their own, at the most all there are; what
        ``gate`` reads of many is all up and down rows.

        Args:
            passing, plain: as for ``bytes_read``.
        """
        own = bytes_read(self.site, self.sizes_of(batch), self.config, passing, plain)
        apart = self.config.selection == "gate" or (self.config.selection == "tiers" and self.site.is_experts)
        if batch > 1 and apart:
            everything = self.site.active_weights() * plain if plain else self.site.active_bytes()
            rows = own * batch / at_once(self.site, batch) if self.layout.gathers(batch) else everything
            own = min(rows, everything)
        return own * at_once(self.site, batch)


def _origin(kind: str, layout: Layout, source: FFNWeights) -> str:
    """Where planes of quantised weights come from, and what rounding them again has changed."""
    if layout.sizes.is_dense:
        return ""
    if not hasattr(layout, "dequantised"):
        return f"read through its adapters ({kind})"
    held = layout.dequantised(source)
    pairs = zip(held.matrices, source.matrices)
    off = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs]
    if isinstance(layout.sizes, OnePlaneSizes):
        as_they_came = f"gate and up lie in 4 bits as they came (to {_percent(max(off[:2]), 2)})"
        return f"read from {kind}; {as_they_came}, rounding down again moves it by {_percent(off[2])} of its size"
    return f"read from {kind}; rounding it again moves weights by {_percent(max(off))} of their size"


def _percent(part: float, digits: int = 1) -> str:
    """Rounded up."""
    return f"{math.ceil(part * 100 * 10**digits) / 10**digits:.{digits}f}%"


def _note(read: int, tokens: int) -> str:
    if read == 0:
        return "was given no token of the prompt: ranked by its weights' norms"
    return f"was given {read} of the prompt's {tokens} tokens: ranked by them and by its weights' norms"
