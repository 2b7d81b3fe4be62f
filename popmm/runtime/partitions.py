"""The FFNs of an attached model, partitioned for one sequence at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from popmm.layouts.choose import Layout
from popmm.method.budget import RegionSizes
from popmm.method.modality import JointStatistics
from popmm.method.partition import FFNPartition
from popmm.runtime.calls import without_backward
from popmm.runtime.phase import Phase
from popmm.runtime.rest import RestLayer
from popmm.runtime.sequence import Sequence


class Followed(Protocol):
    """What is needed of an FFN: ``popmm.runtime.site`` and ``experts`` have them."""

    name: str
    sizes: RegionSizes
    layout: Layout
    identity: Tensor
    partition: FFNPartition | None
    stale: bool

    def check(self) -> bool: ...

    def apply(self, statistics: JointStatistics | None, tokens: int) -> None: ...

    def release(self) -> None: ...


class Partitions:
    """All FFNs' partitions, made and forgotten together; ``phase.decoding`` follows them."""

    def __init__(self, ffns: list[Followed], rest: list[RestLayer], phase: Phase) -> None:
        self.active: Sequence | None = None  # that the FFNs are partitioned for
        self._ffns, self._rest = ffns, rest
        self._phase = phase
        self._warned_of_hooks = False

    @property
    def adapted(self) -> bool:
        """Whether FFNs have adapters that are read into what decode reads."""
        return any(ffn.site.packed is not None and ffn.site.packed.exact for ffn in self._ffns)

    @property
    def prunes(self) -> bool:
        """Whether anything is pruned at all."""
        return any(not ffn.sizes.is_dense for ffn in self._ffns)

    def identity(self) -> dict[str, Tensor]:
        """Some numbers of each FFN's weights, by which a saved sequence knows the model again."""
        return {ffn.name: ffn.identity for ffn in self._ffns}

    def activate(self, sequence: Sequence) -> None:
        """Partitions all FFNs for a sequence. Interrupted half way, they are without a partition, which is dense."""
        self.drop()
        for ffn in self._ffns:
            ffn.apply(sequence.statistics.get(ffn.name), sequence.tokens)
        self.active = sequence
        self._phase.idle(True)

    def again(self) -> None:
        """Partitions all FFNs anew from the statistics at hand."""
        if self.active is not None:
            self.activate(self.active)

    def drop(self) -> None:
        """No sequence is active: the model is dense until its next prompt."""
        self.active, self._phase.decoding = None, False

    def forget(self) -> None:
        """Drops the partitions too."""
        self.drop()
        for ffn in self._ffns:
            ffn.partition = None

    def rewind(self) -> Callable[[], None]:
        """Undoes what the current partition did to the weights; returns what makes it anew."""
        sequence = self.active
        self.drop()
        for ffn in self._ffns:
            ffn.layout.rewind()
        return lambda: None if sequence is None else self.activate(sequence)

    def restore(self) -> None:
        """Gives the weights their own order back and frees what decode needed; partitions stay readable.

        Raises:
            Whatever a layout raises: then some FFNs can decode no more, and the model is dense until its next prompt.
        """
        self._phase.decoding = False
        try:
            for ffn in self._ffns:
                ffn.layout.release()
        except BaseException:
            self.active = None
            raise

    def release(self) -> None:
        """Detached for good."""
        self._phase.released = True
        for part in (*self._ffns, *self._rest):
            part.release()

    def check_weights(self) -> None:
        """Before statistics are taken or used: the FFNs must be those that were attached."""
        for layer in self._rest:
            layer.check()
        hooked = [ffn.name for ffn in self._ffns if ffn.check() and not ffn.sizes.is_dense]
        if self.active is not None and any(ffn.stale for ffn in self._ffns):
            self.again()  # weights have changed under a partition that no prompt will make anew
        if hooked and not self._warned_of_hooks:
            self._warned_of_hooks = True
            warnings.warn(
                f"popmm: hooks were added to layers of {hooked[0]} while attached: they see the prompt, and not the "
                "pruned decode steps, which read weights past the layers' calls",
                stacklevel=2,
            )

    def refusing_backward(self, forward: Callable) -> Callable:
        """A forward whose outputs refuse gradients once the weights are stored otherwise than they were by then."""
        if any(ffn.layout.reorders for ffn in self._ffns):
            return without_backward(forward, lambda: True)
        if any(ffn.layout.name == "permute" for ffn in self._ffns):
            return without_backward(forward, lambda: self._phase.released)
        return forward
