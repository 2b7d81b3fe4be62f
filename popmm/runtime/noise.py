"""What sampling draws, position by position: ahead for drafts, each once, and put back what was not used."""

from __future__ import annotations

import torch
from torch import Tensor

from popmm.method.drafts import noise_like


class Noise:
    """Of one ``generate``: the same draws from the device's generator as sampling without drafts makes."""

    def __init__(self) -> None:
        self._ahead: list[tuple[Tensor | None, Tensor]] = []  # (generator's state before it, noise [1, vocabulary])
        self._after: Tensor | None = None  # the generator's state after the last one
        self._generator: torch.Generator | None = None
        self._found = False

    def at(self, place: int, like: Tensor) -> Tensor:
        """Of the token that comes ``place`` tokens after the next one, shaped like its scores ``[1, vocabulary]``."""
        if not self._found:
            self._generator, self._found = _generator_of(like.device), True
        while len(self._ahead) <= place:
            before = None if self._generator is None else self._generator.get_state()
            self._ahead.append((before, noise_like(like)))
            self._after = None if self._generator is None else self._generator.get_state()
        return self._ahead[place][1]

    def used(self, n_tokens: int) -> None:
        """So many tokens were taken."""
        del self._ahead[:n_tokens]

    def put_back(self) -> None:
        """Leaves the generator as if nothing had been drawn ahead, unless others have drawn from it since."""
        if self._ahead and self._generator is not None and torch.equal(self._generator.get_state(), self._after):
            self._generator.set_state(self._ahead[0][0])
        self._ahead.clear()


def _generator_of(device: torch.device) -> torch.Generator | None:
    """The one that ``torch.multinomial`` draws from, None where its state cannot be reached."""
    if device.type == "cpu":
        return torch.default_generator
    generators = getattr(torch.get_device_module(device), "default_generators", ())
    index = device.index or 0
    return generators[index] if index < len(generators) else None
