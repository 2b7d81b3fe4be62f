"""What sampling draws, position by position: ahead for drafts, each once, and put back what was not used."""

from __future__ import annotations

import torch
from torch import Tensor

from popmm.method.drafts import noise_like


class Noise:
    """Of one ``generate``: the same draws from the device's generator as sampling without drafts makes."""

    def __init__(self) -> None:
        self._ahead: list[tuple[Tensor, Tensor]] = []  # (generator's state before it, noise [1, vocabulary])
        self._generator: torch.Generator | None = None

    def at(self, place: int, like: Tensor) -> Tensor:
        """Of the token that comes ``place`` tokens after the next one, shaped like its scores ``[1, vocabulary]``."""
        if self._generator is None:
            self._generator = _generator_of(like.device)
        while len(self._ahead) <= place:
            self._ahead.append((self._generator.get_state(), noise_like(like)))
        return self._ahead[place][1]

    def used(self, n_tokens: int) -> None:
        """So many tokens were taken."""
        del self._ahead[:n_tokens]

    def put_back(self) -> None:
        """Leaves the generator as if nothing had been drawn ahead."""
        if self._ahead:
            self._generator.set_state(self._ahead[0][0])
            self._ahead.clear()


def _generator_of(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    module = torch.get_device_module(device)
    return module.default_generators[device.index or 0]
