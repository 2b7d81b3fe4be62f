"""Bytes that a decode step of a whole model reads, and how fast this memory could bring them."""

from __future__ import annotations

import time

import torch

from popmm.adapters import describe
from popmm.layouts.traffic import at_once

COPIED = 1 << 28  # elements of the copy that measures the memory's bandwidth


def dense_ffn_bytes(model, batch: int) -> int:
    """FFN bytes that a dense decode step of ``batch`` tokens reads."""
    return round(sum(site.active_bytes() * at_once(site, batch) for site in describe(model, probe=False).sites()))


def other_bytes(model) -> int:
    """Bytes of all weights that a decoded token reads outside the FFNs: attention, routers, output layer."""
    description = describe(model, probe=False)
    size = sum(p.numel() * p.element_size() for p in description.decoder.parameters())
    sites = sum(
        site.weights().bytes_per_channel() * site.weights().d_ff * max(site.n_experts, 1)
        for site in {id(site.module): site for site in description.sites()}.values()  # layers may share one
    )
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    return size - sites - embedding.numel() * embedding.element_size() + head.numel() * head.element_size()


def int8_saving(model) -> tuple[int, int]:
    """Bytes per step that ``quantised_copy`` saves, of the FFNs and of all weights."""
    description = describe(model, probe=False)
    linear = {id(m): m for m in description.decoder.modules() if isinstance(m, torch.nn.Linear)}
    head = model.get_output_embeddings()
    linear[id(head)] = head
    ffns = [site for site in description.sites() if not site.is_experts]
    ffn = sum(site.active_bytes() - site.active_bytes() // site.weights().gate.element_size() for site in ffns)
    return ffn, sum(m.weight.numel() * (m.weight.element_size() - 1) for m in linear.values())


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, in GB, that copying a large tensor reads and writes."""
    n = COPIED if device.type == "cuda" else COPIED // 8
    source = torch.ones(n, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * n * 4 / min(times) / 1e9
