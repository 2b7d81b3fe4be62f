"""A prefill pass in progress: which of its tokens count, and which of them an FFN was given."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from popmm.method.modality import JointStatistics, token_groups
from popmm.runtime.sequence import Sequence


@dataclass
class PromptPass:
    """A prefill pass in progress. Nothing of it is kept unless it ends well."""

    sequence: Sequence
    shape: tuple[int, int]  # batch, tokens per sequence
    past: int  # tokens in the cache before it
    counted: Tensor | None  # bool [batch, n_tokens]: no padding; None = every token
    modalities: dict[str, Tensor] | None  # bool [batch, n_tokens], of all modalities but text
    refreshes: bool = False  # a decode step that is dense, for its statistics
    statistics: dict[str, JointStatistics] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.groups = token_groups(self.counted, self.modalities)
        batch, n_tokens = self.shape
        self.tokens = batch * n_tokens if self.counted is None else int(self.counted.sum())

    @property
    def all_tokens(self) -> int:
        """Tokens that count of the whole sequence so far, this pass included."""
        return self.sequence.tokens + self.tokens

    def groups_of(self, n_rows: int) -> dict[str, Tensor | None]:
        """Which of the rows that an FFN was given are of which modality, padding left out.

        FFNs are given all tokens of a pass, or those of one modality (experts for pictures), or the last ones of each
        sequence (layers that add nothing to the cache). Of any other rows nothing can be told: they count as text if
        every token of the pass does, else not at all.

        Returns:
            bool ``[n_rows]`` by modality; None = every row.
        """
        batch, n_tokens = self.shape
        if n_rows == batch * n_tokens:
            return self.groups
        others = self.modalities or {}
        subsets = dict(others)
        if others:
            subsets["text"] = ~torch.stack([mask.to("cpu") for mask in others.values()]).any(0)
        for name, positions in subsets.items():
            if int(positions.sum()) == n_rows:
                counted = None if self.counted is None else self.counted.to(positions.device)[positions]
                return {name: counted}
        if n_rows % batch == 0 and n_rows < batch * n_tokens:
            last = slice(-(n_rows // batch), None)
            counted = None if self.counted is None else self.counted[:, last]
            return token_groups(counted, {name: mask[:, last] for name, mask in others.items()})
        if self.counted is None and not others:
            return {"text": None}
        return {}
