"""Mixture of experts under POP: one partition per expert, from the prompt tokens routed to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from popmm.adapters.dense import TOLERANCE
from popmm.method import ffn as arithmetic
from popmm.method.expert_linear import falling_experts, mixed, routed_down, routed_hidden, routed_output
from popmm.method.ffn import FFNWeights
from popmm.method.modality import JointStatistics
from popmm.runtime.experts_interface import ON_MODULE, dense_experts, former_implementation
from popmm.runtime.overrides import Hook, Override
from popmm.runtime.phase import Phase
from popmm.runtime.site import PrunedSite


class PrunedExperts(PrunedSite):
    """The stacked experts of one layer under POP."""

    def wire(self, phase: Phase, switches_experts: bool) -> None:
        """Remembers whom to ask for the phase, and the experts implementation that runs the prompt."""
        self.phase = phase
        self.switched = switches_experts  # the model runs our implementation of the experts interface
        own = dense_experts(self.site.module, phase)
        self.dense_forward = lambda *routed: self._by_planes(*routed) if self.replaced else own(*routed)
        self._implementation = former_implementation(self.site.module)
        self._rows = _row_order(self)

    def overrides(self) -> list[Override]:
        return [Override(self.site.module, ON_MODULE, self.forward)] if self.switched else []

    def hooks(self) -> list[Hook]:
        return [] if self.switched else [Hook(self.site.module, self.observe, with_kwargs=True)]

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Experts of tokens x ``[n_tokens, d_model]`` routed to ``index`` with ``weight`` (``[n_tokens, k]``)."""
        phase = self.phase
        if not (torch.compiler.is_compiling() or phase.running):
            phase.warn_if_unwired()
            return self.dense_forward(x, index, weight)
        if phase.alone is not None and not self.sizes.is_dense:
            return self.mixed(x, index, weight)
        if not phase.decoding:
            return self.prefill(x, index, weight)
        dense = self.sizes.is_dense
        y, passing = (self.dense_forward(x, index, weight), None) if dense else self.decode(x, index, weight)
        if self.trace is not None:
            self.record(index, passing)
        return y

    def decode(self, x: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pruned experts. Each (token, expert) pair masks its own candidates.

        Returns:
            The output ``[n_tokens, d_model]``, and which channels in reading order passed, bool
            ``[n_tokens * k, |R| + |C|]``; None if all did.
        """
        if self.config.predicts:
            return self._decode_predicted(x, index, weight)
        w, layout, sizes = self.layout.weights, self.layout, self.sizes
        experts = index.flatten()
        h, passing = self._hidden_and_up(x, index, w)[0], None
        if self.config.selection == "mask":
            norm = layout.down_norm[experts]
            passing = arithmetic.select(h, self.ranking.score, norm, sizes.retained, sizes.budget, self.choose)
            h = arithmetic.fill_in(h, passing, None if layout.mean is None else layout.mean[experts])
        return routed_down(h, w, index, weight, x, self.site.after), passing

    def observe(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Pre-hook that only measures: at ratio 0 the model's own experts run, whatever implementation is set."""
        x, index, weight = (*args, *kwargs.values())[:3]
        if self.phase.decoding:
            if self.trace is not None:
                self.record(index, None)
        elif self.phase.prompt is not None:
            h, up = self._hidden_and_up(x, index, self.site.read())
            self._measure(h, up, _natural(index.flatten()), index, weight)

    def prefill(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Prompt pass: dense, or with the pruned channels of each expert off."""
        if self.phase.prompt is None:
            return self.dense_forward(x, index, weight)
        if self._rows is not None and not self.replaced:
            rows = self._rows(index.flatten())

            def seen(h: Tensor, gate_up: Tensor) -> Tensor:
                up = None if self.site.split is None else self.site.split(gate_up)[1]
                return self._observed(h, up, rows, index, weight)

            return self._implementation(_Observed(self.site.module, seen), x, index, weight)
        y = self.read(x, index, weight)
        return self.dense_forward(x, index, weight) if y is None else y

    def read(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor | None:
        """Measures a prompt's h, which is computed for that; the output, where the dense module's is not to be used."""
        w = self.weights()
        h = self._observed(*self._hidden_and_up(x, index, w), _natural(index.flatten()), index, weight)
        return routed_down(h, w, index, weight, x, self.site.after) if _prunes_prompt(self) or self.replaced else None

    def _observed(self, h: Tensor, up: Tensor | None, rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Measures h ``[n_pairs, d_ff]``, whose rows are the flat (token, choice) pairs ``rows``; what is to go on."""
        statistics = self._measure(h, up, rows, index, weight)
        return self._without_pruned(h, index.flatten()[rows], statistics) if _prunes_prompt(self) else h

    def _by_planes(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The dense experts of all that the planes hold."""
        return routed_output(self.weights(), self.site.combine, x, index, weight, self.site.after)

    def _decode_predicted(self, x: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        experts, combine = index.flatten(), self.site.combine
        pairs = x.repeat_interleave(index.shape[-1], dim=0)
        if self.gathers(len(x)):
            y = self.layout.step(pairs, combine, experts) if self.trace is None else None
            if y is not None:
                return mixed(y, weight, x, self.site.after), None
            y, places = self.layout.decode(pairs, combine, experts)
            passing = self.marked(places) if self.trace is not None else None
        else:
            choose = self.choose if self.phase.simulating else None
            y, passing = self.layout.decode_all(pairs, combine, self.site.weights(), choose, experts)
        return mixed(y, weight, x, self.site.after), passing

    def record(self, index: Tensor, passing: Tensor | None) -> None:
        """Adds a step to the trace: channels of routed experts that passed, in the model's own numbers."""
        batch, n_tokens = self.phase.shape
        experts = index.flatten()
        order = self.layout_order().to(index.device)[experts]
        if passing is None:
            passing = torch.ones_like(order, dtype=torch.bool)
        pairs = torch.zeros(len(experts), self.sizes.d_ff, dtype=torch.bool, device=index.device)
        pairs.scatter_(1, order, passing)
        full = torch.zeros(
            batch * n_tokens, self.site.n_experts, self.sizes.d_ff, dtype=torch.bool, device=index.device
        )
        tokens = torch.arange(batch * n_tokens, dtype=torch.int64, device=index.device)
        token = tokens.repeat_interleave(index.shape[-1])
        full[token, experts] = pairs
        self.trace.add(self.name, full.view(batch, n_tokens, *full.shape[1:]).transpose(0, 1))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _measure(self, h: Tensor, up: Tensor | None, rows: Tensor, index: Tensor, weight: Tensor) -> JointStatistics:
        prompt = self.phase.prompt
        # a router may send a token that skips its experts to some expert with weight zero
        h, up = h.detach(), up.detach() if self.ranking.wants_up else None
        experts, factor = index.detach().flatten()[rows], weight.detach().flatten()[rows]
        read = {}
        for modality, tokens in prompt.groups_of(len(index)).items():
            own = factor != 0
            if tokens is not None:
                own &= tokens.to(h.device)[rows // index.shape[-1]]
            weights = factor[own] if self.config.importance == "routed" else None
            read[modality] = self.ranking.measured(
                h[own], weight=weights, experts=experts[own], up=None if up is None else up[own]
            )
        return self.add(prompt, JointStatistics(read) if read else self.ranking.nothing())

    def _without_pruned(self, h: Tensor, experts: Tensor, statistics: JointStatistics) -> Tensor:
        pooled = self.ranking.pooled(statistics)
        pruned = self.ranking.split(pooled, statistics.tokens).pruned
        places = self.layout.positions(pruned)[experts]
        if self.config.fill == "mean":
            mean = pooled.mean.gather(1, pruned)[experts]
            return h.scatter(1, places, mean.to(h.dtype))
        return h.scatter(1, places, 0.0)

    def _hidden_and_up(self, x: Tensor, index: Tensor, w: FFNWeights) -> tuple[Tensor, Tensor | None]:
        """h of all (token, choice) pairs ``[n_tokens * k, d_ff]`` in natural order, and the up projection."""
        return routed_hidden(w, self.site.combine, x, index)


class _Observed:
    """An experts module whose h and what it is made of go to an observer, which returns what to go on with.

    They stand in ``_apply_gate``, of experts without a gate in ``act_fn``.
    """

    def __init__(self, module: nn.Module, observe: Callable[[Tensor], Tensor]) -> None:
        self._module, self._observe = module, observe

    def __getattr__(self, name: str):
        return getattr(self._module, name)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self._observe(self._module._apply_gate(gate_up), gate_up)

    def act_fn(self, up: Tensor) -> Tensor:
        h = self._module.act_fn(up)
        return h if self._module.has_gate else self._observe(h, up)


@torch.no_grad()
def _row_order(ffn: PrunedExperts) -> Callable[[Tensor], Tensor] | None:
    """Finds the row order of the running implementation's h.

    Implementations that pass h through ``_apply_gate`` can be observed at no cost. Returns a function
    from flat expert numbers to the (token, choice) pair behind each row, or None if h must be
    computed a second time.
    """
    w = ffn.site.read()
    generator, n_tokens = torch.Generator("cpu").manual_seed(0), 4
    x = torch.randn(n_tokens, w.d_model, generator=generator, dtype=torch.float32, device="cpu").to(w.gate)
    index = falling_experts(n_tokens, ffn.site.top_k, ffn.site.n_experts, x.device)
    weight = torch.ones(index.shape, dtype=x.dtype, device=x.device)
    h, _ = ffn._hidden_and_up(x, index, w)
    seen: list[Tensor] = []

    def keep(rows: Tensor, gate_up: Tensor) -> Tensor:
        seen.append(rows)
        return rows

    ffn._implementation(_Observed(ffn.site.module, keep), x, index, weight)
    for order in (_natural, _by_expert):
        if len(seen) == 1 and seen[0].shape == h.shape and _close(seen[0], h[order(index.flatten())]):
            return order
    return None


# row orders of h, as the (token, choice) pair behind each row, from flat expert numbers
def _natural(experts: Tensor) -> Tensor:
    return torch.arange(len(experts), dtype=torch.int64, device=experts.device)


def _by_expert(experts: Tensor) -> Tensor:
    return experts.sort()[1]


def _prunes_prompt(ffn: PrunedExperts) -> bool:
    return ffn.config.prefill == "pruned" and not (ffn.sizes.is_dense or ffn.phase.prompt.refreshes)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a.float() - b.float()).abs().max() <= TOLERANCE.get(a.dtype, 1e-4) * b.float().abs().max())
