"""What the figures of ``popmm inspect`` show, as arrays: how often channels were chosen, what choices share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from popmm.method.partition import FFNPartition

COLUMNS = 1000  # of a heat map, at most: as many as a screen shows
MODALITY_PAIRS = (("image", "text"), ("image", "both"), ("text", "both"))
MODALITY_GROUPS = ("both", "image alone", "text alone", "neither")


def is_of_experts(partition: FFNPartition) -> bool:
    return partition.importance.ndim > 1


def chosen_rates(layers: Mapping[str, FFNPartition], trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How often each channel was computed at decode, by FFN name, in the model's own channel numbers.

    Args:
        trace: masks of the decode steps, bool ``[steps, batch, d_ff]``, of experts ``[steps, batch, n_experts, d_ff]``.

    Returns:
        float32 ``[d_ff]``: share of the decoded tokens; of experts ``[n_experts, d_ff]``, of those sent to the expert.
        nan where there was none.
    """
    rates = {}
    for name, partition in layers.items():
        chosen = trace[name].flatten(0, 1)
        tokens = chosen.any(-1).sum(0, keepdim=True).T if is_of_experts(partition) else len(chosen)
        rates[name] = chosen.sum(0).float() / tokens
    return rates


def routed_rates(layers: Mapping[str, FFNPartition], trace: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Share of the decoded tokens that each expert was given, float32 ``[n_experts]``, by FFN name."""
    found = {name: trace[name].flatten(0, 1) for name, partition in layers.items() if is_of_experts(partition)}
    return {name: chosen.any(-1).sum(0).float() / len(chosen) for name, chosen in found.items()}


def in_reading_order(partition: FFNPartition, rates: Tensor) -> Tensor:
    """Rates ``[(E,) d_ff]`` in the order retained, candidate, pruned, each by falling importance."""
    order = torch.cat([partition.retained, partition.candidate, partition.pruned], dim=-1).cpu()
    return rates.gather(-1, order)


def falling(rates: Tensor) -> Tensor:
    """Rates ``[..., d_ff]``, each row by itself from the channel chosen most often to the least."""
    return rates.sort(dim=-1, descending=True)[0]


def usage(rates: Tensor) -> Tensor:
    """Shares of channels that were chosen always, at times and never, float32 ``[..., 3]``; nan without a step."""
    unknown = rates.isnan().any(-1, keepdim=True)
    parts = torch.stack([(rates == 1), (rates > 0) & (rates < 1), (rates == 0)], dim=-1).float().mean(-2)
    return torch.where(unknown, torch.nan, parts)


def grid(rows: list[Tensor]) -> np.ndarray:
    """Rows ``[d_ff]`` of one heat map ``[len(rows), n]``: as wide as the widest, at most ``COLUMNS``; means."""
    columns = min(max(len(row) for row in rows), COLUMNS)
    found = np.empty((len(rows), columns))
    for line, row in zip(found, rows):
        values = np.concatenate([[0.0], np.cumsum(row.double().numpy())])
        if np.isnan(values).any():
            line[:] = np.nan
            continue
        edges = np.interp(np.linspace(0, len(row), columns + 1), np.arange(len(row) + 1), values)
        line[:] = np.diff(edges) * columns / len(row)
    return found


def common_choice(a: Tensor, b: Tensor) -> Tensor:
    """Of the channels that a token of a chooses, the share that a token of b chooses too, on average.

    Args:
        a, b: rates ``[..., d_ff]``. Where both choose K at random it is K / d_ff.
    """
    return (a * b).sum(-1) / a.sum(-1)


def overlap(a: Tensor, b: Tensor) -> float:
    """Share of the channels a that are among b."""
    return torch.isin(a, b).float().mean().item()


def compared_channels(partition: FFNPartition) -> int:
    """How many of the most important channels are compared: the retained ones; without any, K; all of them: half."""
    sizes = partition.sizes
    if 0 < sizes.retained < sizes.d_ff:
        return sizes.retained
    return sizes.budget if sizes.budget < sizes.d_ff else sizes.d_ff // 2


def most_important(partition: FFNPartition, n: int) -> Tensor:
    """The n channels of most importance, int64 ``[(E,) n]``."""
    return partition.importance.argsort(dim=-1, descending=True, stable=True)[..., :n].cpu()


def top_overlap(a: FFNPartition, b: FFNPartition) -> float:
    """Share of the most important channels (``compared_channels``) in common, over experts on average."""
    n = compared_channels(a)
    first, second = most_important(a, n), most_important(b, n)
    if not is_of_experts(a):
        return overlap(first, second)
    return sum(map(overlap, first, second)) / len(first)


def modality_overlaps(layers: Mapping[str, Mapping[str, FFNPartition]]) -> np.ndarray:
    """``[FFNs, len(MODALITY_PAIRS)]``: share of the most important channels in common, by what ranked them.

    Args:
        layers: FFN partitions by the tokens that they were made from: ``"text"``, ``"image"`` and ``"both"``.
    """
    names = layers["both"]
    return np.array([[top_overlap(layers[a][name], layers[b][name]) for a, b in MODALITY_PAIRS] for name in names])


def modality_rates(layers: Mapping[str, Mapping[str, FFNPartition]], rates: Mapping[str, Tensor]) -> np.ndarray:
    """``[FFNs, len(MODALITY_GROUPS)]``: how often decode steps chose the channels that matter to both
    kinds of tokens, to one alone and to neither; nan where there are no such channels."""
    found = []
    for name, partition in layers["both"].items():
        n, own = compared_channels(partition), rates[name]
        image, text = (_marked(most_important(layers[kind][name], n), own.shape) for kind in ("image", "text"))
        groups = (image & text, image & ~text, text & ~image, ~image & ~text)
        found.append([own[group].nanmean().item() for group in groups])
    return np.array(found)


def _marked(channels: Tensor, shape: torch.Size) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool, device=channels.device).scatter_(-1, channels, True)


def expert_grids(
    first: Mapping[str, FFNPartition],
    second: Mapping[str, FFNPartition],
    rates: Mapping[str, Tensor],
    second_rates: Mapping[str, Tensor],
) -> tuple[np.ndarray, np.ndarray]:
    """What two prompts have in common, ``[FFNs, most experts]`` each, nan where an expert was not asked.

    Where regions are retained, these are compared; with ``gate``, which retains none, what decode steps chose is.

    Returns:
        Share of an expert's channels that another expert of its layer has too, on average over the others; and that the
        same expert has on the second prompt.
    """
    between, prompts = [], []
    for name in (name for name, partition in first.items() if is_of_experts(partition)):
        a, b = _own(first[name], rates[name]), _own(second[name], second_rates[name])
        common = common_choice(a[:, None], a[None])
        others = common[~torch.eye(len(a), dtype=torch.bool, device=a.device)].view(len(a), -1)
        between.append(others.nanmean(-1))
        prompts.append(common_choice(a, b))
    return stacked(between), stacked(prompts)


def _own(partition: FFNPartition, rates: Tensor) -> Tensor:
    if not partition.sizes.retained:
        return rates
    return _marked(partition.retained.cpu(), rates.shape).float()


def stacked(rows: list[Tensor]) -> np.ndarray:
    """Rows of several lengths as one array, filled up with nan."""
    found = np.full((len(rows), max(map(len, rows))), np.nan)
    for line, row in zip(found, rows):
        line[: len(row)] = row.numpy()
    return found
