"""What the pass in progress is: what every FFN of an attached model reads to know what to do."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from popmm.runtime.exclusive import Exclusive
from popmm.runtime.passes import UNWIRED, warn_dense
from popmm.runtime.prompt import PromptPass


class Phase:
    """Prefill, with a prompt to measure; decode; or neither, which is dense."""

    def __init__(self, waiting: int = 0, lossless: bool = False) -> None:
        self.decoding = False  # between passes it says what a compiled step will be
        self.prompt: PromptPass | None = None  # in progress
        self.step = False  # the pass in progress, or the last one, is a decode step: the output layer comes after it
        # of a batch's tokens in a choice that they make together, float32 [batch]; simulated, [batch, steps]
        self.votes: Tensor | None = None
        # of continuous batching, in a pass with prompts: the tokens that decode, bool [tokens]
        self.alone: Tensor | None = None
        self.shape = (0, 0)  # batch, tokens per sequence
        self.lossless = lossless  # decode passes are drafts, and all else is dense
        self.checking = False  # the pass in progress checks a draft: several tokens, and no prompt
        self.simulating = False  # passes of several tokens are decode
        self.released = False  # detached: what is left of our wrappers is transparent
        self.exclusive = Exclusive(waiting)
        self.is_wired: Callable[[], bool] = lambda: True  # set by attach
        self._warned_of_wires = False

    def idle(self, partitioned: bool) -> None:
        """Between passes; whether there is a partition."""
        self.decoding = partitioned and not self.lossless

    @property
    def running(self) -> bool:
        """Whether a pass is in progress: FFNs that are called by themselves are dense."""
        return self.exclusive.in_pass

    def warn_if_unwired(self) -> None:
        """Warns once if the decoder no longer runs by way of this phase."""
        if not self._warned_of_wires and not self.is_wired():
            self._warned_of_wires = True
            warn_dense(UNWIRED)

    def __deepcopy__(self, memo: dict):
        # a copy of the model would share its hooks with the original
        raise RuntimeError("this model is attached: call popmm.detach(model) before copying or pickling it")

    def __reduce__(self):
        self.__deepcopy__({})
