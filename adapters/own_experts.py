"""Stacked experts that their module runs by itself, outside of transformers' experts interface.

Which stack is which, how they lie (gate and up in one, turned, all experts in one matrix), what stands between them and
how the module is called is found by trying: the reading that computes what the module computes is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor, nn

from popmm.method.activations import activate
from popmm.method.expert_linear import falling_experts, routed_output
from popmm.method.ffn import FFNWeights

from .base import FFNSite, UnsupportedModelError
from .between import ARRANGEMENTS, SCALES, TOLERANCE, close
from .dense import INLINE, activations_of
from .forms import arguments_needed, stacked
from .routing import AllWeighted, EachGetsAll, Given, RoutesItself, Routing
from .weights import check_finite, is_machine_failure, why_not_readable

_OTHER_FORM = "register an adapter for this form (entry-point group 'popmm.adapters')"


class Stack(NamedTuple):
    """A parameter that holds a projection of all experts."""

    name: str
    turned: bool  # its rows lie along the last dimension


class StackReading(NamedTuple):
    """One reading of stacks; ``up`` is None if the gate's holds both."""

    n_experts: int
    gate: Stack
    up: Stack | None
    down: Stack
    arrangement: int = 0


def own_experts(module: nn.Module, probe: bool) -> FFNSite | None:
    """The site of experts that a module outside the interface runs, None if it holds none.

    Raises:
        UnsupportedModelError: it holds stacks, and they cannot be pruned.
    """
    names = _stacks(module)
    if not names:
        return None
    kind, held = type(module).__name__, f"holds stacked experts ({', '.join(names)}) outside transformers' interface"
    stacks = {name: module.get_parameter(name) for name in names}
    for name, p in stacks.items():
        reason = "" if p.is_meta and type(p) is nn.Parameter else why_not_readable(p)
        if reason:
            raise UnsupportedModelError(f"{kind} has experts that cannot be read: {name} {reason}")
    readings = list(_readings(module, stacks))
    if not readings:
        raise UnsupportedModelError(f"{kind} {held}, of shapes that are not gate, up and down: {_OTHER_FORM}")
    others = [name for name, _ in _parameters(module, names) if name not in names]
    calls = list(_calls(module, readings[0], stacks, others))
    if not calls:
        beside = f"{', '.join(others)} beside them, " if others else ""
        raise UnsupportedModelError(f"{kind} {held}, {beside}and is called in another way than known: {_OTHER_FORM}")
    combines = [*_own_gates(module), *map(_plain, _activations(module, names))]
    found = _verified(module, stacks, readings, calls, combines) if probe else (readings[0], calls[0], combines[0])
    if found is None:
        raise UnsupportedModelError(
            f"{kind} {held}, and computes something other than down(act(gate(x)) * up(x)): {_OTHER_FORM}"
        )
    reading, routing, combine = found
    n = reading.n_experts
    return FFNSite(
        module=module,
        weights=partial(_views, module, reading),
        combine=combine(reading),
        n_experts=n,
        top_k=n if routing.all_experts else 0,
        routing=routing,
    )


@torch.no_grad()
def verify_caller(site: FFNSite, caller: nn.Module, probe: bool) -> None:
    """Verifies what the caller of experts must keep to, where the experts themselves cannot tell.

    Args:
        probe: run the caller too.

    Raises:
        UnsupportedModelError: tokens come to experts in another way than ``EachGetsAll`` takes for granted.
    """
    if not isinstance(site.routing, EachGetsAll):
        return
    kind, w, seen = type(site.module).__name__, site.weights(), []
    if site.top_k != 1:
        raise UnsupportedModelError(
            f"{kind} is given all tokens for each expert, and {site.top_k} experts count for each token: popmm prunes "
            f"this form for one expert a token"
        )
    if not probe:
        return
    x = _tokens(w.d_model, w.gate)
    handle = site.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        caller(x[None])
    except Exception as error:
        if is_machine_failure(error):
            raise
    finally:
        handle.remove()
    rows = seen[0].view(site.n_experts, -1, w.d_model) if len(seen) == 1 and seen[0].shape[0] else None
    if rows is None or rows.shape[1] != len(x) or bool((rows.ne(0).any(-1).sum(0) > 1).any()):
        raise UnsupportedModelError(
            f"{kind} takes its tokens once for each expert, but {type(caller).__name__} does not give zeros to those "
            f"that a token is not sent to: {_OTHER_FORM}"
        )


def _stacks(module: nn.Module) -> list[str]:
    """Names of the stacks, which may stand in a child if its parent is given routed tokens."""
    if arguments_needed(module) == 3:
        for name, child in module.named_children():
            inner = stacked(child)
            if inner and all(child.get_parameter(own).ndim == 2 for own in inner):
                return [f"{name}.{own}" for own in inner]
    return stacked(module)


def _parameters(module: nn.Module, names: list[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of the module itself, and of the children that hold its stacks."""
    yield from module.named_parameters(recurse=False)
    for child in dict.fromkeys(name.rpartition(".")[0] for name in names if "." in name):
        yield from ((f"{child}.{name}", p) for name, p in module.get_submodule(child).named_parameters())


def _counts(module: nn.Module) -> list[int]:
    """Numbers of experts that a module, or what holds its stacks, tells."""
    parts = (module, *module.children())
    values = [v for part in parts for k, v in vars(part).items() if "expert" in k and type(v) is int]
    return list(dict.fromkeys(v for v in values if v > 1))


def _readings(module: nn.Module, stacks: dict[str, nn.Parameter]) -> Iterator[StackReading]:
    """What the shapes allow, likeliest first."""
    if all(p.ndim == 2 for p in stacks.values()):  # the experts below each other
        rows = next(iter(stacks.values())).shape[0]
        for n in (n for n in _counts(module) if rows % n == 0):
            for gate, up, down in permutations(stacks):
                yield StackReading(n, Stack(gate, False), Stack(up, False), Stack(down, True))
        return
    n = min(p.shape[0] for p in stacks.values())
    for names in permutations(stacks):
        for turned, down_turned in ((False, False), (True, True), (False, True), (True, False)):
            each = [*(Stack(name, turned) for name in names[:-1]), Stack(names[-1], down_turned)]
            shapes = [tuple(_rows(module, stack, n).shape[1:]) for stack in each]
            d_model, d_ff = shapes[-1]
            if len(each) == 3 and shapes[0] == shapes[1] == (d_ff, d_model):
                yield StackReading(n, *each)
            if len(each) == 2 and shapes[0] == (2 * d_ff, d_model):
                for arrangement in range(len(ARRANGEMENTS)):
                    yield StackReading(n, each[0], None, each[1], arrangement)


def _calls(module: nn.Module, reading: StackReading, stacks: dict, others: list[str]) -> Iterator[Routing]:
    """Ways in which the module may be called, by its forward's arguments."""
    n, needed = reading.n_experts, arguments_needed(module)
    handing_on = stacks[reading.gate.name].shape[0] - n if stacks[reading.gate.name].ndim == 3 else 0
    if needed == 3 and not others:
        yield from (Given(n, handing_on, ndim) for ndim in (3, 2))
    if needed == 2 and not others:
        yield AllWeighted(n)
    if needed != 1:
        return
    routers = [child for child in module.children() if type(getattr(child, "top_k", None)) is int]
    d_model = _views(module, reading).d_model
    biases = [name for name in others if getattr(getattr(module, name, None), "shape", ()) == (d_model,)]
    if len(routers) == 1 and others == biases and len(biases) < 2:
        # tried with it first: one that is zero now may not stay so
        yield from (RoutesItself(routers[0], partial(getattr, module, name)) for name in biases)
        yield RoutesItself(routers[0], None)
    elif not others:
        yield EachGetsAll(n)


Combining = Callable[[StackReading], Callable[[Tensor, Tensor], Tensor]]  # from a reading to (gate, up) -> h


def _own_gates(module: nn.Module) -> Iterator[Combining]:
    apply_gate = getattr(module, "_apply_gate", None)
    if apply_gate is not None:

        def combine(reading: StackReading):
            together = ARRANGEMENTS[reading.arrangement][1]
            return lambda gate, up: module._apply_gate(together(gate, up))

        yield combine


def _plain(activation: Callable[[Tensor], Tensor]) -> Combining:
    return lambda reading: partial(activate, activation)


def _activations(module: nn.Module, names: list[str]) -> list[Callable[[Tensor], Tensor]]:
    inner = {name.rpartition(".")[0] for name in names}
    return [act for part in sorted(inner | {""}) for act in activations_of(module.get_submodule(part))] + [*INLINE]


@torch.no_grad()
def _verified(
    module: nn.Module,
    stacks: dict[str, nn.Parameter],
    readings: list[StackReading],
    calls: list[Routing],
    combines: list[Combining],
) -> tuple[StackReading, Routing, Combining] | None:
    """The first that computes what the module does, on tokens whose channels take the sizes of SCALES."""
    check_finite(stacks)
    for routing in calls:
        for reading in readings:
            w = _views(module, reading)
            tolerance = TOLERANCE.get(w.gate.dtype, 1e-4)
            args = routing.trial(*_trial(module, stacks, w))
            try:
                theirs = module(*args)
                routed = routing.read(*args)
            except Exception as error:  # it is called in another way
                if is_machine_failure(error):
                    raise
                continue
            for combine in combines if isinstance(theirs, Tensor) else ():
                try:
                    ours = routing.give(routed_output(w, combine(reading), *routed), *args)
                except Exception as error:  # what a module holds beside its activation may take anything
                    if is_machine_failure(error):
                        raise
                    continue
                if ours.shape == theirs.shape and close(ours, theirs, tolerance):
                    return reading, routing, combine
    return None


def _trial(module: nn.Module, stacks: dict[str, nn.Parameter], w: FFNWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, experts (all that can be named) and weights."""
    x = _tokens(w.d_model, w.gate)
    total, n = max(p.shape[0] if p.ndim == 3 else len(w.gate) for p in stacks.values()), len(x)
    generator = torch.Generator("cpu").manual_seed(1)
    weight = torch.rand(n, 2, generator=generator, dtype=torch.float32, device="cpu") + 0.25
    return x, falling_experts(n, 2, total, x.device), weight.to(x)


def _tokens(d_model: int, gate: Tensor) -> Tensor:
    """Tokens ``[n, d_model]`` whose gates are about as large as SCALES."""
    generator, plain = torch.Generator("cpu").manual_seed(0), dict(dtype=torch.float32, device="cpu")
    size = torch.tensor(SCALES, **plain) / gate[0].float().norm(dim=-1).mean().clamp_min(1e-6).to("cpu")
    return (torch.randn(len(SCALES), d_model, generator=generator, **plain) * size[:, None]).to(gate)


def _rows(module: nn.Module, stack: Stack, n_experts: int) -> Tensor:
    """``[n_experts, out, in]``."""
    w = module.get_parameter(stack.name)
    if w.ndim == 2:
        w = w.view(n_experts, -1, w.shape[-1])
    elif len(w) > n_experts:
        w = w[:n_experts]  # else the parameter itself, which may be stored by channel in its place
    return w.mT if stack.turned else w


def _views(module: nn.Module, reading: StackReading) -> FFNWeights:
    n = reading.n_experts
    gate, down = _rows(module, reading.gate, n), _rows(module, reading.down, n)
    if reading.up is not None:
        return FFNWeights(gate, _rows(module, reading.up, n), down)
    gate, up = (half.transpose(0, 1) for half in ARRANGEMENTS[reading.arrangement][0](gate.transpose(0, 1)))
    return FFNWeights(gate, up, down)
