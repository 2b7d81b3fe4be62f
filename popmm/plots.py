"""Pictures of a model's partition."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from popmm.partition import FFNPartition
    from popmm.trace import Trace

RETAINED, PRUNED = "#1f4e79", "#e4e4e4"


def pyplot():
    """matplotlib without a display."""
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("pictures need matplotlib: pip install 'popmm[eval]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def pass_rates(layers: Mapping[str, FFNPartition], trace: Trace) -> dict[str, torch.Tensor]:
    """How often each channel passed, float32 ``[d_ff]`` in order of falling importance, by FFN name."""
    rates = {}
    for name, partition in layers.items():
        if partition.tokens.ndim:
            continue
        order = torch.cat([partition.retained, partition.candidate, partition.pruned]).cpu()
        passed = trace[name].float().flatten(0, 1)
        rates[name] = (passed.mean(0) if len(passed) else torch.zeros(partition.d_ff))[order]
    return rates


def regions_figure(layers: Mapping[str, FFNPartition], trace: Trace, file: Path) -> None:
    """Writes a PNG: per layer the three regions, and how often each candidate passed."""
    plt = pyplot()
    from matplotlib.patches import Patch

    rates = pass_rates(layers, trace)
    steps = max(mask.shape[0] for mask in trace.values())
    figure, axes = plt.subplots(
        len(rates), 1, figsize=(10, 1.0 + 0.75 * len(rates)), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, (name, rate) in zip(axes[:, 0], rates.items()):
        s = layers[name].sizes
        axis.axvspan(0, s.retained, color=RETAINED, lw=0)
        axis.axvspan(s.read, s.d_ff, color=PRUNED, lw=0)
        ranks = torch.arange(s.retained, s.read) + 0.5
        axis.bar(ranks.numpy(), rate[s.retained : s.read].numpy(), width=1.0, color="#e07b39", lw=0)
        axis.axvline(s.budget, color="black", lw=0.8, ls=":")
        axis.set(xlim=(0, s.d_ff), ylim=(0, 1), yticks=[0, 1])
        axis.set_ylabel(name.split("layers.")[-1], rotation=0, ha="right", va="center", fontsize=8)
    axes[-1, 0].set_xlabel("channels, by falling importance to the prompt (dotted: budget K)")
    figure.suptitle(f"Regions per FFN, and share of {steps} decode steps in which each candidate passed", fontsize=11)
    figure.legend(
        handles=[
            Patch(color=RETAINED, label="retained"),
            Patch(color="#e07b39", label="candidate (height: share of steps passed)"),
            Patch(color=PRUNED, label="pruned"),
        ],
        loc="outside lower center",
        ncols=3,
        fontsize=8,
        frameon=False,
    )
    figure.savefig(file, dpi=130)
    plt.close(figure)


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of the channels a that are among b."""
    return torch.isin(a, b).float().mean().item()


def experts_figure(first: Mapping[str, FFNPartition], second: Mapping[str, FFNPartition], file: Path) -> None:
    """Writes a PNG: per layer and expert, tokens routed, and overlap of the retained channels between
    experts and between two prompts."""
    plt = pyplot()
    names = [name for name, partition in first.items() if partition.tokens.ndim]
    figure, axes = plt.subplots(
        len(names),
        3,
        figsize=(11, 0.8 + 2.3 * len(names)),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"width_ratios": [1.4, 1, 1.4]},
    )
    for (routed, between, prompts), name in zip(axes, names):
        p, q = first[name], second[name]
        experts = range(len(p.tokens))
        width = 0.4
        routed.bar([e - width / 2 for e in experts], p.tokens.tolist(), width, color=RETAINED, label="first prompt")
        routed.bar([e + width / 2 for e in experts], q.tokens.tolist(), width, color="#9dbfdd", label="second prompt")
        routed.set(xticks=list(experts) if len(p.tokens) <= 16 else [], ylabel=name.split("layers.")[-1])
        matrix = [[overlap(p.retained[a], p.retained[b]) for b in experts] for a in experts]
        picture = between.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
        between.set(xticks=[], yticks=[])
        figure.colorbar(picture, ax=between, shrink=0.8)
        prompts.bar(experts, [overlap(p.retained[e], q.retained[e]) for e in experts], color="#e07b39")
        chance = p.sizes.retained / p.sizes.d_ff
        prompts.axhline(chance, color="black", lw=0.8, ls=":")
        prompts.set(ylim=(0, 1), xticks=list(experts) if len(p.tokens) <= 16 else [])
    axes[0, 0].set_title("prompt tokens routed to each expert", fontsize=10)
    axes[0, 0].legend(fontsize=7, frameon=False)
    axes[0, 1].set_title("retained channels shared\nbetween experts", fontsize=10)
    axes[0, 2].set_title("retained channels shared between\nthe two prompts (dotted: chance)", fontsize=10)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def modalities_figure(layers: Mapping[str, Mapping[str, FFNPartition]], file: Path) -> None:
    """Writes a PNG: per FFN, the share of retained channels that partitions from different tokens agree on.

    Args:
        layers: FFN partitions by what they were made from: ``"text"``, ``"image"`` and ``"both"``.
    """
    plt = pyplot()
    names = list(layers["both"])
    pairs = [("image", "text", "#7f7f7f"), ("image", "both", "#e07b39"), ("text", "both", RETAINED)]
    figure, axis = plt.subplots(figsize=(max(7, 1.5 + 0.45 * len(names)), 4), layout="constrained")
    width = 0.8 / len(pairs)
    for i, (a, b, colour) in enumerate(pairs):
        heights = [_mean_overlap(layers[a][name], layers[b][name]) for name in names]
        places = [j + (i - 1) * width for j in range(len(names))]
        axis.bar(places, heights, width, color=colour, label=f"{a} alone and {b}" if b != "text" else f"{a} and {b}")
    chance = [layers["both"][name].sizes.retained / layers["both"][name].d_ff for name in names]
    axis.plot(range(len(names)), chance, color="black", lw=0.8, ls=":", label="chance")
    labels = [name.split("layers.")[-1].removesuffix(".mlp") for name in names]
    axis.set_xticks(range(len(names)), labels, fontsize=8, rotation=90 if len(names) > 16 else 0)
    axis.set(ylim=(0, 1), xlabel="FFN", ylabel="share of retained channels in common")
    axis.legend(fontsize=8, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _mean_overlap(a: FFNPartition, b: FFNPartition) -> float:
    """Overlap of the retained channels, over experts on average."""
    if not a.tokens.ndim:
        return overlap(a.retained, b.retained)
    return sum(overlap(x, y) for x, y in zip(a.retained, b.retained)) / len(a.retained)


def bench_figure(rows: list, title: str, file: Path) -> None:
    """Writes a PNG: speed-up of each pruned row against the share of the bytes it reads."""
    plt = pyplot()
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
    figure.savefig(file, dpi=130)
    plt.close(figure)
