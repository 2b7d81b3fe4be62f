"""What a server takes, and for how long."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a server. Bad values raise ``ValueError``.

    Attributes:
        running: sequences decoded at once, where many are.
        waiting: requests that may wait for others to end; one more is answered 429.
        megabytes: of a request's body, pictures included; a larger one is answered 413.
        seconds: from a request's arrival to the end of its answer; then it ends with 504, or an error in its stream.
        new_tokens: of an answer, where a request does not say.
        cache_tokens: keys and values held, of all sequences together, where many are decoded at once; None = by the
            accelerator's memory, and ``CPU_CACHE_TOKENS`` on a CPU.
        grace: seconds that running requests are given when the server is stopped.
    """

    running: int = 32
    waiting: int = 64
    megabytes: float = 32
    seconds: float = 600
    new_tokens: int = 1024
    cache_tokens: int | None = None
    grace: float = 30

    def __post_init__(self) -> None:
        for name in ("running", "waiting", "new_tokens"):
            least = 0 if name == "waiting" else 1
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: give a number of {least} or more")
        for name in ("megabytes", "seconds", "grace"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 <= value < math.inf and (value > 0 or name == "grace")):
                raise ValueError(f"{name}={value!r}: give a number above 0")
        if self.cache_tokens is not None and self.cache_tokens < 16:
            raise ValueError(f"cache_tokens={self.cache_tokens!r}: give 16 or more, or None for the machine's")


CPU_CACHE_TOKENS = 16384  # by itself transformers takes most of the machine's memory
