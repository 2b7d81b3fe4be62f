"""``popmm bench``: decode speed of dense and pruned models, against the bytes that each must read."""

from __future__ import annotations

import copy
import re
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch._dynamo.utils import counters

from popmm.adapters import describe
from popmm.attach import pruned
from popmm.cli.bench_rows import BenchRow
from popmm.compat import compiled_anywhere, experts_implementation
from popmm.config import PopConfig
from popmm.evaluation.progress import progress
from popmm.evaluation.traffic import copy_bandwidth, dense_ffn_bytes, int8_saving, other_bytes
from popmm.runtime.clock import Clock

PROMPTS = 2  # that a compiled row decodes before it is measured
SETTLING = 3  # decode steps of each generation that are not counted


@dataclass
class Way:
    """A row to measure: how to decode."""

    label: str
    config: PopConfig | None = None  # None = dense
    compiled: bool = False
    experts: str | None = None  # transformers' experts implementation of dense decode steps
    int8: bool = False  # linear layers quantised weight-only by torchao
    times: list[float] = field(default_factory=list)
    prefills: list[float] = field(default_factory=list)
    partitions: list[float] = field(default_factory=list)
    ffn_bytes: int = 0  # per step
    skipped: float = 0.0
    saved: tuple[int, int] = (0, 0)  # bytes per step that quantisation saves: of the FFNs, of all weights
    buffers: int = 0
    peak: int = 0
    recompilations: int = 0
    recordings: int = 0


def ways(
    model,
    selections: list[str],
    ratios: list[float],
    layouts: list[str],
    compiled: bool,
    int8: bool = False,
    rest_bits: int = 16,
    shares: Sequence[float] = (),
) -> list[Way]:
    """Dense rows, then one for each selection, ratio and layout. A selection may carry its bits: ``gate4``.

    Args:
        shares: of the FFN bytes that rows of ``tiers`` read.
    """
    has_experts = any(site.is_experts for site in describe(model, probe=False).sites())
    rows = [Way("dense eager")]
    if has_experts and not compiled:
        # batched_mm copies the routed experts' weights at each step: measured far behind on the CPU
        names = ("eager", "grouped_mm", "batched_mm")[: 2 if model.device.type == "cpu" else 3]
        rows = [Way(f"dense {name}", experts=name) for name in names]
    if compiled:
        rows.append(Way("dense compiled", compiled=True))
    if int8:  # in eager mode torchao writes the weights out in full at each step
        rows.append(Way("dense int8 (torchao), compiled", compiled=True, int8=True))
    for selection in selections:
        name, bits = selection.rstrip("0123456789"), selection.lstrip("abcdefghijklmnopqrstuvwxyz")
        for ratio in ratios:
            for layout in layouts:
                which = {"gate": "gate_bits", "tiers": "weight_bits"}.get(name, "gate_bits")
                how = {which: int(bits)} if bits else {}
                config = PopConfig(pruning_ratio=ratio, selection=name, layout=layout, rest_bits=rest_bits, **how)
                label = f"{selection} {ratio:.0%}" + (f" {layout}" if len(layouts) > 1 else "")
                rows.append(Way(label, config, compiled))
    for share in shares:
        config = PopConfig(bytes=share, selection="tiers", rest_bits=rest_bits)
        rows.append(Way(f"tiers, bytes {share:g}", config, compiled))
    return rows


def random_ids(model, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Tokens of a prompt that means nothing, int64, where the model is."""
    generator = torch.Generator("cpu").manual_seed(seed)
    vocab = model.config.get_text_config().vocab_size
    drawn = dict(generator=generator, dtype=torch.int64, device="cpu")
    return torch.randint(2, min(vocab, 1000), shape, **drawn).to(model.device)


class Bench:
    """One model, one batch size, one length of prompt and answer."""

    def __init__(self, model, batch: int, prompt: int, new: int) -> None:
        self.model, self.batch, self.prompt, self.new = model, batch, prompt, new
        self.device = next(model.parameters()).device
        self.default_experts = experts_implementation(model.config)
        self.dense_ffn_bytes, self.other_bytes = dense_ffn_bytes(model, batch), other_bytes(model)
        self.bandwidth = copy_bandwidth(self.device)

    def run(self, rows: list[Way], rounds: int) -> list[BenchRow]:
        """Measures the rows, in turn where that needs no recompilation."""
        eager = [way for way in rows if not way.compiled]
        compiled = [way for way in rows if way.compiled]
        with progress() as bars:
            bar = bars.add_task("decoding", total=len(eager) * (rounds + 1) + len(compiled))
            for turn in range(rounds + 1):
                for way in eager:
                    self._eager(way, keep=turn > 0)  # the first turn warms up
                    bars.advance(bar)
            for way in compiled:
                self._compiled(way, rounds)
                bars.advance(bar)
        found = [self._row(way) for way in rows]
        dense = [row for row, way in zip(found, rows) if way.config is None and not way.int8]
        baseline = min(dense, key=lambda row: row.ms)
        for row in found:
            row.speed_up = baseline.ms / row.ms
            row.of_bytes_ratio = row.speed_up * row.total_bytes / baseline.total_bytes
            row.partition_steps = row.partition_ms / baseline.ms
        return found

    def _eager(self, way: Way, keep: bool) -> None:
        if way.experts is not None:
            self.model.set_experts_implementation(way.experts)
        with ExitStack() as stack:
            state = stack.enter_context(pruned(self.model, way.config)) if way.config is not None else None
            self._reset_peak()
            prefill, times = self._generate(self.prompt, seed=0, new=self.new)
            self._note(way, state, times if keep else [], [prefill] if keep else [])
        if way.experts is not None:
            self.model.set_experts_implementation(self.default_experts)

    def _compiled(self, way: Way, rounds: int) -> None:
        torch._dynamo.reset()
        self.model.__dict__.pop("_compiled_call", None)
        how = dict(cache_implementation="static", compile_config=compiled_anywhere(fullgraph=True))
        with ExitStack() as stack:
            if way.int8:
                stack.callback(setattr, self, "model", self.model)
                way.saved, self.model = int8_saving(self.model), quantised_copy(self.model)
            state = stack.enter_context(pruned(self.model, way.config)) if way.config is not None else None
            self._reset_peak()
            graphs, recorded = [], []
            for seed in range(PROMPTS + rounds):  # of growing length, to show that none recompiles
                prefill, times = self._generate(self.prompt + seed, seed, self.new, **how)
                graphs.append(counters["stats"]["unique_graphs"])
                recorded.append(graphs_recorded(self.device))
                if seed >= PROMPTS:
                    self._note(way, state, times, [prefill])
            way.recompilations, way.recordings = graphs[-1] - graphs[0], recorded[-1] - recorded[PROMPTS - 1]

    def _generate(self, n_tokens: int, seed: int, new: int, **how) -> tuple[float, list[float]]:
        """(seconds of the prompt pass, seconds of each decode step) as users run them."""
        ids, clock = random_ids(self.model, (self.batch, n_tokens), seed), Clock(None)
        self._synchronize()
        start = time.perf_counter()
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=clock,
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            **how,
        )
        first, *steps = clock.times[1:]
        # new caches have graphs recorded in their first steps
        return first - start, [b - a for a, b in zip([first, *steps], steps)][SETTLING:]

    def _note(self, way: Way, state, times: list[float], prefills: list[float]) -> None:
        way.times += times
        way.prefills += prefills
        if state is not None:
            way.skipped = state.channels_skipped(self.batch)
            own, plain = state.rest_bytes()
            way.saved = 0, plain - own
            way.ffn_bytes, way.buffers = state.bytes_per_step(self.batch)[0], state.buffer_bytes()
            way.partitions.append(state.partition_seconds())
        if self.device.type == "cuda":
            way.peak = max(way.peak, torch.cuda.max_memory_allocated())

    def _row(self, way: Way) -> BenchRow:
        ms = statistics.median(way.times) * 1e3
        tenths = statistics.quantiles(way.times, n=10) if len(way.times) > 1 else way.times * 9
        ffn = way.ffn_bytes if way.config is not None else self.dense_ffn_bytes
        ffn, total = ffn - way.saved[0], ffn + self.other_bytes - way.saved[1]
        rate = total / ms / 1e6
        return BenchRow(
            way.label,
            ms,
            tenths[0] * 1e3,
            tenths[-1] * 1e3,
            self.batch / ms * 1e3,
            ffn,
            total,
            rate,
            rate / self.bandwidth,
            partition_ms=statistics.median(way.partitions) * 1e3 if way.partitions else 0.0,
            prefill_ms=statistics.median(way.prefills) * 1e3,
            buffers_gib=way.buffers / 2**30,
            peak_gib=way.peak / 2**30,
            recompilations=way.recompilations,
            recordings=way.recordings,
            channels_skipped=way.skipped,
            batch=self.batch,
        )

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()


def graphs_recorded(device: torch.device) -> int:
    """CUDA graphs that Inductor has recorded so far."""
    if device.type != "cuda":
        return 0
    from torch._inductor import cudagraph_trees

    manager = cudagraph_trees.get_container(device.index or 0).tree_manager
    return 0 if manager is None else int(re.sub(r"\D", "", repr(manager.graph_counter)))


def quantised_copy(model):
    """A copy of a model whose linear layers hold int8 weights. Stacked experts stay as they are."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    copied = copy.deepcopy(model)
    quantize_(copied, Int8WeightOnlyConfig())
    return copied
