"""Pictures of a model's partition."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from popmm.state import PartitionState
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


def pass_rates(state: PartitionState, trace: Trace) -> dict[str, torch.Tensor]:
    """How often each channel passed, float32 ``[d_ff]`` in order of falling importance, by FFN name."""
    rates = {}
    for name, partition in state.layers.items():
        if partition.tokens.ndim:
            continue
        order = torch.cat([partition.retained, partition.candidate, partition.pruned]).cpu()
        rates[name] = trace[name].float().mean((0, 1))[order]
    return rates


def regions_figure(state: PartitionState, trace: Trace, file: Path) -> None:
    """Writes a PNG: per layer the three regions, and how often each candidate passed."""
    plt = pyplot()
    from matplotlib.patches import Patch

    rates = pass_rates(state, trace)
    steps = max(mask.shape[0] for mask in trace.values())
    figure, axes = plt.subplots(
        len(rates), 1, figsize=(10, 1.0 + 0.75 * len(rates)), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, (name, rate) in zip(axes[:, 0], rates.items()):
        s = state.layers[name].sizes
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
