"""Dense FFNs, gated or not, recognised by their linear layers and verified by a probe.

Separate gate and up projections (Llama, Qwen, Mistral, Gemma, OLMo, ...), one fused projection (Phi-3, GLM-4, ...) and
FFNs without a gate (GPT-2, Falcon, Phi-2, Nemotron, ...) are told apart by shapes. Which projection is the gate, how a
fused one is arranged and how the two are combined is decided by running the module's own forward between its
projections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from popmm.compat import NOT_PARTS
from popmm.kernels.grid import on_grid
from popmm.method.activations import activate
from popmm.method.ffn import FFNWeights, ffn

from .adapted import is_adapted
from .base import FFNSite, UnsupportedModelError, register
from .between import ARRANGEMENTS, SCALES, TOLERANCE, Combination, Reading, close, find_combination, form_of
from .forms import gated, linear_shape, mixes_tokens, projections, takes_hidden_states_alone, ungated
from .quantised import QUANTISED_CLOSE, Packed, is_quantised
from .sharded import bias_of_sum, by_channels, is_spread, local, processes, sum_over_processes, why_not_local
from .weights import check_finite, is_machine_failure, weight_of, why_not_plain

__all__ = ["TOLERANCE", "DenseAdapter"]

_OTHER_FORM = "register an adapter for this form (entry-point group 'popmm.adapters')"


class DenseAdapter:
    """FFNs whose direct children are two or three linear layers and an activation."""

    def site(self, module: nn.Module, probe: bool) -> FFNSite | None:
        layers = projections(module)
        if not layers or mixes_tokens(module):
            return None
        readings = _readings(layers)
        if not readings:
            pair = ungated(layers) if len(layers) == 3 else None
            if pair is not None:
                raise UnsupportedModelError(f"{type(module).__name__} {beside_a_pair(pair, layers)}")
            return None
        activations = activations_of(module)
        inputs, outputs = linear_shape(layers[readings[0].gate])
        square = len(layers) == 3 and inputs == outputs
        if not activations and (square or not takes_hidden_states_alone(module)):
            return None
        if not (readings[0].gated or takes_hidden_states_alone(module)):
            raise UnsupportedModelError(
                f"{type(module).__name__} is an FFN that is called with more than x: {_OTHER_FORM}"
            )
        packed = _packed(layers, type(module).__name__)
        beside = [name for name, child in module.named_children() if name not in layers and not _is_scalar(child)]
        found = find_combination(module, readings, [*activations, *INLINE])
        if found is None and beside:
            raise UnsupportedModelError(
                f"{type(module).__name__} has the layers of an FFN and others beside them ({', '.join(beside)}): "
                f"{_OTHER_FORM}"
            )
        candidates = [found] if found else _guesses(readings, activations or list(INLINE))
        if probe:
            candidates = [_probe(module, layers, candidates, packed)]
        reading, combine, factor = candidates[0]
        down = getattr(module, reading.down)
        reason = by_channels([layer for layer in layers.values() if layer is not down], down)
        if reason or (is_spread(down) and reading.up is None and reading.gated):
            fused = f"{reading.gate} holds gate and up, of which no process has the same channels"
            raise UnsupportedModelError(f"{type(module).__name__} is spread over processes, and {reason or fused}")
        site = _site(module, reading, combine, packed)
        site.factor = factor
        site.reduce, site.processes = sum_over_processes(down), processes(down)
        return site


def described(module: nn.Module, reading: Reading, combine: Callable, kind: str, layers: dict) -> FFNSite:
    """The site of a reading of a module's layers.

    Raises:
        UnsupportedModelError: one of ``layers`` cannot be read, in an FFN of this kind.
    """
    return _site(module, reading, combine, _packed(layers, kind))


def _packed(layers: dict[str, nn.Module], kind: str) -> Packed | None:
    """The quantised and adapted ones of an FFN's layers; others must be plain."""
    quantised = {name: layer for name, layer in layers.items() if is_quantised(layer) or is_adapted(layer)}
    for name, layer in layers.items():
        own = why_not_local if is_spread(layer) else why_not_plain
        reason = "" if name in quantised else own(layer, name)
        if reason:
            raise UnsupportedModelError(f"{kind} is an FFN that cannot be read: {reason}")
    plain = [layer for name, layer in layers.items() if name not in quantised]
    return Packed(quantised, plain) if quantised else None


def _site(module: nn.Module, reading: Reading, combine: Callable, packed: Packed | None) -> FFNSite:
    down, up = getattr(module, reading.down), None if reading.up is None else getattr(module, reading.up)
    views = partial(_views, module, reading)
    site = FFNSite(module=module, weights=views, combine=combine, down=down, up=up)
    if packed is not None:
        site.weights, site.values = partial(views, packed.stand_in), partial(views, packed.weight)
        site.packed = packed
    return site


def _readings(layers: dict[str, nn.Module]) -> list[Reading]:
    """Every reading of linear layers as gate, up and down that their shapes allow, likeliest first."""
    found = []
    for names in gated(layers):
        if len(names) == 3:
            found.append(Reading(*names))
        else:
            fused, down = names
            found += [Reading(fused, None, down, arrangement) for arrangement in range(len(ARRANGEMENTS))]
    pair = ungated(layers) if len(layers) == 2 and not found else None
    return found if pair is None else [Reading(pair[0], None, pair[1], gated=False)]


def beside_a_pair(pair: tuple[str, str], layers: Iterable[str]) -> str:
    """What is said of a module in which other linear layers stand beside those of an FFN without a gate."""
    others = [name for name in layers if name not in pair]
    return (
        f"is an FFN of another form ({' and '.join(pair)} widen and narrow, {', '.join(others)} gates no channel): "
        f"{_OTHER_FORM}"
    )


def _is_scalar(module: nn.Module) -> bool:
    """Whether a module holds no parameters but single numbers, as some activations do."""
    return all(p.numel() == 1 for p in module.parameters())


def activations_of(module: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """Activations that the module holds, as children or as plain functions."""
    children = [
        child
        for child in module.children()
        if not linear_shape(child) and not isinstance(child, (nn.Dropout, nn.ModuleList)) and _is_scalar(child)
    ]
    return children + [value for key, value in vars(module).items() if callable(value) and key not in NOT_PARTS]


# tried where a module holds no activation and so must call one in its forward
INLINE = (F.silu, F.gelu, partial(F.gelu, approximate="tanh"), F.relu)


def _guesses(readings: list[Reading], activations: list[Callable]) -> list[Combination]:
    return [Combination(reading, partial(activate, act)) for act in activations for reading in readings]


def _weight(layer: nn.Module) -> Tensor:
    return local(weight_of(layer))


def _bias(layer: nn.Module) -> Tensor | None:
    return local(getattr(layer, "bias", None))


def _bias_of_down(layer: nn.Module) -> Tensor | None:
    return bias_of_sum(layer) if is_spread(layer) else _bias(layer)


def _views(module: nn.Module, reading: Reading, weight: Callable[[nn.Module], Tensor] = _weight) -> FFNWeights:
    gate, down = getattr(module, reading.gate), getattr(module, reading.down)
    if reading.up is not None:
        up = getattr(module, reading.up)
        return FFNWeights(weight(gate), weight(up), weight(down), _bias(gate), _bias(up), _bias_of_down(down))
    if not reading.gated:
        return FFNWeights(weight(gate), None, weight(down), _bias(gate), None, _bias_of_down(down))
    apart = ARRANGEMENTS[reading.arrangement][0]
    biases = (None, None) if _bias(gate) is None else apart(_bias(gate))
    return FFNWeights(*apart(weight(gate)), weight(down), *biases, _bias(down))


@torch.no_grad()
def _probe(
    module: nn.Module, layers: dict[str, nn.Module], candidates: list[Combination], packed: Packed | None
) -> Combination:
    """The candidate that reproduces the module's own output on random tokens.

    Raises:
        UnsupportedModelError: none does.
    """
    kind = type(module).__name__
    plain_layers = {name: layer for name, layer in layers.items() if packed is None or name not in packed.layers}
    given = {f"{name}.{key}": p for name, layer in plain_layers.items() for key, p in layer.named_parameters()}
    check_finite({name: local(p) for name, p in given.items()})
    read = {layer: _weight(layer) if packed is None else packed.in_its_dtype(layer) for layer in layers.values()}
    views = _views(module, candidates[0].reading, read.__getitem__)
    generator, plain = torch.Generator("cpu").manual_seed(0), dict(dtype=torch.float32, device="cpu")
    x = torch.randn(1, len(SCALES), views.d_model, generator=generator, **plain).to(views.gate.device)
    # so that the channels take the sizes of SCALES
    spread = torch.nn.functional.linear(x.to(views.gate.dtype), views.gate).float().std(-1, keepdim=True)
    size = torch.tensor(SCALES, **plain).to(x.device)[:, None] / spread.clamp_min(1e-6)
    x = (x * size).to(views.gate.dtype)
    # what quantised layers round their inputs to is not known
    tolerance = TOLERANCE.get(x.dtype, 1e-4) if packed is None or packed.exact else QUANTISED_CLOSE
    try:
        expected = module(x)
    except Exception as error:
        if is_machine_failure(error):
            raise
        raise UnsupportedModelError(
            f"{kind} looks like an FFN but does not run on hidden states alone: {error}"
        ) from error
    if isinstance(expected, Tensor):
        for found in candidates:
            views = _views(module, found.reading, read.__getitem__)
            ours = ffn(x, views, found.combine)
            reduce = sum_over_processes(getattr(module, found.reading.down)) if packed is None else None
            ours = ours if reduce is None else reduce(ours)
            if close(ours, expected, tolerance):
                if packed is not None:
                    packed.one_plane = (
                        not packed.exact and views.up is not None and on_grid(views.gate) and on_grid(views.up)
                    )
                return found
    raise UnsupportedModelError(
        f"{kind} has the layers of {'a gated FFN' if candidates[0].reading.gated else 'an FFN without a gate'} but "
        f"computes something other than {form_of(candidates[0].reading)}: {_OTHER_FORM}"
    )


register(DenseAdapter())
