"""``PartitionState``: what a user sees of an attached model."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from popmm.compat import Cache
from popmm.config import PopConfig
from popmm.layouts.traffic import at_once, channels_computed
from popmm.method.drafts import Replay
from popmm.method.partition import FFNPartition
from popmm.report import summary_table
from popmm.runtime.passes import Passes
from popmm.runtime.runner import Runner
from popmm.runtime.sequence import Sequence
from popmm.runtime.trace import Trace

if TYPE_CHECKING:
    from popmm.adapters import FFNSite
    from popmm.runtime.freed import FreedWeights
    from popmm.runtime.rest import RestLayer
    from popmm.runtime.site import PrunedSite
    from popmm.runtime.tower import PrunedTowerFFN


class PartitionState:
    """All partitions of one attached model, kept up to date by its own passes.

    Attributes:
        config: the configuration it was attached with.
        ffn_ratio: share of each FFN's channels that is pruned.
        layers: FFN module name, as in ``model.named_modules()``, to ``FFNPartition``; empty until a
            prompt has been read.
        passes: how many passes were of which kind since attach: ``prompt``, ``decode`` (pruned) and ``dense``; the
            reasons for dense ones in ``passes.reasons``.
        vision: with ``vision="prune"``, FFN module name of the vision tower to the ``FFNPartition`` of the last
            pictures read; empty before.
        ready: whether a prompt has been read, so that one-token passes decode.
    """

    def __init__(
        self,
        config: PopConfig,
        ffn_ratio: float,
        ffns: list[PrunedSite],
        left_dense: list[FFNSite],
        rest: list[RestLayer],
        runner: Runner,
        tower: list[PrunedTowerFFN],
        left_out: Mapping[str, str],
        freed: FreedWeights | None,
    ) -> None:
        self.config = config
        self.ffn_ratio = ffn_ratio
        self._ffns = ffns
        self._left_dense = left_dense
        self._rest = rest
        self._runner = runner
        self._tower = tower
        self._freed = freed
        self._left_out = left_out  # FFNs that cannot be pruned, and why

    @property
    def passes(self) -> Passes:
        return self._runner.passes

    @property
    def ready(self) -> bool:
        return self._runner.partitions.active is not None

    @property
    def layers(self) -> Mapping[str, FFNPartition]:
        if not self.ready:
            return MappingProxyType({})
        return MappingProxyType({ffn.name: ffn.partition for ffn in self._ffns})

    @property
    def vision(self) -> Mapping[str, FFNPartition]:
        return MappingProxyType({ffn.name: ffn.partition for ffn in self._tower if ffn.partition is not None})

    def reset(self) -> None:
        """Forgets the partition and all statistics: the next pass is read as a new prompt."""
        self._runner.reset()
        for ffn in self._tower:
            ffn.partition = None

    def replay_acceptance(self, rate: float) -> None:
        """For measurements of speed on random weights: drafted tokens of ``lossless`` stand at this rate from now on.

        The text is then no longer the dense model's.
        """
        self._runner.around.stands = Replay(rate)

    def bytes_per_step(self, batch: int) -> tuple[int, int]:
        """(pruned, dense): FFN weight bytes that a decode step of ``batch`` sequences reads, each weight once.

        With ``tiers`` the tokens of a dense FFN choose together; of experts each reads its own, and as many experts are
        counted as tokens that are sent to them at random would need.
        """
        if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
            raise ValueError(f"batch={batch!r}: give a number of sequences, 1 or more")
        untouched = sum(site.active_bytes() * at_once(site, batch) for site in self._left_dense)
        dense = sum(ffn.site.active_bytes() * at_once(ffn.site, batch) for ffn in self._ffns)
        pruned = sum(ffn.bytes_per_step(batch) for ffn in self._ffns)
        every = self.config.refresh_every
        if every:  # one step in so many is dense
            pruned = (every * pruned + dense) / (every + 1)
        return round(pruned + untouched), round(dense + untouched)

    def bytes_per_token(self) -> tuple[int, int]:
        """(pruned, dense): FFN weight bytes that one decoded token reads at batch 1.

        Counted by what the selection must read: retained and candidate gate and up rows, and the down
        columns of the channels that pass. FFNs left dense (``skip_layers``) stand on both sides;
        for experts, those that one token activates count. Of steps that ``refresh_every`` makes dense, the average.
        """
        return self.bytes_per_step(1)

    def channels_skipped(self, batch: int = 1) -> float:
        """Share of the FFN channels of one decoded token, of a step of ``batch``, that are not computed, in [0, 1).

        Of experts, those that the token is sent to count; FFNs left dense count as computed. Rounding the gate rows
        saves bytes and skips nothing.
        """
        skipped = total = 0.0
        for ffn in self._ffns:
            own = ffn.site.active_channels()
            skipped += own - channels_computed(ffn.site, ffn.sizes_of(batch), ffn.config)
            total += own
        every = self.config.refresh_every
        if every:
            skipped *= every / (every + 1)
        return skipped / (total + sum(site.active_channels() for site in self._left_dense))

    def notes(self) -> dict[str, str]:
        """FFNs of which a reader must know something, by name: left dense and why, ranked from few tokens or none."""
        seen = {ffn.name: ffn.note for ffn in self._ffns if ffn.note and self.ready}
        origins = {ffn.name: ffn.origin for ffn in self._ffns if ffn.origin}
        for name in origins.keys() & seen.keys():
            origins[name] = f"{origins[name]}; {seen.pop(name)}"
        return {**{name: f"stays dense: {reason}" for name, reason in self._left_out.items()}, **origins, **seen}

    def save_statistics(self, cache: Cache) -> Sequence:
        """What is known of the prompt in ``cache``, to be pickled and given to ``load_statistics`` later.

        ``torch.save(cache, file)`` saves it with the cache already; this serves caches kept in another form.

        Raises:
            ValueError: popmm has read no prompt into this cache.
        """
        sequence = self._runner.sequences.on(cache)
        if sequence is None:
            raise ValueError(
                f"popmm has read no prompt into this {type(cache).__name__}: run one through the model first"
            )
        return copy.deepcopy(sequence)

    def load_statistics(self, cache: Cache, saved: Sequence) -> None:
        """Gives a cache that was rebuilt what ``save_statistics`` told of it, so that it decodes pruned.

        Raises:
            TypeError, ValueError: ``saved`` is no such thing, or of another model.
        """
        if not isinstance(saved, Sequence):
            raise TypeError(f"{type(saved).__name__}: give what state.save_statistics(cache) returned")
        with self._runner.phase.exclusive.between_passes("load_statistics"):
            self._runner.sequences.load(cache, saved)

    def buffer_bytes(self) -> int:
        """Memory that popmm holds beside the model's own weights."""
        planes = sum(layer.planes.bytes() for layer in self._rest if layer.planes is not None)
        return sum(ffn.layout.bytes() for ffn in self._ffns) + planes

    def freed_bytes(self) -> int:
        """Memory of the model's own weights that ``weights="replace"`` has freed."""
        return 0 if self._freed is None else self._freed.bytes()

    def rest_bytes(self) -> tuple[int, int]:
        """(with ``rest_bits``, as they came): bytes that one token reads of the linear layers outside the FFNs.

        Of those that ``rest_bits`` covers: attention's projections and the output layer; (0, 0) with 16.
        """
        read = [layer.read() for layer in self._rest]
        return sum(own for own, _ in read), sum(plain for _, plain in read)

    def summary(self) -> str:
        """Table of all FFNs: layer, d_ff, R, C, P, K, and bytes read per token against dense."""
        return summary_table(self, self._ffns)

    @contextmanager
    def trace(self) -> Iterator[Trace]:
        """Records which channels pass at each decode step run inside the ``with`` block.

        Yields a mapping from FFN name to a bool tensor ``[steps, batch, d_ff]`` (experts ``[steps, batch,
        n_experts, d_ff]``) in the model's own channel numbers. Meanwhile compiled steps run eagerly, and other threads
        are refused.
        """
        with self._runner.phase.exclusive("trace"):
            trace = Trace({ffn.name: tuple(ffn.layout.norms.shape) for ffn in self._ffns})
            previous = [ffn.trace for ffn in self._ffns]
            try:
                for ffn in self._ffns:
                    ffn.trace = trace
                with torch.compiler.set_stance("force_eager"):
                    yield trace
            finally:
                for ffn, before in zip(self._ffns, previous):
                    ffn.trace = before

    def partition_seconds(self) -> float:
        """Measures how long it takes to partition all FFNs from the statistics at hand, layout included.

        Channels of the ``permute`` layout start from the model's own order, as for a first prompt.
        """
        device = self._ffns[0].layout.norms.device
        synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        partition = self._runner.partitions.rewind()
        synchronize()
        start = time.perf_counter()
        partition()
        synchronize()
        return time.perf_counter() - start

    @property
    def is_dense(self) -> bool:
        """Whether nothing is pruned, so that every pass is the model's own."""
        return all(ffn.sizes.is_dense for ffn in self._ffns) and not self._tower

    def repartition(self) -> None:
        """Makes all partitions anew from the statistics at hand."""
        with self._runner.phase.exclusive.between_passes("repartition"):
            self._runner.partitions.again()

    def simulated_decode(self):
        """Context in which passes of several tokens are decode: each token is pruned as if it came alone.

        Teacher-forced text then costs one pass instead of one per token, with the same logits.
        """
        return self._runner.simulated_decode()

    def __repr__(self) -> str:
        pruned, dense = self.bytes_per_token()
        status = "partitioned" if self.ready else "waiting for a prompt"
        notes = self.notes()
        also = f", {len(notes)} FFNs with notes (see summary())" if notes else ""
        return (
            f"PartitionState({len(self._ffns)} FFNs, selection={self.config.selection!r}, reads {pruned / dense:.1%} "
            f"of the FFN bytes and skips {self.channels_skipped():.1%} of the channels per token, {status}{also}; "
            f"passes: {self.passes!r})"
        )
