"""Every knob of popmm, validated once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from popmm.checks import check_bits, is_number, layer_indices

DEFAULT_PRUNING_RATIO = 0.4  # of the paper's own selections, and of gate
DEFAULT_BYTES = 0.33  # of tiers: the fewest at which they lose little (docs/quality.md)
DEFAULT_BYTES_TOGETHER = 0.36  # of a batch, whose tokens choose together: it loses as little with these
DRAFT_BYTES, DRAFT_REST_BITS = 0.25, 8  # of drafts, 19 of 20 of which the model accepts
PLAIN_BITS = 16
PLANE_BITS = (8, 7, 6, 5, 4, 3)  # in which nested planes can be read

_CHOICES = {
    "selection": ("mask", "keep", "gate", "tiers"),
    "fill": ("zero", "mean"),
    "prefill": ("dense", "pruned"),
    "shared_experts": ("dense", "prune"),
    "layout": ("auto", "copy", "permute"),
    "vision": ("dense", "prune"),
    "statistics": ("prompt", "weights"),
    "weights": ("keep", "replace"),
}
DEFAULT_CANDIDATE_FRACTION = 0.1
_IMPORTANCES = ("wanda", "griffin", "flock", "routed")


@dataclass(frozen=True)
class PopConfig:
    """How an attached model prunes. Immutable; every field is checked on construction.

    Args:
        pruning_ratio: share of a decoder block's linear weights to prune, in [0, 1), turned into an FFN
            ratio per model (paper, table 8). 0.4 where a selection is given and no share.
        ffn_ratio: share of each FFN's channels to prune, in [0, 1); excludes ``pruning_ratio``.
        candidate_fraction: gamma, the share of an FFN's channels that is re-scored at each decode step; 0.1
            unless given. With ``selection="gate"``: share of the gate rows that is read; None = chosen from the bytes.
        selection: ``"gate"``: gate rows first, then up and down rows of the K channels that they predict to
            weigh most, which the ratio's bytes allow: ``1 - ffn_ratio`` of the FFN's; ``"tiers"``: a copy in
            nested planes of 4, 6 and 8 bits (3, 5 and 7 where few bytes are asked for): the first plane of the gate
            rows predicts which channels to read in how many, for ``1 - ffn_ratio`` of the FFN's bytes at 16 bits;
            ``"mask"``: the best K of
            retained and candidate channels pass (paper); ``"keep"``: all of them pass. None = gate, or mask if a
            candidate_fraction is given, which is how the paper's method is set, or tiers with ``bytes`` or
            ``weight_bits``. Where nothing is said of what to read, tiers with ``bytes=0.33``, of a batch 0.36.
        importance: how a token scores a channel: ``"wanda"`` ``|h_i| * ||W_down[:, i]||`` (paper, eq. 3);
            ``"griffin"`` ``|h_i| / ||h||``; ``"flock"`` ``|h_i| * ||W_down[:, i]|| / ||h||``; ``"routed"``
            wanda times the router's weight (experts; elsewhere wanda); or a callable
            ``(h [n_tokens, n_channels] float32, down_norm float32) -> [n_tokens, n_channels]``, where
            ``down_norm`` broadcasts to h: ``[n_channels]``, of experts ``[n_tokens, n_channels]``.
            A prompt's score of a channel is the L2 norm of its tokens' scores.
        fill: what stands in for a channel that is not computed: ``"zero"`` (paper) or ``"mean"``, its
            mean over the prompt.
        prefill: ``"dense"`` leaves the prompt pass untouched; ``"pruned"`` completes it with the pruned
            channels off (paper).
        shared_experts: ``"dense"`` leaves shared experts alone (paper); ``"prune"`` prunes them too.
        skip_layers: indices of decoder layers left dense; the other layers take over their share.
        layout: where decode reads weights: ``"copy"`` gathers retained and candidate channels into static
            buffers; ``"permute"`` reorders the model's own weights in place, which holds none of them twice;
            ``"auto"``: permute where it is safe and not slower.
        prior_tokens: n0 of ``n / (n + n0)``, by which an expert that saw n prompt tokens blends its scores
            with the prior; 0 = the prior serves only experts that saw no token.
        modality_balance: vision-language models: share of the statistics' weight that text tokens get
            together, in (0, 1); the tokens of images and videos get the rest. None = every token counts
            once (paper).
        vision: ``"dense"`` leaves the vision tower alone; ``"prune"`` prunes its FFNs picture by picture by
            the prompt pass's rule (paper, appendix), which saves no time.
        gate_bits: with ``selection="gate"``: 16 reads the gate rows as they are; 8 or 4 a quantised copy
            made at attach, for the prediction and as the gate's value. None = 8 where that leaves K at least
            3/4 of the channels, else 4 (measured); 16 where d_model is no multiple of 16 or with a candidate_fraction.
        bytes: share of the FFN's bytes at 16 bits that a token reads, scales included, in (0, 1], in place of a ratio:
            with ``tiers`` and ``gate``.
        weight_bits: with ``selection="tiers"``: all channels in so many bits (8 to 3), whatever ratio above 0: plain
            quantisation, which chooses nothing. None = tiers, in which the best channels are read in 8 bits.
        rest_bits: bits in which decode steps of up to 8 tokens read the other linear layers, attention's projections
            and the output layer: 16 as they are, or a copy in 8 to 3. None = 16, of drafts (``lossless``) 8.
        statistics: what channels are ranked by: ``"prompt"`` by what its prompt made of them (paper); ``"weights"`` by
            the norms of their weights alone, which needs no prompt: every pass of one token per sequence is pruned,
            whatever cache it brings.
        weights: with ``selection="tiers"``: ``"keep"`` leaves the model's own FFN weights beside the planes, for the
            prompt pass; ``"replace"`` frees them, and the prompt is read in the planes' most bits. ``detach`` then
            reads them again from the model's files.
        lossless: decode steps are drafts of some tokens, which one dense pass checks: the text of ``model.generate``
            is the dense model's own, up to the rounding of a pass of several tokens, greedy or sampled with the same
            seed. For one sequence at a time; all else decodes by all weights. The default is then ``bytes=0.25``.
        draft_tokens: with ``lossless``: tokens to draft in a row, 1 to 16; None = as many as pay, which may be none, by
            how many were accepted and by what passes cost on this machine.
        waiting_calls: calls of other threads that may wait for their turn, in order, while one runs the model; any more
            are refused. 0 = all.
        refresh_every: after so many decode steps one is dense: its token joins the statistics, and the
            partition is made anew. 0 = never (paper).
    """

    pruning_ratio: float | None = None
    ffn_ratio: float | None = None
    candidate_fraction: float | None = None
    selection: Literal["mask", "keep", "gate", "tiers"] | None = None
    importance: str | Callable = "wanda"
    fill: Literal["zero", "mean"] = "zero"
    prefill: Literal["dense", "pruned"] = "dense"
    shared_experts: Literal["dense", "prune"] = "dense"
    skip_layers: tuple[int, ...] = ()
    layout: Literal["auto", "copy", "permute"] = "auto"
    prior_tokens: float = 32.0
    modality_balance: float | None = None
    vision: Literal["dense", "prune"] = "dense"
    gate_bits: int | None = None
    refresh_every: int = 0
    bytes: float | None = None
    weight_bits: int | None = None
    rest_bits: int | None = None
    statistics: Literal["prompt", "weights"] = "prompt"
    weights: Literal["keep", "replace"] = "keep"
    lossless: bool = False
    draft_tokens: int | None = None
    waiting_calls: int = 0

    def __post_init__(self) -> None:
        if self.pruning_ratio is not None and self.ffn_ratio is not None:
            raise ValueError(
                f"pruning_ratio={self.pruning_ratio} and ffn_ratio={self.ffn_ratio} exclude each other: give one"
            )
        by_default = self._takes_default()
        object.__setattr__(self, "_by_default", by_default)
        if by_default and self.bytes is None:
            object.__setattr__(self, "bytes", DRAFT_BYTES if self.lossless else DEFAULT_BYTES)
        object.__setattr__(self, "_rest_by_default", self.rest_bits is None)
        if self.rest_bits is None:
            object.__setattr__(self, "rest_bits", DRAFT_REST_BITS if self.lossless else PLAIN_BITS)
        self._check_bytes()
        if self.pruning_ratio is None and self.ffn_ratio is None:
            object.__setattr__(self, "pruning_ratio", DEFAULT_PRUNING_RATIO)
        for name in ("pruning_ratio", "ffn_ratio"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and 0 <= value < 1):
                raise ValueError(f"{name}={value!r} is not a ratio: give a number in [0, 1), such as 0.4")
        if self.selection is None:
            default = "gate" if self.candidate_fraction is None else "mask"
            says_bytes = self.bytes is not None or self.weight_bits is not None
            object.__setattr__(self, "selection", "tiers" if says_bytes else default)
        if self.candidate_fraction is None and self.selection in ("mask", "keep"):
            object.__setattr__(self, "candidate_fraction", DEFAULT_CANDIDATE_FRACTION)
        if self.selection == "tiers":
            self._check_tiers()
        bits = self.gate_bits
        check_bits("gate_bits", bits, (None, 16, 8, 4), "16, 8 or 4, or None to have them chosen")
        if self.weight_bits is not None and self.selection != "tiers":
            raise ValueError(f"weight_bits={self.weight_bits} belongs to selection='tiers': leave it out")
        if bits is not None and self.selection != "gate":
            raise ValueError(f"gate_bits={bits} belongs to selection='gate': leave it out with {self.selection!r}")
        if bits in (8, 4) and self.candidate_fraction is not None:
            raise ValueError(f"gate_bits={bits} reads a quantised copy of all gate rows: give no candidate_fraction")
        gamma = self.candidate_fraction
        if gamma is not None and not (is_number(gamma) and 0 <= gamma <= 1):
            raise ValueError(f"candidate_fraction={gamma!r}: give a number in [0, 1], such as 0.1")
        if not (is_number(self.prior_tokens) and 0 <= self.prior_tokens < math.inf):
            raise ValueError(f"prior_tokens={self.prior_tokens!r}: give a number of tokens, 0 or more")
        balance = self.modality_balance
        if balance is not None and not (is_number(balance) and 0 < balance < 1):
            raise ValueError(
                f"modality_balance={balance!r}: give the text tokens' share of the weight, a number between 0 and 1 "
                "such as 0.5, or None"
            )
        for name, choices in _CHOICES.items():
            if not (isinstance(getattr(self, name), str) and getattr(self, name) in choices):
                raise ValueError(f"{name}={getattr(self, name)!r}: give one of {', '.join(map(repr, choices))}")
        named = isinstance(self.importance, str) and self.importance in _IMPORTANCES
        if not (named or callable(self.importance)):
            known = ", ".join(map(repr, _IMPORTANCES))
            raise ValueError(f"importance={self.importance!r}: give one of {known}, or a callable")
        check_bits("rest_bits", self.rest_bits, (PLAIN_BITS, *PLANE_BITS), "16 (as they are), 8, 7, 6, 5, 4 or 3")
        for name, what in (("refresh_every", "decode steps, or 0 for never"), ("waiting_calls", "calls, or 0")):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}={value!r}: give a number of {what}")
        if self.statistics == "weights":
            needed = {"refresh_every": 0, "modality_balance": None, "fill": "zero", "prefill": "dense"}
            self._check_plain(needed, "is about a prompt's statistics, and statistics='weights' takes none")
        self._check_lossless()
        if self.weights == "replace" and self.selection != "tiers":
            raise ValueError(
                f"weights='replace' keeps the FFNs in the planes of selection='tiers', and this is {self.selection!r}: "
                "give bytes=0.33, say, or weights='keep'"
            )
        object.__setattr__(self, "skip_layers", layer_indices(self.skip_layers))

    def _check_plain(self, needed: dict, why: str) -> None:
        """Settings that do not go with another."""
        for name, plain in needed.items():
            if getattr(self, name) != plain:
                raise ValueError(f"{name}={getattr(self, name)!r} {why}: leave one of them out")

    def _check_lossless(self) -> None:
        """The text is to be the dense model's own, so it must be there, and read the prompt."""
        if not isinstance(self.lossless, bool):
            raise ValueError(f"lossless={self.lossless!r}: give True or False")
        g = self.draft_tokens
        if g is not None:
            if not isinstance(g, int) or isinstance(g, bool) or not 1 <= g <= 16:
                raise ValueError(f"draft_tokens={g!r}: give a number of tokens from 1 to 16, or None to have it chosen")
            if not self.lossless:
                raise ValueError(f"draft_tokens={g} belongs to lossless=True: leave it out")
        if self.lossless:
            needed = {"weights": "keep", "prefill": "dense", "vision": "dense", "refresh_every": 0}
            self._check_plain(needed, "changes what the whole model says, by which lossless=True decides")

    def _takes_default(self) -> bool:
        """Whether nothing was said of what to read: then tiers do, at their default share of the bytes."""
        shares = (self.pruning_ratio, self.ffn_ratio, self.bytes, self.weight_bits)
        others = (self.selection, self.candidate_fraction, self.gate_bits)
        plain = self.fill == "zero" and self.layout == "auto"
        return plain and all(value is None for value in (*shares, *others))

    def without_default(self) -> PopConfig:
        """For weights that cannot be quantised in groups: gate by the paper's ratio, if nothing was asked for."""
        gives_way = self._by_default and self.weights == "keep"
        return self.replace(pruning_ratio=DEFAULT_PRUNING_RATIO) if gives_way else self

    def _check_bytes(self) -> None:
        """``bytes`` is a way to give the FFN ratio."""
        if self.bytes is None:
            return
        same = self.pruning_ratio is None and is_number(self.ffn_ratio) and self.ffn_ratio == 1 - self.bytes
        if not same and (self.pruning_ratio is not None or self.ffn_ratio is not None):
            other = "ffn_ratio" if self.pruning_ratio is None else "pruning_ratio"
            both = f"bytes={self.bytes} says what a token reads, {other}={getattr(self, other)} what it does not"
            raise ValueError(f"{both}: give one of them")
        if self.selection not in (None, "gate", "tiers"):
            raise ValueError(f"bytes={self.bytes} belongs to selection='tiers' or 'gate': give a ratio with this one")
        if not (is_number(self.bytes) and 0 < self.bytes <= 1):
            raise ValueError(f"bytes={self.bytes!r}: give a share of the FFN's bytes at 16 bits, such as 0.25")
        object.__setattr__(self, "ffn_ratio", 1 - self.bytes)

    def _check_tiers(self) -> None:
        for name, value in (("candidate_fraction", None), ("fill", "zero"), ("gate_bits", None)):
            if getattr(self, name) != value:
                raise ValueError(f"{name}={getattr(self, name)!r} does not go with selection='tiers': leave it out")
        check_bits("weight_bits", self.weight_bits, (None, *PLANE_BITS), "8, 7, 6, 5, 4 or 3, or None for tiers")
        if self.weight_bits is not None and self.bytes is not None:
            both = f"weight_bits={self.weight_bits} reads all channels alike, bytes={self.bytes} chooses among them"
            raise ValueError(f"{both}: give one of them")

    @property
    def more_together(self) -> float:
        """Share of the bytes that tokens that choose together read beyond one token's: some, by default."""
        return DEFAULT_BYTES_TOGETHER - DEFAULT_BYTES if self._by_default and not self.lossless else 0.0

    @property
    def predicts(self) -> bool:
        """Whether a token's channels are predicted from its gate values and the up projection's size in the prompt."""
        return self.selection in ("gate", "tiers")

    @classmethod
    def paper(cls, **changes) -> PopConfig:
        """The paper's settings (arXiv 2602.06822), with the given changes."""
        settings = dict(candidate_fraction=0.1, selection="mask", importance="wanda", fill="zero", prefill="pruned")
        return cls(**{**settings, **changes})

    def replace(self, **changes) -> PopConfig:
        """A copy with the given fields changed. Giving one of the ratios or ``bytes`` drops the others."""
        if self._rest_by_default and "rest_bits" not in changes:
            changes["rest_bits"] = None
        if self._by_default:  # nothing was said yet of what to read
            resolved = ("pruning_ratio", "ffn_ratio", "bytes", "selection", "weights")
            kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in resolved}
            changed = PopConfig(**{**kept, **changes})
            replaces = self.weights == "replace" and changed.selection == "tiers" and "weights" not in changes
            return dataclasses.replace(changed, weights="replace") if replaces else changed
        shares = ("pruning_ratio", "ffn_ratio", "bytes")
        given = [name for name in shares if changes.get(name) is not None]
        if given or self.bytes is not None:  # which has set the FFN ratio
            for name in shares:
                kept = None if given or name == "ffn_ratio" else getattr(self, name)
                changes.setdefault(name, kept)
            if changes.get("bytes") is not None:
                changes.setdefault("weight_bits", None)
        if changes.get("weight_bits") is not None and not given and self.bytes is not None:
            changes.update(bytes=None, ffn_ratio=self.ffn_ratio)  # whose bits read all channels, at any ratio
        selection = changes.get("selection", self.selection)
        if selection != self.selection:  # each has its own default
            if self.candidate_fraction in (None, DEFAULT_CANDIDATE_FRACTION):
                changes.setdefault("candidate_fraction", None)
            for name, owner, default in (
                ("gate_bits", "gate", None),
                ("weight_bits", "tiers", None),
                ("weights", "tiers", "keep"),
            ):
                if selection != owner:
                    changes.setdefault(name, default)
        return dataclasses.replace(self, **changes)
