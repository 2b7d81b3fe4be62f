"""Many conversations about one picture in one row of a training batch, none of which sees another.

A row is what all of them begin with, the picture last, and then what each of them says after it. A mask hides the
conversations from one another and positions start anew behind the picture, so the model computes for each of them what
it computes for it alone, and reads the picture once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

ALL = 0  # owner of what all conversations see; they are 1, 2, ...
NOBODY = -1  # of padding


@dataclass
class Row:
    """Tokens of one picture and of conversations, most of them about it."""

    ids: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)  # time, height, width
    owners: list[int] = field(default_factory=list)
    learned: list[bool] = field(default_factory=list)
    looks: list[bool] = field(default_factory=list)  # whether a token sees the picture

    def append(self, ids: list[int], owner: int, positions: list[tuple[int, int, int]], learned=None, looks=True):
        self.ids += ids
        self.positions += positions
        self.owners += [owner] * len(ids)
        self.learned += learned or [False] * len(ids)
        self.looks += [looks] * len(ids)


class Packer:
    """Packs conversations for a Qwen2-VL processor whose pictures are all of one size.

    Args:
        side: a picture's tokens along each side.
    """

    def __init__(self, processor, side: int):
        self.processor, self.side = processor, side
        self.tokenizer = processor.tokenizer
        self.start, self.end, self.image, self.pad = self.tokenizer.convert_tokens_to_ids(
            ["<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|endoftext|>"]
        )
        self.assistant = self.tokenizer("assistant\n")["input_ids"]
        talk = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
        self.opening = self.tokenizer(talk.partition("<|image_pad|>")[0])["input_ids"]

    def rows(self, conversations: list[list[dict]], longest: int) -> list[Row]:
        """Rows of at most ``longest`` tokens; conversations that are longer are left out.

        Args:
            conversations: in chat form, each about the one picture or about none.
        """
        rows: list[Row] = []
        texts = self.processor.apply_chat_template(conversations, tokenize=False)
        for ids in sorted(self.tokenizer(texts)["input_ids"], key=len, reverse=True):  # fills rows best
            at = ids.index(self.image) if self.image in ids else None
            said = len(ids) if at is None else len(ids) - at - 1
            free = next((row for row in rows if len(row.ids) + said <= longest), None)
            if free is None:
                rows.append(free := self._begun())
            if len(free.ids) + said > longest:
                rows.remove(free)
                continue
            first = 0 if at is None else at + self.side
            positions = [(first + i,) * 3 for i in range(said)]
            free.append(ids[-said:], free.owners[-1] + 1, positions, self._learned(ids)[-said:], at is not None)
        return rows

    def _begun(self) -> Row:
        """A row that holds no more than what conversations about a picture begin with, and the picture."""
        row, grid = Row(), range(self.side)
        row.append(self.opening, ALL, [(i,) * 3 for i in range(len(self.opening))])
        at = len(self.opening)
        row.append([self.image] * self.side**2, ALL, [(at, at + r, at + c) for r in grid for c in grid])
        return row

    def _learned(self, ids: list[int]) -> list[bool]:
        """Which tokens are the assistant's words, or the end of them."""
        learned, position = [False] * len(ids), 0
        while position < len(ids):
            if ids[position] == self.start and ids[position + 1 : position + 1 + len(self.assistant)] == self.assistant:
                position += 1 + len(self.assistant)
                stop = ids.index(self.end, position) + 1
                learned[position:stop] = [True] * (stop - position)
                position = stop
            position += 1
        return learned

    def batch(self, rows: list[Row], length: int) -> dict[str, torch.Tensor]:
        """Tokens of rows, padded to ``length``.

        Returns:
            ``input_ids``, ``labels`` (-100 where nothing is learned) [rows, length] int64; ``position_ids``
            [3, rows, length] int64; ``attention_mask`` [rows, 1, length, length] bool.
        """

        def padded(values: list[list], pad) -> torch.Tensor:
            return torch.tensor([v + [pad] * (length - len(v)) for v in values], dtype=torch.long, device="cpu")

        ids = padded([row.ids for row in rows], self.pad)
        learned = padded([row.learned for row in rows], False).bool()
        looks = padded([row.looks for row in rows], False).bool()
        owners = padded([row.owners for row in rows], NOBODY)
        seen = (owners[:, :, None] == owners[:, None, :]) | (looks[:, :, None] & (owners[:, None, :] == ALL))
        return {
            "input_ids": ids,
            "labels": ids.masked_fill(~learned, -100),
            "position_ids": torch.stack([padded([[p[i] for p in row.positions] for row in rows], 0) for i in range(3)]),
            "attention_mask": seen.tril()[:, None],
        }
