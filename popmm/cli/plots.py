"""Pictures of a model's partition: one figure each, however many layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from popmm.cli.channels import (
    MODALITY_GROUPS,
    MODALITY_PAIRS,
    compared_channels,
    expert_grids,
    falling,
    grid,
    in_reading_order,
    is_of_experts,
    modality_overlaps,
    modality_rates,
    routed_rates,
    stacked,
    usage,
)
from popmm.evaluation.figures import pyplot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from popmm.method.partition import FFNPartition
    from popmm.runtime.trace import Trace

RETAINED, CANDIDATE, PRUNED, UNKNOWN = "#1f4e79", "#e07b39", "#e4e4e4", "#b9a7a7"
DPI = 130
LABELLED = 40  # rows of a heat map, at most, that are all named
WRITTEN = 8  # columns of a heat map, at most, whose values are written into it


def save(figure: Figure, file: Path) -> None:
    """Writes a figure and closes it."""
    figure.savefig(file, dpi=DPI)
    pyplot().close(figure)


def _height(rows: int) -> float:
    """Inches of a figure of so many rows: at most 1,560 pixels."""
    return min(2.6 + 0.3 * rows, 12.0)


def short(name: str) -> str:
    return name.split("layers.")[-1]


def _heat(axis: Axes, values: np.ndarray, rows: list[str], most: float = 1.0, colours="viridis", bad=UNKNOWN):
    """Rows of numbers as colours, named at the left; unknown ones in a grey of their own."""
    plt = pyplot()
    cmap = plt.get_cmap(colours).with_extremes(bad=bad)
    picture = axis.imshow(
        np.ma.masked_invalid(values), cmap=cmap, vmin=0, vmax=most, aspect="auto", interpolation="nearest"
    )
    shown = range(0, len(rows), -(-len(rows) // LABELLED))
    axis.set_yticks(list(shown), [rows[i] for i in shown], fontsize=8)
    return picture


def _write(axis: Axes, values: np.ndarray, most: float = 1.0) -> None:
    """Numbers into the cells of a heat map, where there is room."""
    if len(values) > LABELLED or values.shape[1] > WRITTEN:
        return
    for (y, x), value in np.ndenumerate(values):
        text, dark = ("-", True) if np.isnan(value) else (f"{value:.2f}", value < 0.6 * most)
        axis.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")


def _share_of_channels(axis: Axes, columns: int, d_ffs: set[int]) -> None:
    """Ticks in channels where all FFNs have as many, else in shares of d_ff."""
    width = d_ffs.pop() if len(d_ffs) == 1 else None
    places = [i / 4 for i in range(5)]
    labels = [f"{round(p * width)}" if width else f"{p:.0%}" for p in places]
    axis.set_xticks([p * columns - 0.5 for p in places], labels)


def _bar_of(figure: Figure, picture, axis, label: str) -> None:
    figure.colorbar(picture, ax=axis, shrink=0.9, pad=0.02).set_label(label, fontsize=8)


def _draw_chosen(figure: Figure, axis: Axes, rates: list[torch.Tensor], rows: list[str], budgets: list[float]) -> None:
    """Heat map: each row's channels from the one chosen most often to the least, K marked."""
    values = grid([falling(rate) for rate in rates])
    picture = _heat(axis, values, rows)
    columns = values.shape[1]
    axis.plot(
        [share * columns - 0.5 for share in budgets], range(len(rows)), "|", color="#ff4fa3", ms=9, mew=1.5, label="K"
    )
    axis.set_xlim(-0.5, columns - 0.5)
    _share_of_channels(axis, columns, {len(rate) for rate in rates})
    axis.set_xlabel("channels, each row by itself from the most often to the least often chosen (pink: budget K)")
    _bar_of(figure, picture, axis, "share of decoded tokens that chose the channel")


def _draw_regions(figure: Figure, axis: Axes, rates: list[torch.Tensor], rows: list[str], sizes: list) -> None:
    """Heat map: the three regions, and in the candidates' how often each passed."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    values = grid(rates)
    columns = values.shape[1]
    regions = np.ones((len(rows), columns))
    for line, s in zip(regions, sizes):
        line[: round(s.retained / s.d_ff * columns)] = 0
        line[round(s.read / s.d_ff * columns) :] = 2
    below = ListedColormap([RETAINED, UNKNOWN, PRUNED])  # of candidates it shows those whose rate is unknown
    axis.imshow(regions, cmap=below, vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    picture = _heat(axis, np.where(regions == 1, values, np.nan), rows, colours="Oranges", bad="none")
    budgets = [s.budget / s.d_ff * columns - 0.5 for s in sizes]
    axis.plot(budgets, range(len(rows)), "|", color="black", ms=9, mew=1.5)
    axis.set_xlim(-0.5, columns - 0.5)
    _share_of_channels(axis, columns, {s.d_ff for s in sizes})
    axis.set_xlabel("channels, by falling importance to the prompt (black: budget K)")
    _bar_of(figure, picture, axis, "candidates: share of decoded tokens that let the channel pass")
    handles = [Patch(color=RETAINED, label="retained: always computed"), Patch(color=PRUNED, label="pruned: never")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8, frameon=False)


def channels_figure(
    layers: Mapping[str, FFNPartition], rates: Mapping[str, torch.Tensor], steps: int, skipped: float
) -> Figure:
    """Which channels of the dense FFNs decode steps computed, a row per FFN.

    With regions retained: the regions, and how often each candidate passed. With ``gate``, which chooses among all: how
    often each channel was chosen, and how many were always, at times and never.

    Args:
        rates: ``chosen_rates``.
        steps: decode steps that they are of.
        skipped: share of a token's channels that are not computed.
    """
    plt = pyplot()
    names = [name for name, partition in layers.items() if not is_of_experts(partition)]
    rows, partitions = [short(name) for name in names], [layers[name] for name in names]
    said = f"{steps} decode steps, {skipped:.1%} of the channels skipped per token"
    size = _height(len(rows))
    if any(p.sizes.retained and not p.sizes.is_dense for p in partitions):
        figure, axis = plt.subplots(figsize=(11, size), layout="constrained")
        ordered = [in_reading_order(layers[name], rates[name]) for name in names]
        _draw_regions(figure, axis, ordered, rows, [p.sizes for p in partitions])
        figure.suptitle(f"Regions per FFN, and how often candidates passed: {said}", fontsize=11)
    else:
        figure, (axis, bars) = plt.subplots(
            1, 2, figsize=(12, size), layout="constrained", gridspec_kw={"width_ratios": [3, 1]}
        )
        budgets = [p.budget / p.d_ff for p in partitions]
        _draw_chosen(figure, axis, [rates[name] for name in names], rows, budgets)
        _draw_usage(bars, stacked([usage(rates[name]) for name in names]))
        figure.suptitle(f"How often each channel was chosen: {said}", fontsize=11)
    axis.set_ylabel("FFN (layer)")
    return figure


def _draw_usage(axis: Axes, parts: np.ndarray) -> None:
    """Bars: per row, channels chosen always, at times and never."""
    left = np.zeros(len(parts))
    for label, colour, share in zip(("always", "at times", "never"), (RETAINED, CANDIDATE, PRUNED), parts.T):
        axis.barh(range(len(parts)), share, left=left, color=colour, label=label, height=0.8)
        left = left + share
    axis.set(xlim=(0, 1), ylim=(len(parts) - 0.5, -0.5), yticks=[], xlabel="share of the FFN's channels")
    axis.legend(fontsize=8, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), title="chosen")


def experts_figure(
    first: Mapping[str, FFNPartition],
    second: Mapping[str, FFNPartition],
    rates: Mapping[str, torch.Tensor],
    second_rates: Mapping[str, torch.Tensor],
    trace: Trace,
) -> Figure:
    """Per layer and expert: tokens sent to it, channels in common with other experts and with a second prompt, and
    how often each of its channels was chosen.

    Args:
        rates, second_rates: ``chosen_rates`` of the decode steps after each prompt.
        trace: the first one's masks.
    """
    plt = pyplot()
    names = [name for name, partition in first.items() if is_of_experts(partition)]
    rows, partitions = [short(name).removesuffix(".experts") for name in names], [first[name] for name in names]
    routed = routed_rates(first, trace)
    between, prompts = expert_grids(first, second, rates, second_rates)
    what = "retained" if any(p.sizes.retained for p in partitions) else "chosen"
    chance = np.mean([(p.sizes.retained or p.budget) / p.d_ff for p in partitions])
    grids = {
        "decoded tokens\nsent to each expert": stacked([routed[name] for name in names]),
        f"{what} channels shared with\nother experts (chance: {chance:.2f})": between,
        f"{what} channels shared with the\nsecond prompt (chance: {chance:.2f})": prompts,
    }
    n_rows = sum(len(p.importance) for p in partitions)
    figure = plt.figure(figsize=(13, min(12.0, 5.0 + 0.25 * len(rows) + 0.06 * n_rows)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.4])
    for axis, (title, values) in zip(upper.subplots(1, 3), grids.items()):
        most = 1.0 if axis.get_subplotspec().colspan.start else max(np.nanmax(values), 1e-6)
        picture = _heat(axis, values, rows, most=most)
        _write(axis, values, most)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("expert")
        axis.xaxis.get_major_locator().set_params(integer=True)
        upper.colorbar(picture, ax=axis, shrink=0.9)
    axis = lower.subplots()
    each = [rate for name in names for rate in rates[name]]
    labels = [f"{row}, expert {e}" for row, p in zip(rows, partitions) for e in range(len(p.importance))]
    if what == "retained":
        ordered = [rate for name in names for rate in in_reading_order(first[name], rates[name])]
        _draw_regions(lower, axis, ordered, labels, [p.sizes for p in partitions for _ in p.importance])
    else:
        budgets = [p.budget / p.d_ff for p in partitions for _ in p.importance]
        _draw_chosen(lower, axis, each, labels, budgets)
    axis.set_title("channels of each expert, over the decoded tokens sent to it (grey: none)", fontsize=9)
    return figure


def modalities_figure(layers: Mapping[str, Mapping[str, FFNPartition]], rates: Mapping[str, torch.Tensor]) -> Figure:
    """How much image and text tokens agree on which channels matter, and how often decode steps chose those.

    Args:
        layers: FFN partitions by what they were made from: ``"text"``, ``"image"`` and ``"both"``.
        rates: ``chosen_rates`` of the decode steps, by the partition of both.
    """
    plt = pyplot()
    rows = [short(name).removesuffix(".mlp") for name in layers["both"]]
    size = _height(len(rows)) + 0.4
    plain = [name for name, partition in layers["both"].items() if not is_of_experts(partition)]
    figure = plt.figure(figsize=(12, min(2 * size, 12.0) if plain else size))
    figure.set_layout_engine("constrained")
    places = figure.add_gridspec(2 if plain else 1, 2)
    shared, chosen = figure.add_subplot(places[0, 0]), figure.add_subplot(places[0, 1])
    chance = np.mean([compared_channels(p) / p.d_ff for p in layers["both"].values()])
    panels = [
        (shared, modality_overlaps(layers), [f"{a} and {b}" for a, b in MODALITY_PAIRS], "share in common"),
        (chosen, modality_rates(layers, rates), list(MODALITY_GROUPS), "share of decoded tokens that chose them"),
    ]
    for axis, values, columns, label in panels:
        picture = _heat(axis, values, rows)
        axis.set_xticks(range(len(columns)), columns, fontsize=8)
        _write(axis, values)
        _bar_of(figure, picture, axis, label)
    shared.set(ylabel="FFN (layer)", xlabel="channels ranked by the tokens of")
    shared.set_title(
        f"channels that matter most to both\n(top {chance:.0%} of d_ff, which is also what chance shares)", fontsize=10
    )
    chosen.set(xlabel="channels among those that matter most to the tokens of")
    chosen.set_title("how often decode steps chose the channels\nthat matter most to ...", fontsize=10)
    if plain:
        every = figure.add_subplot(places[1, :])
        names = [short(name).removesuffix(".mlp") for name in plain]
        budgets = [layers["both"][name].budget / layers["both"][name].d_ff for name in plain]
        _draw_chosen(figure, every, [rates[name] for name in plain], names, budgets)
        every.set(ylabel="FFN (layer)")
        every.set_title("how often decode steps chose each channel", fontsize=10)
    return figure


def bench_figure(rows: list, title: str, file: Path) -> None:
    """Writes a picture: speed-up of each pruned row against the share of the bytes it reads; of several batch sizes,
    tokens per second and bytes of each row by batch.
    """
    plt = pyplot()
    if len({row.batch for row in rows}) > 1:
        figure, (speed, read) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
        for name in dict.fromkeys(row.row for row in rows):
            own = [row for row in rows if row.row == name]
            sizes = [row.batch for row in own]
            speed.plot(sizes, [row.tokens_per_second for row in own], "o-", label=name)
            read.plot(sizes, [row.share_of(rows) for row in own], "o-", label=name)
        for axis, what in ((speed, "tokens per second, all sequences"), (read, "bytes read per step, share of dense")):
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted({row.batch for row in rows}), sorted({row.batch for row in rows}))
            axis.set(xlabel="sequences at once", ylabel=what, ylim=(0, None))
        speed.legend(fontsize=8, frameon=False)
        figure.suptitle(title, fontsize=11)
        return save(figure, file)
    figure, axis = plt.subplots(figsize=(6, 4.5), layout="constrained")
    dense = max(row.total_bytes for row in rows)
    for name in dict.fromkeys(row.row.split()[0] for row in rows):
        own = [row for row in rows if row.row.split()[0] == name]
        axis.plot([row.total_bytes / dense for row in own], [row.speed_up for row in own], "o-", label=name)
    shares = [0.4 + 0.006 * i for i in range(101)]
    axis.plot(shares, [1 / share for share in shares], color="black", lw=0.8, ls=":", label="as the bytes")
    axis.set(xlabel="bytes read per token, share of dense", ylabel="speed-up against the baseline", title=title)
    axis.invert_xaxis()
    axis.legend(fontsize=8, frameon=False)
    save(figure, file)
