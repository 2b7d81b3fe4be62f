"""Pictures of how good pruned decoding is, and of what decoding does to a prompt's ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from popmm.evaluation.figures import pyplot

if TYPE_CHECKING:
    from popmm.evaluation.dynamics import Dynamics
    from popmm.evaluation.evaluate import Row

BEST = 4  # methods drawn in strong colours


def equal_bytes_figure(rows: list[Row], title: str, file: Path, exact: bool = False) -> None:
    """Writes a PNG: KL to dense (or exact answers) of each method against the bytes it read, with error bars."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8, 5.5), layout="constrained")
    by_method: dict[str, list[Row]] = {}
    for row in rows[1:]:
        name = row.method if row.batch == 1 else f"{row.method}, batch of {row.batch}"
        by_method.setdefault(name, []).append(row)

    def value(row: Row) -> tuple[float, float]:
        return (row.exact, row.exact_spread) if exact else (max(row.kl, 1e-7), row.kl_spread)

    order = sorted(by_method, key=lambda m: value(by_method[m][-1])[0], reverse=exact)
    colours = plt.get_cmap("tab20")
    for i, (name, points) in enumerate(by_method.items()):
        points = sorted(points, key=lambda r: r.bytes_share)
        means, spreads = zip(*(value(r) for r in points))
        rounded = name.startswith("weights at")
        strong = order.index(name) < BEST or rounded or name == "mask"
        how = dict(marker="*" if rounded else "o", ms=11 if rounded else 4, lw=1.5 if strong else 0.8)
        axis.errorbar(
            [r.bytes_share for r in points],
            means,
            spreads,
            label=name,
            alpha=1.0 if strong else 0.5,
            capsize=2,
            color=colours(i % 20),
            **how,
        )
    if not exact:
        axis.set_yscale("log")
    axis.set(xlabel="share of the FFN weights' bytes read per token", title=title)
    axis.set_ylabel("exact answers" if exact else "KL to dense, nats per token (lower is better)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, ncols=2)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def speed_figure(points: Mapping[str, list[tuple[float, float, str]]], title: str, file: Path) -> None:
    """Writes a PNG: KL to the 16-bit model against tokens per second, a colour per owner; up and left is worse.

    Args:
        points: by owner, of (tokens per second, KL, name).
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for (owner, own), marker in zip(points.items(), "so^v"):
        speeds, losses, names = zip(*own)
        shown = [max(loss, 1e-4) for loss in losses]
        axis.scatter(speeds, shown, marker=marker, label=owner, s=40)
        for speed, loss, name in zip(speeds, shown, names):
            axis.annotate(name, (speed, loss), fontsize=7, xytext=(4, 3), textcoords="offset points")
    axis.set_yscale("log")
    axis.set(xlabel="tokens per second (higher is better)", title=title)
    axis.set_ylabel("KL to the 16-bit model, nats per token (lower is better)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def gamma_figure(rows: list[Row], title: str, file: Path) -> None:
    """Writes a PNG: KL to dense against the width of the candidate band, a line per pruning ratio (paper, figure 4)."""
    plt = pyplot()
    figure, (by_width, by_bytes) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for ratio in sorted({row.pruning_ratio for row in rows[1:]}):
        own = [row for row in rows[1:] if row.pruning_ratio == ratio]
        widths = [float(row.method.rsplit(" ", 1)[1]) for row in own]
        values, spreads = [row.kl for row in own], [row.kl_spread for row in own]
        by_width.errorbar(widths, values, spreads, marker="o", ms=4, capsize=2, label=f"{ratio:.0%} pruned")
        by_bytes.errorbar([row.bytes_share for row in own], values, spreads, marker="o", ms=4, capsize=2)
    by_width.set(xlabel="gamma: width of the candidate band, of d_ff", ylabel="KL to dense, nats per token")
    by_bytes.set(xlabel="share of the FFN bytes that this reads")
    for axis in (by_width, by_bytes):
        axis.grid(alpha=0.3)
        axis.set_yscale("log")
    by_width.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def dynamics_figure(layers: Mapping[str, Dynamics], file: Path) -> None:
    """Writes a PNG: ranks of sampled channels over the decode steps of the first and the last FFN, and how much of
    each step's top half was in the prompt's (paper, figure 2)."""
    plt = pyplot()
    names = list(layers)
    shown = [names[0], names[-1]] if len(names) > 1 else names
    figure, axes = plt.subplots(1, len(shown) + 1, figsize=(5 * (len(shown) + 1), 4), layout="constrained")
    colours = plt.get_cmap("viridis")
    for axis, name in zip(axes, shown):
        ranks = layers[name].sampled_ranks
        for i, track in enumerate(ranks.unbind(1)):
            axis.plot(range(len(track)), track.tolist(), color=colours(i / ranks.shape[1]), lw=0.8)
        axis.set(xlabel="decode step (0: the prompt)", ylabel="rank, 0 = most important", title=f"{name}: ranks")
        axis.invert_yaxis()
    last = axes[-1]
    for i, name in enumerate(names):
        last.plot(
            range(1, 1 + len(layers[name].overlap)),
            layers[name].overlap.tolist(),
            lw=1,
            label=name,
            color=colours(i / len(names)),
        )
    last.axhline(0.5, color="black", lw=0.8, ls=":")
    last.set(ylim=(0, 1), xlabel="decode step", title="share of each step's top half\nthat is in the prompt's")
    if len(names) <= 8:
        last.legend(fontsize=7)
    figure.savefig(file, dpi=130)
    plt.close(figure)
