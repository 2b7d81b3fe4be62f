"""FFNs without a gate that are no module to be called: their projections stand among other parts of a block.

OPT, BART or BERT keep them in the decoder layer; BLOOM's and MPT's modules add the residual too. popmm then stands in
for the two projections: the first is given x, and what the second returns is the FFN's output, whatever comes before or
after. So all that must hold is that an activation stands between them and nothing else. One pass of the decoder over a
few tokens verifies that of all its layers: their first projections give known values, and what reaches the second is
compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from popmm.method.activations import activate

from .base import FFNSite, UnsupportedModelError
from .between import SCALES, TOLERANCE, Reading, close, samples
from .dense import INLINE, activations_of, described
from .forms import linear_shape
from .sharded import is_spread
from .weights import check_finite, is_machine_failure, why_not_readable

READING = Reading("first", None, "down", gated=False)


class Pair(nn.Module):
    """The two projections of an FFN, wherever they stand."""

    def __init__(self, first: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.first, self.down = first, down


def pair_site(block: nn.Module, names: tuple[str, str], probe: bool) -> FFNSite:
    """The site of two projections somewhere in a block; ``verify_pairs`` finds what stands between them.

    Args:
        names: of the first projection and of down, from the block on.

    Raises:
        UnsupportedModelError: they cannot be read.
    """
    first, down = (block.get_submodule(name) for name in names)
    layers = dict(zip(names, (first, down)))
    if any(map(is_spread, layers.values())):
        raise UnsupportedModelError(_said(names, "is spread over processes, and is no module by itself"))
    if probe:
        every = {f"{name}.{key}": p for name, own in layers.items() for key, p in own.named_parameters()}
        check_finite({name: p for name, p in every.items() if not why_not_readable(p)})
    around = {id(part): part for name in names for part in _on_the_way(block, name)}
    if any(_tells_channels_apart(part, linear_shape(down)[0]) for part in around.values()):
        raise UnsupportedModelError(_said(names, _OTHERWISE))
    found = [act for part in around.values() for act in activations_of(part)]
    combines = [partial(activate, act) for act in [*found, *INLINE]]
    site = described(Pair(first, down), READING, combines[0], type(block).__name__, layers)
    site.entry, site.likely, site.places = first, combines, layers
    return site


def _on_the_way(block: nn.Module, name: str) -> Iterable[nn.Module]:
    """A block, and the modules that lead to a part of it."""
    parts = name.split(".")[:-1]
    return [block.get_submodule(".".join(parts[:n])) for n in range(len(parts) + 1)]


def _tells_channels_apart(part: nn.Module, d_ff: int) -> bool:
    """Whether something beside the projections has a number for each channel, as a norm between them does."""
    beside = [child for child in part.children() if not linear_shape(child)]
    return any(p.shape == (d_ff,) for child in beside for p in child.parameters(recurse=False))


@torch.no_grad()
def verify_pairs(decoder: nn.Module, sites: list[FFNSite]) -> dict[str, str]:
    """Sets each site's activation by one pass of the decoder; of those that have none, the reason, by name."""
    given: dict[str, Tensor] = {}
    seen: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    handles = []
    for site in sites:
        gate, _, _ = samples(site.down)

        def give(module: nn.Module, args: tuple, output: Tensor, gate: Tensor = gate, name: str = site.name):
            if output.numel() != gate.numel():
                return None
            given[name] = gate.to(output).view(output.shape)
            return given[name]

        def see(module: nn.Module, args: tuple, name: str = site.name) -> None:
            seen[name].append(args[0].detach())

        handles += [site.entry.register_forward_hook(give), site.down.register_forward_pre_hook(see)]
    try:
        _run(decoder)
    except Exception as error:
        if is_machine_failure(error):
            raise
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        return {
            site.name: _said(_names(site), _NOT_RUN.format(kind=type(decoder).__name__, error=message))
            for site in sites
        }
    finally:
        for handle in handles:
            handle.remove()
    refused = {}
    for site in sites:
        combine = _between(site.likely, given.get(site.name), seen[site.name])
        if combine is None:
            refused[site.name] = _said(_names(site), _OTHERWISE)
        else:
            site.combine = combine
    return refused


def _names(site: FFNSite) -> Iterable[str]:
    return [name.removeprefix(f"{site.name}.") for name in site.places]


def _said(names: Iterable[str], reason: str) -> str:
    return f"an FFN without a gate ({' and '.join(names)}) {reason}"


_NOT_RUN = (
    "could not be verified, for its {kind} does not run on a few tokens alone ({error}): register an adapter for this "
    "form (entry-point group 'popmm.adapters')"
)
_OTHERWISE = (
    "has something other than an activation of each channel by itself between its projections: popmm prunes "
    "down(act(up(x)))"
)


def _run(decoder: nn.Module) -> None:
    embedding = decoder.get_input_embeddings()
    ids = torch.arange(len(SCALES), dtype=torch.int64, device=embedding.weight.device) + 4
    decoder(input_ids=ids.remainder(embedding.num_embeddings)[None], use_cache=False)


def _between(likely: list, given: Tensor | None, seen: list[Tensor]):
    """Which of the likely combinations makes what was seen of what was given."""
    if given is None or len(seen) != 1 or seen[0].shape != given.shape:
        return None
    tolerance = TOLERANCE.get(given.dtype, 1e-4)
    for combine in likely:
        try:
            h = combine(given, None)
        except Exception as error:  # what a block holds beside its activation may take anything
            if is_machine_failure(error):
                raise
            continue
        if isinstance(h, Tensor) and close(h.flatten(0, -2)[None], seen[0].flatten(0, -2)[None], tolerance):
            return combine
    return None
