"""Our place in transformers' experts interface: switched on with the first attached model, off with the last."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from popmm.adapters import UnsupportedModelError
from popmm.compat import ALL_EXPERTS_FUNCTIONS, experts_implementation, set_back_experts
from popmm.runtime.phase import Phase

IMPLEMENTATION = "popmm"  # our name in transformers' experts interface
ON_MODULE = "_popmm_experts"  # where an attached experts module finds its forward


# configurations set to our implementation: (configuration, its former implementation, ids of attached decoders)
_switched: dict[int, tuple] = {}


def popmm_experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Our entry in transformers' experts interface; modules that are not attached run as they did before."""
    forward = module.__dict__.get(ON_MODULE)
    if forward is None:
        return former_implementation(module)(module, hidden_states, top_k_index, top_k_weights)
    return forward(hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, popmm_experts_forward)


def switch_on(decoder: nn.Module) -> None:
    """Sets a model's experts to our implementation. Models may share one configuration."""
    config = decoder.config
    _, _, users = _switched.setdefault(id(config), (config, experts_implementation(config), set()))
    users.add(id(decoder))
    if experts_implementation(config) != IMPLEMENTATION:
        decoder.set_experts_implementation(IMPLEMENTATION)


def switch_off(decoder: nn.Module) -> None:
    """Undoes ``switch_on``, however far it came: the last attached model brings the former implementation back."""
    config = decoder.config
    if id(config) not in _switched:
        return
    _, former, users = _switched[id(config)]
    users.discard(id(decoder))
    if not users:
        if experts_implementation(config) == IMPLEMENTATION:
            set_back_experts(config, former)
        _switched.pop(id(config), None)


def check_switched(decoder: nn.Module) -> None:
    """Refuses to run after somebody else has set the experts implementation of an attached model."""
    name = experts_implementation(decoder.config)
    if name != IMPLEMENTATION:
        raise RuntimeError(
            f"the experts implementation was set to {name!r} while the model was attached: call popmm.detach(model) "
            "first, then set it, then attach again"
        )


def former_implementation(module: nn.Module, decoding: bool = False) -> Callable[..., Tensor]:
    """The function ``(module, x, index, weight)`` that ran a module's experts before attach.

    With ``decoding``, what ``generate`` would switch to for its decode steps.
    """
    original = getattr(type(module).forward, "__wrapped__", None)
    if original is None:
        raise UnsupportedModelError(f"{type(module).__name__} does not use transformers' experts interface")
    entry = _switched.get(id(module.config))
    name = entry[1] if entry else experts_implementation(module.config)
    if name == IMPLEMENTATION:  # a copy of an attached model's configuration
        name = "grouped_mm"
    if decoding and name == "grouped_mm" and module.down_proj.device.type != "cpu":
        name = "batched_mm"
    return ALL_EXPERTS_FUNCTIONS.get_interface(name, original)


def dense_experts(module: nn.Module, phase: Phase) -> Callable[..., Tensor]:
    """Forward of experts that are left dense."""
    prompt, step = former_implementation(module), former_implementation(module, decoding=True)

    def forward(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return (step if phase.decoding else prompt)(module, x, index, weight)

    return forward
