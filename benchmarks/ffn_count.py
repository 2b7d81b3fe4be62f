"""Counts a model's FFNs by what their weights look like and what they do, without asking popmm's adapters.

A module owns an FFN if two of its weights (its own, or those of layers directly in it) lead from d_model to something
wider and back, and if what it does to a token does not depend on other tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

_NO_LAYERS = (nn.Embedding, nn.modules.conv._ConvNd, nn.LayerNorm, nn.RNNBase)
_OF_OTHER_MODALITY = re.compile(r"vision|visual|image|video|audio|speech|sound|qformer|resampler|encoder\\.")
PROMPT = 7


def count_ffns(
    model: nn.Module, d_model: int, known: set[str], accounted: Callable[[str], bool]
) -> tuple[list[str], list[str]]:
    """Names of the modules that own an FFN, and of those that nobody accounts for.

    Args:
        d_model: of the language model.
        known: names of the FFNs that popmm has found; they are not tried again.
        accounted: whether popmm has said something of a module of that name.
    """
    owners = [name for name, module in model.named_modules() if _is_pair(_shapes(module), d_model)]
    owners += [name for name in _spread(model, d_model) if not any(o.startswith(f"{name}.") for o in owners)]
    calls, ran = _calls(model, [name for name in owners if name not in known])
    present, missed = [], []
    for name in owners:
        if name in known or accounted(name):
            present.append(name)
        elif name not in calls:
            if not ran and not _OF_OTHER_MODALITY.search(name):  # nobody knows: it is counted
                present.append(name)
        elif _is_an_ffn(model.get_submodule(name), *calls[name]):
            present.append(name)
            missed.append(name)
    return present, missed


def _shapes(module: nn.Module) -> list[tuple[int, int]]:
    """The weights of a module and of the layers directly in it, two sizes each, the smaller first."""
    own = [p for p in module.parameters(recurse=False)] if not isinstance(module, _NO_LAYERS) else []
    if _is_layer(module):
        own = [p for p in own if p.ndim == 3]
    own += [child.weight for child in module.children() if _is_layer(child) and isinstance(child.weight, Tensor)]
    return [tuple(sorted(w.shape[-2:])) for w in own if w.ndim in (2, 3)]


def _is_layer(module: nn.Module) -> bool:
    leaf = next(module.children(), None) is None
    return leaf and hasattr(module, "weight") and not isinstance(module, _NO_LAYERS)


def _is_pair(shapes: list[tuple[int, int]], d_model: int) -> bool:
    """Whether two weights lead from d_model to a wider size and back: up and down, or gate and up in one and down."""
    wide = [b for a, b in shapes if a == d_model and b > d_model]
    fused = [b for b in wide if 2 * b in wide]
    return bool(fused) or any(wide.count(size) > 1 for size in wide)


def _spread(model: nn.Module, d_model: int) -> Iterator[str]:
    """Blocks whose up and down projections lie in different parts of them."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        for i, block in enumerate(module):
            parts = [child for child in block.children() if not _is_layer(child)]
            layers = [layer for part in parts for layer in part.children() if _is_layer(layer)]
            layers = [layer for layer in layers if isinstance(layer, nn.Linear)]
            if _is_pair([tuple(sorted(layer.weight.shape)) for layer in layers], d_model):
                yield f"{name}.{i}"


def _calls(model: nn.Module, names: list[str]) -> tuple[dict[str, tuple], bool]:
    """Arguments of the last call of each module while the model reads a prompt, and whether it read it to the end."""
    seen, hooks, ran = {}, [], True
    for name in names:

        def keep(module, args, kwargs, name=name) -> None:
            seen[name] = args, kwargs

        hooks.append(model.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True))
    ids = torch.randint(4, 60, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except Exception:  # it wants more than ids (pictures, sound): what was called before that is known
        ran = False
    finally:
        for hook in hooks:
            hook.remove()
    return seen, ran


@torch.no_grad()
def _is_an_ffn(module: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Whether a module computes each token by itself, or holds a projection pair that does."""
    x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point()), None)
    if x is None or PROMPT not in x.shape:
        return True
    other = x.clone()
    other.select(x.shape.index(PROMPT), 0).add_(1.0)

    def run(instead: Tensor) -> tuple[Tensor, list]:
        flows, hooks = [], []
        for layer in module.modules():
            if _is_layer(layer) and layer.weight.ndim == 2:
                hooks.append(layer.register_forward_hook(lambda m, a, y: flows.append((m, a[0], y))))
        try:
            y = module(
                *(instead if a is x else a for a in args), **{k: instead if v is x else v for k, v in kwargs.items()}
            )
        finally:
            for hook in hooks:
                hook.remove()
        return (y[0] if isinstance(y, (tuple, list)) else y), flows

    try:
        (y, flows), (changed, _) = run(x), run(other)
    except Exception:
        return True  # cannot be told: it is counted
    at = y.shape.index(PROMPT) if isinstance(y, Tensor) and PROMPT in y.shape else None
    if at is None:
        return True
    if torch.equal(y.select(at, PROMPT - 1), changed.select(at, PROMPT - 1)):
        return True
    return any(_follows(up, down) for _, _, up in flows for _, down, _ in flows)


def _follows(g: Tensor, h: Tensor) -> bool:
    """Whether h is an activation of g, elementwise: activations rise with what is positive."""
    if g.numel() != h.numel() or g.data_ptr() == h.data_ptr():
        return False
    g, h = g.flatten(), h.flatten()
    high = g > g.std()
    if int(high.sum()) < 8 or torch.equal(g, h):
        return False
    ranks = torch.stack([g[high].argsort().argsort(), h[high].argsort().argsort()]).float()
    return bool(torch.corrcoef(ranks)[0, 1] > 0.99)
