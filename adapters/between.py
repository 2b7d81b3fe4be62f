"""What a module's own forward does between its projections, computed without their weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from popmm.method.activations import activate

from .base import UnsupportedModelError
from .forms import linear_shape
from .weights import is_machine_failure

# size of the values that a combination is tried with: ordinary ones, and ones that a clamp would change
SCALES = (0.5, 1.0, 1.0, 3.0, 30.0, 100.0)
# relative error of a correct description, by dtype: rounding of two products in a row
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}

# the arrangements of gate and up in the rows of one fused projection: (apart, together)
ARRANGEMENTS: tuple[tuple[Callable, Callable], ...] = (
    (lambda rows: rows.chunk(2), lambda gate, up: torch.cat([gate, up], dim=-1)),
    (lambda rows: rows.chunk(2)[::-1], lambda gate, up: torch.cat([up, gate], dim=-1)),
    (lambda rows: (rows[0::2], rows[1::2]), lambda gate, up: torch.stack([gate, up], dim=-1).flatten(-2)),
)


class Reading(NamedTuple):
    """One reading of a module's linear layers; ``up`` is None if the gate's layer holds both, or there is no gate."""

    gate: str
    up: str | None
    down: str
    arrangement: int = 0
    gated: bool = True  # else ``gate`` is the first projection of an FFN without one


class Combination(NamedTuple):
    """How a module's forward joins gate and up."""

    reading: Reading
    combine: Callable[[Tensor, Tensor | None], Tensor]  # (gate [..., n], up [..., n] or None) -> h times the factor
    factor: Callable[[], Tensor | float] | None = None  # of the module's output, where it has one


class _Projection:
    """Stands for a linear layer: gives what it was told to, or hands on its input."""

    def __init__(self, layer: nn.Module, output: Tensor | None) -> None:
        self._layer, self._output, self.seen = layer, output, None

    def __call__(self, x: Tensor) -> Tensor:
        self.seen = x
        return x if self._output is None else self._output

    def __getattr__(self, name: str):
        return getattr(self._layer, name)


class _Between:
    """A module with stand-ins for its projections; what it does at random is off."""

    training = False

    def __init__(self, module: nn.Module, stand_ins: dict[str, Any]) -> None:
        self._module, self._stand_ins = module, stand_ins

    def __getattr__(self, name: str):
        if name in self._stand_ins:
            return self._stand_ins[name]
        method = getattr(type(self._module), name, None)
        if isinstance(method, FunctionType):
            return MethodType(method, self)
        found = getattr(self._module, name)
        return _same if isinstance(found, nn.Dropout) else found


def _same(x: Tensor) -> Tensor:
    return x


def run_between(
    module: nn.Module, reading: Reading, gate: Tensor, up: Tensor | None, scalars: dict[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """``module``'s forward for given projections ``[..., n]``: what reaches down, and what the module makes of it.

    ``scalars`` stand for parameters of the module's own.
    """
    down = _Projection(getattr(module, reading.down), None)
    layers: dict[str, Any] = {**(scalars or {}), reading.down: down}
    if up is None:
        layers[reading.gate] = _Projection(getattr(module, reading.gate), gate)
    elif reading.up is None:
        both = ARRANGEMENTS[reading.arrangement][1](gate, up)
        layers[reading.gate] = _Projection(getattr(module, reading.gate), both)
    else:
        layers[reading.gate] = _Projection(getattr(module, reading.gate), gate)
        layers[reading.up] = _Projection(getattr(module, reading.up), up)
    x = gate.new_zeros(*gate.shape[:-1], linear_shape(getattr(module, reading.gate))[0])
    y = type(module).forward(_Between(module, layers), x)
    return down.seen, y


def own_combine(module: nn.Module, reading: Reading, gate: Tensor, up: Tensor | None) -> Tensor:
    """The module's own combination of gate and up ``[..., n]``, its output's factor included."""
    return run_between(module, reading, gate, up)[1]


@torch.no_grad()
def find_combination(
    module: nn.Module, readings: list[Reading], activations: list[Callable[[Tensor], Tensor]]
) -> Combination | None:
    """The combination that a module's forward computes, ``[..., n]`` each; None if that cannot be told.

    It is ``activation(gate) * up`` with one of ``activations`` where that is right (``activation(gate)`` without a
    gate), and else the module's own forward between the projections.

    Raises:
        UnsupportedModelError: the forward does something between or after the projections that forbids pruning.
    """
    gate, up, tolerance = samples(getattr(module, readings[0].down))
    up = up if readings[0].gated else None
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    scalars = {
        name: torch.full(p.shape, 2.0, dtype=gate.dtype, device=gate.device)
        for name, p in own
        if p.numel() == 1 or p.is_meta
    }
    refused, general = None, None
    for reading in readings:
        run = partial(run_between, module, reading, scalars=scalars)
        ran = _try(run, gate, up)
        if ran is None or ran[0].shape != gate.shape or ran[1].shape != gate.shape:
            continue
        h, y = ran
        for activation in activations:
            acted = _try(lambda g, u, act=activation: (activate(act, g, u),) * 2, gate, up)
            if acted is not None and close(y, acted[0], tolerance):
                return Combination(reading, partial(activate, activation))
        few = torch.arange(gate.shape[-1] - 1, -1, -3, dtype=torch.int64, device=gate.device)
        some = _try(run, gate[..., few], None if up is None else up[..., few])
        size = float((y * h).sum() / (h * h).sum())
        if some is None or not close(some[0], h[..., few], tolerance):
            refused = refused or _why_not_by_channel(run, gate, up, h, few, tolerance)
        elif not close(y, size * h, tolerance):
            refused = f"changes its output after the down projection: popmm prunes {form_of(reading)}"
        elif general is None or not general[0]:
            factor = None
            if not close(y, h, tolerance):
                scaling = [name for name in scalars if _scales(module, reading, gate, up, scalars, name, h, tolerance)]
                factor = partial(getattr, module, scaling[0]) if scaling else partial(float, size)
            found = Combination(reading, partial(own_combine, module, reading), factor)
            general = up is None or _is_linear_in_up(run, gate, up, tolerance), found
    if general is not None:
        return general[1]
    if refused is not None:
        raise UnsupportedModelError(f"{type(module).__name__} {refused}")
    return None


_OF_OTHERS = (
    "computes a channel from other channels too (a norm or a choice among them stands between its projections): popmm "
    "prunes FFNs whose channels do not depend on each other"
)
_OF_NORM = (
    "divides its channels by a norm over all of them before its down projection: a pruned step computes some of them "
    "only, and so would divide by another number than the dense model; popmm prunes FFNs whose channels do not depend "
    "on each other"
)
_OF_PLACE = (
    "treats its channels differently between its projections (parameters of its own for each of them): popmm prunes "
    "FFNs whose channels are all computed alike"
)


def form_of(reading: Reading) -> str:
    """What an FFN of this reading computes."""
    return "down(act(gate(x)) * up(x))" if reading.gated else "down(act(up(x)))"


def _why_not_by_channel(
    run: Callable, gate: Tensor, up: Tensor | None, h: Tensor, few: Tensor, tolerance: float
) -> str:
    """What is said of a module whose channels ``few`` are not computed as they are among all: do others change too?"""
    changed = gate.clone()
    changed[..., few] += 1
    rest = torch.ones(gate.shape[-1], dtype=torch.bool, device=gate.device)
    rest[few] = False
    ran = _try(run, changed, up)
    if ran is None:
        return _OF_OTHERS
    now, before = ran[0][..., rest], h[..., rest]
    if close(now, before, tolerance):
        return _OF_PLACE
    factor = (now * before).sum(-1, keepdim=True) / before.square().sum(-1, keepdim=True)
    return _OF_NORM if close(now, factor * before, tolerance) else _OF_OTHERS


def samples(down: nn.Module) -> tuple[Tensor, Tensor, float]:
    """Gate and up ``[1, len(SCALES), d_ff]`` where the weights lie, and the tolerance of their dtype."""
    weight = next(down.parameters(), None)
    lies = weight is not None and not weight.is_meta
    device, dtype = (weight.device, weight.dtype) if lies else (torch.device("cpu"), torch.float32)
    generator = torch.Generator("cpu").manual_seed(0)
    shape = 1, len(SCALES), linear_shape(down)[0]
    plain = dict(dtype=torch.float32, device="cpu")
    scale = torch.tensor(SCALES, **plain)[:, None]
    gate, up = ((torch.randn(shape, generator=generator, **plain) * scale).to(device) for _ in range(2))
    return gate, up, max(TOLERANCE.get(dtype, 1e-4), TOLERANCE[gate.dtype])


def _try(run: Callable, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """What ``run`` gives, if it runs and gives tensors."""
    try:
        h, y = run(gate, up)
    except Exception as error:  # whatever the module's own code may raise: then only its weights can tell
        if is_machine_failure(error):
            raise
        return None
    return (h, y) if isinstance(h, Tensor) and isinstance(y, Tensor) else None


def _scales(module, reading, gate, up, scalars, name, h, tolerance) -> bool:
    """Whether the output is h times this parameter."""
    _, y = run_between(module, reading, gate, up, {**scalars, name: scalars[name] * 1.5})
    _, before = run_between(module, reading, gate, up, scalars)
    return close(y, before * 1.5, tolerance) and not close(y, before, tolerance)


def _is_linear_in_up(run: Callable, gate: Tensor, up: Tensor, tolerance: float) -> bool:
    small = slice(0, 3)  # clamps are not linear
    gate, up = gate[:, small] / 2, up[:, small] / 2
    none, once, twice = (run(gate, factor * up)[0] for factor in (0, 1, 2))
    return close(twice - once, once - none, tolerance)


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether a is b for every token, ``[..., n]``, as far as rounding allows; tokens that overflow say nothing."""
    a, b = a.float().flatten(0, -2), b.float().flatten(0, -2)
    if a.shape != b.shape:
        return False
    finite = b.isfinite().all(-1) & a.isfinite().all(-1)
    if not finite[: len(finite) // 2].all():  # the smaller half must not overflow
        return False
    error = (a - b).abs().amax(-1)
    return bool((error <= tolerance * b.abs().amax(-1))[finite].all())
